"""llama.cpp's own converter, told the pre-tokenizer of a tokenizer that it does not know.

    python recipes/convert_gguf.py LLAMA_CPP PRE_TOKENIZER CHECKPOINT --outfile model.gguf --outtype f32

LLAMA_CPP is a folder of llama.cpp's sources. Its converter knows byte-level BPE tokenizers by a hash of what they make
of one string, so a tokenizer with a vocabulary of its own stops it ("BPE pre-tokenizer was not recognized"), although
the rule by which text is split before BPE is nearly always one that llama.cpp has under some model's name: "gpt-2" for
a plain ByteLevel pre-tokenizer, "llama-bpe" for Llama 3's, "qwen2" for Qwen's. Look at "pre_tokenizer" in
tokenizer.json, and check a few texts against the original tokenizer afterwards. Known tokenizers keep their own name.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    sys.path.insert(0, str(args.sources))
    import convert_hf_to_gguf
    from conversion.base import TextModel

    recognise = TextModel.get_vocab_base_pre

    def recognise_or_believe(self, tokenizer) -> str:
        try:
            return recognise(self, tokenizer)
        except NotImplementedError:
            return args.pre_tokenizer

    # The converter has no option for it.
    TextModel.get_vocab_base_pre = recognise_or_believe
    # It reads its arguments from there.
    sys.argv = ["convert_hf_to_gguf.py", *args.converter]
    convert_hf_to_gguf.main()


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
