r"""How fast recovery trains: tokens a second, share of the matrix ceiling and memory, beside plain SFT and plain LoRA.

    python recipes/benchmarks/recovery_speed.py --device cuda                                    # Llama-2-7B, 32 -> 8
    python recipes/benchmarks/recovery_speed.py --device cuda --compile --batch 8
    python recipes/benchmarks/recovery_speed.py --device cuda --documents 700                        # packed documents
    python recipes/benchmarks/recovery_speed.py --device cuda --load-in-4bit --batch 1 --memory 24
    python recipes/benchmarks/recovery_speed.py --device cuda --hidden 2048 --layers 16 --vocab 128256
    python recipes/benchmarks/recovery_speed.py --device cpu --hidden 128 --layers 2 --vocab 4096 --length 128

Every arm trains a model of true shape with random weights on random tokens, in a process of its own, with the options
of the recipes (bf16, gradient checkpointing, LoRA on all linear layers). FLOPs are those that the arm cannot avoid:
matrix products of the teacher, the student's forward, its recomputation and its backward, attention counted causally.
Their share is of the rate of large bf16 products, measured in the same run. Memory is what PyTorch allocated at most
on CUDA after warming up, the process's peak on a CPU. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, TrainerCallback

from asymgqa_peft import AsymGQAConfig
from asymgqa_peft.attention import register_grouped_sdpa
from asymgqa_peft.initialize.walk import peak_memory
from asymgqa_peft.tables import markdown_table
from recipes.benchmarks import shapes
from recipes.reporting import provenance

REPOSITORY = Path(__file__).resolve().parents[2]
LIMITS = {"share of the ceiling": 0.45, "x SFT's time": 1.45, "x SFT's memory": 1.15}
TOKENS = 100e6
"""Of a recovery as the recipes do it."""


@dataclass(frozen=True)
class Arm:
    """A trainer on an adapter; `distillation_weight` None is SFTTrainer."""

    adapter: str
    distillation_weight: float | None


ARMS = {
    "LoRA, SFT": Arm("lora", None),
    "AsymGQA, SFT": Arm("asymgqa", None),
    "AsymGQA, distilled": Arm("asymgqa", 1.0),
}
BASELINE, TARGET = "AsymGQA, SFT", "AsymGQA, distilled"


def main(arguments: list[str] | None = None) -> dict:
    """Run every arm; print the table and the JSON line."""
    args = parse_args(arguments)
    register_grouped_sdpa()
    if args.arm:
        result = measure(args)
        print(json.dumps(result), flush=True)
        return result
    if arguments is None:
        arguments = sys.argv[1:]
    limits = shapes.ceilings(args.device)
    ceiling = limits.get("bfloat16 TFLOP/s", limits["float32 TFLOP/s"])
    arms = {}
    for arm in args.arms:
        arms[arm] = run_in_subprocess(arm, arguments)
        print(f"{arm}: {arms[arm]}", flush=True)
    rows = table(args, arms, ceiling)
    print(markdown_table(rows, aligned=True))
    result = {"rows": rows, "arms": arms, "ceilings": limits, "checks": {}, "options": vars(args)}
    if {BASELINE, TARGET} <= arms.keys():
        result["checks"] = checks(rows, args)
        shapes.print_checks(result["checks"])
    print(json.dumps({**result, **provenance(args.device)}))
    return result


def run_in_subprocess(arm: str, arguments: list[str]) -> dict:
    """Measure one arm in a fresh process: no caches, no fragments and no peak of the arm before."""
    command = [sys.executable, "-m", "recipes.benchmarks.recovery_speed", *arguments, "--arm", arm]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    if process.returncode != 0:
        raise SystemExit(f"{arm} failed, its error is above; the command was: {' '.join(command)}")
    return json.loads(process.stdout.splitlines()[-1])


# ------------------------------------------------------------------------------------------------------ one arm


def measure(args: argparse.Namespace) -> dict:
    """Train one arm; median seconds of the timed steps, peak bytes, first and last loss."""
    torch.manual_seed(0)
    if args.device == "cpu":
        # More threads would make the times of a busy machine swing.
        torch.set_num_threads(1)
    elif args.memory:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(args.memory * 2**30 / total)
    with tempfile.TemporaryDirectory() as folder:
        trainer, clock = build_trainer(args, folder)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trainable, _ = trainer.model.get_nb_trainable_parameters()
    seconds = statistics.median(clock.seconds)
    if args.profile:
        print_profile(trainer)
    return {
        "step_seconds": seconds,
        "tokens_per_second": args.batch * args.length / seconds,
        "first_step_seconds": clock.first,
        "peak_bytes": peak_memory(),
        "losses": [losses[0], losses[-1]],
        "trainable_parameters": trainable,
    }


def build_trainer(args: argparse.Namespace, folder: str):
    """The arm's trainer on a random Llama with its adapter, and the clock that watches it."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from asymgqa_peft import AsymGQATrainer

    on_cpu, steps = args.device == "cpu", args.warmup + args.steps
    clock, weight = StepClock(args), ARMS[args.arm].distillation_weight
    training = SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=args.batch,
        max_steps=steps,
        max_length=args.length,
        packing=args.documents is not None,
        gradient_checkpointing=not args.no_checkpointing,
        bf16=not on_cpu,
        use_cpu=on_cpu,
        # The Trainer alone would compile the model as a whole, which takes minutes.
        torch_compile=args.compile and weight is not None,
        logging_steps=max(1, steps // 2),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    arguments = dict(
        model=adapted_llama(args),
        args=training,
        # Under scaling.py every rank takes rows of its own.
        train_dataset=Dataset.from_dict({"input_ids": token_rows(args, steps * training.world_size)}),
        processing_class=placeholder_tokenizer(),
        callbacks=[clock],
    )
    if weight is None:
        if args.compile:
            for layer in arguments["model"].get_base_model().model.layers:
                layer.compile()
        return SFTTrainer(**arguments), clock
    trainer = AsymGQATrainer(**arguments, distillation_weight=weight)
    if args.chunk_mib:
        trainer.chunk_bytes = args.chunk_mib * 2**20
    return trainer, clock


