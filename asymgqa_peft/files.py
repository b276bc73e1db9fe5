"""Files and folders that a reader finds whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_beside(path: str | Path) -> Iterator[Path]:
    """Write a file under a name of its own beside ``path``; at the end it takes the place of ``path``.

    The folder of ``path`` is made if need be. After an error nothing new is left, and ``path`` is as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def save_json(path: str | Path, value: object) -> None:
    """Write JSON, and the folder it goes to if need be; a reader never sees half a file."""
    with written_beside(path) as beside:
        beside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


@contextmanager
def folder_beside(path: str | Path) -> Iterator[Path]:
    """Fill an empty folder beside ``path``; at the end it takes the place of ``path``. After an error it is removed.

    What was at ``path`` is removed last: whenever the process is killed, the old folder or the new one is whole on
    disk, for a moment as ``path`` + ".replaced".
    """
    path = Path(path)
    beside, replaced = path.with_name(path.name + ".partial"), path.with_name(path.name + ".replaced")
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(beside, ignore_errors=True)  # what a killed run left
    beside.mkdir()
    try:
        yield beside
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    if path.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        path.rename(replaced)
    beside.rename(path)
    shutil.rmtree(replaced, ignore_errors=True)
