"""CTranslate2, through its own converter for transformers and our recipe around that."""

from __future__ import annotations

import sys
from pathlib import Path

import ctranslate2
import numpy as np
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.convert_ctranslate2 import convert


class Engine:
    version = ctranslate2.__version__

    def __init__(self, checkpoint: Path, scratch: Path, dtype: str):
        converted = scratch / "ctranslate2"
        self.decoder = convert(checkpoint, converted).decoder
        self.generator = ctranslate2.Generator(str(converted), device="cpu", compute_type="float32")
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)

    def logits(self, ids: list[int]) -> np.ndarray:
        return np.array(self.generator.forward_batch([ids]))[0]

    def greedy(self, ids: list[int], count: int) -> list[int]:
        tokens = self.tokenizer.convert_ids_to_tokens(ids)
        options = {"max_length": count, "sampling_topk": 1, "include_prompt_in_result": False}
        return self.generator.generate_batch([tokens], **options)[0].sequences_ids[0]

    def kv_heads(self) -> int:
        """As the converter wrote them: the number is only there where it is not that of the query heads."""
        heads = getattr(self.decoder.layer[0].self_attention, "num_heads_kv", self.decoder.num_heads)
        return int(heads.numpy())

    def tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text).input_ids
