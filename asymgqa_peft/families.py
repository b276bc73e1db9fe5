"""What differs from one architecture to the next, as data. No other module branches on the family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, PretrainedConfig

from .heads import HeadShape, NormSpan


@dataclass(frozen=True)
class StandIn:
    """Another stock class that holds the same weights with heads that the base's own class cannot have."""

    model_type: str
    # Values that the source configuration must have for the classes to compute the same; and fields of it that must
    # have the value of another.
    needs: dict[str, object] = field(default_factory=dict)
    equals: dict[str, str] = field(default_factory=dict)
    # How many KV heads the other class can have, any number unless given.
    kv_heads: int | None = None
    # Values that the other configuration then gets, and fields of it that the source has under another name.
    sets: dict[str, object] = field(default_factory=dict)
    fields: dict[str, str] = field(default_factory=dict)
    # Parts of the source's names -> what the other class has in their place, replaced in this order.
    renames: dict[str, str] = field(default_factory=dict)
    # The other class's one projection for all of q, then k, then v, where it does not have them apart.
    fused_qkv: str | None = None
    # Projections of the source that the other class has in equal parts, by the ends of their names.
    splits: dict[str, tuple[str, ...]] = field(default_factory=dict)
    # First rows of the source that the other class does not have, by the ends of names.
    drops_rows: dict[str, int] = field(default_factory=dict)
    # What stands behind a LayerNorm, in a decoder layer (the attention's name: its q, k and v) -> that norm, whose
    # scale and shift go in there: the other class has one norm where the source has several, all of one input.
    folds: dict[str, str] = field(default_factory=dict)
    # Whether the source recomputes its cache where longrope's frequencies change, and the other class does not.
    loses_recomputing: bool = False
    # What who uses the other class must know; merging warns of it.
    caution: str | None = None

    def classes(self, model_class: type, config: PretrainedConfig) -> tuple[type | None, type]:
        """Model class for the task of ``model_class``, None where there is no such one, and configuration class."""
        config_class = CONFIG_MAPPING[self.model_type]
        own, other = (each.__name__.removesuffix("Config") for each in (type(config), config_class))
        return getattr(transformers, model_class.__name__.replace(own, other, 1), None), config_class

    def refusal(self, model_class: type, config: PretrainedConfig, kv_heads: int) -> str | None:
        """Why the class cannot hold a model's weights with so many KV heads; None where it can."""
        other, config_class = self.classes(model_class, config)
        if other is None:
            task = model_class.__name__.removeprefix(type(config).__name__.removesuffix("Config"))
            return f"no stock class holds them but {self.model_type}, which has no {task}"
        rope = getattr(config, "rope_parameters", None) or {}
        needs = self.needs | {name: getattr(config, same) for name, same in self.equals.items()}
        if any(rope.get(name, getattr(config, name, value)) != value for name, value in needs.items()):
            wanted = ", ".join(f"{name}={value!r}" for name, value in needs.items())
            return f"no stock class holds them but {self.model_type}, which computes the same only for {wanted}"
        if self.kv_heads not in (None, kv_heads):
            return f"no stock class holds them, but {self.model_type} would hold num_key_value_heads={self.kv_heads}"
        return None

    def rename(self, name: str) -> str:
        """The other class's name of a tensor or module of the source."""
        for old, new in self.renames.items():
            name = name.replace(old, new)
        return name


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
    # RMS norms between the projections and RoPE: their names, what one spans, and what its scale is beyond its weight.
    query_norm: str | None = None
    key_norm: str | None = None
    norm_span: NormSpan | None = None
    norm_offset: float = 0.0
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
    # Whether config and forward know a number of KV heads. If not, the shared K/V heads are repeated to all heads: K/V
    # parameters are shared, the cache is not smaller. In the adapter always, in the plain checkpoint unless there is
    # a `padded_as`.
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
    # A family that is not `grouped` leaves equal groups to them too.
    padded_as: StandIn | None = None
    wide_as: StandIn | None = None
    # Options of the configuration that cannot be on -> technical reason and remedy.
    refused_options: dict[str, str] = field(default_factory=dict)
    # The configuration's bound on queries, keys and values, a clamp unless None.
    clamp_option: str | None = None

    @property
    def shared_names(self) -> tuple[str, ...]:
        """Projections that are trained whole and take no LoRA."""
        return (self.fused_qkv,) if self.fused_qkv else (self.key, self.value)

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


_HEAD_NORMS = {"query_norm": "q_norm", "key_norm": "k_norm", "norm_span": "head"}

GPT_NEOX_AS_PHI = StandIn(
    "phi",
    needs={"use_parallel_residual": True},
    fields={"resid_pdrop": "hidden_dropout", "embd_pdrop": "hidden_dropout"},
    renames={
        "gpt_neox": "model",
        "embed_in": "embed_tokens",
        "emb_dropout": "embed_dropout",
        "final_layer_norm": "final_layernorm",
        ".attention": ".self_attn",
        "dense_h_to_4h": "fc1",
        "dense_4h_to_h": "fc2",
        "classifier": "score",
    },
    folds={"attention": "input_layernorm", "mlp.dense_h_to_4h": "post_attention_layernorm"},
)
"""A parallel residual normalises one input twice, where Phi does once: exact with both norms folded."""

