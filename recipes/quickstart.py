"""The main job on the bundled model: wrap at 4:1, initialise, recover, merge, save, serve - next to classic GQA, which
learns from the text as published, and once more from the base, like ours.

Text is the standard library of the running Python: training modules for recovery, held-out modules for every number in
the table, and for calibration the validation modules, since activations on text that a model knows by heart are not
those it will serve. `bash recipes/quickstart.sh` makes the environment first.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
import transformers
from datasets import Dataset
from peft import get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig

from asymgqa_peft import AsymGQAConfig, AsymGQATrainer, initialize_asymgqa_weights
from asymgqa_peft.evaluate import perplexity
from asymgqa_peft.plotting import plot_groups
from recipes.experiments import OURS, arm_config, distilled
from recipes.folders import replacing
from recipes.reporting import print_report
from recipes.stdlib_text import held_out_texts, token_blocks, training_texts, validation_texts

START = time.monotonic()
RECIPES = Path(__file__).parent


@dataclass(frozen=True)
class Arm:
    """One row of the table.

    Args:
        name: an arm of recipes/experiments.py.
        label: what the table calls it.
        folder: where its plain checkpoint goes, inside `--output`.
        learning_rate: of LoRA's weights; the best of three on the validation modules, after 32 steps.
    """

    name: str
    label: str
    folder: str
    learning_rate: float


ARMS = (
    Arm("neighbour mean, SFT", "classic GQA (neighbour mean, SFT)", "classic", 2e-3),
    Arm("neighbour mean, distilled", "neighbour mean, distilled", "classic_distilled", 2e-3),
    Arm(OURS, "asymmetric, principal, refit, distilled", "plain", 5e-4),
)


def main() -> None:
    args = parse_args()
    quieten()
    stage("Nothing is downloaded: the model and Python's standard library, its text, are here. Tokenising the text")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    train = shuffled(token_blocks(training_texts(), tokenizer, args.block_size), args.seed)
    calibration = token_blocks(validation_texts(), tokenizer, args.block_size)
    calibration = shuffled(calibration, args.seed)[: args.calibration_blocks]
    held_out = token_blocks(held_out_texts(), tokenizer, args.block_size)
    # Every n-th block, so that a part of the held-out text still covers all of its modules.
    held_out = held_out[:: -(-len(held_out) // args.held_out_blocks)].contiguous()
    args.output.mkdir(parents=True, exist_ok=True)
    held_out_file = args.output / "held_out.safetensors"
    save_file({"blocks": held_out}, held_out_file)

    checkpoints = [("MHA (the base)", args.model, None)]
    untrained: dict[str, float] = {}
    for arm in ARMS:
        stage(f"{arm.label}: wrapping the base")
        model = wrap(arm, args)
        if arm.name == OURS:
            stage(f"{arm.label}: choosing groups and merging heads, from {calibration.numel():,} tokens")
            report = initialize_asymgqa_weights(model, calibration.split(8))
            report.save(args.output / "initialization.json")
            picture, _ = plot_groups(report, args.output / "groups")
            print(f"The groups of every layer are drawn in {picture}")
        merge = arm_config(arm.name)["merge"]
        # Both neighbour means begin as the same model: it is measured once.
        if merge not in untrained:
            untrained[merge] = perplexity(model, held_out.split(8))
        stage(f"{arm.label}: recovering from perplexity {untrained[merge]:.4g}, {args.steps} steps")
        recover(model, tokenizer, train, arm, args)
        folder = args.output / arm.folder
        with replacing(folder, overwrite=True) as beside:
            model.merge_and_unload().save_pretrained(beside)
            tokenizer.save_pretrained(beside)
        checkpoints.append((arm.label, folder, untrained[merge]))

    stage(f"Measuring the base and the plain checkpoints without this package, on {held_out.numel():,} tokens")
    measured = serve([folder for _, folder, _ in checkpoints], held_out_file)
    rows = []
    for (label, _, before), served in zip(checkpoints, measured, strict=True):
        rows.append(row(label, served, before))
        stage(f"{label}: perplexity {served['perplexity']:.4g}, {served['decode_tokens_per_s']:,.0f} tokens/s")
    print_report(rows, seed=args.seed, recovery_tokens=args.steps * args.batch_size * args.train_length)
    print(f"The plain checkpoint lies in {folder}")


def stage(text: str) -> None:
    """Say what begins, and how long after the start."""
    print(f"[{time.monotonic() - START:4.0f} s] {text}", flush=True)


def quieten() -> None:
    """Leave out what libraries tell each other and what is over at once: bars of short work, names to come."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


