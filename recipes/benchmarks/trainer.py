"""Cost of self-distillation: peak memory and step time of AsymGQATrainer beside SFTTrainer's.

    python recipes/benchmarks/trainer.py --device cuda
    python recipes/benchmarks/trainer.py --device cpu --vocab 4096 --hidden 128 --layers 2 --length 128

Both train the same AsymGQA adapter on a random Llama with random tokens, each in a process of its own. The last line
is one JSON object. Memory is what PyTorch allocated at most on CUDA after warming up, the process's peak on CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import get_peft_model

from asymgqa_peft import AsymGQAConfig
from asymgqa_peft.initialize.walk import peak_memory
from asymgqa_peft.tables import markdown_table
from recipes.benchmarks import shapes
from recipes.reporting import provenance

ARMS = {"SFTTrainer": None, "AsymGQATrainer w=1": 1.0, "AsymGQATrainer w=0.5": 0.5}
BASELINE, TARGET = "SFTTrainer", "AsymGQATrainer w=1"
LIMITS = {"memory_ratio": 1.15, "time_ratio": 1.45}
REPOSITORY = Path(__file__).resolve().parents[2]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vocab", type=int, default=128256, help="vocabulary (default: Llama 3's)")
    parser.add_argument("--hidden", type=int, default=2048, help="model width; heads have 64 dimensions")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4, help="sequences per step")
    parser.add_argument("--length", type=int, default=2048, help="tokens per sequence")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--warmup", type=int, default=4, help="steps before the timed ones")
    parser.add_argument("--device", choices=["cuda", "cpu"], default=shapes.default_device())
    parser.add_argument("--no-checkpointing", action="store_true", help="keep all activations")
    parser.add_argument("--chunk-mib", type=int, default=None, help="size of one chunk's logits")
    # Set when the script calls itself.
    parser.add_argument("--arm", choices=list(ARMS), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    """Run every arm and print the table and the JSON line."""
    options = parse_arguments(argv)
    if options.arm:
        result = measure(options)
        print(json.dumps(result))
        return result
    if argv is None:
        argv = sys.argv[1:]
    arms = {arm: run_in_subprocess(arm, argv) for arm in ARMS}
    summary = summarise(options, arms)
    print_table(summary)
    print(json.dumps(summary))
    return summary


def run_in_subprocess(arm: str, argv: list[str]) -> dict:
    """Measure one arm in a fresh process: no caches, no fragments and no peak of the arm before."""
    command = [sys.executable, "-m", "recipes.benchmarks.trainer", *argv, "--arm", arm]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    if process.returncode != 0:
        raise SystemExit(f"{arm} failed, its error is above; the command was: {' '.join(command)}")
    return json.loads(process.stdout.splitlines()[-1])


def measure(options: argparse.Namespace) -> dict:
    """Train one arm; median seconds per timed step, peak bytes, first and last loss."""
    torch.manual_seed(0)
    if options.device == "cpu":
        # More threads would make the times of a busy machine swing.
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trainer, clock = build_trainer(options, folder)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trainable, _ = trainer.model.get_nb_trainable_parameters()
    return {
        "step_seconds": statistics.median(clock.seconds),
        "peak_bytes": peak_memory(),
        "losses": [losses[0], losses[-1]],
        "trainable_parameters": trainable,
        "backbone_parameters": sum(p.numel() for name, p in trainer.model.named_parameters() if ".layers." in name),
    }


def build_trainer(options: argparse.Namespace, folder: str):
    """The arm's trainer on a random Llama with an AsymGQA adapter, and the clock that watches it."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from asymgqa_peft import AsymGQATrainer

    on_cpu = options.device == "cpu"
    steps = options.warmup + options.steps
    tokens = torch.randint(3, options.vocab, (options.batch * steps, options.length))
    clock = step_clock(options)
    arguments = dict(
        model=adapted_llama(options),
        args=SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=options.batch,
            max_steps=steps,
            max_length=options.length,
            gradient_checkpointing=not options.no_checkpointing,
            bf16=not on_cpu,
            use_cpu=on_cpu,
            logging_steps=steps // 2,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"input_ids": tokens.tolist()}),
        processing_class=placeholder_tokenizer(),
        callbacks=[clock],
    )
    weight = ARMS[options.arm]
    if weight is None:
        return SFTTrainer(**arguments), clock
    trainer = AsymGQATrainer(**arguments, distillation_weight=weight)
    if options.chunk_mib:
        trainer.chunk_bytes = options.chunk_mib * 2**20
    return trainer, clock


