"""Convert a model to grouped-query attention and recover it: data, wrap, initialise, train, merge, save, push.

    python recipes/recover.py --config recipes/configs/llama2_7b.yaml
    python recipes/recover.py --config recipes/configs/tiny.yaml --num_key_value_heads 8 --max_steps 20
    python recipes/recover.py --config recipes/configs/llama2_7b.yaml --resume_from_checkpoint true
    accelerate launch --config_file recipes/configs/accelerate/fsdp2.yaml recipes/recover.py --config ...

Every key of the YAML file is an option and can be overridden on the command line; those of TRL's SFTConfig
(learning_rate, max_length, packing, ...) are options too. Under `accelerate launch` every process runs this script.
The result lies in `output_dir`: `adapter/`, `plain/` (merged), `initialization.json`, `evaluation.json`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate.utils import parse_flag_from_env
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from peft import PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.utils import CONFIG_NAME
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, set_seed
from transformers.integrations import is_fsdp_enabled, unset_hf_deepspeed_config
from trl import SFTConfig, TrlParser

from asymgqa_peft import AsymGQAConfig, AsymGQATrainer, InitializationReport, initialize_asymgqa_weights
from asymgqa_peft.attention import register_grouped_sdpa
from asymgqa_peft.estimates import (
    SINGLE,
    Sizes,
    evaluation_need,
    free_memory,
    initialization_need,
    recovery_need,
)
from asymgqa_peft.evaluate import kv_cache_bytes_per_token, perplexity
from asymgqa_peft.files import save_json
from asymgqa_peft.hub import check_push_target
from asymgqa_peft.mistakes import in_one_line, message_of, model_called
from recipes import merge_and_push
from recipes.checkpoints import checkpoint_bytes, checkpoint_to_resume, held_bytes, is_finished
from recipes.folders import check_space, check_writable, replacing
from recipes.inputs import load_tokenizer
from recipes.reporting import print_report


@dataclass
class ConversionArguments:
    """What is converted, how, and where it goes."""

    model_name_or_path: str = field(metadata={"help": "Base model: folder or Hub id."})
    dataset: str = field(
        metadata={"help": "Training text: a .txt, .json or .jsonl file, or a Hub id[:configuration]."}
    )
    num_key_value_heads: int = field(metadata={"help": "G, shared K/V heads per layer."})
    head_dim: int | None = field(default=None, metadata={"help": "Width of a shared head; default: the base's."})
    adapter: str | None = field(
        default=None, metadata={"help": "Folder of an initialised adapter to train, with its initialization.json."}
    )
    dataset_split: str = field(
        default="train", metadata={"help": "Split of the data set; its last rows are held out."}
    )
    held_out_fraction: float = field(default=0.01, metadata={"help": "Share of the data kept for the final numbers."})
    grouping: str = field(default="asymmetric", metadata={"help": "neighbour, random, symmetric or asymmetric."})
    criterion: str = field(default="residual", metadata={"help": "cosine or residual."})
    merge: str = field(default="principal", metadata={"help": "mean, aligned or principal."})
    max_group_size: int | None = field(default=None, metadata={"help": "Largest group, in the base's KV heads."})
    refit_output: bool = field(
        default=False,
        metadata={"help": "Start o_proj's LoRA from a least-squares fit: better untrained, worse after a recovery."},
    )
    fit_steps: int = field(
        default=0, metadata={"help": "Gradient steps per layer, each on a calibration batch, that fit shared heads."}
    )
    lora_r: int = field(default=32, metadata={"help": "LoRA rank."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA alpha."})
    calibration_tokens: int = field(default=131_072, metadata={"help": "Tokens read by the initialisation."})
    calibration_batch_size: int = field(default=4, metadata={"help": "Sequences per calibration batch."})
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "Attention of the training, default sdpa that knows packed rows; plain/ is free."},
    )
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


Start = tuple[PeftModel, InitializationReport, list[dict]]
"""An adapter ready to be trained, how it was initialised, and what it and its base were measured at."""
FILES = (".txt", ".json", ".jsonl")
INITIALIZATION, EVALUATION = "initialization.json", "evaluation.json"


def main(arguments: list[str] | None = None) -> None:
    args, training = parse_options(arguments)
    # Else ZeRO-3 would shard, on loading, weights that the initialisation has to read.
    unset_hf_deepspeed_config()
    output = check_writable(training.output_dir)
    check_hub_targets(args)
    check_dataset(args.dataset)
    check_adapter(args, training)
    # One process renames half-written checkpoints before the others look.
    with training.main_process_first(local=False, desc="choosing the checkpoint"):
        checkpoint = checkpoint_to_resume(training)
    # Here a base is found out that does not exist, or that the options do not fit.
    with in_one_line(model_called(args.model_name_or_path)):
        empty = empty_model(args, training)
        needed = bytes_to_write(empty, args, training)
        check_memory(empty, args, training, initialises=checkpoint is None and args.adapter is None)
    tokenizer = load_tokenizer(args.model_name_or_path)
    check_space(
        output,
        needed - held_bytes(output),
        "adapter, checkpoints, plain checkpoint",
        "choose another --output_dir, lower --save_total_limit or set --save_plain false",
    )
    # LoRA starts at random.
    set_seed(training.seed)
    # On return no model is left: the merge loads the base afresh, since a 4-bit or sharded one could not hold the
    # new heads.
    rows = recover(args, training, tokenizer, checkpoint, output)
    leave_process_group(training)
    if training.process_index == 0:
        save_json(output / EVALUATION, rows)
        print_report(rows, device=training.device, arguments=vars(args))
        publish(args, output)
        print(f"The adapter lies in {output / 'adapter'}, all numbers beside it.")


def recover(
    args: ConversionArguments, training: SFTConfig, tokenizer, checkpoint: Path | None, output: Path
) -> list[dict]:
    """Make the adapter or load the checkpoint's, train it, save it in `output`; rows of the evaluation."""
    with training.main_process_first(desc="reading the data"), in_one_line(f"dataset={args.dataset!r}"):
        data = load_data(args, training, tokenizer)
    if checkpoint:
        model, report, rows = resume(checkpoint, args, training)
    elif args.adapter:
        # Base and initialised model are not measured: one GPU may not hold them.
        model, rows = load_initialised(Path(args.adapter), args, training), []
        report = InitializationReport.load(Path(args.adapter) / INITIALIZATION)
    else:
        model, report, rows = initialise(args, training, data)
    # Read off before the model is sharded.
    size = kv_cache_bytes_per_token(model, model.config.dtype or torch.float32)
    if training.process_index == 0:
        report.save(output / INITIALIZATION)
        save_json(output / EVALUATION, rows)
        model.print_trainable_parameters()
    if checkpoint and is_finished(checkpoint, training):
        save_loaded(model, tokenizer, output / "adapter", training)
    else:
        trainer = train(model, tokenizer, data.train, checkpoint, args, training)
        save_trained(trainer, output / "adapter", training)
        # The model may be sharded by now.
        model = trainer.model
    recovered = perplexity(model, data.held_out.split(args.calibration_batch_size))
    rows.append({"model": "recovered", "held-out perplexity": recovered, "KV bytes/token": size})
    return rows


