r"""How a conversion grows with heads, their size, layers and tokens; import time, adapter size, loading time.

    python recipes/benchmarks/growth.py --device cpu                             # small shapes, two minutes
    python recipes/benchmarks/growth.py --device cuda                            # 8..128 heads, 64..256 dimensions
    python recipes/benchmarks/growth.py --only layers files import

One axis grows at a time and the others stay; the hidden size stays too, so that heads and head dimension grow only the
attention. "width" is W / D: shared heads become wider and fewer, the bytes of the cache stay. The exponent of a stage
is the slope of log seconds over log size, by least squares. Beside it stands the exponent of its largest term: the
sums of outer products take tokens (H D)^2, the solve (H D)^3, the pair costs K^2 D^3, the maps of G groups of K / G
heads G (K D / G)^3, all of it layers. An exponent well above that is a surprise. Prints tables and one JSON line.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import linear_regression

import torch
from peft import PeftModel, get_peft_model

from asymgqa_peft import AsymGQAConfig, initialize_asymgqa_weights
from asymgqa_peft.tables import markdown_table
from recipes.benchmarks import shapes
from recipes.reporting import print_report

STAGES = ("statistics", "targets", "search", "merge", "refit", "converted stream")
LARGEST_TERM = {  # axis -> exponent of the whole: of its dearest stage
    "heads": 3.0,
    "head_dim": 3.0,
    "width": 2.0,
    "layers": 1.0,
    "tokens": 1.0,
}
SLACK = 0.3
PARTS = (*LARGEST_TERM, "files", "import")
SIZES = {
    "cpu": {
        "hidden": 256,
        "at": {"heads": 16, "head_dim": 16, "width": 1, "layers": 1, "tokens": 4096},
        "heads": [8, 16, 32, 64],
        "head_dim": [16, 32, 64],
        "width": [1, 2, 4],
        "layers": [1, 2, 4],
        "tokens": [4096, 8192, 16384],
    },
    "cuda": {
        "hidden": 2048,
        "at": {"heads": 32, "head_dim": 64, "width": 1, "layers": 2, "tokens": 32768},
        "heads": [8, 16, 32, 64, 128],
        "head_dim": [64, 128, 256],
        "width": [1, 2, 4],
        "layers": [1, 2, 4, 8],
        "tokens": [16384, 32768, 65536, 131072],
    },
}


def main(arguments: list[str] | None = None) -> dict:
    """Measure every part asked for and print its table, and the exponents with the JSON line."""
    args = parse_args(arguments)
    sizes = SIZES[args.device]
    # The first conversion of a process also loads libraries.
    convert(sizes, dict(sizes["at"]), args)
    runs, exponents, extra = {}, [], {}
    for axis in LARGEST_TERM:
        if axis not in args.only:
            continue
        runs[axis] = []
        for size in sizes[axis]:
            runs[axis].append(convert(sizes, sizes["at"] | {axis: size}, args))
        print(f"\n{axis}\n{markdown_table(runs[axis], aligned=True)}", flush=True)
        exponents.append(exponents_of(axis, sizes[axis], runs[axis]))
    if "files" in args.only:
        extra["files"] = [files(sizes, layers, args) for layers in sizes["layers"]]
        print(f"\nfiles\n{markdown_table(extra['files'], aligned=True)}", flush=True)
        for name in FILE_COLUMNS:
            exponent = slope(sizes["layers"], [row[name] for row in extra["files"]])
            extra[f"{name} exponent"] = exponent
            print(f"{name} exponent {exponent:.2f}", flush=True)
    if "import" in args.only:
        extra["import"] = import_seconds()
        print(f"\nimport, s: {extra['import']}", flush=True)
    surprises = [row["axis"] for row in exponents if row["total"] > row["largest term"] + SLACK]
    print(f"exponents of seconds; above their largest term: {', '.join(surprises) or 'none'}")
    rows = exponents or [{"axis": "none measured"}]
    print_report(rows, args.device, runs=runs, surprises=surprises, arguments=vars(args), sizes=sizes, **extra)
    return {"exponents": exponents, "runs": runs, **extra}


def wrapped(sizes: dict, point: dict, args: argparse.Namespace) -> PeftModel:
    """A model of the point's shape under an adapter that caches a quarter."""
    config = shapes.shape_config(
        "tiny",
        point["layers"],
        hidden_size=sizes["hidden"],
        intermediate_size=2 * sizes["hidden"],
        num_attention_heads=point["heads"],
        num_key_value_heads=point["heads"],
        head_dim=point["head_dim"],
    )
    base = shapes.random_llama(config, args.device, shapes.working_dtype(args.device))
    shapes.plant_similar_heads(base, sources=point["heads"] // 2)
    shared = {
        "num_key_value_heads": point["heads"] // 4 // point["width"],
        "head_dim": point["width"] * point["head_dim"],
    }
    return get_peft_model(base, AsymGQAConfig(**shared, r=args.rank, task_type="CAUSAL_LM"))


def convert(sizes: dict, point: dict, args: argparse.Namespace) -> dict:
    """One conversion: its point, seconds per stage and in all, and the bytes it needed beyond the model."""
    model = wrapped(sizes, point, args)
    tokens = torch.randint(128, (point["tokens"] // 512, 512), generator=torch.Generator().manual_seed(0))
    before, start = shapes.reset_peak(args.device), time.perf_counter()
    try:
        report = initialize_asymgqa_weights(model, tokens.split(8), progress=False)
    except torch.OutOfMemoryError:
        print(f"{point}: out of memory", flush=True)
        return point | {"total": math.nan}
    seconds, peak = time.perf_counter() - start, shapes.peak_beyond(before, args.device)
    # A benchmark of a conversion that finds nothing would say nothing.
    if sum(report.costs) > sum(report.neighbour_costs):
        raise SystemExit(f"{point}: the groups found cost more than neighbours.")
    row = dict(point)
    for stage in STAGES:
        row[stage] = report.seconds.get(stage, 0.0)
    # All of the search, not only what the walk waits for.
    row["search"] = report.search_seconds
    return row | {"total": seconds, "MB": peak and peak / 1e6}


def exponents_of(axis: str, sizes: Sequence[int], runs: list[dict]) -> dict:
    """Exponents of every stage, of the sum and of the memory along one axis."""
    row = {"axis": axis, "sizes": f"{sizes[0]}..{sizes[-1]}", "largest term": LARGEST_TERM[axis]}
    for column in (*STAGES, "total", "MB"):
        row[column] = slope(sizes, [run.get(column) for run in runs])
    return row


def slope(sizes: Sequence[float], values: Sequence[float | None]) -> float | None:
    """Least-squares slope of log values over log sizes; None with fewer than two values."""
    x, y = [], []
    for size, value in zip(sizes, values, strict=True):
        if value and math.isfinite(value):
            x.append(math.log(size))
            y.append(math.log(value))
    if len(x) < 2:
        return None
    return linear_regression(x, y).slope


FILE_COLUMNS = ("adapter, bytes", "wrapping, s", "loading, s")


def files(sizes: dict, layers: int, args: argparse.Namespace) -> dict:
    """Bytes of the adapter file beside those of its tensors; seconds to wrap a base and to load the adapter on one."""
    # All other sizes stay.
    point = sizes["at"] | {"layers": layers}
    start = time.perf_counter()
    model = wrapped(sizes, point, args)
    wrapping = time.perf_counter() - start
    parameters = sum(p.numel() * p.itemsize for name, p in model.named_parameters() if "lora_" in name)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = (Path(folder) / "adapter_model.safetensors").stat().st_size
        base = model.unload()
        start = time.perf_counter()
        PeftModel.from_pretrained(base, folder)
        loading = time.perf_counter() - start
    return {
        "layers": layers,
        "adapter, bytes": size,
        "its tensors, bytes": parameters,
        "wrapping, s": wrapping,
        "loading, s": loading,
    }


def import_seconds() -> dict[str, float]:
    """Median wall time of a fresh Python that imports what the package needs, and that imports the package."""
    seconds = {}
    for name, command in (
        ("peft and transformers", "import peft, transformers, torch"),
        ("asymgqa_peft", "import asymgqa_peft"),
    ):
        start = partial(subprocess.run, [sys.executable, "-c", command], check=True, capture_output=True)
        seconds[name] = shapes.median_seconds(start, "cpu", repeats=3, warmup=1)
    return seconds


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank")
    parser.add_argument("--device", choices=SIZES, default=shapes.default_device())
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