FAMILIES: dict[str, Family] = {
    "llama": Family(
        # LlamaConfig wants hidden_size % num_attention_heads == 0; and more engines honour Mistral's head_dim.
        padded_as=StandIn(
            "mistral", needs={"attention_bias": False, "mlp_bias": False}, sets={"sliding_window": None}
        ),
    ),
    "mistral": Family(),
    "qwen2": Family(
        # Engines take Qwen2's head dimension for hidden_size / num_attention_heads, and Llama's as it is written.
        padded_as=StandIn("llama", needs={"use_sliding_window": False}, sets={"attention_bias": True}),
    ),
    "qwen3": Family(**_HEAD_NORMS),
    "gemma": Family(),
    "gemma2": Family(plain_residual=False, scale_in_config=True),
    "gemma3_text": Family(plain_residual=False, scale_in_config=True, norm_offset=1.0, **_HEAD_NORMS),
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
    "olmo2": Family(plain_residual=False, query_norm="q_norm", key_norm="k_norm", norm_span="layer"),
    "phi3": Family(
        fused_qkv="qkv_proj",
        geometry={"num_key_value_heads": "kv_heads", "num_key_value_groups": "slots_per_kv", "head_dim": "head_dim"},
        config_heads=True,
        # Its configuration checks the number of rotary frequencies against hidden_size / heads.
        wide_as=StandIn(
            "mistral",
            needs={"partial_rotary_factor": 1.0},
            splits={"mlp.gate_up_proj.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight")},
            loses_recomputing=True,
        ),
    ),
    "opt": Family(
        output="out_proj",
        geometry={},
        rotary=False,
        grouped=False,
        padded_as=StandIn(
            "gpt_bigcode",
            needs={"do_layer_norm_before": True, "_remove_final_layer_norm": False},
            equals={"word_embed_proj_dim": "hidden_size"},
            kv_heads=1,
            sets={"multi_query": True, "embd_pdrop": 0.0, "layer_norm_epsilon": 1e-5},
            fields={
                "n_embd": "hidden_size",
                "n_layer": "num_hidden_layers",
                "n_positions": "max_position_embeddings",
                "n_inner": "ffn_dim",
                "attn_pdrop": "attention_dropout",
                "resid_pdrop": "dropout",
                "initializer_range": "init_std",
            },
            renames={
                "decoder.final_layer_norm": "decoder.ln_f",
                "model.decoder.": "transformer.",
                "decoder.": "",
                "embed_tokens": "wte",
                "embed_positions": "wpe",
                "layers.": "h.",
                "self_attn_layer_norm": "ln_1",
                "final_layer_norm": "ln_2",
                "self_attn.out_proj": "attn.c_proj",
                "self_attn": "attn",
                "fc1": "mlp.c_fc",
                "fc2": "mlp.c_proj",
            },
            fused_qkv="c_attn",
            # Where OPT's positions start.
            drops_rows={"embed_positions.weight": 2},
            caution="counts positions from the first column, not from the first real token: give its forward "
            "position_ids with left-padded inputs, as generate() does. llama.cpp and mlx-lm run this class with GELU, "
            "whatever its activation_function says.",
        ),
    ),
    "gpt_neox": Family(
        attention="attention",
        output="dense",
        fused_qkv="query_key_value",
        fused_layout="heads",
        geometry={},
        grouped=False,
        rope_fields={"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
        padded_as=GPT_NEOX_AS_PHI,
        wide_as=GPT_NEOX_AS_PHI,
    ),
}

PLAIN_FAMILIES = {"gpt_bigcode": Family(rotary=False)}
"""Classes that plain checkpoints alone are of; nothing in them can be shared further."""

NOT_SUPPORTED = {
    "gpt2": "Its projections are Conv1D, stored transposed, and no stock class has its learned positions with more "
    "than one but fewer than all KV heads"
}
"""Architectures that people may ask for -> why they are not declared."""

SHARED_PROJECTION_NAMES = frozenset(name for family in FAMILIES.values() for name in family.shared_names)
"""Projections of any family that are trained whole."""


def find_family(config: PretrainedConfig) -> Family:
    """The declaration for a model's configuration.

    Raises:
        ValueError: for an architecture that is not declared, or one that is refused, with reason and remedy.
    """
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        reason = NOT_SUPPORTED.get(model_type, "AsymGQA must know how its attention lays out heads")
        raise ValueError(
            f"model_type={model_type!r} is not supported: {reason}. "
            f"Supported: {', '.join(sorted(FAMILIES))}. Use a text-only checkpoint of one of these."
        )
    family = FAMILIES[model_type]
    for option, reason in family.refused_options.items():
        if getattr(config, option):
            found = f"{option}={getattr(config, option)!r}"
            raise ValueError(f"This {model_type} model cannot take grouped attention: {found} {reason}")
    return family


def head_shape(config: PretrainedConfig) -> HeadShape:
    """Head counts and dimensions of the attention layers of a supported model, or of a plain checkpoint."""
    family = PLAIN_FAMILIES.get(config.model_type) or find_family(config)
    num_heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    clamped = family.clamp_option is not None and getattr(config, family.clamp_option) is not None
    return HeadShape(
        hidden_size=config.hidden_size,
        num_attention_heads=num_heads,
        base_kv_heads=getattr(config, "num_key_value_heads", None) or num_heads,
        head_dim=head_dim,
        rotary_dim=int(head_dim * _rotary_fraction(config)) if family.rotary else 0,
        free_keys=not clamped,
        free_values=not clamped,
        norm_span=family.norm_span,
    )


def _rotary_fraction(config: PretrainedConfig) -> float:
    parameters = getattr(config, "rope_parameters", None)
    if isinstance(parameters, Mapping) and "partial_rotary_factor" in parameters:
        return parameters["partial_rotary_factor"]
    return getattr(config, "partial_rotary_factor", None) or 1.0
