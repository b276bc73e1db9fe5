"""Fixtures: three tiny random models that between them have every feature of the adapter, and what tests do to them.

No test reaches the network. Models are made anew for every test: wrapping changes them in place.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries read it
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM, Qwen2Config, Qwen2ForCausalLM

from asymgqa_peft import AsymGQAConfig

VOCAB = 64
LAYERS = 2
torch.set_num_threads(1)  # the suite runs in parallel processes, and the models are too small to gain from threads


def tiny_llama(**changes) -> LlamaForCausalLM:
    """MHA: E 48, H = K = 6, D 8."""
    sizes = {"hidden_size": 48, "intermediate_size": 32, "num_attention_heads": 6, "num_key_value_heads": 6}
    return _build(LlamaForCausalLM, LlamaConfig, sizes | changes)


def tiny_qwen2(**changes) -> Qwen2ForCausalLM:
    """GQA base with K/V bias: E 64, H 8, K 4, D 8."""
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4}
    return _build(Qwen2ForCausalLM, Qwen2Config, sizes | changes)


def tiny_phi(**changes) -> PhiForCausalLM:
    """Partial rotary, biases everywhere, `dense` for o_proj: E 48, H = K = 6, D 8, R 4."""
    sizes = {"hidden_size": 48, "intermediate_size": 32, "num_attention_heads": 6, "partial_rotary_factor": 0.5}
    return _build(PhiForCausalLM, PhiConfig, sizes | changes)


BASES = {"llama": tiny_llama, "qwen2": tiny_qwen2, "phi": tiny_phi}
GROUPS = {"llama": [[0, 2, 3, 5], [1, 4]], "qwen2": [[0, 2, 3], [1]], "phi": [[0, 2, 3, 5], [1, 4]]}
OTHER_GROUPS = {"llama": [[0, 1, 5], [3], [2, 4]], "qwen2": [[2], [0], [1, 3]], "phi": [[0, 1, 5], [3], [2, 4]]}


def _build(model_class, config_class, sizes: dict):
    torch.manual_seed(0)
    common = {"vocab_size": VOCAB, "num_hidden_layers": LAYERS, "max_position_embeddings": 64}
    config = config_class(**common | {"tie_word_embeddings": False} | sizes)
    model = model_class(config).eval()
    with torch.no_grad():  # biases start at zero, which would hide them
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def adapter_config(groups: list | None = None, **changes) -> AsymGQAConfig:
    """A config with `groups` in every layer."""
    fields = {"num_key_value_heads": 2, "r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}
    if groups is not None:
        fields |= {"num_key_value_heads": len(groups), "head_groups": [groups] * LAYERS}
    return AsymGQAConfig(**fields | changes)


def scramble(model: torch.nn.Module, adapter_name: str = "default", seed: int = 1) -> None:
    """Random values in everything that an adapter trains, so that no part of it is the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{adapter_name}." in f"{name}." and ".lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.3 * noise.to(parameter))


def wrap(base: torch.nn.Module, config: AsymGQAConfig, **options) -> PeftModel:
    """A wrapped model with random adapter weights, the same for every call."""
    torch.manual_seed(1)  # LoRA's A starts at random
    model = get_peft_model(base, config, **options)
    scramble(model)
    return model.eval()


@torch.no_grad()
def logits(model: torch.nn.Module, seed: int = 5) -> torch.Tensor:
    """(2, 11, V) in fp32, on fixed random tokens."""
    ids = torch.randint(0, VOCAB, (2, 11), generator=torch.Generator().manual_seed(seed))
    return model(input_ids=ids).logits.float()


@pytest.fixture(params=sorted(BASES))
def family(request) -> str:
    """Every one of the three models in turn."""
    return request.param


@pytest.fixture
def base(family):
    """The family's untouched model."""
    return BASES[family]()


@pytest.fixture
def wrapped(base, family):
    """The model under an adapter of unequal groups with random weights."""
    return wrap(base, adapter_config(GROUPS[family]))