def token_rows(args: argparse.Namespace, steps: int) -> list[list[int]]:
    """Rows of `length` random tokens; with --documents of random lengths, for packing to fill rows with."""
    generator = torch.Generator().manual_seed(0)
    needed = args.batch * args.length * steps
    tokens = torch.randint(3, args.vocab, (2 * needed,), generator=generator).tolist()
    if args.documents is None:
        return [tokens[start : start + args.length] for start in range(0, needed, args.length)]
    rows, start = [], 0
    while start < needed + args.batch * args.length:
        length = int(torch.empty(1).exponential_(1 / args.documents, generator=generator)) + 16
        rows.append(tokens[start : start + min(length, args.length)])
        start += len(rows[-1])
    return rows


def llama_config(args: argparse.Namespace) -> LlamaConfig:
    """Llama-2-7B's configuration, or one of --hidden with heads of 64 and a tied output layer."""
    if args.hidden is None:
        return shapes.shape_config(args.shape, args.layers, attn_implementation=args.attention)
    heads = args.hidden // 64
    return shapes.shape_config(
        "tiny",
        args.layers,
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=4 * args.hidden,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        tie_word_embeddings=True,
        attn_implementation=args.attention,
    )


def adapted_llama(args: argparse.Namespace):
    """The arm's adapter on a random Llama MHA at 4:1, in bfloat16 on CUDA."""
    config = llama_config(args)
    model = shapes.random_llama(config, args.device, shapes.working_dtype(args.device))
    if args.load_in_4bit:
        model = in_4_bits(model, args)
    if ARMS[args.arm].adapter == "lora":
        lora = LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(model, lora)
    groups = max(1, config.num_key_value_heads // 4)
    # Unequal groups, as the search finds them.
    partition = shapes.unequal_groups(config.num_key_value_heads, groups)
    adapter = AsymGQAConfig(
        num_key_value_heads=groups,
        head_groups=[partition] * config.num_hidden_layers,
        r=args.rank,
        lora_alpha=args.rank,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, adapter)


def in_4_bits(model, args: argparse.Namespace):
    """The model saved and loaded in NF4, as recover.py loads a base with load_in_4bit."""
    from peft import prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    with tempfile.TemporaryDirectory() as folder:
        model.to("cpu").save_pretrained(folder)
        del model
        torch.cuda.empty_cache()
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=quantization, device_map={"": args.device}, attn_implementation=args.attention
        )
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=not args.no_checkpointing)


