"""ONNX Runtime, through optimum-onnx's export."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer


class Engine:
    version = f"{onnxruntime.__version__} (optimum-onnx {version('optimum-onnx')})"

    def __init__(self, checkpoint: Path, scratch: Path):
        self.checkpoint = checkpoint
        self.model = ORTModelForCausalLM.from_pretrained(checkpoint, export=True, dtype=torch.float32)
        # optimum-onnx shapes the empty cache by hidden_size / heads, also for an unpadded model; its graph is right.
        self.model.embed_size_per_head = self.model.config.head_dim

    def logits(self, ids: list[int]) -> np.ndarray:
        inputs = torch.tensor([ids])
        return self.model(input_ids=inputs, attention_mask=torch.ones_like(inputs)).logits[0].numpy()

    def greedy(self, ids: list[int], count: int) -> list[int]:
        sequence = self.model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False)[0]
        return sequence[len(ids) :].tolist()

    def kv_heads(self) -> int:
        inputs = {node.name: node.shape for node in self.model.session.get_inputs()}
        return inputs["past_key_values.0.key"][1]

    def tokenize(self, text: str) -> list[int]:
        return AutoTokenizer.from_pretrained(self.checkpoint)(text).input_ids
