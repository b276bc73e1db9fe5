"""mlx-lm, on mlx's CPU back end."""

from __future__ import annotations

from importlib.metadata import version
from itertools import islice
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm import load
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache


class Engine:
    version = f"{version('mlx-lm')} (mlx {version('mlx')})"

    def __init__(self, checkpoint: Path, scratch: Path, dtype: str):
        self.model, self.tokenizer = load(str(checkpoint))

    def logits(self, ids: list[int]) -> np.ndarray:
        return np.array(self.model(mx.array([ids]))[0].astype(mx.float32))

    def greedy(self, ids: list[int], count: int) -> list[int]:
        return [int(token) for token, _ in islice(generate_step(mx.array(ids), self.model, max_tokens=count), count)]

    def kv_heads(self) -> int:
        cache = make_prompt_cache(self.model)
        mx.eval(self.model(mx.array([[0]]), cache=cache))
        return cache[0].keys.shape[1]

    def tokenize(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)