def adapted_llama(options: argparse.Namespace):
    """A random Llama MHA at 4:1, in bfloat16 on CUDA."""
    heads = options.hidden // 64
    config = shapes.shape_config(
        "tiny",
        options.layers,
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=4 * options.hidden,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=options.length,
        tie_word_embeddings=True,
    )
    model = shapes.random_llama(config, options.device, shapes.working_dtype(options.device))
    groups = max(1, heads // 4)
    return get_peft_model(model, AsymGQAConfig(num_key_value_heads=groups, grouping="neighbour", merge="mean", r=16))


def placeholder_tokenizer():
    """SFTTrainer wants a tokenizer for its padding and end tokens; the data are token ids already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def step_clock(options: argparse.Namespace):
    """A callback that times steps after the warm-up and resets CUDA's peak when they begin."""
    from transformers import TrainerCallback

    class StepClock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, args, state, control, **kwargs) -> None:
            shapes.synchronize(options.device)
            if state.global_step == options.warmup:
                shapes.reset_peak(options.device)
            self.started = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs) -> None:
            shapes.synchronize(options.device)
            if state.global_step > options.warmup:
                self.seconds.append(time.perf_counter() - self.started)

    return StepClock()


def expected_time_ratio(options: argparse.Namespace, backbone_parameters: int) -> float:
    """Steps in matrix multiplications: the teacher adds one pass through the backbone to SFT's two, or three.

    The head takes three products with (E, V) either way: SFTTrainer projects again in backward, where AsymGQATrainer
    projects the teacher. Attention itself, and everything that is bound by bandwidth, is left out.
    """
    passes = 3
    if options.no_checkpointing:
        passes = 2
    head = 3 * options.hidden * options.vocab
    return ((passes + 1) * backbone_parameters + head) / (passes * backbone_parameters + head)


def summarise(options: argparse.Namespace, arms: dict[str, dict]) -> dict:
    """Everything that a published number needs beside it."""
    base, ours = arms[BASELINE], arms[TARGET]
    ratios = {
        "memory_ratio": ours["peak_bytes"] / base["peak_bytes"],
        "time_ratio": ours["step_seconds"] / base["step_seconds"],
    }
    return {
        **ratios,
        "within_limits": all(ratios[name] <= limit for name, limit in LIMITS.items()),
        "limits": LIMITS,
        "expected_time_ratio": expected_time_ratio(options, base["backbone_parameters"]),
        "arms": arms,
        "options": vars(options),
        **provenance(options.device),
    }


def print_table(summary: dict) -> None:
    """One line per arm, relative to SFTTrainer."""
    base, rows = summary["arms"][BASELINE], []
    for name, arm in summary["arms"].items():
        rows.append(
            {
                "trainer": name,
                "peak GiB": arm["peak_bytes"] / 2**30,
                "x memory": arm["peak_bytes"] / base["peak_bytes"],
                "s/step": arm["step_seconds"],
                "x time": arm["step_seconds"] / base["step_seconds"],
            }
        )
    print(markdown_table(rows, aligned=True))
    print(f"expected time ratio from matrix products alone: {summary['expected_time_ratio']:.3f}")
    print(f"limits: memory {LIMITS['memory_ratio']}, time {LIMITS['time_ratio']}; {summary['device']}")


if __name__ == "__main__":
    main()
