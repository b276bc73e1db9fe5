"""What must hold of files before others get them: whole, of this folder, and nothing that runs code when loaded."""

from __future__ import annotations

import json
import pickletools
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub.utils import filter_repo_objects
from safetensors import SafetensorError, safe_open

PICKLED = ["*.bin", "*.ckpt", "*.pickle", "*.pkl", "*.pt", "*.pth"]
"""File types that run code when they are loaded, and are not pushed."""

_RUNS_CODE = {
    "GLOBAL",
    "STACK_GLOBAL",
    "INST",
    "OBJ",
    "NEWOBJ",
    "NEWOBJ_EX",
    "REDUCE",
    "BUILD",
    "EXT1",
    "EXT2",
    "EXT4",
}


def check_files(folder: Path, names: Iterable[str]) -> None:
    """Raise one ValueError for all files of a folder, by their names in it, that must not be published.

    Symbolic links, which may lead to what is nobody else's business; pickles under any suffix; safetensors and JSON
    files that are not whole; an adapter that is not of this package.
    """
    problems = []
    for name in names:
        if reason := _refusal_of(folder / name):
            problems.append(f"{name} {reason}")
    if problems:
        raise ValueError(f"folder={str(folder)!r} cannot be published: {'; '.join(problems)}.")


def _refusal_of(path: Path) -> str | None:
    if path.is_symlink():
        return "is a symbolic link: put the file itself there"
    if not path.is_file():
        return "is missing or no file"
    if list(filter_repo_objects([path.name.lower()], allow_patterns=PICKLED)):
        return "would run code when loaded: save as safetensors, remove it"
    if path.suffix == ".safetensors":
        return _refusal_of_tensors(path)
    if _is_pickle(path):
        return "holds a pickle, which would run code when loaded: remove it"
    if path.suffix == ".json":
        return _refusal_of_json(path)
    return None


def _refusal_of_tensors(path: Path) -> str | None:
    try:
        with safe_open(path, "pt") as tensors:
            names = list(tensors.keys())
    except (SafetensorError, OSError) as error:
        return f"is no whole safetensors file ({error}): save it again"
    if path.name == "adapter_model.safetensors" and not any(".lora_kv." in name for name in names):
        return "holds no shared heads, it is not an adapter of asymgqa_peft"
    return None


def _refusal_of_json(path: Path) -> str | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        return f"is no whole JSON file ({error}): save it again"
    if path.name.endswith(".safetensors.index.json"):
        files = set(content.get("weight_map", {}).values())
        missing = sorted(name for name in files if not (path.parent / name).is_file())
        if missing:
            return f"names weights that are missing: {', '.join(missing)}"
    return None


def _is_pickle(path: Path) -> bool:
    """Whether a file would run code as a pickle, bare or in the archive that torch.save writes."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".pkl") for name in archive.namelist())
    runs_code = False
    with path.open("rb") as file:
        if re.match(rb"\x80[\x00-\x05]", file.read(2)):
            return True
        file.seek(0)
        try:
            for opcode, _, _ in pickletools.genops(file):
                runs_code = runs_code or opcode.name in _RUNS_CODE
        except (ValueError, UnicodeDecodeError):  # any other kind of file
            return False
    return runs_code