def wrap(arm: Arm, args: argparse.Namespace) -> torch.nn.Module:
    """The bundled model as a PeftModel with one shared K/V head for four."""
    # Here, so that no arm depends on those before it.
    set_seed(args.seed)
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    config = AsymGQAConfig(
        num_key_value_heads=args.kv_heads or base.config.num_attention_heads // 4,
        seed=args.seed,
        task_type="CAUSAL_LM",
        **arm_config(arm.name),
    )
    return get_peft_model(base, config)


def recover(model, tokenizer, blocks: torch.Tensor, arm: Arm, args: argparse.Namespace) -> None:
    """The same few steps for every arm; distilled ones learn from their own base, classic GQA from the text."""
    # Shorter than the blocks: as many tokens in more, cheaper sequences.
    sequences = blocks.reshape(-1, args.train_length)[: args.steps * args.batch_size]
    trainer = AsymGQATrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(args.output / "recovery"),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=arm.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=args.steps // 20,
            max_length=args.train_length,
            gradient_checkpointing=False,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            seed=args.seed,
        ),
        train_dataset=Dataset.from_dict({"input_ids": sequences.tolist()}),
        processing_class=tokenizer,
        distillation_weight=float(distilled(arm.name)),
    )
    trainer.train()


def serve(folders: list[Path], held_out_file: Path) -> Iterator[dict]:
    """Measure plain checkpoints in a process that never imports this package, one result after the other."""
    # A process of its own, so that nothing of this package is loaded there; one, as its imports take seconds.
    command = [sys.executable, str(RECIPES / "serve_plain.py"), *map(str, folders), "--blocks", str(held_out_file)]
    quiet = os.environ | {"TQDM_DISABLE": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=quiet) as process:
        for line in process.stdout:
            yield json.loads(line)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def row(arm: str, served: dict, before: float | None = None) -> dict:
    """One line of the table; `before` is the perplexity between initialisation and recovery."""
    return {
        "model": arm,
        "served as": served["class"],
        "KV heads": served["cache_kv_heads"],
        "KV bytes/token": served["cache_bytes_per_token"],
        "parameters": served["parameters"],
        "perplexity, no training": before,
        "perplexity, recovered": served["perplexity"],
        "decode tokens/s": served["decode_tokens_per_s"],
    }


def shuffled(blocks: torch.Tensor, seed: int) -> torch.Tensor:
    """Blocks in a seeded random order."""
    return blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", type=Path, default=RECIPES / "tiny_model", help="folder of an MHA checkpoint")
    parser.add_argument("--output", type=Path, default=Path("out/quickstart"), help="folder for everything written")
    parser.add_argument("--kv-heads", type=int, help="G, shared K/V heads; default: a quarter of the base's")
    parser.add_argument("--steps", type=int, default=32, help="recovery steps per arm")
    parser.add_argument("--batch-size", type=int, default=16, help="sequences per step")
    parser.add_argument("--train-length", type=int, default=256, help="tokens per sequence of the recovery")
    parser.add_argument("--block-size", type=int, default=512, help="tokens per sequence of calibration and measuring")
    parser.add_argument("--held-out-blocks", type=int, default=72, help="held-out sequences measured, evenly spread")
    parser.add_argument("--calibration-blocks", type=int, default=96, help="sequences read by the initialisation")
    parser.add_argument("--seed", type=int, default=0, help="seed of data order, groups and LoRA")
    return parser.parse_args()


if __name__ == "__main__":
    main()
