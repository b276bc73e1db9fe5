r"""Where the seconds of a conversion go: every stage of `initialize_asymgqa_weights` on a model of true shape.

    python recipes/benchmarks/conversion.py --device cuda                                     # Llama-2-7B, 32 -> 8
    python recipes/benchmarks/conversion.py --device cuda --groups 4 --head-dim 256
    python recipes/benchmarks/conversion.py --device cuda --shape llama-3.1-8b --groups 4
    python recipes/benchmarks/conversion.py --device cuda --layers 3 --profile --pieces       # a part, extrapolated

Weights are random, with heads that resemble each other in part; tokens are random. Beside each stage stands its floor:
the FLOPs it cannot avoid at the rate that the largest matrix products reach on this device, measured in the same run.
The conversion is checked: its KL to the base on other tokens must be below classic GQA's (neighbour groups, mean),
which is what the adapter holds before. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from peft import get_peft_model
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig

from asymgqa_peft import AsymGQAConfig, initialize_asymgqa_weights
from asymgqa_peft.evaluate import kl_to_reference
from asymgqa_peft.method.threads import map_in_threads
from recipes.benchmarks import shapes
from recipes.reporting import print_report

SECONDS, SEARCH_SHARE, MEMORY = 75.0, 0.25, 8e9
"""Targets: seconds in all, the search's share of them, bytes beyond what is allocated before."""


def main(arguments: list[str] | None = None) -> dict:
    """Convert, and print the table and the JSON line."""
    args = parse_args(arguments)
    config = shapes.shape_config(args.shape, args.layers)
    limits = shapes.ceilings(args.device)
    model, seconds = build(config, args)
    print(f"a model of {config.num_hidden_layers} layers was made in {seconds:.1f} s", flush=True)
    unseen = torch.randint(config.vocab_size, (1, args.length), generator=torch.Generator().manual_seed(9))
    # Until it is initialised the adapter holds classic GQA.
    before = kl_to_reference(model, model, [unseen])
    pieces = []
    if args.pieces:
        pieces = print_pieces(config, args)
    report, seconds, memory = convert(model, config, args)
    after = kl_to_reference(model, model, [unseen])
    # With --layers only a part was converted.
    scale = shapes.SHAPES[args.shape]["num_hidden_layers"] / config.num_hidden_layers
    floors = floor_seconds(config, args, limits)
    rows = table(report.seconds, seconds, floors, config.num_hidden_layers, scale)
    total, search = rows[-1]["all layers, s"], report.seconds["search"] / seconds
    print(
        f"search: {report.search_seconds * scale:.1f} s in all layers, {search:.1%} of the time spent waiting for it"
    )
    checks = {
        "KL below classic GQA's": after < before,
        f"at most {SECONDS:.0f} s": total <= SECONDS,
        f"search at most {SEARCH_SHARE:.0%}": search <= SEARCH_SHARE,
        "at most 8 GB beyond the weights": memory is None or memory <= MEMORY,
    }
    shapes.print_checks(checks)
    result = {
        "ceilings": limits,
        "kl_classic": before,
        "kl_initialised": after,
        "search_share": search,
        "search_seconds": report.search_seconds * scale,
        "bytes_beyond_weights": memory,
        "cost_over_neighbour": sum(report.costs) / sum(report.neighbour_costs),
        "checks": checks,
        "pieces": pieces,
        "threads": torch.get_num_threads(),
        "arguments": vars(args),
    }
    print_report(rows, args.device, **result)
    if not checks["KL below classic GQA's"]:
        raise SystemExit(f"the conversion is wrong: KL {after} is not below {before}.")
    return result


def build(config: LlamaConfig, args: argparse.Namespace):
    """The wrapped model, classic GQA until it is initialised, and the seconds it took."""
    start = time.perf_counter()
    base = shapes.random_llama(config, args.device, shapes.working_dtype(args.device))
    shapes.plant_similar_heads(base, sources=2 * args.groups)
    lora = {"r": args.rank, "lora_alpha": args.rank, "task_type": "CAUSAL_LM"}
    adapter = AsymGQAConfig(num_key_value_heads=args.groups, head_dim=args.head_dim, **lora)
    return get_peft_model(base, adapter), time.perf_counter() - start


def convert(model, config: LlamaConfig, args: argparse.Namespace):
    """Initialise; the report, seconds of wall time, and the peak of memory beyond what was allocated before."""
    initialise = partial(initialize_asymgqa_weights, model, calibration(config, args), progress=False)
    before = shapes.reset_peak(args.device)
    start = time.perf_counter()
    report = initialise()
    seconds, peak = time.perf_counter() - start, shapes.peak_beyond(before, args.device)
    if args.profile:
        print_profile(initialise, args)
    return report, seconds, peak


