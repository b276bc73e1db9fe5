"""llama.cpp's own converter, told what it does not know of a merged checkpoint: its tokenizer and its wide heads.

    python recipes/convert_gguf.py LLAMA_CPP PRE_TOKENIZER CHECKPOINT --outfile model.gguf --outtype f32

LLAMA_CPP is a folder of llama.cpp's sources. Its converter knows byte-level BPE tokenizers by a hash of what they make
of one string, so a tokenizer with a vocabulary of its own stops it ("BPE pre-tokenizer was not recognized"), although
the rule by which text is split before BPE is nearly always one that llama.cpp has under some model's name: "gpt-2" for
a plain ByteLevel pre-tokenizer, "llama-bpe" for Llama 3's, "qwen2" for Qwen's. Look at "pre_tokenizer" in
tokenizer.json, and check a few texts against the original tokenizer afterwards. Known tokenizers keep their own name.

Heads wider than the base's turn at frequencies that the checkpoint states as RoPE of type longrope. Of a Llama or
Mistral model the converter keeps the type and drops the factors, and llama.cpp then computes with plain RoPE without a
word. Here the factors are written as "rope_freqs.weight", and the type, with which llama.cpp would not read that
tensor, is left out. What was written is read back: a file that has lost its factors is removed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    sys.path.insert(0, str(args.sources))
    import convert_hf_to_gguf

    # The converter has no options for these.
    believe_pre_tokenizer(args.pre_tokenizer)
    write_rope_factors()
    read_back()
    # It reads its arguments from there.
    sys.argv = ["convert_hf_to_gguf.py", *args.converter]
    convert_hf_to_gguf.main()


def believe_pre_tokenizer(name: str) -> None:
    """Let the converter call a pre-tokenizer that it does not recognise by this name."""
    from conversion.base import TextModel

    recognise = TextModel.get_vocab_base_pre

    def recognise_or_believe(self, tokenizer) -> str:
        try:
            return recognise(self, tokenizer)
        except NotImplementedError:
            return name

    TextModel.get_vocab_base_pre = recognise_or_believe


def write_rope_factors() -> None:
    """Let the converter write the factors of a Llama or Mistral model of RoPE type longrope."""
    import torch
    from conversion.llama import LlamaModel

    extra_tensors, set_parameters = LlamaModel.generate_extra_tensors, LlamaModel.set_gguf_parameters

    def with_factors(self):
        yield from extra_tensors(self)
        if longrope(self.hparams) is not None:
            yield "rope_freqs.weight", torch.tensor(single_factors(self.hparams), dtype=torch.float32)

    def without_type(self) -> None:
        if longrope(self.hparams) is not None:
            # A copy: hparams holds the same dict, and what was written is compared with it.
            self.rope_parameters = {name: value for name, value in self.rope_parameters.items() if name != "rope_type"}
        set_parameters(self)

    LlamaModel.generate_extra_tensors, LlamaModel.set_gguf_parameters = with_factors, without_type


def read_back() -> None:
    """Let the converter read what it has written, and remove a file that has lost the factors."""
    from conversion.base import ModelBase

    write = ModelBase.write

    def write_and_read(self) -> None:
        write(self)
        if longrope(self.hparams) is None:
            return
        files = self.gguf_writer.format_shard_names(self.fname_out)
        if not holds_factors(files, self.hparams):
            for file in files:
                file.unlink()
            raise SystemExit(
                f"{self.fname_out} was removed: the RoPE factors of {self.hparams['architectures'][0]} were lost on "
                "the way, and llama.cpp would not have complained; only Llama and Mistral checkpoints keep them here."
            )

    ModelBase.write = write_and_read


def longrope(config: dict) -> dict | None:
    """The RoPE parameters of a configuration of type longrope; None for any other."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if parameters.get("rope_type", parameters.get("type")) == "longrope":
        return parameters
    return None


def single_factors(config: dict) -> list[float]:
    """The factors (W_r / 2,) of a configuration of type longrope that has one list of them.

    Raises:
        SystemExit: if there are two, as in what was made of a base of type longrope, or cosines and sines are scaled.
    """
    parameters = longrope(config)
    if parameters["short_factor"] == parameters["long_factor"] and parameters.get("attention_factor") == 1.0:
        return parameters["short_factor"]
    raise SystemExit(
        f"This {config['architectures'][0]} has one list of RoPE factors for short inputs and another for long ones, "
        "or an attention_factor: the converted model could hold neither; serve it with transformers or OpenVINO."
    )


def holds_factors(files: Sequence[Path], config: dict) -> bool:
    """Whether GGUF files hold a longrope configuration's factors where llama.cpp looks for them."""
    from gguf import GGUFReader

    readers = [GGUFReader(file) for file in files]
    tensors = {tensor.name: tensor.data for reader in readers for tensor in reader.tensors}
    parameters = longrope(config)
    expected = {"rope_freqs.weight": parameters["short_factor"]}
    # With a scaling type llama.cpp reads two lists instead, which the converters of Phi-3 and MiniCPM write.
    if any(name.endswith(".rope.scaling.type") for name in readers[0].fields):
        expected = {
            "rope_factors_short.weight": parameters["short_factor"],
            "rope_factors_long.weight": parameters["long_factor"],
        }
    for name, factors in expected.items():
        if name not in tensors or not np.array_equal(tensors[name], np.float32(factors)):
            return False
    return True


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    """Our two arguments, and what goes to the converter unread."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", metavar="LLAMA_CPP", type=Path, help="folder of llama.cpp's sources")
    parser.add_argument("pre_tokenizer", metavar="PRE_TOKENIZER", help="llama.cpp's name of it, e.g. gpt-2")
    parser.add_argument("converter", metavar="CHECKPOINT ...", nargs=argparse.REMAINDER, help="for the converter")
    args = parser.parse_args(arguments)
    if not (args.sources / "convert_hf_to_gguf.py").is_file():
        parser.error(f"LLAMA_CPP={args.sources} lacks convert_hf_to_gguf.py: name a folder of llama.cpp's sources.")
    return args


if __name__ == "__main__":
    main()
