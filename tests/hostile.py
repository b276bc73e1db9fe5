"""Mutated adapter folders, each loaded as PEFT loads it, with plain LoRA's beside ours: python tests/hostile.py [seed]

Fields of the configuration get values of every kind, tensors other names, shapes, dtypes and numbers, files are cut,
flipped, swapped for pickles, links and pipes. Loading happens in a process of its own, which reports what it opened,
and is started anew where a folder makes it hang or crash. `faults` says what must not be.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import pickle
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import psutil
import torch
from models import GROUPS, logits, tiny_llama, wrap
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from asymgqa_peft import AsymGQAConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OURS, LORA = "asym_gqa", "lora"
OWN_FIELDS = sorted(AsymGQAConfig.__dataclass_fields__.keys() - LoraConfig.__dataclass_fields__.keys())
SECONDS = 3.0
"""A load that computes or waits for longer hangs."""


@dataclass(frozen=True)
class Case:
    """One way to spoil a folder: `spoil(folder, generator)`. `own` if LoRA has nothing of the kind."""

    name: str
    spoil: Callable[[Path, random.Random], None]
    own: bool = False


@dataclass
class Result:
    """What became of a load: "refused", "loaded", "hang" or "crash".

    Attributes:
        error, message: the exception's type and text.
        told: warnings that the valid folder does not raise.
        same: whether it answers as the valid adapter, and under a disabled adapter as the base.
        events: what the load did that no load should.
    """

    outcome: str
    error: str = ""
    message: str = ""
    told: list[str] = field(default_factory=list)
    same: bool = True
    events: list[str] = field(default_factory=list)

    @property
    def is_silent_and_wrong(self) -> bool:
        return self.outcome == "loaded" and not self.told and not self.same


def faults(cases: list[Case], ours: dict[str, Result], lora: dict[str, Result]) -> dict[str, str]:
    """Name of a case -> what must not be, for all cases where something is."""
    found = {}
    for case in cases:
        own, other = ours[case.name], lora.get(case.name)
        if own.outcome in ("hang", "crash") and (other is None or other.outcome != own.outcome):
            found[case.name] = own.outcome
        elif own.events:
            found[case.name] = ", ".join(own.events)
        elif own.is_silent_and_wrong and (case.own or not other.is_silent_and_wrong):
            found[case.name] = "loads silently and answers differently"
        elif case.own and own.outcome == "refused" and own.error != "ValueError":
            found[case.name] = f"refused by {own.error}: {own.message}"
    return found


# ---------------------------------------------------------------------------------------------------- the folders


def write_valid(folder: Path) -> None:
    """A valid adapter of each kind, in folders of their names."""
    targets = ["q_proj", "o_proj"]
    wrap(tiny_llama(), GROUPS["llama"], target_modules=targets, lora_alpha=16).save_pretrained(folder / OURS)
    config = LoraConfig(r=4, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(0)
    get_peft_model(tiny_llama(), config).save_pretrained(folder / LORA)


def kind_of(folder: Path) -> str:
    return folder.name.partition("-")[0]


def set_field(name: str, value: object = None, raw: str | None = None) -> Callable[[Path, random.Random], None]:
    """Give a field a value, as JSON text where json.dumps would not write it; `...` removes it."""

    def spoil(folder: Path, _: random.Random) -> None:
        config = json.loads((folder / CONFIG).read_text())
        config[name] = "@" if raw else value
        if value is ...:
            del config[name]
        text = json.dumps(config)
        (folder / CONFIG).write_text(text.replace('"@"', raw) if raw else text)

    return spoil


def edit_tensors(edit: Callable[[dict, random.Random], dict | None]) -> Callable[[Path, random.Random], None]:
    def spoil(folder: Path, generator: random.Random) -> None:
        tensors = load_file(folder / WEIGHTS)
        edited = edit(tensors, generator)
        tensors = tensors if edited is None else edited
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, folder / WEIGHTS, metadata={"format": "pt"})

    return spoil


def edit_bytes(file: str, edit: Callable[[bytes, random.Random], bytes]) -> Callable[[Path, random.Random], None]:
    def spoil(folder: Path, generator: random.Random) -> None:
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(edit(content, generator))

    return spoil


VALUES = {
    "null": None,
    "str": "x",
    "int": 7,
    "zero": 0,
    "negative": -1,
    "huge": 10**30,
    "float": 1.5,
    "nan": float("nan"),
    "true": True,
    "list": [],
    "ints": [1, 2],
    "dict": {},
    "nested": {"a": {"b": [1, {"c": None}]}},
    "unicode": "\u202e\u0000\U0001f4a9é",
    "missing": ...,
}
MORE_VALUES = {"empty": "", "one": 1, "inf": float("inf"), "false": False, "long": "A" * 200_000}
RAW_VALUES = {"digits": "1" + "0" * 5000, "deep": "[" * 5000 + "]" * 5000}


OWN_VALUES = {
    "num_key_value_heads": [3, 4, 6, 2.0, "2", [2]],
    "grouping": ["ASYMMETRIC", "random", "neighbour", "symmetric", "cosine", ["asymmetric"]],
    "criterion": ["cosine", "Residual", ["residual"]],
    "merge": ["mean", "aligned", "principal ", "all", ["mean"]],
    "max_group_size": [2, 3, 4, 6, 100, 10**18],
    "head_dim": [4, 8, 9, 12, 16, 32, 10**9, "8"],
    "initialized": [0, "true", [True]],
    "refit_output": [0, "no"],
    "fit_steps": [-1, 1.0, "5"],
    "seed": [3.0, "0", 10**40],
}
HEAD_GROUPS = GROUPS["llama"]
ALL_GROUPS = {
    "overlapping": [[[0, 1, 2, 3, 5], [1, 4]], HEAD_GROUPS[1]],
    "incomplete": [[[0, 2, 3], [1, 4]], HEAD_GROUPS[1]],
    "other order in a group": [[[5, 3, 2, 0], [4, 1]], HEAD_GROUPS[1]],
    "groups swapped": [HEAD_GROUPS[0][::-1], HEAD_GROUPS[1]],
    "layers swapped": HEAD_GROUPS[::-1],
    "layer missing": HEAD_GROUPS[:1],
    "layer too many": [*HEAD_GROUPS, HEAD_GROUPS[0]],
    "booleans": [[[False, 2, 3, 5], [True, 4]], HEAD_GROUPS[1]],
    "floats": [[[0.0, 2.0, 3.0, 5.0], [1.0, 4.0]], HEAD_GROUPS[1]],
    "strings": [[["0", "2", "3", "5"], ["1", "4"]], HEAD_GROUPS[1]],
    "string as group": [["0235", "14"], HEAD_GROUPS[1]],
    "dict as group": [[{"0": 2}, [1, 4]], HEAD_GROUPS[1]],
    "dict of layers": {"0": HEAD_GROUPS[0], "1": HEAD_GROUPS[1]},
    "nulls": [[[None], [1, 4]], HEAD_GROUPS[1]],
    "nan": [[[float("nan")], [1, 4]], HEAD_GROUPS[1]],
    "huge head": [[[0, 2, 3, 10**25], [1, 4]], HEAD_GROUPS[1]],
    "too deep": [HEAD_GROUPS, HEAD_GROUPS],
    "other sizes": [[[0, 2, 3], [1, 4, 5]], HEAD_GROUPS[1]],
    "one group": [[[0, 1, 2, 3, 4, 5]]] * 2,
    "many heads": [[list(range(100_000)), []]] * 2,
    "many layers": [HEAD_GROUPS[0]] * 10_000,
    "many groups": [[[head] for head in range(10_000)]] * 2,
}
PATTERN_THAT_HANGS = r"(([a-z._0-9])+)+!"
LORA_VALUES = {
    "peft_type": ["LORA", "ASYM_GQA", "asym_gqa", "IA3", "PROMPT_TUNING", "XLORA", "nope", "../x"],
    "base_model_name_or_path": ["../../etc/passwd", "/etc/passwd", "http://169.254.169.254/", "~/.ssh/id_rsa", "x\ny"],
    "auto_mapping": [{"base_model_class": "system", "parent_library": "os"}, {"base_model_class": 1}],
    "target_modules": [
        PATTERN_THAT_HANGS,
        "((((",
        ".*",
        r".*\.(q_proj|o_proj)",
        ".*k_proj",
        "zzz",
        ["k_proj", "q_proj"],
        [""],
        ["."],
        ["q_proj"],
        ["lm_head", "q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "ALL-LINEAR",
        ["q_proj"] * 100_000,
        ["self_attn"],
        ["model.layers.0.self_attn.k_proj"],
    ],
    "rank_pattern": [{"q_proj": rank} for rank in (2, 4, -1, 0, "4", 2.5)] + [{"k_proj": 2}, {"((": 2}],
    "alpha_pattern": [{"q_proj": 2}, {"q_proj": "4"}, {"((": 2}],
    "exclude_modules": ["k_proj", ["q_proj"], ".*", ["v_proj", "o_proj"]],
    "r": [2, 8, 64, 4096],
    "lora_alpha": [1e308, 1e-308, -4],
    "lora_dropout": [0.5, 2, -0.1],
    "modules_to_save": [["k_proj"], ["self_attn"], ["lm_head"], ["embed_tokens"], ["zzz"], [""], ["model"]],
    "layers_to_transform": [[0], 0, [99], -1],
    "layers_pattern": ["layers", ["layers"]],
    "bias": ["all", "lora_only"],
    "use_dora": [True],
    "use_rslora": [True],
    "init_lora_weights": ["pissa", "pissa_niter_4", "olora", "eva", "loftq", "corda", "orthogonal", "gaussian"],
    "revision": ["main", "../../x", "\n"],
    "trainable_token_indices": [[1], {"embed_tokens": [1]}, [10**9]],
    "layer_replication": [[[0, 2]], [[0, 1_000_000]]],
    "alora_invocation_tokens": [[1]],
    "target_parameters": [["q_proj.weight"], ["mlp.gate_proj.weight"]],
    "megatron_config": [{"a": 1}],
    "arrow_config": [{"top_k": 3}],
    "eva_config": [{}],
    "kasa_config": [{}],
    "velora_config": [{}],
    "loftq_config": [{"loftq_bits": 4}],
    "runtime_config": [{"ephemeral_gpu_offload": True}, 1],
    "task_type": ["SEQ_CLS", "NOPE", "FEATURE_EXTRACTION"],
    "peft_version": ["999.0"],
    "inference_mode": [False],
    "unknown_field": [1],
    "__class__": ["x"],
    "__init__": ["x"],
}


def field_cases(config: dict) -> Iterator[Case]:
    """Every field with a value of every kind, then values that mean something to the field."""
    for name in config:
        own = name in OWN_FIELDS
        for label, value in (VALUES | MORE_VALUES if own else VALUES).items():
            yield Case(f"{name}={label}", set_field(name, value), own)
        for label, raw in RAW_VALUES.items():
            yield Case(f"{name}={label}", set_field(name, raw=raw))
    for fields, own in ((OWN_VALUES, True), (LORA_VALUES, False)):
        for name, values in fields.items():
            for value in values:
                yield Case(f"{name}={str(value)[:60]!r}", set_field(name, value), own)
    for label, groups in ALL_GROUPS.items():
        yield Case(f"head_groups: {label}", set_field("head_groups", groups), own=True)
    for number in range(40):
        yield Case(f"head_groups: random {number}", random_groups, own=True)


def random_groups(folder: Path, generator: random.Random) -> None:
    """One to three heads moved, repeated, lost or of another number."""
    groups = copy.deepcopy(HEAD_GROUPS)
    for _ in range(generator.randint(1, 3)):
        layer = generator.choice(groups)
        group = generator.choice(layer)
        change = generator.choice(["lose", "repeat", "move", "negate", "add"])
        if change == "add" or not group:
            group.append(generator.randrange(8))
        elif change == "repeat":
            group.append(generator.choice(group))
        elif change == "move":
            generator.choice(layer).append(group.pop())
        elif change == "negate":
            group[0] = -1 - group[0]
        else:
            group.pop(generator.randrange(len(group)))
    set_field("head_groups", groups)(folder, generator)


# What plain LoRA lacks is compared with what befalls its own A of the same projection, or of q_proj.
TENSORS = [
    "q_proj.lora_A",
    "o_proj.lora_B",
    "k_proj.lora_kv",
    "v_proj.lora_kv",
    "k_proj.lora_query_gain",
    "v_proj.lora_value_mix",
]
GROUPS_TENSOR = "k_proj.lora_groups"
TENSOR_EDITS: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
    "missing": lambda tensor: None,
    "larger": lambda tensor: torch.zeros([size + 1 for size in tensor.shape]),
    "smaller": lambda tensor: tensor[:-1],
    "transposed": lambda tensor: tensor.transpose(0, -1) if tensor.dim() > 1 else tensor[:-1],
    "flat": lambda tensor: tensor.flatten() if tensor.dim() > 1 else tensor[None],
    "one more axis": lambda tensor: tensor[None],
    "scalar": lambda tensor: torch.tensor(1.0),
    "empty": lambda tensor: torch.zeros(0),
    "nan": lambda tensor: torch.full(tensor.shape, float("nan")),
    "inf": lambda tensor: torch.full(tensor.shape, float("inf")),
    "large": lambda tensor: tensor * 1e30,
    "zeros": lambda tensor: torch.zeros_like(tensor),
    "negative": lambda tensor: -tensor,
    "shuffled": lambda tensor: tensor.flip(0),
}
DTYPES = ["int8", "uint8", "int32", "int64", "float16", "bfloat16", "float64", "bool", "float8_e4m3fn", "complex64"]


def name_like(tensors: dict[str, torch.Tensor], part: str, layer: int = 1) -> str:
    """The tensor of that part in a layer; of plain LoRA, which has no shared heads, q_proj's A, or B without it."""
    names = [name for name in tensors if f"layers.{layer}." in name]
    found = [name for name in names if part in name] or [name for name in names if "q_proj.lora_" in name]
    return found[0]


