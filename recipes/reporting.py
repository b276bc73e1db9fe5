"""What every recipe prints: a table for people, one JSON object for programs, and where the numbers come from."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "transformers", "peft", "trl", "datasets", "accelerate")


def format_table(rows: Sequence[Mapping[str, object]]) -> str:
    """A Markdown table; its columns are the first row's keys. Floats get four significant digits."""
    columns = list(rows[0])
    cells = [columns] + [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    lines = [[_pad(cell, width) for cell, width in zip(line, widths, strict=True)] for line in cells]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def provenance(device: str | torch.device = "cpu") -> dict[str, object]:
    """Commit, versions and device that a number was measured with."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return {
        "commit": _commit(),
        "device": name,
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
    }


def print_report(rows: Sequence[Mapping[str, object]], device: str | torch.device = "cpu", **extra: object) -> None:
    """Print the table, then everything as one JSON line."""
    print(format_table(rows), flush=True)
    print(json.dumps({**provenance(device), **extra, "rows": list(rows)}), flush=True)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _pad(cell: str, width: int) -> str:
    return cell.rjust(width) if cell[:1].isdigit() or cell == "-" else cell.ljust(width)


def _commit() -> str:
    def git(*words: str) -> str:
        folder = Path(__file__).parent
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
