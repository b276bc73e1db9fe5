"""OpenVINO, through optimum-intel's export."""

from __future__ import annotations

from pathlib import Path

import dummy_cache
import openvino
import serve_transformers
from optimum.exporters.openvino import model_configs
from optimum.intel import OVModelForCausalLM
from optimum.intel.version import __version__ as optimum_version

dummy_cache.has_kv_heads(model_configs.PhiOpenVINOConfig)
FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


class Engine(serve_transformers.Engine):
    version = f"{openvino.__version__.split('-')[0]} (optimum-intel {optimum_version})"

    def __init__(self, checkpoint: Path, scratch: Path, dtype: str):
        self.checkpoint = checkpoint
        options = FLOAT32 if dtype == "float32" else None
        self.model = OVModelForCausalLM.from_pretrained(checkpoint, export=True, ov_config=options)

    def kv_heads(self) -> int:
        """The cache is the graph's state: (batch, heads, tokens, D) per layer."""
        states = [variable.info for variable in self.model.model.get_variables()]
        return next(state.data_shape[1].get_length() for state in states if ".key" in state.variable_id)