def edited(part: str, edit: Callable[[torch.Tensor], torch.Tensor | None]):
    def change(tensors: dict, _: random.Random) -> None:
        name = name_like(tensors, part)
        tensors[name] = edit(tensors[name])
        if tensors[name] is None:
            del tensors[name]

    return edit_tensors(change)


def renamed(change: Callable[[str], str], part: str = "") -> Callable[[Path, random.Random], None]:
    """All tensors, or the one of a part, under other names."""

    def rename(tensors: dict, _: random.Random) -> dict:
        chosen = name_like(tensors, part) if part else None
        return {change(name) if chosen in (None, name) else name: tensor for name, tensor in tensors.items()}

    return edit_tensors(rename)


def without(part: str) -> Callable[[Path, random.Random], None]:
    def drop(tensors: dict, _: random.Random) -> dict:
        return {name: tensor for name, tensor in tensors.items() if part not in name}

    return edit_tensors(drop)


def with_extra(name: str, *shape: int, lacks: str = "\n") -> Callable[[Path, random.Random], None]:
    def add(tensors: dict, _: random.Random) -> dict:
        kept = {key: tensor for key, tensor in tensors.items() if lacks not in key}
        return kept | {name: torch.full(shape, 0.5)}

    return edit_tensors(add)


def random_edit(tensors: dict, generator: random.Random) -> None:
    """Two of the edits, on any two tensors."""
    for _ in range(2):
        name = name_like(tensors, generator.choice(TENSORS), layer=generator.randrange(2))
        edit = TENSOR_EDITS[generator.choice(sorted(TENSOR_EDITS))]
        result = edit(tensors.pop(name))
        if result is not None:
            tensors[name] = result


