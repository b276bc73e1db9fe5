"""ONNX Runtime, through optimum-onnx's export."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import dummy_cache
import onnxruntime
import serve_transformers
import torch
from optimum.exporters.onnx import model_configs
from optimum.onnxruntime import ORTModelForCausalLM

dummy_cache.has_kv_heads(model_configs.PhiOnnxConfig)


class Engine(serve_transformers.Engine):
    version = f"{onnxruntime.__version__} (optimum-onnx {version('optimum-onnx')})"

    def __init__(self, checkpoint: Path, scratch: Path, dtype: str):
        self.checkpoint = checkpoint
        # Of a bfloat16 checkpoint too: ONNX Runtime has no kernels for that on a CPU.
        self.model = ORTModelForCausalLM.from_pretrained(checkpoint, export=True, dtype=torch.float32)
        # optimum-onnx shapes the empty cache by hidden_size / heads, also for an unpadded model; its graph is right.
        config = self.model.config
        self.model.embed_size_per_head = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
        self.model.num_key_value_heads = config.num_key_value_heads

    def kv_heads(self) -> int:
        inputs = {node.name: node.shape for node in self.model.session.get_inputs()}
        return inputs["past_key_values.0.key"][1]
