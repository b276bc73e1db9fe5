"""CTranslate2, through its own converter for transformers."""

from __future__ import annotations

import json
from pathlib import Path

import ctranslate2
import numpy as np
from ctranslate2.converters import TransformersConverter
from transformers import AutoTokenizer


class Converter(TransformersConverter):
    """Keeps what it converts to: nothing public says how many K/V heads a converted model has."""

    def _load(self):
        self.spec = super()._load()
        return self.spec


class Engine:
    version = ctranslate2.__version__

    def __init__(self, checkpoint: Path, scratch: Path):
        converter, converted = Converter(str(checkpoint)), scratch / "ctranslate2"
        converter.convert(str(converted))
        declare_unknown_token(converted / "config.json")
        self.decoder = converter.spec.decoder
        self.generator = ctranslate2.Generator(str(converted), device="cpu", compute_type="float32")
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)

    def logits(self, ids: list[int]) -> np.ndarray:
        return np.array(self.generator.forward_batch([ids]))[0]

    def greedy(self, ids: list[int], count: int) -> list[int]:
        tokens = self.tokenizer.convert_ids_to_tokens(ids)
        options = {"max_length": count, "sampling_topk": 1, "include_prompt_in_result": False}
        return self.generator.generate_batch([tokens], **options)[0].sequences_ids[0]

    def kv_heads(self) -> int:
        """The number is only written down where it is not that of the query heads."""
        heads = getattr(self.decoder.layer[0].self_attention, "num_heads_kv", self.decoder.num_heads)
        return int(heads.numpy())

    def tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text).input_ids


def declare_unknown_token(config: Path) -> None:
    """For a tokenizer without one the Mistral converter writes null, which loading refuses; Llama's writes this."""
    values = json.loads(config.read_text())
    values["unk_token"] = values["unk_token"] or ""
    config.write_text(json.dumps(values))
