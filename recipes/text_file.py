"""Text files, plain or compressed."""

from __future__ import annotations

import lzma
from pathlib import Path


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file; one that ends in .xz is decompressed."""
    opened = open
    if Path(path).suffix == ".xz":
        opened = lzma.open
    with opened(path, "rt", encoding="utf-8") as file:
        return file.read()
