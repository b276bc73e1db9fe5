r"""What the adapter costs in training: forward and step against plain PEFT LoRA of the same rank on the same base.

    python recipes/benchmarks/overhead.py --device cuda                # four layers of Llama-2-7B, 2 x 2048 tokens
    python recipes/benchmarks/overhead.py --device cpu                 # the bundled model, 8 x 512 tokens

A step is forward, backward and AdamW without a cache, with and without gradient checkpointing. Arms: equal groups,
unequal groups (the largest of 1.5 times the mean) as the adapter runs them, and the same with its padded slots, which
it uses where there is a cache. Arms take turns, and the median counts, so that a busy machine disturbs all alike.
Memory is the peak that one arm adds, its model included. The floor is the FLOPs of the base's own products and
attention at the measured ceiling. Both layouts must give the same logits. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from asymgqa_peft import AsymGQAConfig
from asymgqa_peft.adapter.site import attention_sites
from recipes.benchmarks import shapes
from recipes.reporting import print_report

RECIPES = Path(__file__).resolve().parents[1]
LORA, EQUAL, WIDE, UNEQUAL, PADDED = (
    "LoRA",
    "equal groups",
    "half the groups, twice as wide",
    "unequal groups",
    "unequal groups, padded slots",
)
DEFAULTS = {
    "cuda": {"batch": 2, "length": 2048, "checkpointing": [0, 1]},
    "cpu": {"batch": 8, "length": 512, "checkpointing": [0]},
}
LIMITS = {"cuda": {"time": 1.10, "memory": 1.10}, "cpu": {"time": 1.20}}
TOLERANCE = {torch.bfloat16: 5e-2, torch.float32: 1e-4}


def main(arguments: list[str] | None = None) -> list[dict]:
    """Measure every arm and print the table and the JSON line."""
    args = parse_args(arguments)
    limits, rows = shapes.ceilings(args.device), []
    base = load_base(args)
    inputs = torch.randint(base.config.vocab_size, (args.batch, args.length), device=args.device)
    error = layouts_differ(base, inputs[:1, :64], args)
    for checkpointing in args.checkpointing:
        arms = {}
        for name, build in builders(base.config, args).items():
            try:
                arms[name] = Arm(build(copy.deepcopy(base)), inputs, checkpointing, args.device)
            except torch.OutOfMemoryError:
                print(f"{name}: out of memory", flush=True)
        # Arms take turns: what slows the machine for a while slows all of them.
        for _ in range(args.steps):
            for arm in arms.values():
                arm.measure()
        floors = floor_seconds(base, inputs, checkpointing, limits)
        for name, arm in arms.items():
            rows.append(row(name, arm, arms[LORA], checkpointing, floors))
            print(rows[-1], flush=True)
        # The next round's models need the memory.
        arms.clear()
    checks = within_limits(rows, LIMITS[args.device])
    shapes.print_checks(checks)
    print_report(rows, args.device, ceilings=limits, checks=checks, layouts_error=error, arguments=vars(args))
    return rows


def load_base(args: argparse.Namespace) -> nn.Module:
    """The base in eval mode: a random Llama on a GPU, the bundled model on a CPU."""
    if args.device == "cuda":
        return shapes.random_llama(shapes.shape_config(args.shape, args.layers), args.device, torch.bfloat16)
    return AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()


def builders(config, args: argparse.Namespace) -> dict[str, Callable[[nn.Module], PeftModel]]:
    """Arm -> what wraps the base."""
    lora = {"r": args.rank, "lora_alpha": args.rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    groups = args.groups or config.num_key_value_heads // 4
    partition = shapes.unequal_groups(config.num_key_value_heads, groups)
    equal = AsymGQAConfig(num_key_value_heads=groups, **lora)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    wide = AsymGQAConfig(num_key_value_heads=groups // 2, head_dim=2 * dim, **lora)
    unequal = AsymGQAConfig(num_key_value_heads=groups, head_groups=[partition] * config.num_hidden_layers, **lora)
    return {
        LORA: lambda base: get_peft_model(base, LoraConfig(**lora)),
        EQUAL: lambda base: get_peft_model(base, equal),
        WIDE: lambda base: get_peft_model(base, wide),
        UNEQUAL: lambda base: get_peft_model(base, unequal),
        PADDED: lambda base: always_padded(get_peft_model(base, unequal)),
    }


def always_padded(model: PeftModel) -> PeftModel:
    """Show the attention slots, as in evaluation mode, in training too."""
    for site in attention_sites(model):
        for layer in site.shared_layers():
            layer.eval()
            layer.train = partial(_stay, layer)  # whatever mode the model is put into
    return model


def _stay(layer: nn.Module, mode: bool = True) -> nn.Module:
    return layer


@torch.no_grad()
def layouts_differ(base: nn.Module, inputs: torch.Tensor, args: argparse.Namespace) -> float:
    """Largest difference of the two layouts' logits, relative to the largest logit; raises if it is no rounding."""
    model = builders(base.config, args)[UNEQUAL](copy.deepcopy(base)).eval()
    logits = model(input_ids=inputs, use_cache=False).logits
    padded = always_padded(model)(input_ids=inputs, use_cache=False).logits
    error = ((logits - padded).abs().max() / logits.abs().max()).item()
    if error > TOLERANCE[logits.dtype]:
        raise SystemExit(f"the layouts with and without a cache differ by {error:.2g} of the largest logit.")
    return error


