r"""Perplexity against bytes of KV cache: fewer heads, fewer bits per entry, and both.

    python recipes/benchmarks/quality_per_byte.py                                 # the bundled model, no training
    python recipes/benchmarks/quality_per_byte.py --results recovery.jsonl        # beside recovered arms
    python recipes/benchmarks/quality_per_byte.py --model DIR --adapters out/adapter_8 out/adapter_4

Measured here: the MHA model and its conversions (adapters given, or initialised without training) with a cache of
16, 8 and 4 bits. --results adds the rows of `recovery.py`'s JSON line. Quantisation is simulated: every entry
that goes into the cache is rounded to its grid and back, keys per channel over blocks of 32 tokens, values per token
over 32 channels (KIVI, Liu et al., arXiv 2402.02750), with a 16-bit scale and minimum per block; no recent tokens are
spared. Bytes count those, too. Prints every point, the best one at each budget, and one JSON line; --plot draws them.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from asymgqa_peft import AsymGQAConfig, initialize_asymgqa_weights
from asymgqa_peft.evaluate import cache_argument, kv_cache_bytes_per_token, perplexity
from asymgqa_peft.tables import markdown_table
from recipes.benchmarks import shapes
from recipes.benchmarks.initialization import read
from recipes.reporting import print_report
from recipes.stdlib_text import held_out_texts, token_blocks, validation_texts

RECIPES = Path(__file__).resolve().parents[1]
BITS = (16, 8, 4)
BLOCK = 32
BUDGETS = (1.0, 0.5, 0.25, 0.125, 0.0625)
"""Shares of the MHA model's 16-bit cache."""


def main(arguments: list[str] | None = None) -> list[dict]:
    """Measure all points and print them, the choice at each budget and the JSON line."""
    args = parse_args(arguments)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device).eval()
    calibration = token_blocks(read(args.calibration) or validation_texts(args.stdlib), tokenizer, args.block_size)
    held_out = token_blocks(read(args.held_out) or held_out_texts(args.stdlib), tokenizer, args.block_size)
    held_out = held_out[: args.held_out_blocks].split(args.batch_size)
    points = list(read_results(args.results))
    for arm, model in models(base, calibration, args):
        check_cache(model, held_out[:1])
        for bits in args.bits:
            point = {
                "arm": f"{arm}, {bits} bits",
                "kv_bytes_per_token": kv_bytes(model, bits),
                "perplexity": quantised_perplexity(model, held_out, bits),
            }
            points.append(point)
            print(point, flush=True)
    full = kv_bytes(base, 16)
    points.sort(key=lambda point: (-point["kv_bytes_per_token"], point["perplexity"]))
    rows = []
    for point in points:
        rows.append({**point, "share of MHA": point["kv_bytes_per_token"] / full})
    choices = [best_within(points, budget, full) for budget in BUDGETS]
    print(f"\nthe best at each budget\n{markdown_table(choices, aligned=True)}\n", flush=True)
    if args.plot:
        from asymgqa_peft.plotting import plot_quality

        lines = []
        for point in points:
            lines.append(point | {"arm": line_of(point["arm"])})
        print("drawn: " + ", ".join(map(str, plot_quality(lines, args.plot))), flush=True)
    print_report(rows, args.device, choices=choices, arguments=vars(args))
    return rows


def models(base: nn.Module, calibration: Tensor, args: argparse.Namespace) -> Iterator[tuple[str, nn.Module]]:
    """The MHA model, then each conversion."""
    yield "MHA", base
    for folder in args.adapters:
        model = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
        yield f"{folder.name} (G {model.active_peft_config.num_key_value_heads})", model
    if args.adapters:
        return
    for ratio in args.ratios:
        groups = base.config.num_key_value_heads // ratio
        config = AsymGQAConfig(num_key_value_heads=groups, r=args.rank, lora_alpha=args.rank, task_type="CAUSAL_LM")
        model = get_peft_model(copy.deepcopy(base), config).eval()
        # As initialization.py does with calibration seed 0.
        chosen = torch.randperm(len(calibration), generator=torch.Generator().manual_seed(0))
        batches = calibration[chosen[: args.blocks]].split(args.batch_size)
        initialize_asymgqa_weights(model, batches, progress=False)
        yield f"ours {ratio}:1, no training", model


def line_of(arm: str) -> str:
    """The line of the plot that a point lies on: MHA's widths make one, a conversion's ratios one per width."""
    # With it comes trl, which only a plot has to wait for.
    from recipes.experiments import OURS

    if arm.startswith("MHA"):
        return "MHA, quantised"
    name, _, widths = arm.partition(", ")
    if name.startswith("ours "):
        return f"ours, {widths}"
    return arm.replace(OURS, "ours, recovered")


# ------------------------------------------------------------------------------------------ the quantised cache


