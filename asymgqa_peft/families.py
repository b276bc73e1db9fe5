"""What differs from one architecture to the next, as data. No other module branches on the family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig

from .heads import HeadShape


@dataclass(frozen=True)
class StandIn:
    """Another stock class that holds the same weights with heads that the base's own class cannot have."""

    model_type: str
    # Values that the source configuration must have for the classes to compute the same.
    needs: dict[str, object]
    # Values that the other configuration then gets.
    sets: dict[str, object] = field(default_factory=dict)
    # Projections of the source that the other class has in equal parts, by the ends of their names.
    splits: dict[str, tuple[str, ...]] = field(default_factory=dict)
    # Whether the other class has q, k and v apart where the source has them fused.
    unfuses: bool = False
    # Projections that have a bias in the other class only, which is 0: by the ends of their names.
    adds_bias: tuple[str, ...] = ()

    def can_replace(self, config: PretrainedConfig) -> bool:
        """Whether the classes compute the same under this configuration."""
        rope = getattr(config, "rope_parameters", None) or {}
        found = {name: rope.get(name, getattr(config, name, value)) for name, value in self.needs.items()}
        return found == self.needs


@dataclass(frozen=True)
class Family:
    """One architecture, declared: every field says what it means beside its usual value."""

    # Last component of the attention module's name, and the names of the projections inside.
    attention: str = "self_attn"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    # One projection that holds q, k and v instead of the three: as "blocks", all of q, then k, then v; or by "heads",
    # q, k, v of head 0, then of head 1, ...
    fused_qkv: str | None = None
    fused_layout: Literal["blocks", "heads"] = "blocks"
    # RMS norms that span all heads (OLMo-2); norms within a head need no entry.
    query_norm: str | None = None
    key_norm: str | None = None
    # Attributes of the attention module that say what heads it is to see, and which figure each holds: "slots",
    # "kv_heads", "slots_per_kv", "head_dim" or "rotary_dim".
    geometry: dict[str, str] = field(
        default_factory=lambda: {"num_key_value_groups": "slots_per_kv", "head_dim": "head_dim"}
    )
    # Whether its forward reads `self.config.num_attention_heads`.
    config_heads: bool = False
    # Whether o_proj's output is added to the residual stream as it is, not normalised before.
    plain_residual: bool = True
    # Whether keys carry RoPE.
    rotary: bool = True
    # Whether config and forward know a number of KV heads. If not, the shared K/V heads are repeated to all heads, in
    # the adapter and in the plain checkpoint: K/V parameters are shared, the cache is not smaller.
    grouped: bool = True
    # Whether the configuration says what scores are divided by, whatever the head dimension.
    scale_in_config: bool = False
    # Whether the configuration lets head_dim differ from hidden_size / num_attention_heads.
    explicit_head_dim: bool = True
    # Entries of `rope_parameters` -> what transformers 4 called them, at the top of config.json.
    rope_fields: dict[str, str] = field(
        default_factory=lambda: {"rope_theta": "rope_theta", "partial_rotary_factor": "partial_rotary_factor"}
    )
    # The classes that hold padded slots and wide heads in its stead; wide ones go to `padded_as` where none is named.
    padded_as: StandIn | None = None
    wide_as: StandIn | None = None
    # Options of the configuration that cannot be on -> technical reason and remedy.
    refused_options: dict[str, str] = field(default_factory=dict)
    # Whether a norm stands between k_proj and the attention.
    norms_keys: bool = False
    # The configuration's bound on queries, keys and values, a clamp unless None.
    clamp_option: str | None = None

    @property
    def shared_names(self) -> tuple[str, ...]:
        """Projections that are trained whole and take no LoRA."""
        return (self.fused_qkv,) if self.fused_qkv else (self.key, self.value)

    @property
    def query_source(self) -> str:
        """Module whose output is the attention's query."""
        return self.query_norm or self.query

    def split_fused(self, heads: Tensor, shape: HeadShape, dim: int = 0) -> tuple[Tensor, ...]:
        """Heads of a fused projection along the axis `dim` >= 0 -> H of q, K of k, K of v."""
        if self.fused_layout == "heads":
            return heads.unflatten(dim, (shape.num_attention_heads, 3)).unbind(dim + 1)
        return heads.split([shape.num_attention_heads, shape.base_kv_heads, shape.base_kv_heads], dim)

    def join_fused(self, query: Tensor, key: Tensor, value: Tensor, dim: int = 0) -> Tensor:
        """Heads of q, k and v along the axis `dim` >= 0 -> those of the fused projection."""
        if self.fused_layout == "heads":
            return torch.stack((query, key, value), dim + 1).flatten(dim, dim + 1)
        return torch.cat((query, key, value), dim)