def tensor_cases() -> Iterator[Case]:
    for part in (*TENSORS, GROUPS_TENSOR):
        own = part == GROUPS_TENSOR
        for label, edit in TENSOR_EDITS.items():
            yield Case(f"{part} {label}", edited(part, edit), own)
        for dtype in DTYPES:
            yield Case(
                f"{part} as {dtype}", edited(part, lambda tensor, dtype=dtype: tensor.to(getattr(torch, dtype)))
            )
        yield Case(f"{part} renamed", renamed(lambda name: name + "x", part))
        yield Case(f"{part} in capitals", renamed(str.upper, part))
    for value in (-1, 2, 10**12):
        edit = edited(GROUPS_TENSOR, lambda tensor, value=value: torch.full(tensor.shape, value, dtype=torch.int64))
        yield Case(f"{GROUPS_TENSOR} of {value}", edit, own=True)
    for dtype in DTYPES:
        change = {"dtype": getattr(torch, dtype)}
        convert = edit_tensors(lambda tensors, _, to=change: {name: each.to(**to) for name, each in tensors.items()})
        yield Case(f"all as {dtype}", convert)
    renames = {
        "no prefix": lambda name: name.replace("base_model.model.", ""),
        "prefix twice": lambda name: "base_model.model." + name,
        "adapter's name": lambda name: name.replace(".weight", ".default.weight"),
        "layers swapped": lambda name: name.translate(str.maketrans("01", "10")),
    }
    for label, rename in renames.items():
        yield Case(f"all names: {label}", renamed(rename))
    for part in ("k_proj", "v_proj", "lora_A", "lora_B", "layers.1", "lora_groups", "lora", "o_proj"):
        yield Case(f"all without {part}", without(part))
    inner = "base_model.model.model."
    extras = [
        "junk",
        "",
        "x.base_layer.y",
        "base_model.model.x.base_layer.y",
        f"{inner}layers.0.self_attn.q_proj.weight",
        f"{inner}layers.0.self_attn.q_proj.base_layer.weight",
        f"{inner}layers.0.self_attn.k_proj.base_layer.weight",
        f"{inner}layers.9.self_attn.q_proj.lora_A.weight",
        f"{inner}layers.0.self_attn.q_proj.lora_A.other.weight",
        f"{inner}layers.0.self_attn.k_proj.lora_slots.default.kv_source",
        f"{inner}norm.weight",
        f"{inner}embed_tokens.weight",
        f"{inner}rotary_emb.inv_freq",
        f"{inner}layers.0.input_layernorm.weight",
        "base_model.model.lm_head.weight",
    ]
    for name in extras:
        for lacks in ("\n", "layers.1", "k_proj.lora_kv"):
            for shape in ((48, 48), (48,)):
                label = f"{name or 'no name'} of {shape} added, {lacks.strip() or 'nothing'} missing"
                yield Case(label, with_extra(name, *shape, lacks=lacks))
    for number in range(120):
        yield Case(f"random tensors {number}", edit_tensors(random_edit))


