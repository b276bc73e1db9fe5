"""Stands in for llama.cpp's converter in tests/test_engines.py; the real one runs in tests/engines.sh."""

import sys
from pathlib import Path

from conversion.base import TextModel
from conversion.llama import LlamaModel


def main() -> None:
    folder, _, file = sys.argv[1:]
    if folder == "tokenizer":
        print(sys.argv[1:], [TextModel.get_vocab_base_pre(None, name) for name in ("qwen2", "unheard of")])
        return
    model_class = LlamaModel if "MistralForCausalLM" in (Path(folder) / "config.json").read_text() else TextModel
    model_class(Path(folder), Path(file)).write()
