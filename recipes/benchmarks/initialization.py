r"""Quality of every initialisation before any training: held-out perplexity by arm, G and calibration seed.

    python recipes/benchmarks/initialization.py                                    # the bundled model, CPU
    python recipes/benchmarks/initialization.py --model DIR --calibration books.txt.xz --held-out test.txt \
        --device cuda

A calibration seed draws which blocks of the calibration text are read. The arm "random" also draws its groups by it.
Calibration reads text that the model was not trained on (the bundled one's validation modules): activations on text it
knows by heart mislead the merge.
Prints a table, mean and largest deviation over seeds, and one JSON line with every run.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from statistics import fmean

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from asymgqa_peft import AsymGQAConfig, initialize_asymgqa_weights
from asymgqa_peft.evaluate import perplexity
from recipes.reporting import print_report
from recipes.stdlib_text import held_out_texts, token_blocks, validation_texts
from recipes.text_file import read_text

RECIPES = Path(__file__).resolve().parents[1]


def arm(grouping: str, merge: str, refit: bool = False, criterion: str = "residual") -> dict:
    """An arm's choices as config fields."""
    return {"grouping": grouping, "criterion": criterion, "merge": merge, "refit_output": refit}


ARMS = {
    "neighbour, mean": arm("neighbour", "mean"),
    "cosine symmetric, mean": arm("symmetric", "mean", criterion="cosine"),
    "cosine asymmetric, mean": arm("asymmetric", "mean", criterion="cosine"),
    "residual symmetric, mean": arm("symmetric", "mean"),
    "residual asymmetric, mean": arm("asymmetric", "mean"),
    "residual symmetric, aligned": arm("symmetric", "aligned"),
    "residual asymmetric, aligned": arm("asymmetric", "aligned"),
    "neighbour, principal": arm("neighbour", "principal"),
    "residual symmetric, principal": arm("symmetric", "principal"),
    "residual asymmetric, principal": arm("asymmetric", "principal"),
    "neighbour, principal + refit": arm("neighbour", "principal", True),
    "random, principal + refit": arm("random", "principal", True),
    "residual symmetric, principal + refit": arm("symmetric", "principal", True),
    "residual asymmetric, principal + refit": arm("asymmetric", "principal", True),
}


def main(arguments: list[str] | None = None) -> list[dict]:
    """Run every arm and print the table."""
    args = parse_args(arguments)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device).eval()
    blocks = token_blocks(read(args.calibration) or validation_texts(args.stdlib), tokenizer, args.block_size)
    held_out = token_blocks(read(args.held_out) or held_out_texts(args.stdlib), tokenizer, args.block_size)
    held_out = held_out[: args.held_out_blocks].split(args.batch_size)
    reference = perplexity(base, held_out)
    print(f"base: perplexity {reference:.3f} on {sum(b.numel() for b in held_out):,} held-out tokens", flush=True)
    rows = []
    for ratio in args.ratios:
        for name in args.arms or ARMS:
            runs = [convert(base, blocks, held_out, ratio, ARMS[name], seed, args) for seed in args.seeds]
            rows.append(summary(name, ratio, runs, reference))
            print(f"{ratio}:1 {name}: {rows[-1]['perplexity']:.2f} ({rows[-1]['x base']:.3f}x)", flush=True)
    print_report(rows, args.device, base_perplexity=reference, arguments=vars(args))
    return rows


def convert(base, blocks, held_out, ratio: int, choices: dict, seed: int, args: argparse.Namespace) -> dict:
    """One arm with one calibration seed."""
    chosen = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))[: args.blocks]
    groups = base.config.num_key_value_heads // ratio
    config = AsymGQAConfig(
        num_key_value_heads=groups, r=args.rank, lora_alpha=args.rank, seed=seed, task_type="CAUSAL_LM", **choices
    )
    # Wrapping changes a model in place, and the next arm needs the base as it was.
    model = get_peft_model(copy.deepcopy(base), config)
    start = time.perf_counter()
    report = initialize_asymgqa_weights(model, blocks[chosen].split(args.batch_size), progress=False)
    seconds = time.perf_counter() - start
    largest = 0
    for layer in report.head_groups:
        largest = max(largest, *map(len, layer))
    return {"perplexity": perplexity(model, held_out), "seconds": seconds, "largest_group": largest}


def summary(name: str, ratio: int, runs: list[dict], reference: float) -> dict:
    """One row of the table."""
    values = [run["perplexity"] for run in runs]
    mean = fmean(values)
    return {
        "arm": name,
        "ratio": f"{ratio}:1",
        "perplexity": mean,
        "x base": mean / reference,
        "+-": max(abs(value - mean) for value in values),
        "largest group": max(run["largest_group"] for run in runs),
        "seconds": fmean(run["seconds"] for run in runs),
    }


def read(path: Path | None) -> list[str] | None:
    """The one text of a file, .xz or plain; None without a path."""
    if path is None:
        return None
    return [read_text(path)]


def model_and_texts(description: str) -> argparse.ArgumentParser:
    """A command line that names a model, what to calibrate on and what to measure on."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=RECIPES / "tiny_model", help="folder of an MHA model")
    parser.add_argument("--calibration", type=Path, help="text to calibrate on (default: the validation modules)")
    parser.add_argument("--held-out", type=Path, help="text to measure on (default: the held-out modules)")
    parser.add_argument("--stdlib", type=Path, help="folder of another Python's standard library to read")
    return parser


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = model_and_texts(__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ratios", type=int, nargs="+", default=[2, 4, 8], help="base KV heads per shared head")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="calibration seeds")
    parser.add_argument("--arms", nargs="+", choices=ARMS, metavar="ARM", help=f"default: all of {', '.join(ARMS)}")
    parser.add_argument("--blocks", type=int, default=128, help="calibration blocks")
    parser.add_argument("--block-size", type=int, default=512, help="tokens per block")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rank", type=int, default=64, help="LoRA rank, which bounds the refit")
    parser.add_argument("--held-out-blocks", type=int, help="measure on the first of them only")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
