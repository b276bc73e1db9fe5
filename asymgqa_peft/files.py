"""Files and folders that a reader finds whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_beside(path: str | Path) -> Iterator[Path]:
    """A name beside ``path``, of this process alone, whose file takes its place at the end; nothing stays on an error.

    The folder of ``path`` is made if need be.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def folder_beside(path: str | Path) -> Iterator[Path]:
    """An empty folder beside ``path``, which takes its place at the end; nothing stays on an error.

    What was at ``path`` is removed last: whenever the process is killed, the old folder or the new one is whole on
    disk, for a moment as ``path`` + ".replaced".
    """
    path = Path(path)
    beside, replaced = (path.with_name(path.name + suffix) for suffix in (".partial", ".replaced"))
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
