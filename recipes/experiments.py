"""What experiments with many runs share: cells that survive an interrupt, arms, and one way to train."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig

from asymgqa_peft import AsymGQATrainer
from asymgqa_peft.files import save_json

# Published recipes train on text (SFT); the others learn from the untouched base (distillation).
ARMS = {
    "neighbour mean, SFT": {"grouping": "neighbour", "merge": "mean"},
    "random mean, SFT": {"grouping": "random", "merge": "mean"},
    "cosine symmetric mean, SFT": {"grouping": "symmetric", "criterion": "cosine", "merge": "mean"},
    "cosine asymmetric mean, SFT": {"grouping": "asymmetric", "criterion": "cosine", "merge": "mean"},
    "neighbour mean, distilled": {"grouping": "neighbour", "merge": "mean"},
    "residual symmetric aligned, distilled": {"grouping": "symmetric", "merge": "aligned"},
    "residual asymmetric aligned, distilled": {"grouping": "asymmetric", "merge": "aligned"},
    "residual symmetric principal, distilled": {"grouping": "symmetric", "merge": "principal"},
    "residual asymmetric principal, distilled": {"grouping": "asymmetric", "merge": "principal"},
}
OURS = "residual asymmetric principal, distilled"


def distilled(arm: str) -> bool:
    """Whether an arm learns from its own base."""
    return arm.endswith(", distilled")


def arm_config(arm: str) -> dict:
    """The arm's fields of AsymGQAConfig. Only the principal merge refits o_proj; the others are as published."""
    return {**ARMS[arm], "refit_output": ARMS[arm]["merge"] == "principal"}


class Cells:
    """Results of runs, one JSON file each: an interrupted experiment goes on where it stopped, several processes may
    share a folder.

    Args:
        folder: where the files lie; made if absent.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, key: dict, measure: Callable[[], dict]) -> dict:
        """The cell's result, measured if no file has it; a reader never sees half a file."""
        name = "-".join(str(value).replace(",", "").replace(" ", "_").replace(":", "to") for value in key.values())
        path = self.folder / f"{name}.json"
        # Another process may have measured it meanwhile, or an earlier run.
        if not path.exists():
            cell = {**key, **measure()}
            save_json(path, cell)
            print(json.dumps(cell), flush=True)
        return json.loads(path.read_text(encoding="utf-8"))

    def all(self) -> list[dict]:
        """Every result in the folder, those of other processes included."""
        return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(self.folder.glob("*.json"))]


def train(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    distillation_weight: float = 0.0,
    kv_learning_rate_scale: float = 0.5,
    group_by_length: bool = False,
) -> list[float]:
    """Train in place with TRL on rows of input_ids and labels; returns the logged losses, 20 of them at most.

    Cosine schedule, 5 % warm-up; bf16 autocast on CUDA. Checkpoints are not written: a run is minutes.
    `group_by_length` puts rows of like length into a batch, which short sentences otherwise fill with padding.
    """
    on_cuda = next(model.parameters()).is_cuda
    with tempfile.TemporaryDirectory() as scratch:
        trainer = AsymGQATrainer(
            model=model,
            args=SFTConfig(
                output_dir=scratch,
                max_steps=steps,
                per_device_train_batch_size=batch_size,
                learning_rate=learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=max(1, steps // 20),
                # The rows are cut already, and have labels of their own.
                max_length=None,
                gradient_checkpointing=False,
                dataset_kwargs={"skip_prepare_dataset": True},
                logging_steps=max(1, steps // 20),
                save_strategy="no",
                train_sampling_strategy="group_by_length" if group_by_length else "random",
                report_to=[],
                disable_tqdm=True,
                bf16=on_cuda,
                use_cpu=not on_cuda,
                seed=seed,
            ),
            train_dataset=rows,
            processing_class=tokenizer,
            distillation_weight=distillation_weight,
            kv_learning_rate_scale=kv_learning_rate_scale,
        )
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