class Arm:
    """One wrapped model in training, its clock and its peak of memory."""

    def __init__(self, model: PeftModel, inputs: torch.Tensor, checkpointing: bool, device: str):
        self.model, self.inputs, self.device = model.train(), inputs, device
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5)
        self.forwards, self.steps = [], []
        own = sum(p.numel() * p.itemsize for p in model.parameters())
        before = shapes.reset_peak(device)
        # The first of each loads kernels and makes the optimizer's moments: it sets the peak, not the time.
        self.forward()
        self.step()
        self.peak = shapes.peak_beyond(before, device)
        if self.peak is not None:
            self.peak += own
        self.trainable = sum(parameter.numel() for parameter in trained)

    @torch.no_grad()
    def forward(self) -> None:
        """Without gradients."""
        self.model(input_ids=self.inputs, use_cache=False, logits_to_keep=1)

    def step(self) -> None:
        """Forward, backward, AdamW."""
        self.model(input_ids=self.inputs, labels=self.inputs, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def measure(self) -> None:
        """Time one of each."""
        for call, seconds in ((self.forward, self.forwards), (self.step, self.steps)):
            shapes.synchronize(self.device)
            start = time.perf_counter()
            call()
            shapes.synchronize(self.device)
            seconds.append(time.perf_counter() - start)


def floor_seconds(base: nn.Module, inputs: torch.Tensor, checkpointing: bool, limits: dict[str, float]) -> tuple:
    """Forward without logits, and step, of the frozen base: its products once, and their gradients to activations."""
    config, tokens = base.config, inputs.numel()
    products = sum(p.numel() for name, p in base.named_parameters() if ".layers." in name)
    attention = inputs.shape[1] * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    backbone, head = 2 * tokens * (products + attention), 2 * tokens * config.hidden_size * config.vocab_size
    rate = limits.get("bfloat16 TFLOP/s", limits["float32 TFLOP/s"]) * 1e12
    passes = 2
    if checkpointing:
        # The forward is run again.
        passes += 1
    return backbone / rate, (passes * backbone + 2 * head) / rate


def row(name: str, arm: Arm, lora: Arm, checkpointing: bool, floors: tuple) -> dict:
    """One row of the table; ratios are to plain LoRA."""
    forward, step = median(arm.forwards), median(arm.steps)
    found = {
        "arm": name,
        "checkpointing": "on" if checkpointing else "off",
        "trainable": arm.trainable,
        "forward, ms": forward * 1e3,
        "floor, ms": floors[0] * 1e3,
        "x LoRA": forward / median(lora.forwards),
        "step, ms": step * 1e3,
        "step floor, ms": floors[1] * 1e3,
        "step x LoRA": step / median(lora.steps),
        "peak, GB": None,
        "peak x LoRA": None,
    }
    if arm.peak is not None:
        found |= {"peak, GB": arm.peak / 1e9, "peak x LoRA": arm.peak / lora.peak}
    return found


def within_limits(rows: list[dict], limits: dict[str, float]) -> dict[str, bool]:
    """Targets of both arms of ours, from the worse of the two and of checkpointing on and off."""
    ours = [line for line in rows if line["arm"] in (EQUAL, WIDE, UNEQUAL)]
    checks = {}
    for kind, column in (("time", "step x LoRA"), ("memory", "peak x LoRA")):
        if kind in limits:
            worst = max(line[column] for line in ours)
            checks[f"{kind} of a step at most {limits[kind]} x LoRA's (worst {worst:.3f})"] = worst <= limits[kind]
    return checks


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=LIMITS, default=shapes.default_device())
    parser.add_argument("--shape", choices=shapes.SHAPES, default="llama-2-7b", help="on a GPU")
    parser.add_argument("--layers", type=int, default=4, help="on a GPU")
    parser.add_argument("--model", type=Path, default=RECIPES / "tiny_model", help="on a CPU: folder of an MHA model")
    parser.add_argument("--groups", type=int, help="G (default: a quarter of the base's KV heads)")
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank")
    parser.add_argument("--batch", type=int, help="sequences per step (default: 2 on a GPU, 8 on a CPU)")
    parser.add_argument("--length", type=int, help="tokens per sequence (default: 2048 on a GPU, 512 on a CPU)")
    parser.add_argument("--steps", type=int, default=9, help="timed steps")
    parser.add_argument(
        "--checkpointing", type=int, nargs="+", choices=[0, 1], help="default: 0 1 on a GPU, 0 on a CPU"
    )
    args = parser.parse_args(arguments)
    for name, value in DEFAULTS[args.device].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


if __name__ == "__main__":
    main()
