r"""Perplexity after recovery by arm and ratio, beside the MHA model after the same training.

    python recipes/benchmarks/recovery.py --model DIR --text train.txt.xz --calibration validation.txt.xz \
        --held-out held_out.txt.xz --tokens 8e6
    python recipes/benchmarks/recovery.py --tokens 2e5 --ratios 4         # the bundled model, minutes on a CPU
    python recipes/benchmarks/recovery.py ... --sweep                     # learning rates, on the calibration text

Every arm gets the same tokens in the same order. "control" is the MHA model with plain LoRA trained on the text, its
number the best that this much training can be expected to keep. --sweep trains the default arm with each learning rate
and each scale of the K/V rate and measures on the calibration text's last blocks: choices are made there. --bits also
measures with the cache rounded as quality_per_byte.py does, which reads the result. Interrupted, it goes on where it
stopped; processes with other options may share --output.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from asymgqa_peft import AsymGQAConfig, initialize_asymgqa_weights
from asymgqa_peft.evaluate import kv_cache_bytes_per_token, perplexity
from recipes.benchmarks import shapes
from recipes.benchmarks.initialization import model_and_texts, read
from recipes.benchmarks.quality_per_byte import BITS, quantised_perplexity, recovered_column
from recipes.experiments import ARMS, OURS, Cells, arm_config, distilled, train
from recipes.reporting import print_report
from recipes.stdlib_text import held_out_texts, token_blocks, training_texts, validation_texts

CONTROL = "control: MHA, SFT"
Cell = tuple[dict, Callable[[], dict]]
"""What identifies a run, and how it is measured."""
SWEEP_BLOCKS = 48
"""Blocks at the end of the calibration text that a sweep measures on."""


def main(arguments: list[str] | None = None) -> list[dict]:
    """Run what is missing and print the table."""
    args = parse_args(arguments)
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def blocks(path: Path | None, bundled) -> torch.Tensor:
        return token_blocks(read(path) or bundled(args.stdlib), tokenizer, args.block_size)

    calibration, text = blocks(args.calibration, validation_texts), blocks(args.text, training_texts)
    measured = blocks(args.held_out, held_out_texts)
    if args.sweep:
        # The held-out text must not choose learning rates.
        calibration, measured = calibration[:-SWEEP_BLOCKS], calibration[-SWEEP_BLOCKS:]
    measured = measured[: args.held_out_blocks].split(args.batch_size)
    run = Run(args, tokenizer, text, calibration, measured)
    folder, cells_of_seed = "runs", run.comparison
    if args.sweep:
        folder, cells_of_seed = "sweep", run.sweep
    cells = Cells(args.output / folder)
    cells.get({"ratio": "1:1", "arm": "base", "seed": 0}, run.base)
    for seed in args.seeds:
        for key, measure in cells_of_seed(seed):
            cells.get(key, measure)
    rows = with_ratio_to_base(cells.all())
    print_report(rows, args.device, arguments=vars(args))
    return rows


class Run:
    """The data and options that all cells share."""

    def __init__(self, args: argparse.Namespace, tokenizer, text, calibration, measured):
        self.args, self.tokenizer, self.text = args, tokenizer, text
        self.calibration, self.measured = calibration, measured

    def comparison(self, seed: int) -> Iterator[Cell]:
        """The control and every arm at every ratio, with the first rate and scale."""
        args = self.args
        if args.control:
            yield {"ratio": "1:1", "arm": CONTROL, "seed": seed}, partial(self.control, seed)
        for ratio, arm in itertools.product(args.ratios, args.arms):
            rate = args.sft_rate
            if distilled(arm):
                rate = args.rates[0]
            key = {"ratio": f"{ratio}:1", "arm": arm, "seed": seed}
            yield key, partial(self.convert, arm, ratio, seed, rate, args.scales[0])

    def sweep(self, seed: int) -> Iterator[Cell]:
        """The default arm with every rate and scale."""
        for ratio, rate, scale in itertools.product(self.args.ratios, self.args.rates, self.args.scales):
            key = {"ratio": f"{ratio}:1", "arm": OURS, "seed": seed, "rate": rate, "scale": scale}
            yield key, partial(self.convert, OURS, ratio, seed, rate, scale)

    def load(self) -> torch.nn.Module:
        """The base in float32 on the device."""
        return AutoModelForCausalLM.from_pretrained(self.args.model, dtype=torch.float32).to(self.args.device).eval()

    def base(self) -> dict:
        """The untouched base."""
        model = self.load()
        return {"KV bytes/token": kv_bytes(model), "no training": perplexity(model, self.measured)}

    def control(self, seed: int) -> dict:
        """The base with plain LoRA on all linear layers after the same tokens."""
        base = self.load()
        size = kv_bytes(base)
        lora = LoraConfig(r=self.args.rank, lora_alpha=self.args.rank, target_modules="all-linear")
        model = get_peft_model(base, lora)
        # Plain text, no distillation: it has no other model to learn from.
        losses = self.train(model, seed, self.args.sft_rate, 0.0, 1.0)
        return {"KV bytes/token": size, "recovered": perplexity(model, self.measured), "losses": losses}

    def convert(self, arm: str, ratio: int, seed: int, rate: float, scale: float) -> dict:
        """One arm at one ratio: initialised, measured, recovered, measured."""
        base, args = self.load(), self.args
        groups = base.config.num_key_value_heads // ratio
        options = {"r": args.rank, "lora_alpha": args.rank, "seed": seed, "task_type": "CAUSAL_LM"}
        model = get_peft_model(base, AsymGQAConfig(num_key_value_heads=groups, **options, **arm_config(arm)))
        chosen = torch.randperm(len(self.calibration), generator=torch.Generator().manual_seed(seed))
        batches = self.calibration[chosen[: args.calibration_blocks]].split(args.batch_size)
        initialize_asymgqa_weights(model, batches, progress=False)
        before = perplexity(model, self.measured)
        start = time.perf_counter()
        losses = self.train(model, seed, rate, float(distilled(arm)), scale)
        result = {
            "KV bytes/token": kv_bytes(model),
            "no training": before,
            "recovered": perplexity(model, self.measured),
        }
        for bits in args.bits:
            result[recovered_column(bits)] = quantised_perplexity(model, self.measured, bits)
        return result | {"seconds": time.perf_counter() - start, "losses": losses}

    def train(self, model, seed: int, rate: float, weight: float, scale: float) -> list[float]:
        """`--tokens` tokens of the text, blocks in a seeded order, repeated if there are too few."""
        args = self.args
        steps = max(1, int(args.tokens) // (args.batch_size * args.block_size))
        # The same order for every arm of a seed.
        order = torch.randperm(len(self.text), generator=torch.Generator().manual_seed(seed))
        chosen = order.repeat(-(-steps * args.batch_size // len(order)))[: steps * args.batch_size]
        ids = self.text[chosen].tolist()
        losses = train(
            model,
            self.tokenizer,
            Dataset.from_dict({"input_ids": ids, "labels": ids}),
            steps=steps,
            batch_size=args.batch_size,
            learning_rate=rate,
            seed=seed,
            distillation_weight=weight,
            kv_learning_rate_scale=scale,
        )
        model.eval()
        return losses


def kv_bytes(model) -> int:
    """KV cache in 16 bits."""
    return kv_cache_bytes_per_token(model, torch.bfloat16)


def with_ratio_to_base(cells: list[dict]) -> list[dict]:
    """The cells as rows, best known order, each with its perplexity over the base's."""
    base = next(cell["no training"] for cell in cells if cell["arm"] == "base")
    order = ["base", CONTROL, *ARMS]
    cells.sort(key=lambda cell: (cell["ratio"], order.index(cell["arm"]), str(sorted(cell.items()))))
    recovered = [recovered_column(bits) for bits in sorted(BITS, reverse=True)]
    columns = ("ratio", "arm", "seed", "rate", "scale", "KV bytes/token", "no training", *recovered)
    known = set().union(*cells)
    rows = []
    for cell in cells:
        row = {}
        for name in columns:
            if name in known:
                row[name] = cell.get(name)
        row["x base"] = None
        if "recovered" in cell:
            row["x base"] = cell["recovered"] / base
        rows.append(row)
    return rows


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = model_and_texts(__doc__)
    parser.add_argument("--text", type=Path, help="text to train on (default: the bundled model's training modules)")
    parser.add_argument("--output", type=Path, default=Path("out/recovery"), help="folder of the results")
    parser.add_argument("--device", default=shapes.default_device())
    parser.add_argument("--tokens", type=float, default=8e6, help="tokens of recovery")
    parser.add_argument("--ratios", type=int, nargs="*", default=[2, 4, 8], help="base KV heads per shared head")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--no-control", dest="control", action="store_false", help="leave out the MHA control")
    parser.add_argument("--sweep", action="store_true", help="compare --rates and --scales on the calibration text")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3], help="learning rates; the first is used")
    parser.add_argument("--scales", type=float, nargs="+", default=[0.5], help="K/V rates relative to it, likewise")
    parser.add_argument("--sft-rate", type=float, default=1e-3, help="learning rate of arms without distillation")
    parser.add_argument(
        "--bits", type=int, nargs="*", choices=BITS[1:], default=[], help="also round the cache to them"
    )
    parser.add_argument("--rank", type=int, default=64, help="LoRA rank")
    parser.add_argument("--calibration-blocks", type=int, default=128)
    parser.add_argument("--held-out-blocks", type=int, help="measure on the first of them only")
    parser.add_argument("--block-size", type=int, default=512, help="tokens per block")
    parser.add_argument("--batch-size", type=int, default=32, help="blocks per step")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
