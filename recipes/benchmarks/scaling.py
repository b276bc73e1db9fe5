r"""How initialisation and recovery scale over the GPUs of one machine.

    python recipes/benchmarks/scaling.py --layers 8 --compile --side-by-side --out scaling.jsonl     # Llama-2-7B
    python recipes/benchmarks/scaling.py --device cpu --ranks 1 2 --hidden 256 --layers 2 --vocab 4096 --length 128 \
        --blocks 16 --documents 50

Every number of ranks is a group of processes of its own, one on each GPU. The initialisation reads the same blocks
whatever their number, each rank its share; weights and tokens are random, as in conversion.py. The recovery (DDP,
distilled, packed documents) trains on as many tokens per rank and step whatever their number, as in recovery_speed.py.
One rank runs without a launcher and without DDP. Times are those of the slowest rank, after a warm-up.

Groups of processes run one after another, and their ranks share all cores; with --side-by-side they run at the same
time where there are GPUs for them, and each rank gets the same number of cores. Prints a line after each part, which
is a JSON line in --out as well, then a table and one more JSON line.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from threading import Timer

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from asymgqa_peft import initialize_asymgqa_weights
from asymgqa_peft.attention import register_grouped_sdpa
from asymgqa_peft.initialize.walk import peak_memory
from asymgqa_peft.method.threads import share_of_cores
from recipes.benchmarks import conversion, recovery_speed, shapes
from recipes.reporting import print_report, provenance

REPOSITORY = Path(__file__).resolve().parents[2]
EFFICIENCY = 0.85
"""Target: tokens a second of a recovery, over those of one rank times the number of ranks."""


def main(arguments: list[str] | None = None) -> list[dict]:
    """Measure every number of ranks; print the table and the JSON line."""
    args = parse_args(arguments)
    if args.worker:
        return work(args)
    if arguments is None:
        arguments = sys.argv[1:]
    rows, failed = [], []
    for groups in waves(args):
        with ThreadPoolExecutor(len(groups)) as beside:
            runs = {ranks: beside.submit(run_group, ranks, cards, arguments, args) for ranks, cards in groups.items()}
        for ranks, run in runs.items():
            found, is_whole = run.result()
            rows += found
            if not is_whole:
                failed.append(ranks)
    if rows:
        rows.sort(key=lambda row: (args.parts.index(row["part"]), row["ranks"]))
        found = table(rows)
        met = checks(found)
        shapes.print_checks(met)
        print_report(found, args.device, checks=met, measured=rows, arguments=vars(args))
    if failed:
        raise SystemExit(f"the processes on {failed} ranks ended early or took over {args.timeout:g} s: see above.")
    return rows


# ---------------------------------------------------------------------------------------------- groups of processes


def waves(args: argparse.Namespace) -> list[dict[int, list[str]]]:
    """What runs at the same time: numbers of ranks, each with the GPUs that its ranks see."""
    cards = [str(index) for index in range(max(args.ranks))]
    if args.device == "cuda":
        if "CUDA_VISIBLE_DEVICES" in os.environ:
            cards = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
        else:
            cards = [str(index) for index in range(torch.cuda.device_count())]
    if max(args.ranks) > len(cards):
        raise SystemExit(f"--ranks {max(args.ranks)} needs as many GPUs, {len(cards)} are visible: lower --ranks.")
    found: list[dict[int, list[str]]] = []
    free: list[str] = []
    for ranks in args.ranks:
        if not (found and args.side_by_side and ranks <= len(free)):
            found.append({})
            free = cards
        found[-1][ranks], free = free[:ranks], free[ranks:]
    return found


def run_group(ranks: int, cards: list[str], arguments: list[str], args: argparse.Namespace) -> tuple[list[dict], bool]:
    """Start so many processes of this script; their rows, and whether they came to the end."""
    command = [sys.executable, "-m", "recipes.benchmarks.scaling", *arguments, "--worker"]
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        command[1:2] = [*launcher, "--nproc-per-node", str(ranks), "-m"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(cards)}
    if args.side_by_side:
        # Else the one group would wait for the other's searches and compilers.
        share = str(max(1, os.cpu_count() // max(args.ranks)))
        environment |= {"OMP_NUM_THREADS": share, "TORCHINDUCTOR_COMPILE_THREADS": share}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY, env=environment)
    # A rank that is gone leaves the others waiting for it.
    clock = Timer(args.timeout, process.terminate)
    clock.start()
    rows = []
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith('{"part"'):
                rows.append(json.loads(line))
                if args.out:
                    with args.out.open("a", encoding="utf-8") as file:
                        file.write(line)
    except BaseException:
        process.terminate()
        raise
    finally:
        clock.cancel()
    return rows, process.wait() == 0


# --------------------------------------------------------------------------------------------------------- one rank


def work(args: argparse.Namespace) -> list[dict]:
    """Measure the parts as one of the ranks, or as the only one; the first rank prints a line of each."""
    # As the Trainer does it: the process group, and this rank's GPU as the current one.
    state = PartialState(cpu=args.device == "cpu")
    register_grouped_sdpa()
    rows = []
    for part in args.parts:
        # What the last part left is no part of this one.
        gc.collect()
        row = {"part": part, "ranks": state.num_processes}
        row |= PARTS[part](args, state)
        rows.append(row | provenance(args.device))
        if state.is_main_process:
            print(json.dumps(rows[-1]), flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return rows


def initialization(args: argparse.Namespace, state: PartialState) -> dict:
    """Initialise a model together with the other ranks, each from its share of the batches."""
    config = recovery_speed.llama_config(recovery_options(args))
    groups = max(1, config.num_key_value_heads // 4)
    lengths = ["--length", str(args.length), "--batch-size", str(args.batch), "--rank", str(args.rank)]
    options = conversion.parse_args(["--device", args.device, "--groups", str(groups), *lengths])
    # What starts up with the first kernels is no part of it: a layer, and a batch for each rank.
    for layers, blocks in ((1, state.num_processes * args.batch), (config.num_hidden_layers, args.blocks)):
        options.blocks = blocks
        config.num_hidden_layers = layers
        model, _ = conversion.build(config, options)
        batches = conversion.calibration(config, options)[state.process_index :: state.num_processes]
        shapes.reset_peak(args.device)
        report, seconds = timed(
            lambda: initialize_asymgqa_weights(model, batches, progress=False),  # noqa: B023 (called here)
            args.device,
            state,
        )
    with share_of_cores():
        threads = torch.get_num_threads()
    chosen = hashlib.sha256(json.dumps(report.head_groups).encode()).hexdigest()[:16]
    return {
        "layers": config.num_hidden_layers,
        "seconds": seconds,
        "tokens": report.tokens,
        "groups": sorted(set(gather_object([chosen]))),
        "peak_bytes": gather_object([peak_memory()]),
        "threads": threads,
        "search_seconds": report.search_seconds,
        "stages": report.seconds,
    }


def recovery(args: argparse.Namespace, state: PartialState) -> dict:
    """Train a model under DDP as recovery_speed.py trains it; seconds are the median step's of the slowest rank."""
    options = recovery_options(args)
    found = recovery_speed.measure(options)
    steps = gather_object([found["step_seconds"]])
    return {
        "layers": recovery_speed.llama_config(options).num_hidden_layers,
        "seconds": max(steps),
        "tokens": args.batch * args.length * state.num_processes,
        "peak_bytes": gather_object([found["peak_bytes"]]),
        "first_step_seconds": found["first_step_seconds"],
        "losses": found["losses"],
    }


