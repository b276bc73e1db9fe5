"""Convert a model to grouped-query attention and recover it: data, wrap, initialise, train, merge, save, push.

    python recipes/recover.py --config recipes/configs/llama2_7b.yaml
    python recipes/recover.py --config recipes/configs/tiny.yaml --num_key_value_heads 8 --max_steps 20

Every key of the YAML file is an option and can be overridden on the command line; those of TRL's SFTConfig
(learning_rate, max_length, packing, ...) are options too. Under `accelerate launch` every process runs this script.
The result lies in `output_dir`: `adapter/`, `plain/` (merged), `initialization.json`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import merge_and_push
import torch
from datasets import Dataset, load_dataset
from folders import check_writable
from peft import get_peft_model, prepare_model_for_kbit_training
from reporting import print_report
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, set_seed
from trl import SFTConfig, TrlParser

from asymgqa_peft import AsymGQAConfig, AsymGQATrainer, initialize_asymgqa_weights
from asymgqa_peft.evaluate import kv_cache_bytes_per_token, perplexity
from asymgqa_peft.hub import check_push_target, push_adapter_to_hub


@dataclass
class ConversionArguments:
    """What is converted, how, and where it goes."""

    model_name_or_path: str = field(metadata={"help": "Base model: folder or Hub id."})
    dataset: str = field(
        metadata={"help": "Training text: a .txt, .json or .jsonl file, or a Hub id[:configuration]."}
    )
    num_key_value_heads: int = field(metadata={"help": "G, shared K/V heads per layer."})
    dataset_split: str = field(
        default="train", metadata={"help": "Split of the data set; its last rows are held out."}
    )
    held_out_fraction: float = field(default=0.01, metadata={"help": "Share of the data kept for the final numbers."})
    grouping: str = field(default="asymmetric", metadata={"help": "neighbour, random, symmetric or asymmetric."})
    criterion: str = field(default="residual", metadata={"help": "cosine or residual."})
    merge: str = field(default="principal", metadata={"help": "mean, aligned or principal."})
    max_group_size: int | None = field(default=None, metadata={"help": "Largest group, in the base's KV heads."})
    refit_output: bool = field(default=True, metadata={"help": "Start o_proj's LoRA from a least-squares fit."})
    lora_r: int = field(default=32, metadata={"help": "LoRA rank."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA alpha."})
    calibration_tokens: int = field(default=131_072, metadata={"help": "Tokens read by the initialisation."})
    calibration_batch_size: int = field(default=4, metadata={"help": "Sequences per calibration batch."})
    load_in_4bit: bool = field(default=False, metadata={"help": "QLoRA-style: base in 4 bits (bitsandbytes)."})
    distillation_weight: float = field(default=1.0, metadata={"help": "1: learn from the base only; 0: plain SFT."})
    temperature: float = field(default=1.0, metadata={"help": "Distillation temperature."})
    kv_learning_rate_scale: float = field(default=0.5, metadata={"help": "Shared K/V learning rate, times LoRA's."})
    save_plain: bool = field(default=True, metadata={"help": "Also merge and save a plain checkpoint."})
    hub_adapter_id: str | None = field(default=None, metadata={"help": "Push the adapter to this private repository."})
    hub_merged_id: str | None = field(default=None, metadata={"help": "Push the merged model to this repository."})


@dataclass(frozen=True)
class Data:
    """Training rows, and token blocks (N, T) for calibration and for the final numbers."""

    train: Dataset
    calibration: torch.Tensor
    held_out: torch.Tensor


def main(arguments: list[str] | None = None) -> None:
    args, training = TrlParser((ConversionArguments, SFTConfig)).parse_args_and_config(arguments)
    output = check_writable(training.output_dir)
    for repo_id in filter(None, (args.hub_adapter_id, args.hub_merged_id)):
        check_push_target(repo_id)
    set_seed(training.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    data = load_data(args, training, tokenizer)
    model = get_peft_model(load_base(args, training), adapter_config(args, training))
    if training.process_index == 0:
        model.print_trainable_parameters()

    batches = data.calibration.split(args.calibration_batch_size)
    report = initialize_asymgqa_weights(model, batches, progress=training.process_index == 0)
    held_out = data.held_out.split(args.calibration_batch_size)
    with model.disable_adapter():
        base_perplexity = perplexity(model, held_out)
    initial_perplexity = perplexity(model, held_out)

    trainer = AsymGQATrainer(
        model=model,
        args=training,
        train_dataset=data.train,
        processing_class=tokenizer,
        distillation_weight=args.distillation_weight,
        temperature=args.temperature,
        kv_learning_rate_scale=args.kv_learning_rate_scale,
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model(str(output / "adapter"))
    recovered_perplexity = perplexity(model, held_out)
    if not trainer.is_world_process_zero():
        return
    numbers = {"base": base_perplexity, "initialised": initial_perplexity, "recovered": recovered_perplexity}
    rows = [{"model": name, "held-out perplexity": value} for name, value in numbers.items()]
    for row in rows:
        shrunk = row["model"] != "base"
        row["KV bytes/token"] = kv_cache_bytes_per_token(model if shrunk else model.config, torch.bfloat16)
    report.save(output / "initialization.json")
    (output / "evaluation.json").write_text(json.dumps(rows, indent=1) + "\n")
    if args.hub_adapter_id:
        data = {"calibration_data": args.dataset, "recovery_data": args.dataset}
        push_adapter_to_hub(model, tokenizer, args.hub_adapter_id, report=report, evaluation=rows, **data)
    print_report(rows, device=next(model.parameters()).device, arguments=vars(args))
    del model, trainer  # the merge loads the base afresh: a 4-bit one could not hold the new heads
    if args.save_plain or args.hub_merged_id:
        merge_and_push.main(merge_options(args, output))


def merge_options(args: ConversionArguments, output: Path) -> list[str]:
    """Command line of merge_and_push.py for what was just trained."""
    options = [str(output / "adapter"), "--output", str(output / "plain"), "--overwrite"]
    options += ["--report", str(output / "initialization.json"), "--evaluation", str(output / "evaluation.json")]
    options += ["--calibration-data", args.dataset, "--recovery-data", args.dataset]
    if args.load_in_4bit:
        options += ["--dtype", "bfloat16"]
    return options + (["--push", args.hub_merged_id] if args.hub_merged_id else [])


def load_base(args: ConversionArguments, training: SFTConfig) -> torch.nn.Module:
    """The base in the dtype it was saved in, or in 4 bits; on the accelerator if there is one."""
    if not args.load_in_4bit:
        model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, dtype="auto")
        return model.to(training.device)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = AutoModelForCausalLM.from_pretrained(
        args.model_name_or_path, quantization_config=quantization, device_map={"": training.device}
    )
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=training.gradient_checkpointing)


def adapter_config(args: ConversionArguments, training: SFTConfig) -> AsymGQAConfig:
    return AsymGQAConfig(
        num_key_value_heads=args.num_key_value_heads,
        grouping=args.grouping,
        criterion=args.criterion,
        merge=args.merge,
        max_group_size=args.max_group_size,
        refit_output=args.refit_output,
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        seed=training.seed,
        task_type="CAUSAL_LM",
    )


def load_data(args: ConversionArguments, training: SFTConfig, tokenizer) -> Data:
    """Read the data set once; the last rows are held out, calibration reads the first."""
    if args.dataset.endswith(".txt"):
        text = Path(args.dataset).read_text(encoding="utf-8")
        blocks = into_blocks([tokenizer(text).input_ids], training.max_length)
        rows = Dataset.from_dict({"input_ids": blocks.tolist()})
    else:
        rows = read_rows(args.dataset, args.dataset_split)
    held_out = max(1, int(len(rows) * args.held_out_fraction))
    if held_out >= len(rows):
        raise ValueError(f"dataset={args.dataset!r} has {len(rows)} rows: too few to hold one out and train.")
    kept, rest = rows.select(range(len(rows) - held_out)), rows.select(range(len(rows) - held_out, len(rows)))
    wanted = args.calibration_tokens // training.max_length
    calibration = into_blocks(tokens_of(kept, training, tokenizer), training.max_length, wanted)
    return Data(kept, calibration, into_blocks(tokens_of(rest, training, tokenizer), training.max_length, wanted))


def read_rows(name: str, split: str) -> Dataset:
    if name.endswith((".json", ".jsonl")):
        return load_dataset("json", data_files=name, split=split)
    path, _, configuration = name.partition(":")
    return load_dataset(path, configuration or None, split=split)


def tokens_of(rows: Dataset, training: SFTConfig, tokenizer) -> Iterator[list[int]]:
    """Token ids of each row, closed by the end-of-text token."""
    for row in rows:
        if "input_ids" in row:
            yield row["input_ids"]
        elif "messages" in row:
            yield tokenizer(tokenizer.apply_chat_template(row["messages"], tokenize=False)).input_ids
        else:
            yield [*tokenizer(row[training.dataset_text_field]).input_ids, tokenizer.eos_token_id]


def into_blocks(documents: Iterable[list[int]], size: int, count: int | None = None) -> torch.Tensor:
    """Concatenate documents and cut (N, size) blocks, `count` at most."""
    tokens: list[int] = []
    for document in documents:
        tokens += document
        if count is not None and len(tokens) >= count * size:
            break
    blocks = torch.tensor(tokens[: len(tokens) // size * size]).view(-1, size)
    if len(blocks) == 0:
        raise ValueError(f"dataset holds {len(tokens)} tokens, less than one sequence of max_length={size}.")
    return blocks[:count]


if __name__ == "__main__":
    main()
