"""Text that every CPython carries: the sources and the help topics of its standard library.

The bundled tiny model is trained on this text, and the recipes and tests calibrate and measure on it, so they need
no download. The modules and help topics held out here are never trained on, nor used for the tokenizer, nor used to
choose anything; the validation ones are what choices are made on.

Works on CPython 3.10 to 3.14, also in a virtual environment, where the standard library stays with the base
interpreter.
"""

from __future__ import annotations

import ast
import os
import sysconfig
import tokenize
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

# Mid-sized, spread over subjects, and a single file of this name in every CPython from 3.10 to 3.14.
HELD_OUT_MODULES = (
    "asyncio.streams",
    "calendar",
    "cmd",
    "contextlib",
    "csv",
    "email.header",
    "fractions",
    "ftplib",
    "gzip",
    "heapq",
    "http.cookies",
    "json.decoder",
    "multiprocessing.pool",
    "shlex",
    "tempfile",
    "textwrap",
)
VALIDATION_MODULES = (
    "asyncio.queues",
    "configparser",
    "email.generator",
    "graphlib",
    "logging.config",
    "plistlib",
    "queue",
    "random",
    "reprlib",
    "sched",
    "unittest.suite",
    "uuid",
    "xml.sax.saxutils",
)
# Topics repeat one another ("specialnames" contains "customization", ...); these share next to nothing with the rest.
HELD_OUT_TOPICS = ("calls", "formatstrings", "import", "objects", "strings", "typesmapping")
VALIDATION_TOPICS = ("binary", "operator-summary", "raise", "string-methods")

# `encodings` is generated character tables; `pydoc_data` holds the topics as one escaped literal, read below as prose.
_SKIPPED_FOLDERS = frozenset({"__pycache__", "encodings", "idle_test", "pydoc_data", "test", "tests"})
# Build settings of one machine, paths included.
_SKIPPED_PREFIX = "_sysconfigdata"


def training_texts(stdlib: str | Path | None = None) -> list[str]:
    """Every module and help topic that is neither held out nor used for validation, modules first, sorted by name.

    `stdlib` is the folder of a standard library; `None` means that of the running interpreter.
    """
    root = _stdlib_folder(stdlib)
    left_out = set(_module_paths(root, HELD_OUT_MODULES + VALIDATION_MODULES))
    texts = []
    for path in _source_files(root):
        if path not in left_out:
            text = _read_or_none(path)
            if text:
                texts.append(text)
    topics = _topics(root)
    for name in sorted(topics.keys() - {*HELD_OUT_TOPICS, *VALIDATION_TOPICS}):
        texts.append(topics[name])
    return texts


def held_out_texts(stdlib: str | Path | None = None) -> list[str]:
    """The held-out modules, then the held-out help topics, in the order of their lists."""
    return _named_texts(stdlib, HELD_OUT_MODULES, HELD_OUT_TOPICS)


def validation_texts(stdlib: str | Path | None = None) -> list[str]:
    """The validation modules, then the validation help topics, in the order of their lists."""
    return _named_texts(stdlib, VALIDATION_MODULES, VALIDATION_TOPICS)


def token_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> torch.LongTensor:
    """All texts as one row of token ids, each text followed by the end-of-text token: shape (tokens,)."""
    import torch

    once = list(dict.fromkeys(texts))  # a corpus may hold a text many times
    encoded = tokenizer(once, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    ids_of = dict(zip(once, encoded, strict=True))
    tokens: list[int] = []
    for text in texts:
        tokens += [*ids_of[text], tokenizer.eos_token_id]
    return torch.tensor(tokens, dtype=torch.long)


def token_blocks(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, block_size: int) -> torch.LongTensor:
    """The texts joined with the end-of-text token and cut into blocks: shape (N, block_size), no partial block."""
    ids = token_ids(texts, tokenizer)
    count = len(ids) // block_size
    if count == 0:
        raise ValueError(f"block_size={block_size} is more than the {len(ids)} tokens of the texts; make it smaller")
    return ids[: count * block_size].view(count, block_size)


def _stdlib_folder(stdlib: str | Path | None) -> Path:
    """The standard library's folder, checked to hold .py sources (some installations carry only .pyc or a zip)."""
    root = Path(stdlib or sysconfig.get_path("stdlib"))
    needed = _module_paths(root, (*HELD_OUT_MODULES, *VALIDATION_MODULES, "pydoc_data.topics"))
    missing = [path.relative_to(root).as_posix() for path in needed if not path.is_file()]
    if missing:
        shown = ", ".join(missing[:3])
        if len(missing) > 3:
            shown += ", ..."
        raise FileNotFoundError(
            f"the standard library in {root} lacks .py sources: {len(missing)} of the {len(needed)} looked for "
            f"({shown}); "
            "use a full CPython 3.10 to 3.14, or name the folder of its standard library"
        )
    return root


def _module_paths(root: Path, modules: Sequence[str]) -> list[Path]:
    """Files of modules named with dots."""
    return [root.joinpath(*module.split(".")).with_suffix(".py") for module in modules]


def _source_files(root: Path) -> list[Path]:
    """The library's own .py files, sorted, without tests, generated tables and installed packages."""
    found = []
    for folder, subfolders, files in os.walk(root):
        # Folders no import can name (site-packages, config-3.11-x86_64-linux-gnu, ...) are not the library's own.
        subfolders[:] = [name for name in subfolders if name.isidentifier() and name not in _SKIPPED_FOLDERS]
        for name in files:
            if name.endswith(".py") and not name.startswith(_SKIPPED_PREFIX):
                found.append(Path(folder, name))
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _read_source(path: Path) -> str:
    # It honours the file's own encoding declaration.
    with tokenize.open(path) as file:
        return file.read()


def _read_or_none(path: Path) -> str | None:
    try:
        return _read_source(path)
    # A bad encoding declaration is a SyntaxError to tokenize.
    except (SyntaxError, UnicodeDecodeError):
        return None


def _topics(root: Path) -> dict[str, str]:
    """`pydoc_data.topics.topics`, parsed rather than imported so that any installation's folder can be read."""
    (path,) = _module_paths(root, ["pydoc_data.topics"])
    tree = ast.parse(_read_source(path))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "topics":
            return ast.literal_eval(node.value)
    raise ValueError(f"pydoc_data/topics.py in {root} assigns no dict named topics; use a CPython 3.10 to 3.14")


def _named_texts(stdlib: str | Path | None, modules: Sequence[str], topics: Sequence[str]) -> list[str]:
    root = _stdlib_folder(stdlib)
    known_topics = _topics(root)
    texts = list(map(_read_source, _module_paths(root, modules)))
    for name in topics:
        texts.append(known_topics[name])
    return texts