class SimulatedQuantisedCache(DynamicCache):
    """A cache whose entries have been rounded to a grid of 2**bits values and back; 16 bits leave them alone."""

    def __init__(self, bits: int):
        super().__init__()
        self.bits = bits

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        """Keys and values (B, heads, T, D), rounded, behind those of before."""
        if self.bits < 16:
            # Keys per channel: a few of them are large at every position.
            key_states = rounded(key_states.mT, self.bits).mT
            value_states = rounded(value_states, self.bits)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def rounded(states: Tensor, bits: int) -> Tensor:
    """Blocks of BLOCK entries of the last axis on 2**bits evenly spaced values from their least to their largest.

    The last block may be shorter. The scale and the least value are rounded to 16 bits, as they would be stored.
    """
    length = states.shape[-1]
    # A short block is filled up with its last entry, which changes neither its least nor its largest.
    last = states[..., -1:].expand(*states.shape[:-1], -length % BLOCK)
    blocks = torch.cat((states, last), dim=-1).unflatten(-1, (-1, BLOCK))
    least = blocks.amin(-1, keepdim=True).to(torch.float16).to(states.dtype)
    scale = ((blocks.amax(-1, keepdim=True) - least) / (2**bits - 1)).to(torch.float16).to(states.dtype)
    levels = ((blocks - least) / scale.clamp_min(torch.finfo(torch.float16).tiny)).round().clamp(0, 2**bits - 1)
    return (least + levels * scale).flatten(-2)[..., :length]


def kv_bytes(model: nn.Module, bits: int) -> float:
    """Bytes of cache per token, scales and minima of 16 bits included."""
    return quantised_bytes(kv_cache_bytes_per_token(model, torch.bfloat16), bits)


def quantised_bytes(unrounded: float, bits: int) -> float:
    """Bytes of a cache that takes `unrounded` in 16 bits."""
    if bits == 16:
        return unrounded
    scale_and_least = 32 / BLOCK
    return unrounded * (bits + scale_and_least) / 16


@torch.no_grad()
def quantised_perplexity(model: nn.Module, batches, bits: int) -> float:
    """exp of the mean next-token cross-entropy, every position attending to the cache's own rounded entries."""
    total, count = 0.0, 0
    for ids in batches:
        ids = ids.to(model.device)
        logits = model(input_ids=ids, use_cache=True, **{cache_argument(model): SimulatedQuantisedCache(bits)}).logits[
            :, :-1
        ]
        losses = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        total, count = total + losses.double().sum().item(), count + losses.numel()
    return math.exp(total / count)


def check_cache(model: nn.Module, batches) -> None:
    """At 16 bits the cache must change nothing."""
    with_cache, without = quantised_perplexity(model, batches, 16), perplexity(model, batches)
    if abs(with_cache / without - 1) > 1e-3:
        raise SystemExit(f"the cache alone changes the perplexity from {without} to {with_cache}.")


# ------------------------------------------------------------------------------------------- points and choices


def recovered_column(bits: int) -> str:
    """What recovery.py calls the perplexity after recovery with a cache of so many bits."""
    return named_with_bits("recovered", bits)


def named_with_bits(name: str, bits: int) -> str:
    """What is measured with the cache as it is keeps its name."""
    if bits == 16:
        return name
    return f"{name}, {bits} bits"


def read_results(path: Path | None) -> Iterator[dict]:
    """Points of the recovered arms in a file of JSON lines, seeds averaged."""
    if path is None:
        return
    found: dict[tuple, list[float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        # recovery.py prints a table before its JSON line.
        if not line.startswith("{"):
            continue
        for row, bits in itertools.product(json.loads(line).get("rows", []), BITS):
            value = row.get(recovered_column(bits))
            if value:
                point = (named_with_bits(row["arm"], bits), row["KV bytes/token"], bits)
                found.setdefault(point, []).append(value)
    if not found:
        raise SystemExit(f"--results {path} holds no recovered arm: give what recovery.py printed.")
    for (arm, size, bits), values in found.items():
        yield {"arm": arm, "kv_bytes_per_token": quantised_bytes(size, bits), "perplexity": fmean(values)}


def best_within(points: list[dict], budget: float, full: float) -> dict:
    """The point of least perplexity within a share of the MHA model's 16-bit cache."""
    within = [point for point in points if point["kv_bytes_per_token"] <= budget * full]
    best = min(within, key=lambda point: point["perplexity"], default={})
    choice = {"budget, share of MHA": budget, "bytes": budget * full}
    for name in ("arm", "kv_bytes_per_token", "perplexity"):
        choice[name] = best.get(name)
    return choice


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=RECIPES / "tiny_model", help="folder of an MHA model")
    parser.add_argument("--adapters", type=Path, nargs="*", default=[], help="folders of trained adapters on it")
    parser.add_argument("--results", type=Path, help="file with the JSON line of recovery.py")
    parser.add_argument("--calibration", type=Path, help="text to calibrate on (default: the validation modules)")
    parser.add_argument("--held-out", type=Path, help="text to measure on (default: the held-out modules)")
    parser.add_argument("--stdlib", type=Path, help="folder of another Python's standard library to read")
    parser.add_argument("--plot", type=Path, help="draw the points there, as PNG and SVG")
    parser.add_argument("--device", default=shapes.default_device())
    parser.add_argument("--ratios", type=int, nargs="+", default=[2, 4, 8], help="without --adapters: heads per group")
    parser.add_argument("--bits", type=int, nargs="+", choices=BITS, default=list(BITS))
    parser.add_argument("--blocks", type=int, default=128, help="calibration blocks")
    parser.add_argument("--block-size", type=int, default=512, help="tokens per block")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rank", type=int, default=64, help="LoRA rank")
    parser.add_argument("--held-out-blocks", type=int, help="measure on the first of them only")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