def placeholder_tokenizer():
    """SFTTrainer wants a tokenizer for its padding and end tokens; the data are token ids already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


class StepClock(TrainerCallback):
    """Times steps after the warm-up, and resets CUDA's peak when they begin."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.seconds: list[float] = []
        self.first = 0.0

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """Wait for the device, then start the clock."""
        shapes.synchronize(self.args.device)
        if state.global_step == self.args.warmup:
            shapes.reset_peak(self.args.device)
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Stop the clock; the first step, which compiles, is kept apart."""
        shapes.synchronize(self.args.device)
        seconds = time.perf_counter() - self.started
        if state.global_step == 1:
            self.first = seconds
        if state.global_step > self.args.warmup:
            self.seconds.append(seconds)


def print_profile(trainer) -> None:
    """Which kernels two more steps take their time in, on standard error, where no JSON is looked for."""
    from torch.profiler import ProfilerActivity, profile

    trainer.args.max_steps = 2
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as watched:
        trainer.train()
    averages = watched.key_averages()
    print(averages.table(sort_by="self_device_time_total", row_limit=45, max_name_column_width=90), file=sys.stderr)


# --------------------------------------------------------------------------------------------------- the floors


def flops_per_token(args: argparse.Namespace, arm: Arm) -> float:
    """FLOPs of matrix products that a token cannot avoid, forward and backward, counted as the module says.

    Frozen matrices have no gradient of their own: their backward costs as much as their forward; trained ones' twice.
    """
    config = llama_config(args)
    width, layers = config.hidden_size, config.num_hidden_layers
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    mlp = 3 * width * config.intermediate_size
    # Causal: half of the scores and half of the weighted values.
    attention = 2 * args.length * queries
    teacher = 2 * (2 * width * queries + 2 * width * keys + mlp) + attention
    shared = 2 * width * keys
    if arm.adapter == "asymgqa":
        shared = 2 * width * max(1, config.num_key_value_heads // 4) * config.head_dim
    frozen = 2 * width * queries + mlp
    lora = args.rank * (2 * (width + queries) + 3 * (width + config.intermediate_size))
    if arm.adapter == "lora":
        frozen += shared
        lora += args.rank * 2 * (width + keys)
        shared = 0
    forward = 2 * (frozen + shared + lora) + attention
    backward = 2 * (frozen + 2 * shared + 2 * lora) + 2 * attention
    layer = forward + backward
    if not args.no_checkpointing:
        layer += forward
    head_products = 2
    if arm.distillation_weight:
        layer += teacher
        head_products = 3
    return layers * layer + head_products * 2 * width * args.vocab


# ---------------------------------------------------------------------------------------------------- the table


def table(args: argparse.Namespace, arms: dict[str, dict], ceiling: float) -> list[dict]:
    """One row per arm, relative to SFTTrainer on the same adapter."""
    base = arms.get(BASELINE)
    rows = []
    for name, found in arms.items():
        rate = found["tokens_per_second"]
        reached = rate * flops_per_token(args, ARMS[name]) / 1e12
        row = {
            "arm": name,
            "tokens/s": rate,
            "s/step": found["step_seconds"],
            "TFLOP/s": reached,
            "share of the ceiling": reached / ceiling,
            "peak GiB": found["peak_bytes"] / 2**30,
            f"hours for {TOKENS / 1e6:.0f} M tokens": TOKENS / rate / 3600,
        }
        if base:
            row["x SFT's time"] = found["step_seconds"] / base["step_seconds"]
            row["x SFT's memory"] = found["peak_bytes"] / base["peak_bytes"]
        rows.append(row)
    return rows


def checks(rows: list[dict], args: argparse.Namespace) -> dict[str, bool]:
    """The targets, met or not."""
    (row,) = (row for row in rows if row["arm"] == TARGET)
    found = {
        f"at least {LIMITS['share of the ceiling']:.0%} of the ceiling": row["share of the ceiling"]
        >= LIMITS["share of the ceiling"]
    }
    for name in ("x SFT's time", "x SFT's memory"):
        found[f"{name} at most {LIMITS[name]}"] = row[name] <= LIMITS[name]
    if args.memory:
        found[f"{args.memory:g} GiB are enough"] = row["peak GiB"] <= args.memory
    return found


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What is trained: a shape and the rank of its LoRA."""
    parser.add_argument("--shape", choices=shapes.SHAPES, default="llama-2-7b")
    parser.add_argument("--hidden", type=int, help="another shape: model width; heads of 64, MLP of 4 times the width")
    parser.add_argument("--vocab", type=int, help="vocabulary, with --hidden")
    parser.add_argument("--layers", type=int, help="default: the shape's")
    parser.add_argument("--rank", type=int, default=64, help="LoRA rank")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--batch", type=int, default=4, help="sequences per step")
    parser.add_argument("--length", type=int, default=2048, help="tokens per sequence")
    parser.add_argument("--documents", type=int, help="mean length of documents that TRL packs into sequences")
    parser.add_argument("--attention", default="grouped_sdpa", help="attn_implementation")
    parser.add_argument("--steps", type=int, default=8, help="timed steps")
    parser.add_argument("--warmup", type=int, default=4, help="steps before the timed ones")
    parser.add_argument("--device", choices=["cuda", "cpu"], default=shapes.default_device())
    parser.add_argument("--no-checkpointing", action="store_true", help="keep all activations")
    parser.add_argument("--compile", action="store_true", help="compile the layers, as torch_compile of our trainer")
    parser.add_argument("--load-in-4bit", action="store_true", help="base in NF4 (bitsandbytes)")
    parser.add_argument("--memory", type=float, help="GiB of the GPU that may be used")
    parser.add_argument("--chunk-mib", type=int, default=None, help="size of one chunk's logits")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--profile", action="store_true", help="two more steps, and the kernels they run")
    # Set when the script calls itself.
    parser.add_argument("--arm", choices=list(ARMS), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.vocab is None:
        args.vocab = shapes.SHAPES[args.shape]["vocab_size"]
    return args


if __name__ == "__main__":
    main()