FAMILIES: dict[str, Family] = {
    "llama": Family(
        # LlamaConfig wants hidden_size % num_attention_heads == 0; and more engines honour Mistral's head_dim.
        padded_as=StandIn("mistral", {"attention_bias": False, "mlp_bias": False}, {"sliding_window": None}),
    ),
    "mistral": Family(),
    "qwen2": Family(
        # Engines take Qwen2's head dimension for hidden_size / num_attention_heads, and Llama's as it is written.
        padded_as=StandIn("llama", {"use_sliding_window": False}, {"attention_bias": True}, adds_bias=("o_proj",)),
    ),
    "qwen3": Family(norms_keys=True),
    "gemma": Family(),
    "gemma2": Family(plain_residual=False, scale_in_config=True),
    "gemma3_text": Family(plain_residual=False, scale_in_config=True, norms_keys=True),
    "phi": Family(
        output="dense",
        geometry={"num_key_value_groups": "slots_per_kv", "head_dim": "head_dim", "rotary_ndims": "rotary_dim"},
        refused_options={
            "qk_layernorm": "sizes its norms by hidden_size // num_attention_heads, which padded slots change. "
            "Use a Phi without it (Phi-1, 1.5 and 2 are)."
        },
    ),
    "stablelm": Family(
        geometry={"num_heads": "slots", "num_key_value_heads": "kv_heads", "num_key_value_groups": "slots_per_kv"},
        explicit_head_dim=False,
        refused_options={
            "qk_layernorm": "gives every head its own LayerNorm module, which padded slots cannot share. "
            "Use a StableLM without it (e.g. the 3B and 1.6B models)."
        },
    ),
    "olmo": Family(clamp_option="clip_qkv"),
    "olmo2": Family(plain_residual=False, query_norm="q_norm", key_norm="k_norm", norms_keys=True),
    "phi3": Family(
        fused_qkv="qkv_proj",
        geometry={"num_key_value_heads": "kv_heads", "num_key_value_groups": "slots_per_kv", "head_dim": "head_dim"},
        config_heads=True,
        # Its configuration checks the number of rotary frequencies against hidden_size / heads.
        wide_as=StandIn(
            "mistral",
            needs={"partial_rotary_factor": 1.0},
            splits={"mlp.gate_up_proj.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight")},
            unfuses=True,
        ),
    ),
    "opt": Family(output="out_proj", geometry={}, rotary=False, grouped=False),
    "gpt_neox": Family(
        attention="attention",
        output="dense",
        fused_qkv="query_key_value",
        fused_layout="heads",
        geometry={},
        grouped=False,
        rope_fields={"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    ),
}

SHARED_PROJECTION_NAMES = frozenset(name for family in FAMILIES.values() for name in family.shared_names)
"""Projections of any family that are trained whole."""


def find_family(config: PretrainedConfig) -> Family:
    """The declaration for a model's configuration.

    Raises:
        ValueError: for an architecture that is not declared, or one that is refused, with reason and remedy.
    """
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        raise ValueError(
            f"model_type={model_type!r} is not supported: AsymGQA must know how its attention lays out heads. "
            f"Supported: {', '.join(sorted(FAMILIES))}. Use a text-only checkpoint of one of these."
        )
    family = FAMILIES[model_type]
    for option, reason in family.refused_options.items():
        if getattr(config, option):
            found = f"{option}={getattr(config, option)!r}"
            raise ValueError(f"This {model_type} model cannot take grouped attention: {found} {reason}")
    return family


def head_shape(config: PretrainedConfig) -> HeadShape:
    """Head counts and dimensions of a supported model's attention layers."""
    family = find_family(config)
    num_heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    clamped = family.clamp_option is not None and getattr(config, family.clamp_option) is not None
    return HeadShape(
        hidden_size=config.hidden_size,
        num_attention_heads=num_heads,
        base_kv_heads=getattr(config, "num_key_value_heads", None) or num_heads,
        head_dim=head_dim,
        rotary_dim=int(head_dim * _rotary_fraction(config)) if family.rotary else 0,
        free_keys=not family.norms_keys and not clamped,
        free_values=not clamped,
    )


def _rotary_fraction(config: PretrainedConfig) -> float:
    parameters = getattr(config, "rope_parameters", None)
    if isinstance(parameters, Mapping) and "partial_rotary_factor" in parameters:
        return parameters["partial_rotary_factor"]
    return getattr(config, "partial_rotary_factor", None) or 1.0
