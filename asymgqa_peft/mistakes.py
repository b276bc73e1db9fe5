"""A user's mistake in one line, with the remedy and without a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def in_one_line(subject: str) -> Iterator[None]:
    """Exit with one line, no traceback, where the user's input is at fault."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise SystemExit(f"{subject}: {message_of(error)}") from error


def message_of(error: Exception) -> str:
    """An error's message as one line, and how to log in where the Hub asks for it."""
    message = " ".join(str(error).split())
    response = getattr(error.__cause__, "response", None)
    is_refused = response is not None and response.status_code in (401, 403)
    if is_refused and "hf auth login" not in message:
        message += " Log in with `hf auth login`, as somebody who may read it."
    return message


def model_called(name: str) -> str:
    """A model's name for an error message, which says what was looked for, and where a model might be instead."""
    folder = Path(name)
    if not folder.exists():
        return f"{name} is no folder here, and as a repository"
    inside = [str(folder / part) for part in ("plain", "adapter") if (folder / part).is_dir()]
    if inside:
        return f"{name} is the folder of a run, take {' or '.join(inside)}"
    return name
