"""Stock transformers. Every serve_*.py has an `Engine` like this one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


class Engine:
    """A checkpoint loaded unmodified; what an engine must convert first goes into `scratch`.

    A float32 one is computed in float32; one in bfloat16 as the engine does it unless it is told otherwise.
    """

    version = transformers.__version__

    def __init__(self, checkpoint: Path, scratch: Path, dtype: str):
        self.checkpoint = checkpoint
        self.model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()

    @torch.no_grad()
    def logits(self, ids: list[int]) -> np.ndarray:
        """(T, V)"""
        inputs = torch.tensor([ids])
        return self.model(input_ids=inputs, attention_mask=torch.ones_like(inputs)).logits[0].float().numpy()

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """The `count` tokens after ids, through the engine's own cache."""
        sequence = self.model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False)[0]
        return sequence[len(ids) :].tolist()

    @torch.no_grad()
    def kv_heads(self) -> int:
        """As the engine's cache holds them, or as near to it as the engine shows."""
        return self.model(torch.tensor([[0]]), use_cache=True).past_key_values.layers[0].keys.shape[1]

    def tokenize(self, text: str) -> list[int]:
        """By the engine's own reading of the checkpoint's tokenizer."""
        return AutoTokenizer.from_pretrained(self.checkpoint)(text).input_ids
