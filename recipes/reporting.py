"""What every recipe prints: a table for people, one JSON object for programs, and where the numbers come from."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from asymgqa_peft.tables import markdown_table

PACKAGES = ("torch", "transformers", "peft", "trl", "datasets", "accelerate")


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
    print(markdown_table(rows, aligned=True), flush=True)
    print(json.dumps({**provenance(device), **extra, "rows": list(rows)}, default=str), flush=True)


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
