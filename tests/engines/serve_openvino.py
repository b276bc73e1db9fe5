"""OpenVINO, through optimum-intel's export."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino
import torch
from optimum.intel import OVModelForCausalLM
from optimum.intel.version import __version__ as optimum_version
from transformers import AutoTokenizer

FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


class Engine:
    version = f"{openvino.__version__.split('-')[0]} (optimum-intel {optimum_version})"

    def __init__(self, checkpoint: Path, scratch: Path):
        self.checkpoint = checkpoint
        self.model = OVModelForCausalLM.from_pretrained(checkpoint, export=True, ov_config=FLOAT32)

    def logits(self, ids: list[int]) -> np.ndarray:
        inputs = torch.tensor([ids])
        return self.model(input_ids=inputs, attention_mask=torch.ones_like(inputs)).logits[0].numpy()

    def greedy(self, ids: list[int], count: int) -> list[int]:
        sequence = self.model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False)[0]
        return sequence[len(ids) :].tolist()

    def kv_heads(self) -> int:
        """The cache is the graph's state: (batch, heads, tokens, D) per layer."""
        states = [variable.info for variable in self.model.model.get_variables()]
        return next(state.data_shape[1].get_length() for state in states if ".key" in state.variable_id)

    def tokenize(self, text: str) -> list[int]:
        return AutoTokenizer.from_pretrained(self.checkpoint)(text).input_ids