def calibration(config: LlamaConfig, args: argparse.Namespace) -> tuple[Tensor, ...]:
    """Batches of random tokens, (batch_size, length) each."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (args.blocks, args.length), generator=generator)
    return tokens.split(args.batch_size)


def print_profile(call: Callable[[], object], args: argparse.Namespace) -> None:
    """Run once more: what Python waits for, and on a GPU which kernels take longest."""
    on_gpu = args.device == "cuda"
    watched = profile(activities=[ProfilerActivity.CUDA]) if on_gpu else nullcontext()
    python = cProfile.Profile()
    with watched, python:
        call()
    pstats.Stats(python).sort_stats("tottime").print_stats(30)
    if on_gpu:
        print(watched.key_averages().table(sort_by="self_device_time_total", row_limit=30), flush=True)


def print_pieces(config: LlamaConfig, args: argparse.Namespace) -> list[dict]:
    """Seconds of the linear algebra of one layer, where it can run: what decides between GPU and CPU threads."""
    dim, queries, rank = config.head_dim, config.num_attention_heads * config.head_dim, 2 * args.rank + 16
    heads = config.num_key_value_heads
    rows = []
    for name, count, size in (
        ("pairs", heads * (heads - 1) // 2, 2 * dim),
        ("groups of 4", 32, 4 * dim),
        ("groups of 6", 16, 6 * dim),
        ("roots", heads, dim),
    ):
        random = torch.randn(count, size, size, dtype=torch.float64)
        # Positive definite, as the second moments of a layer are.
        symmetric = random @ random.mT
        parts = symmetric.split(-(-count // torch.get_num_threads()))
        row = {"piece": f"{name}: eigenvalues of {count} x {size} x {size}"}
        row["CPU threads, s"] = shapes.median_seconds(
            lambda p=parts: map_in_threads(torch.linalg.eigvalsh, p), "cpu", 1, 1
        )
        if args.device == "cuda":
            for dtype in (torch.float64, torch.float32):
                there = symmetric.to(args.device, dtype)
                seconds = shapes.median_seconds(lambda m=there: torch.linalg.eigvalsh(m), args.device, 1, 1)
                row[f"GPU {dtype}, s"] = seconds
        rows.append(row)
        print(row, flush=True)
    square = torch.randn(queries, queries, dtype=torch.float64, device=args.device)
    square = square @ square.mT / queries + torch.eye(queries).to(square)
    thin = torch.randn(queries, rank, dtype=torch.float64, device=args.device)
    factor = torch.linalg.cholesky(square)
    for name, call in {
        f"float64 product of {queries}": lambda: square @ square,
        f"Cholesky of {queries}": lambda: torch.linalg.cholesky(square),
        f"Cholesky solve of {queries}": lambda: torch.cholesky_solve(square, factor),
        f"QR of {queries} x {rank}": lambda: torch.linalg.qr(thin),
        f"to the CPU and back, {queries}": lambda: square.cpu().to(args.device),
    }.items():
        rows.append({"piece": name, f"{args.device}, s": shapes.median_seconds(call, args.device, 3, 1)})
        print(rows[-1], flush=True)
    return rows


def floor_seconds(config: LlamaConfig, args: argparse.Namespace, limits: dict[str, float]) -> dict[str, tuple]:
    """Per stage and layer: (seconds at the ceiling, what is counted). Logits and embeddings are left out."""
    tokens, width = args.blocks * args.length, config.hidden_size
    queries = config.num_attention_heads * config.head_dim
    keys, groups = config.num_key_value_heads * config.head_dim, args.groups * (args.head_dim or config.head_dim)
    forward_rate = limits.get("bfloat16 TFLOP/s", limits["float32 TFLOP/s"]) * 1e12
    # The solve of the refit is in float64.
    exact_rate = limits["float64 TFLOP/s"] * 1e12
    # Causal: half of the scores, half of the weighted values.
    attention = 2 * args.length * queries
    mlp = 6 * width * config.intermediate_size
    outer = 2 * keys * keys + 4 * keys * config.num_key_value_heads * 2
    solve = 2 * queries**3 / 3 + 4 * queries**2 * width
    projected = 2 * width * (queries + 2 * keys)
    original = tokens * (4 * width * (queries + keys) + attention + mlp)
    converted = tokens * (2 * width * queries + mlp)
    attended = tokens * (2 * width * (queries + 2 * groups) + attention + 2 * queries * (queries + width))
    return {
        "statistics": (tokens * (projected + outer) / forward_rate, "q, k and v of the original, outer products"),
        "targets": (original / forward_rate, "forward of the original"),
        "refit": (attended / forward_rate + solve / exact_rate, "forward of the attention, outer products, solve"),
        "converted stream": (converted / forward_rate, "o_proj and MLP of the converted layer"),
    }


def table(stages: dict[str, float], seconds: float, floors: dict[str, tuple], layers: int, scale: float) -> list[dict]:
    """A row per stage, what no stage covers, and the sum; `scale` extrapolates them to all layers of the shape."""
    # What no stage covers is shown, too: nothing hides between them.
    stages = stages | {"between stages": seconds - sum(stages.values())}
    rows, floor = [], 0.0
    for stage, value in stages.items():
        row = {
            "stage": stage,
            "measured, s": value,
            "all layers, s": value * scale,
            "share": f"{value / seconds:.1%}",
            "floor, all layers, s": None,
            "the floor counts": None,
        }
        if stage in floors:
            per_layer, row["the floor counts"] = floors[stage]
            row["floor, all layers, s"] = per_layer * layers * scale
            floor += row["floor, all layers, s"]
        rows.append(row)
    total = {"stage": "total", "measured, s": seconds, "all layers, s": seconds * scale, "share": "100.0%"}
    total["floor, all layers, s"] = floor
    return [*rows, total]


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=shapes.SHAPES, default="llama-2-7b")
    parser.add_argument("--groups", type=int, default=8, help="G")
    parser.add_argument("--head-dim", type=int, help="W, width of the shared heads; default: the base's")
    parser.add_argument("--layers", type=int, help="convert only so many; times are extrapolated to all")
    parser.add_argument("--blocks", type=int, default=128, help="calibration blocks")
    parser.add_argument("--length", type=int, default=2048, help="tokens per block")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rank", type=int, default=32, help="LoRA rank, which bounds the refit")
    parser.add_argument("--profile", action="store_true", help="convert again and print what took longest")
    parser.add_argument("--pieces", action="store_true", help="time the linear algebra of a layer on its own")
    parser.add_argument("--device", default=shapes.default_device())
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
