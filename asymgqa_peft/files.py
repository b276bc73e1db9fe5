"""Files and folders that a reader finds whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path


@contextmanager
def written_beside(path: str | Path) -> Iterator[Path]:
    """Write a file under a name of its own beside ``path``; at the end it takes the place of ``path``.

    The folder of ``path`` is made if need be. After an error nothing new is left, and ``path`` is as it was.
    """
    path = Path(path)
    with _private_folder_beside(path) as private:
        yield private / path.name
        (private / path.name).replace(path)


def save_json(path: str | Path, value: object) -> None:
    """Write JSON, and the folder it goes to if need be; a reader never sees half a file."""
    with written_beside(path) as beside:
        beside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


@contextmanager
def folder_beside(path: str | Path) -> Iterator[Path]:
    """Fill an empty folder beside ``path``; at the end it takes the place of ``path``. After an error it is removed.

    What was at ``path`` is removed last: whenever the process is killed, the old folder or the new one is whole on
    disk, for a moment in a folder whose name starts as that of ``path``. Of several processes the last one to end
    leaves its folder. The new folder has the old one's permissions.

    Raises:
        ValueError: for a path that no folder can take the place of, before anything is written.
    """
    path = Path(path)
    check_replaceable(path)
    with _private_folder_beside(path) as private:
        beside = private / path.name
        beside.mkdir()
        yield beside
        # Another process may take the old folder away meanwhile.
        with suppress(FileNotFoundError):
            # A temporary folder that nobody else may read stays one.
            beside.chmod(path.stat().st_mode & 0o7777)
        _put_in_place(beside, path)


def _put_in_place(beside: Path, path: Path) -> None:
    for attempt in count():
        replaced = beside.with_name(f"replaced-{attempt}")
        try:
            with suppress(FileNotFoundError):
                path.rename(replaced)
            beside.rename(path)
            return
        except BaseException as error:
            if replaced.exists() and not path.exists():
                # Unless another process has put its folder there by now.
                with suppress(OSError):
                    replaced.rename(path)
            # Another process may have put its folder there between the two.
            if getattr(error, "errno", None) not in (errno.ENOTEMPTY, errno.EEXIST):
                raise


def check_replaceable(path: Path) -> None:
    """Raise ValueError unless a new folder can take the place of ``path``, there or not."""
    reason = None
    if path.name in ("", ".."):
        reason = "has no name of its own: choose a folder inside"
    elif path.is_symlink():
        reason = f"is a symbolic link: give the folder it leads to, {str(path.resolve())!r}"
    elif os.path.ismount(path):  # which, unlike pathlib, bears a folder that goes away meanwhile
        reason = "is a mount point, which cannot be renamed: choose a folder inside"
    elif _is_no_folder(path):
        reason = "is a file"
    if reason is not None:
        raise ValueError(f"folder={str(path)!r} cannot be written, it {reason}.")


def _is_no_folder(path: Path) -> bool:
    """Whether something is there that is no folder; asked once, because another process may take it away."""
    try:
        return not stat.S_ISDIR(path.stat().st_mode)
    except FileNotFoundError:
        return False


@contextmanager
def _private_folder_beside(path: Path) -> Iterator[Path]:
    """A new folder of a unique name beside ``path``, for this user only; it is removed with what it holds.

    What a killed process has left of its own stays, and is told.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f"{path.name}.partial-"
    left = sorted(str(each) for each in path.parent.iterdir() if each.name.startswith(prefix))
    if left:
        warnings.warn(
            f"{', '.join(left)}: left by a process that was killed while it wrote {str(path)!r}, unless one is still "
            "writing. A folder of this name may hold the only whole copy: look into it, then remove it.",
            stacklevel=5,
        )
    private = Path(tempfile.mkdtemp(prefix=prefix, dir=path.parent))
    try:
        yield private
    finally:
        shutil.rmtree(private, ignore_errors=True)
