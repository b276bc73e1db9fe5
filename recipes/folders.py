"""Output folders that are whole or absent, and checked before hours of work go into them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from asymgqa_peft.files import folder_beside


def check_writable(folder: str | Path) -> Path:
    """The folder, made if need be; a full disk or a wrong right is told now and not after the training."""
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        # A full disk shows only when something is written.
        with tempfile.TemporaryFile(dir=path) as probe:
            probe.write(os.urandom(1 << 20))
            probe.flush()
    except OSError as error:
        raise SystemExit(
            f"{folder} cannot be written ({error}): free space there or choose another folder."
        ) from error
    return path


def check_space(folder: Path, needed: int, what: str, remedy: str) -> None:
    """Exit if the disk of a folder has less than `needed` bytes left for `what` will be written."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SystemExit(
            f"{folder} has {free / 1e9:.2f} GB free, the run will write {needed / 1e9:.2f} GB ({what}): free space, "
            f"{remedy}."
        )


@contextmanager
def replacing(folder: Path, overwrite: bool) -> Iterator[Path]:
    """An empty folder beside `folder`, which takes its place at the end, whole or not at all."""
    if folder.exists():
        if not overwrite:
            raise SystemExit(f"--output {folder} exists: --overwrite replaces it.")
        if folder.is_dir() and not _is_saved_model(folder):
            raise SystemExit(f"--output {folder} holds no model: it is not replaced, choose another folder.")
    with ExitStack() as stack:
        try:
            beside = stack.enter_context(folder_beside(folder))
        except (OSError, ValueError) as error:
            raise SystemExit(f"--output {folder} cannot be written: {error}") from error
        yield beside


def _is_saved_model(folder: Path) -> bool:
    """Whether a folder is what a save has written: one of something else is never removed, whatever options say."""
    entries = [entry for entry in folder.iterdir() if entry.name != "additional_chat_templates"]
    names = {entry.name for entry in entries}
    has_config = bool(names & {"config.json", "adapter_config.json"})
    has_weights = any(name.endswith((".safetensors", ".bin")) for name in names)
    return not names or (has_config and has_weights and not any(entry.is_dir() for entry in entries))