class Planted:
    """Opens a file to write, once it is unpickled."""

    def __reduce__(self):
        return open, (os.devnull, "w")


def pickle_as(name: str, by_torch: bool, alone: bool) -> Callable[[Path, random.Random], None]:
    def spoil(folder: Path, _: random.Random) -> None:
        if alone:
            (folder / WEIGHTS).unlink()
        if by_torch:
            torch.save({"x": Planted()}, folder / name)
        else:
            (folder / name).write_bytes(pickle.dumps({"x": Planted()}))

    return spoil


def in_place_of(name: str, make: Callable[[Path], None]) -> Callable[[Path, random.Random], None]:
    def spoil(folder: Path, _: random.Random) -> None:
        (folder / name).unlink()
        make(folder / name)

    return spoil


def flip(content: bytes, generator: random.Random, header: bool) -> bytes:
    """One bit, in a safetensors file's header or behind it."""
    end = 8 + struct.unpack("<Q", content[:8])[0]
    position = generator.randrange(8, end) if header else generator.randrange(end, len(content))
    flipped = bytearray(content)
    flipped[position] ^= 1 << generator.randrange(8)
    return bytes(flipped)


def file_cases() -> Iterator[Case]:
    contents = {
        "empty": lambda text: b"",
        "half": lambda text: text[: len(text) // 2],
        "a list": lambda text: b"[]",
        "null": lambda text: b"null",
        "a number": lambda text: b"3",
        "byte order mark": lambda text: b"\xef\xbb\xbf" + text,
        "latin-1": lambda text: text.rstrip()[:-1] + b',"x":"\xff"}',
        "key twice": lambda text: text.rstrip()[:-1] + b',"r":8}',
        "deep": lambda text: b"[" * 100_000,
        "utf-16": lambda text: text.decode().encode("utf-16"),
        "trailing": lambda text: text + b"garbage",
        "nul": lambda text: b"\0" * 100,
    }
    for label, edit in contents.items():
        yield Case(f"{CONFIG}: {label}", edit_bytes(CONFIG, lambda content, _, edit=edit: edit(content)))
    for number in range(60):
        yield Case(f"{WEIGHTS}: header flipped {number}", edit_bytes(WEIGHTS, lambda c, g: flip(c, g, header=True)))
    for number in range(20):
        yield Case(f"{WEIGHTS}: data flipped {number}", edit_bytes(WEIGHTS, lambda c, g: flip(c, g, header=False)))
    for length in (0, 4, 8, 100, 5000, -1):
        yield Case(f"{WEIGHTS}: cut at {length}", edit_bytes(WEIGHTS, lambda content, _, n=length: content[:n]))
    for length in (0, 10**9, 2**63):
        claim = struct.pack("<Q", length)
        yield Case(f"{WEIGHTS}: header of {length}", edit_bytes(WEIGHTS, lambda c, _, claim=claim: claim + c[8:]))
    yield Case(f"{WEIGHTS}: trailing", edit_bytes(WEIGHTS, lambda content, _: content + b"x" * 100))
    for name in ("adapter_model.bin", WEIGHTS, "pytorch_model.bin", "training_args.bin", "initialization.json"):
        for by_torch in (False, True):
            for alone in (False, True):
                label = f"pickle {name}, {'torch' if by_torch else 'bare'}{', alone' if alone else ''}"
                yield Case(label, pickle_as(name, by_torch, alone))
    for name in (CONFIG, WEIGHTS):
        for target in ("/etc/passwd", "/nonexistent", "/dev/null", "/dev/zero", name):
            yield Case(f"{name} -> {target}", in_place_of(name, lambda path, to=target: path.symlink_to(to)))
        yield Case(f"{name} is a folder", in_place_of(name, Path.mkdir))
        yield Case(f"{name} is a pipe", in_place_of(name, os.mkfifo))
        yield Case(f"{name} is absent", in_place_of(name, lambda path: None))


# ---------------------------------------------------------------------------------------------------- the loading

WRITING = {"os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.chmod", "os.truncate"}
OUTSIDE = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect", "socket.getaddrinfo"}


class Watch:
    """Notes what a load must not do: unpickle, write outside its folder, start a process, ask the network."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.events: list[str] = []
        sys.addaudithook(self.see)

    def see(self, event: str, args: tuple) -> None:
        if self.folder is None:
            return
        writes = event in WRITING
        if event == "open":
            path, mode, flags = args
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) and path != os.devnull
        if event == "pickle.find_class":
            self.events.append(f"unpickles {args[0]}.{args[1]}")
        elif event in OUTSIDE:
            self.events.append(event)
        elif writes and not str(args[0]).startswith(str(self.folder)):
            self.events.append(f"{event} {args[0]}")


class Told(logging.Handler):
    """Keeps what is logged as a warning or worse."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []
        for name in ("", "peft", "transformers"):
            logging.getLogger(name).addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


class Loader:
    """Loads folders one after the other, and compares with the valid adapter of their kind."""

    def __init__(self, folder: Path) -> None:
        self.watch, self.log = Watch(), Told()
        self.base = tiny_llama()
        self.base_logits = logits(self.base)
        self.expected: dict[str, torch.Tensor] = {}
        self.usual: set[str] = set()
        for kind in (OURS, LORA):
            told, model = self._load(folder / kind)
            self.usual.update(told)
            self.expected[kind] = logits(model)

    def _load(self, folder: Path) -> tuple[list[str], PeftModel]:
        self.log.messages.clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = PeftModel.from_pretrained(copy.deepcopy(self.base), folder).eval()
        told = self.log.messages + [str(warning.message) for warning in caught]
        return told, model

    def load(self, folder: Path) -> Result:
        self.watch.folder, self.watch.events = folder, []
        try:
            told, model = self._load(folder)
            result = Result("loaded", told=[message[:200] for message in told if message not in self.usual])
            result.same = torch.equal(logits(model), self.expected[kind_of(folder)])
            if result.same and not result.told:
                with model.disable_adapter():
                    result.same = torch.equal(logits(model), self.base_logits)
        except Exception as error:
            result = Result("refused", type(error).__name__, str(error)[:200])
        finally:
            self.watch.folder = None
        result.events = sorted(set(self.watch.events))
        return result


def _work(connection, loader: Loader, folder: Path, kind: str, cases: list[Case], seed: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    for number, case in enumerate(cases):
        spoiled = folder / f"{kind}-spoiled"
        shutil.rmtree(spoiled, ignore_errors=True)
        spoiled.mkdir()
        for name in (CONFIG, WEIGHTS):
            shutil.copy(folder / kind / name, spoiled)
        case.spoil(spoiled, random.Random(f"{seed} {case.name}"))
        connection.send(number)
        connection.send(loader.load(spoiled))


def _answers(connection, process: psutil.Process) -> bool:
    """Whether the process answers before it has used up its seconds, computing or waiting for somebody else."""
    started, waited = sum(process.cpu_times()[:2]), 0.0
    while not connection.poll(0.5):
        waited += 0.5
        computed = sum(process.cpu_times()[:2]) - started
        # One that waits for a busy core is neither.
        if computed > SECONDS or (waited > SECONDS and process.status() == psutil.STATUS_SLEEPING):
            return False
    return True


def load_all(loader: Loader, folder: Path, kind: str, cases: list[Case], seed: str) -> dict[str, Result]:
    """Load every case's folder of one kind; a process that hangs or dies is replaced."""
    results: dict[str, Result] = {}
    context = get_context("fork")
    while len(results) < len(cases):
        left = cases[len(results) :]
        receiving, sending = context.Pipe(duplex=False)
        worker = context.Process(target=_work, args=(sending, loader, folder, kind, left, seed))
        worker.start()
        sending.close()
        outcome = "crash"
        try:
            for case in left:
                receiving.recv()
                if not _answers(receiving, psutil.Process(worker.pid)):
                    outcome = "hang"
                    break
                results[case.name] = receiving.recv()
        except EOFError:
            pass
        if len(results) < len(cases):
            worker.kill()
            results[cases[len(results)].name] = Result(outcome)
        worker.join()
    return results


def all_cases(folder: Path) -> list[Case]:
    """Every case once, by its name."""
    config = json.loads((folder / OURS / CONFIG).read_text())
    cases = [*field_cases(config), *tensor_cases(), *file_cases()]
    return list({case.name: case for case in cases}.values())


def run(seed: str = "0") -> tuple[list[Case], dict[str, Result], dict[str, Result]]:
    """All cases, what became of our adapter in each, and of plain LoRA where it has something of the kind."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_valid(folder)
        cases = all_cases(folder)
        loader = Loader(folder)
        ours = load_all(loader, folder, OURS, cases, seed)
        shared = [case for case in cases if not case.own]
        return cases, ours, load_all(loader, folder, LORA, shared, seed)


def main() -> None:
    start = time.perf_counter()
    cases, ours, lora = run(*sys.argv[1:2])
    for kind, results in ((OURS, ours), (LORA, lora)):
        outcomes = [result.outcome for result in results.values()]
        counts = {outcome: outcomes.count(outcome) for outcome in ("refused", "loaded", "hang", "crash")}
        counts["silent and wrong"] = sum(result.is_silent_and_wrong for result in results.values())
        print(kind, len(results), counts)
    found = faults(cases, ours, lora)
    if "-v" in sys.argv:
        for case in cases:
            print(case.name, case.own, ours[case.name], lora.get(case.name), sep=" | ")
    for name, fault in found.items():
        print(f"{name}: {fault}")
    print(f"{len(found)} faults in {len(cases)} cases, {time.perf_counter() - start:.0f} s")
    sys.exit(bool(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
