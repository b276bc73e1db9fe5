"""llama.cpp, through its own converter to GGUF and the Python binding that carries its sources."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import llama_cpp
import numpy as np
from llama_cpp import Llama

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
SOURCES = Path(sys.prefix) / "source" / "vendor" / "llama.cpp"  # where engines.sh leaves them
PRE_TOKENIZER = "gpt-2"  # that of the bundled model: ByteLevel with GPT-2's expression, a vocabulary of its own


class Engine:
    version = f"llama-cpp-python {llama_cpp.__version__}"

    def __init__(self, checkpoint: Path, scratch: Path, dtype: str):
        file, kind = scratch / "model.gguf", "f32"
        options = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
        if dtype != "float32":
            # What llama.cpp's own programs choose: flash attention, over a cache in float16.
            kind, options = "bf16", {"flash_attn": True}
        converter = [sys.executable, str(RECIPES / "convert_gguf.py"), str(SOURCES), PRE_TOKENIZER]
        subprocess.run([*converter, str(checkpoint), "--outfile", str(file), "--outtype", kind], check=True)
        config, overrides = json.loads((checkpoint / "config.json").read_text()), None
        if config["model_type"] == "phi":  # the converter writes the number of query heads
            overrides = {"phi2.attention.head_count_kv": config["num_key_value_heads"]}
        self.llama = Llama(str(file), n_ctx=512, logits_all=True, verbose=False, kv_overrides=overrides, **options)

    def logits(self, ids: list[int]) -> np.ndarray:
        self.llama.reset()
        self.llama.eval(ids)
        return self.llama.scores[: len(ids)].copy()

    def greedy(self, ids: list[int], count: int) -> list[int]:
        tokens = self.llama.generate(ids, temp=0.0, repeat_penalty=1.0)
        return [next(tokens) for _ in range(count)]

    def kv_heads(self) -> int:
        return llama_cpp.llama_model_n_head_kv(self.llama._model.model)

    def tokenize(self, text: str) -> list[int]:
        return self.llama.tokenize(text.encode(), add_bos=False)
