r"""An initialisation of a base that the GPU does not hold, against the same of one that it does.

    python recipes/benchmarks/offloaded.py                                                 # Llama-2-7B within 8 GB
    python recipes/benchmarks/offloaded.py --shape llama-2-70b --groups 4 --layers 24 --gpu-memory 24 --only offloaded

The base is initialised whole on the GPU; then its weights wait in main memory, and all but --gpu-memory GB of the GPU
is taken, so that a step that needed more would fail. Weights and tokens are random, as in conversion.py. Both have to
end with the same groups and the same adapter. With --layers a part is initialised, and times are extrapolated to all
layers; it has to fit on the GPU once, where it is made. Prints a JSON line after each, then a table and another one.
"""

from __future__ import annotations

import argparse
import gc
import json
import time

import torch
from accelerate import cpu_offload
from peft import get_peft_model
from torch import Tensor

from asymgqa_peft import AsymGQAConfig, initialize_asymgqa_weights
from recipes.benchmarks import shapes
from recipes.reporting import print_report

TIMES = 2.5
"""Target: seconds of an offloaded initialisation over those of one that the GPU holds."""
ARMS = ("whole", "offloaded")


def main(arguments: list[str] | None = None) -> list[dict]:
    """Initialise the base in each of the ways; one row for each."""
    args = parse_args(arguments)
    config = shapes.shape_config(args.shape, args.layers)
    # What starts up with the first kernels is no part of either.
    initialise("warm-up", made(shapes.shape_config(args.shape, 1), args), args, blocks=args.batch_size)
    base, rows, adapters = made(config, args), [], []
    for arm in args.only or ARMS:
        ballast = None
        if arm == "offloaded":
            base = cpu_offload(base.to("cpu"), execution_device=torch.device(args.device))
            ballast = all_but(args.gpu_memory, args.device)
        row, model = initialise(arm, base, args)
        # With --layers only a part was initialised.
        row["all layers, s"] = row["seconds"] * shapes.SHAPES[args.shape]["num_hidden_layers"] / row["layers"]
        print(json.dumps(row), flush=True)
        rows.append(row)
        adapters.append({name: tensor.cpu() for name, tensor in model.state_dict().items() if "lora_" in name})
        base = model.unload()
        del model, ballast
    shapes.print_checks(checks(rows, adapters, args))
    table = [{name: value for name, value in row.items() if name not in ("groups", "stages")} for row in rows]
    print_report(table, args.device, arms=rows, arguments=vars(args))
    return rows


def made(config, args: argparse.Namespace):
    """A base on the device, with heads that resemble each other in part."""
    base = shapes.random_llama(config, args.device, shapes.working_dtype(args.device))
    shapes.plant_similar_heads(base, sources=min(2 * args.groups, config.num_key_value_heads))
    return base


def all_but(gigabytes: float | None, device: str) -> Tensor | None:
    """What leaves so many GB of the GPU free while it is held; None for all of it, and on a CPU."""
    if gigabytes is None or torch.device(device).type != "cuda":
        return None
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    return torch.empty(max(0, int(free - gigabytes * 1e9)), dtype=torch.uint8, device=device)


def initialise(arm: str, base, args: argparse.Namespace, blocks: int | None = None):
    """Wrap and initialise a base; its row of the table, and the model."""
    config = base.config
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (blocks or args.blocks, args.length), generator=generator)
    torch.manual_seed(0)
    # What the last arm left is no part of this one.
    gc.collect()
    before = shapes.reset_peak(args.device)
    if arm == "whole":
        # Its weights count.
        before = 0
    start = time.perf_counter()
    lora = {"r": args.rank, "lora_alpha": args.rank, "task_type": "CAUSAL_LM"}
    model = get_peft_model(base, AsymGQAConfig(num_key_value_heads=args.groups, **lora))
    wrapped = time.perf_counter()
    report = initialize_asymgqa_weights(model, tokens.split(args.batch_size), progress=False)
    shapes.synchronize(args.device)
    row = {
        "arm": arm,
        "layers": config.num_hidden_layers,
        "wrapping, s": wrapped - start,
        "seconds": time.perf_counter() - wrapped,
        "GPU bytes": shapes.peak_beyond(before, args.device),
        "tokens": report.tokens,
        "groups": report.head_groups,
        "stages": report.seconds,
    }
    return row, model


def checks(rows: list[dict], adapters: list[dict[str, Tensor]], args: argparse.Namespace) -> dict[str, bool]:
    """Targets, and whether each is met; ends the run where the two initialisations differ."""
    met = {}
    if rows[-1]["arm"] == "offloaded" and args.gpu_memory is not None and rows[-1]["GPU bytes"] is not None:
        met[f"within {args.gpu_memory:g} GB of GPU memory"] = rows[-1]["GPU bytes"] <= args.gpu_memory * 1e9
    if len(rows) < 2:
        return met
    whole, offloaded = rows
    offloaded["x whole"] = offloaded["seconds"] / whole["seconds"]
    met[f"at most {TIMES}x the time"] = offloaded["x whole"] <= TIMES
    difference = 0.0
    for name, tensor in adapters[0].items():
        largest = tensor.abs().max().clamp_min(1e-12)
        difference = max(difference, ((adapters[1][name] - tensor).abs().max() / largest).item())
    offloaded["adapters differ by"] = difference
    if whole["groups"] != offloaded["groups"] or difference > 1e-3:
        raise SystemExit(f"the initialisations differ: by {difference} of the largest number, or in their groups.")
    return met


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=shapes.SHAPES, default="llama-2-7b")
    parser.add_argument("--groups", type=int, default=8, help="G")
    parser.add_argument("--layers", type=int, help="initialise only so many; times are extrapolated to all")
    parser.add_argument("--gpu-memory", type=float, default=8.0, help="GB of the GPU that the offloaded arm may use")
    parser.add_argument("--only", nargs="+", choices=ARMS, help="default: both, one after the other")
    parser.add_argument("--blocks", type=int, default=128, help="calibration blocks")
    parser.add_argument("--length", type=int, default=2048, help="tokens per block")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rank", type=int, default=32, help="LoRA rank, which bounds the refit")
    parser.add_argument("--device", default=shapes.default_device())
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