def parse_options(arguments: list[str] | None) -> tuple[ConversionArguments, SFTConfig]:
    """Of the command line and its --config; exits in one line where they are wrong or this machine cannot do it."""
    with in_one_line("options"):
        try:
            args, training = TrlParser((ConversionArguments, SFTConfig)).parse_args_and_config(arguments)
        except ValueError as error:
            if "bf16/gpu" not in str(error):
                raise
            raise ValueError("bf16 needs a GPU that has it; on a CPU add --bf16 false --use_cpu true.") from error
    if args.load_in_4bit and find_spec("bitsandbytes") is None:
        raise SystemExit("load_in_4bit needs bitsandbytes: pip install -e '.[quant]'")
    if training.n_gpu > 1:
        raise SystemExit(
            f"{training.n_gpu} GPUs are visible to one process: start with `accelerate launch` or `torchrun`, or make "
            "one visible (CUDA_VISIBLE_DEVICES=0)."
        )
    return args, training


def check_hub_targets(args: ConversionArguments) -> None:
    """Find out before any work whether the pushes at the end can succeed."""
    if args.hub_adapter_id and Path(args.model_name_or_path).exists():
        raise SystemExit(
            f"hub_adapter_id={args.hub_adapter_id!r}: nobody could load the adapter, its base "
            f"{args.model_name_or_path!r} is a folder of yours. Give the base by its Hub id, or push later with "
            "merge_and_push.py --adapter-only --base-model OWNER/NAME."
        )
    for repo_id in (args.hub_adapter_id, args.hub_merged_id):
        if repo_id:
            with in_one_line(f"pushing to {repo_id}"):
                check_push_target(repo_id)