def recovery_options(args: argparse.Namespace) -> argparse.Namespace:
    """Those of recovery_speed.py, for the distilled arm."""
    words = ["--arm", recovery_speed.TARGET, "--device", args.device, "--shape", args.shape]
    for name in ("hidden", "vocab", "layers", "rank", "batch", "length", "documents", "steps", "warmup"):
        value = getattr(args, name)
        if value is not None:
            words += [f"--{name}", str(value)]
    if args.compile:
        words.append("--compile")
    return recovery_speed.parse_args(words)


def timed(call: Callable[[], object], device: str, state: PartialState) -> tuple[object, float]:
    """The call's result, and the seconds until all ranks that began together have come back from it."""
    shapes.synchronize(device)
    state.wait_for_everyone()
    start = time.perf_counter()
    result = call()
    shapes.synchronize(device)
    state.wait_for_everyone()
    return result, time.perf_counter() - start


PARTS = {"initialization": initialization, "recovery": recovery}


# -------------------------------------------------------------------------------------------------------- the table


def table(rows: list[dict]) -> list[dict]:
    """A row per part and number of ranks, beside the part's row of fewest ranks."""
    found = []
    for row in rows:
        first = next(other for other in rows if other["part"] == row["part"])
        # The same tokens in less time, or more tokens in the same.
        rate, first_rate = row["tokens"] / row["seconds"], first["tokens"] / first["seconds"]
        speed_up = rate / first_rate
        same = None
        if "groups" in row:
            same = row["groups"] == first["groups"] and len(row["groups"]) == 1
        found.append(
            {
                "part": row["part"],
                "ranks": row["ranks"],
                "seconds": row["seconds"],
                "tokens/s": rate,
                "speed-up": speed_up,
                "efficiency": speed_up * first["ranks"] / row["ranks"],
                "same groups": same,
                "peak GiB per rank": max(row["peak_bytes"]) / 2**30,
                "threads per rank": row.get("threads"),
            }
        )
    return found


def checks(found: list[dict]) -> dict[str, bool]:
    """Targets, and whether each is met, of each part's rows after its first."""
    met = {}
    for before, row in pairwise(found):
        if row["part"] != before["part"]:
            continue
        name = f"{row['part']} on {row['ranks']} ranks"
        if row["part"] == "recovery":
            met[f"{name}: at least {EFFICIENCY:.0%} of so many times the speed"] = row["efficiency"] >= EFFICIENCY
        else:
            met[f"{name}: the same groups"] = row["same groups"]
            met[f"{name}: faster than on {before['ranks']}"] = row["seconds"] < before["seconds"]
    return met


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4], help="numbers of ranks")
    parser.add_argument("--side-by-side", action="store_true", help="measure at the same time where there are GPUs")
    recovery_speed.add_model_options(parser)
    parser.add_argument("--length", type=int, default=2048, help="tokens per block or sequence")
    parser.add_argument("--batch", type=int, default=4, help="blocks per batch, and sequences per rank and step")
    parser.add_argument("--blocks", type=int, default=128, help="calibration blocks in all")
    parser.add_argument("--documents", type=int, default=700, help="mean length of the documents of the recovery")
    parser.add_argument("--compile", action="store_true", help="compile the layers of the recovery")
    parser.add_argument("--steps", type=int, default=16, help="timed steps of the recovery")
    parser.add_argument("--warmup", type=int, default=4, help="steps before the timed ones")
    parser.add_argument("--timeout", type=float, default=300, help="seconds that a group of processes may take")
    parser.add_argument("--out", type=Path, help="file that a JSON line is added to after each part")
    parser.add_argument("--device", choices=["cuda", "cpu"], default=shapes.default_device())
    # Set when the script calls itself.
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.blocks < args.batch * max(args.ranks):
        parser.error(f"--blocks {args.blocks}: each of {max(args.ranks)} ranks needs a batch of {args.batch}.")
    args.ranks = sorted(set(args.ranks))
    return args


if __name__ == "__main__":
    main()
