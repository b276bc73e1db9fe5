"""Where a run goes on: the last whole checkpoint, never a half-written one; and what checkpoints will take on disk."""

from __future__ import annotations

import json
import math
import re
import shutil
import warnings
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import SaveStrategy
from trl import SFTConfig

BYTES_PER_PARAMETER = 16
"""Of a checkpoint per trained parameter: float32 weights, AdamW's two moments, and the second copy FSDP writes."""

# How one device or DDP, FSDP and DeepSpeed call it.
_OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer_0", "global_step*")
_ZIPPED = (".pt", ".pth", ".bin")


def checkpoint_to_resume(training: SFTConfig) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` asks for, or None for a start from the beginning.

    "true" is the last whole checkpoint of `output_dir`, or the beginning if there is none: a job that is restarted
    with the same command goes on. Half-written checkpoints found on the way are renamed, with a warning.

    Raises:
        SystemExit: for a path that is no whole checkpoint, a checkpoint of another number of processes, or if the run
            would write over whole checkpoints that it does not follow.
    """
    wanted = str(training.resume_from_checkpoint or "false")
    found = _checkpoints(Path(training.output_dir))
    if wanted.lower() == "true":
        for checkpoint in found:
            defect = _defect(checkpoint, training.world_size)
            if defect is None:
                return checkpoint
            # Renamed, so that nothing is ever written into what is left.
            aside = checkpoint.with_name(f"incomplete-{checkpoint.name}")
            warnings.warn(f"{checkpoint} is not whole ({defect}): renamed {aside.name}, not used.", stacklevel=2)
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.rename(aside)
        return None
    start, step = None, -1
    if wanted.lower() != "false":
        start = Path(wanted)
        step = _step(start)
        defect = _defect(start, training.world_size)
        if defect is not None:
            raise SystemExit(
                f"resume_from_checkpoint={wanted} is no whole checkpoint: {defect}. Pass true for the last."
            )
    # The last one comes first: it alone tells whether any lies behind the start.
    if found and _step(found[0]) > step:
        raise SystemExit(
            f"{found[0]} is of an earlier run, which this one would mix with: continue it with "
            "--resume_from_checkpoint true, remove it, or choose another --output_dir."
        )
    return start


def is_finished(checkpoint: Path, training: SFTConfig) -> bool:
    """Whether all steps had been done there. The Trainer, resumed, would do one more."""
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    steps = state.max_steps
    if training.max_steps > 0:
        steps = training.max_steps
    return state.global_step >= steps


def checkpoint_bytes(training: SFTConfig, trained_parameters: int) -> int:
    """What the checkpoints of a run take at its fullest moment: a new one is written before an old one goes."""
    if training.save_strategy == SaveStrategy.NO:
        return 0
    saves = training.num_train_epochs
    if training.save_strategy == SaveStrategy.STEPS:
        if training.max_steps <= 0:
            # A lower bound: how many there will be depends on the data.
            saves = 1
        elif training.save_steps >= 1:
            saves = training.max_steps / training.save_steps
        else:
            # A share of all steps.
            saves = 1 / training.save_steps
    # While one is written, one more than the limit lies there.
    kept = min(math.ceil(saves), (training.save_total_limit or math.inf) + 1)
    return kept * BYTES_PER_PARAMETER * trained_parameters


def held_bytes(folder: Path) -> int:
    """What the checkpoints of a folder take already."""
    size = 0
    for checkpoint in _checkpoints(folder):
        for file in checkpoint.rglob("*"):
            if file.is_file():
                size += file.stat().st_size
    return size


def _checkpoints(folder: Path) -> list[Path]:
    """Last first."""
    found = [path for path in folder.glob("checkpoint-*") if _step(path) >= 0]
    return sorted(found, key=_step, reverse=True)


def _step(checkpoint: Path) -> int:
    """The step that a folder is named after, -1 for other names."""
    match = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    if match is None:
        return -1
    return int(match.group(1))


def _defect(checkpoint: Path, processes: int) -> str | None:
    """What a checkpoint lacks, or None. Raises SystemExit if other processes than these wrote it.

    A process writes its files one after another, the first one trainer_state.json at the very end; only the other
    processes' random states may come later. A folder that was copied or ran into a full disk may lack anything.
    """
    states = ["rng_state.pth"]
    if processes > 1:
        states = [f"rng_state_{rank}.pth" for rank in range(processes)]
    if {file.name for file in checkpoint.glob("rng_state*.pth")} - set(states):
        raise SystemExit(f"{checkpoint} was not written by {processes} processes: resume with as many as wrote it.")
    for name in ("adapter_config.json", "adapter_model.safetensors", *states, TRAINER_STATE_NAME):
        if not (checkpoint / name).is_file():
            if processes > 1 and name in states:
                return f"{name} is missing, or fewer processes wrote it"
            return f"{name} is missing"
    if not any(any(checkpoint.glob(pattern)) for pattern in _OPTIMIZERS):
        return "the optimizer's state is missing"
    for file in sorted(checkpoint.iterdir()):
        if not _is_complete(file):
            return f"{file.name} is cut off"
    return None


def _is_complete(file: Path) -> bool:
    """Whether a file ends where its format says; formats that do not say are taken as they are."""
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt"):
                return True
        except SafetensorError:
            return False
    if file.suffix == ".json":
        try:
            json.loads(file.read_text(encoding="utf-8"))
            return True
        # Where a character of several bytes is cut, reading raises one of these, too.
        except ValueError:
            return False
    return file.suffix not in _ZIPPED or zipfile.is_zipfile(file)