def check_dataset(name: str) -> None:
    """Find out before any work whether a file that `dataset` names can be read; Hub ids are left to `datasets`."""
    path = Path(name)
    if path.suffix in FILES and not path.is_file():
        raise SystemExit(f"dataset={name!r}: no such file. Give a file of yours with --dataset, or a Hub id.")
    if path.suffix not in FILES and path.is_file():
        raise SystemExit(f"dataset={name!r}: files are read as {', '.join(FILES)}; rename plain text to .txt.")


def check_adapter(args: ConversionArguments, training: SFTConfig) -> None:
    """Find out before any work whether the folder that `adapter` names holds one that was initialised."""
    if args.adapter is None:
        return
    folder = Path(args.adapter)
    for name in (CONFIG_NAME, INITIALIZATION):
        if not (folder / name).is_file():
            raise SystemExit(
                f"adapter={args.adapter!r} has no {name}: save it with model.save_pretrained(folder), and what "
                f'initialize_asymgqa_weights returned with report.save(folder + "/{INITIALIZATION}").'
            )
    check_same_options(folder, args, training)


def empty_model(args: ConversionArguments, training: SFTConfig) -> PeftModel:
    """The base with an adapter, without weights; from the base's configuration alone."""
    config = AutoConfig.from_pretrained(args.model_name_or_path)
    if training.max_length > config.max_position_embeddings:
        raise ValueError(
            f"max_length={training.max_length} is more than the {config.max_position_embeddings} tokens that it "
            "takes: lower --max_length."
        )
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
        return get_peft_model(base, adapter_config(args, training), low_cpu_mem_usage=True)


def bytes_to_write(model: PeftModel, args: ConversionArguments, training: SFTConfig) -> int:
    """What the run will have on disk at its fullest moment, from its `empty_model`."""
    trained, parameters = model.get_nb_trainable_parameters()
    needed = 4 * trained + checkpoint_bytes(training, trained)
    if args.hub_adapter_id:
        # The copy that is pushed.
        needed += 4 * trained
    if args.save_plain or args.hub_merged_id:
        dtype = model.config.dtype or torch.float32
        if args.load_in_4bit:
            dtype = torch.bfloat16
        needed += dtype.itemsize * (parameters - trained)
    return needed


def check_memory(model: PeftModel, args: ConversionArguments, training: SFTConfig, initialises: bool) -> None:
    """Raise ValueError if what is to come certainly does not fit, and warn where it may not; no weights are read.

    Of a base in main memory only what comes beyond its weights counts: these are pages of their files. What FSDP or
    DeepSpeed shard is not estimated; the merge is written layer by layer.
    """
    device = training.device
    trained, _ = model.get_nb_trainable_parameters()
    sizes = Sizes.of(model.get_base_model(), args.head_dim)
    held, weights = sizes.in_4bit() if args.load_in_4bit else (sizes, sizes.weights)
    adapter, on_gpu = SINGLE * trained, device.type == "cuda"
    before = adapter + weights if on_gpu else adapter
    needs = []
    if initialises:
        batch = args.calibration_batch_size * training.max_length
        tokens = max(batch, args.calibration_tokens // training.world_size)
        gpu_free = free_memory(device) - before if on_gpu else None
        need = initialization_need(held, trained, tokens, batch, args.refit_output, gpu_free)
        remedies = "lower --calibration_tokens or --calibration_batch_size"
        needs.append(("The initialisation", need, remedies))
        needs.append(("The evaluation", evaluation_need(held, batch), "lower --calibration_batch_size"))
    if not (uses_fsdp() or training.deepspeed):
        need = recovery_need(
            held,
            trained,
            tokens=training.per_device_train_batch_size * training.max_length,
            checkpointing=training.gradient_checkpointing,
            autocast=training.bf16 or training.fp16,
            accumulates=training.gradient_accumulation_steps > 1,
            on_gpu=on_gpu,
        )
        remedies = "lower --per_device_train_batch_size (and raise --gradient_accumulation_steps) or --lora_r"
        if not training.gradient_checkpointing:
            remedies = f"set --gradient_checkpointing true, or {remedies}"
        needs.append(("The recovery", need, remedies))
    for what, need, remedies in needs:
        if on_gpu and not args.load_in_4bit:
            remedies += ", or set --load_in_4bit true"
        if reason := replace(need, device=need.device + before).lack(what, device, remedies):
            raise ValueError(reason)


def initialise(args: ConversionArguments, training: SFTConfig, data: Data) -> Start:
    """Wrap the base and initialise the adapter; each process reads its share of the calibration data."""
    model = get_peft_model(load_base(args, training), adapter_config(args, training))
    # The ranks' statistics are summed: together they read all batches once.
    batches = data.calibration.split(args.calibration_batch_size)[training.process_index :: training.world_size]
    with in_one_line(f"initialisation on dataset={args.dataset!r}"):
        report = initialize_asymgqa_weights(model, batches, progress=training.process_index == 0)
    held_out = data.held_out.split(args.calibration_batch_size)
    with model.disable_adapter():
        before = perplexity(model, held_out)
    rows = []
    # The base's configuration knows all its heads, the wrapped model those that it shares.
    for name, cached, value in (("base", model.config, before), ("initialised", model, perplexity(model, held_out))):
        size = kv_cache_bytes_per_token(cached, model.config.dtype or torch.float32)
        rows.append({"model": name, "held-out perplexity": value, "KV bytes/token": size})
    return model, report, rows


def resume(checkpoint: Path, args: ConversionArguments, training: SFTConfig) -> Start:
    """Wrap the base with the checkpoint's adapter, which holds the groups: nothing is initialised again."""
    run = checkpoint.parent
    missing = [name for name in (INITIALIZATION, EVALUATION) if not (run / name).is_file()]
    if missing:
        raise SystemExit(f"{run} lacks {', '.join(missing)}: {checkpoint.name} is not of this recipe.")
    check_same_options(checkpoint, args, training)
    model = load_initialised(checkpoint, args, training)
    # A run that was killed after its end has the recovered model's row, which is measured anew.
    rows = [row for row in json.loads((run / EVALUATION).read_text(encoding="utf-8")) if row["model"] != "recovered"]
    return model, InitializationReport.load(run / INITIALIZATION), rows


def load_initialised(folder: Path, args: ConversionArguments, training: SFTConfig) -> PeftModel:
    """Wrap the base with an adapter that holds its groups and shared heads, to be trained."""
    return PeftModel.from_pretrained(load_base(args, training), folder, is_trainable=True)


def check_same_options(folder: Path, args: ConversionArguments, training: SFTConfig) -> None:
    """Exit unless an adapter was made with the options of this run."""
    saved, wanted = PeftConfig.from_pretrained(folder), adapter_config(args, training)
    for name in (
        "num_key_value_heads",
        "head_dim",
        "grouping",
        "criterion",
        "merge",
        "max_group_size",
        "r",
        "lora_alpha",
    ):
        before, now = getattr(saved, name, None), getattr(wanted, name)
        if before != now:
            raise SystemExit(
                f"{folder} was made with {name}={before!r}, now it is {now!r}: set it back, or start anew in another "
                "--output_dir."
            )


def train(
    model: PeftModel, tokenizer, rows: Dataset, checkpoint: Path | None, args: ConversionArguments, training: SFTConfig
) -> AsymGQATrainer:
    """Recover, from the beginning or from the checkpoint on."""
    trainer = AsymGQATrainer(
        model=model,
        args=training,
        train_dataset=rows,
        processing_class=tokenizer,
        distillation_weight=args.distillation_weight,
        temperature=args.temperature,
        kv_learning_rate_scale=args.kv_learning_rate_scale,
    )
    if trainer.is_fsdp_enabled:
        # Else neither checkpoints nor save_model would hold the adapter.
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    return trainer


def save_trained(trainer: AsymGQATrainer, folder: Path, training: SFTConfig) -> None:
    """Save the adapter, whole or not at all. Every process gives its part of the weights, the first one writes."""
    if training.process_index != 0:
        trainer.save_model(str(folder))
        return
    with replacing(folder, overwrite=True) as beside:
        trainer.save_model(str(beside))
        # A pickle, and the checkpoints have it.
        (beside / "training_args.bin").unlink(missing_ok=True)


def save_loaded(model: PeftModel, tokenizer, folder: Path, training: SFTConfig) -> None:
    """Save the adapter of the last checkpoint, after which nothing was trained: every process holds it whole."""
    if training.process_index == 0:
        with replacing(folder, overwrite=True) as beside:
            model.save_pretrained(beside)
            tokenizer.save_pretrained(beside)


def leave_process_group(training: SFTConfig) -> None:
    """End the work of many processes: the first one alone goes on, and others would wait for it until a timeout."""
    training.distributed_state.wait_for_everyone()
    unset_hf_deepspeed_config()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def publish(args: ConversionArguments, output: Path) -> None:
    """Push the adapter, merge, push the merged model: what of it was asked for."""
    described = merge_and_push.Options(
        adapter=str(output / "adapter"),
        output=output / "plain",
        overwrite=True,
        report=output / INITIALIZATION,
        evaluation=output / EVALUATION,
        calibration_data=args.dataset,
        recovery_data=args.dataset,
    )
    if args.hub_adapter_id:
        copy = output / "pushed_adapter"
        merge_and_push.publish(replace(described, output=copy, adapter_only=True, push=args.hub_adapter_id))
    if args.save_plain or args.hub_merged_id:
        # A 4-bit base is merged in the dtype that its adapter was trained in.
        dtype = "bfloat16" if args.load_in_4bit else described.dtype
        merge_and_push.publish(replace(described, dtype=dtype, push=args.hub_merged_id))


def uses_fsdp() -> bool:
    """Whether `accelerate launch` was told to shard the model; transformers' function asks for more."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP")


def load_base(args: ConversionArguments, training: SFTConfig) -> torch.nn.Module:
    """The base in the dtype it was saved in, or in 4 bits; whole, on each process's accelerator if there is one.

    In main memory where FSDP takes its shards from there and nothing is initialised before.
    """
    if is_fsdp_enabled():
        raise SystemExit(
            "The initialisation needs the weights on every process: set fsdp_cpu_ram_efficient_loading: false in the "
            "launch configuration."
        )
    if not args.load_in_4bit:
        model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, dtype="auto")
        if args.adapter is None or not uses_fsdp():
            model = model.to(training.device)
        return with_attention(model, args.attn_implementation)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = AutoModelForCausalLM.from_pretrained(
        args.model_name_or_path, quantization_config=quantization, device_map={"": training.device}
    )
    # Norms in float32, gradients to the inputs: what PEFT advises for a quantised base.
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=training.gradient_checkpointing)
    return with_attention(model, args.attn_implementation)


def with_attention(model: torch.nn.Module, implementation: str | None) -> torch.nn.Module:
    """The model with that attention; None replaces sdpa by one that has no mask for packed documents to read."""
    if implementation is None and model.config._attn_implementation == "sdpa":
        register_grouped_sdpa()
        implementation = "grouped_sdpa"
    if implementation is not None:
        model.set_attn_implementation(implementation)
    return model


def adapter_config(args: ConversionArguments, training: SFTConfig) -> AsymGQAConfig:
    return AsymGQAConfig(
        num_key_value_heads=args.num_key_value_heads,
        head_dim=args.head_dim,
        grouping=args.grouping,
        criterion=args.criterion,
        merge=args.merge,
        max_group_size=args.max_group_size,
        refit_output=args.refit_output,
        fit_steps=args.fit_steps,
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
        check_columns(rows, training, tokenizer)
    held_out = max(1, int(len(rows) * args.held_out_fraction))
    if held_out >= len(rows):
        raise ValueError(
            f"{len(rows)} rows, or sequences of max_length={training.max_length} tokens, are too few to hold one out "
            "and train: give more text, or lower --max_length."
        )
    # The last rows are held out: calibration and training never see them.
    kept, rest = rows.select(range(len(rows) - held_out)), rows.select(range(len(rows) - held_out, len(rows)))
    wanted = args.calibration_tokens // training.max_length
    calibration = into_blocks(tokens_of(kept, training, tokenizer), training.max_length, wanted)
    return Data(kept, calibration, into_blocks(tokens_of(rest, training, tokenizer), training.max_length, wanted))


def read_rows(name: str, split: str) -> Dataset:
    path, _, configuration = name.partition(":")
    options = {"path": path, "name": configuration or None}
    if name.endswith((".json", ".jsonl")):
        options = {"path": "json", "data_files": name}
    try:
        return load_dataset(**options, split=split)
    except DatasetGenerationError as error:
        raise ValueError(message_of(error.__cause__ or error)) from error


def check_columns(rows: Dataset, training: SFTConfig, tokenizer) -> None:
    """Raise ValueError unless TRL and `tokens_of` know where the text is, and how chats are written."""
    columns = set(rows.column_names)
    known = {"input_ids", "messages", training.dataset_text_field} & columns
    if not known and not {"prompt", "completion"} <= columns:
        raise ValueError(
            f"of its columns {sorted(columns)} none is known: name that of the text with --dataset_text_field, or "
            "call them messages (chats), or prompt and completion."
        )
    is_chat = "messages" in columns or ("prompt" in columns and not isinstance(rows[0]["prompt"], str))
    if "input_ids" not in columns and is_chat and tokenizer.chat_template is None:
        raise ValueError(
            "it holds chats, and the base's tokenizer has no chat template: take the instruction-tuned model's "
            "tokenizer files, or text."
        )


def tokens_of(rows: Dataset, training: SFTConfig, tokenizer) -> Iterator[list[int]]:
    """Token ids of each row; a text is closed by the end-of-text token."""
    for row in rows:
        if "input_ids" in row:
            yield row["input_ids"]
            continue
        text = row.get("messages") or row.get(training.dataset_text_field)
        if text is None:
            # Two strings, or two lists of messages.
            text = row["prompt"] + row["completion"]
        if isinstance(text, str):
            yield [*tokenizer(text).input_ids, tokenizer.eos_token_id]
        else:
            yield tokenizer(tokenizer.apply_chat_template(text, tokenize=False)).input_ids


def into_blocks(documents: Iterable[list[int]], size: int, count: int | None = None) -> torch.Tensor:
    """Concatenate documents and cut (N, size) blocks, `count` at most."""
    tokens: list[int] = []
    for document in documents:
        # Stops as soon as there are enough: a large data set is not tokenised whole.
        tokens += document
        if count is not None and len(tokens) >= count * size:
            break
    blocks = torch.tensor(tokens[: len(tokens) // size * size]).view(-1, size)
    if len(blocks) == 0:
        raise ValueError(
            f"{len(tokens)} tokens are less than one sequence of max_length={size}: give more text, or lower "
            "--max_length."
        )
    return blocks[:count]


if __name__ == "__main__":
    main()
