"""Tuner layers for shared K/V heads, and the hooks that fit query heads to them.

A `SharedKey` and a `SharedValue` stand where k_proj and v_proj stood (`SharedQKV` where the base fuses them) and keep
the originals. Axes as in `slots`.

An adapter in effect shows the attention one of two shapes, which compute the same:

- in evaluation mode, G shared heads with p query slots each: queries are fitted to the shared head of their group and
  scattered into slots after q_proj, and heads are gathered back and mixed before o_proj. The cache holds G heads.
- in training mode, one K/V head per query head, so that there are no empty slots to compute; there too where a family
  cannot store fewer heads. Shared keys and values are decoded into each query head's own of D dimensions; behind a
  norm, which acts on all W of them, they are repeated as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from ..families import Family
from ..groups import Partition
from ..heads import HeadShape, SharedShape
from .offload import copy_without_hooks
from .slots import HeadLayout, HeadMix, HeadScale, RotaryGain

# No LoRA, for all their names: PEFT trains and saves what stands under the prefix "lora_".
SHARED_CONTAINERS = (
    "lora_kv",
    "lora_query_scale",
    "lora_query_gain",
    "lora_query_mix",
    "lora_value_mix",
    "lora_norm",
)
"""Where the trainable tensors of shared heads stand in their layers."""


class SharedLinear(nn.Linear):
    """Projection onto shared heads in the input's dtype: fp32 weights over a bf16 base cost no fp32 product."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, E) -> (B, T, out)."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class SharedLayer(nn.Module, BaseTunerLayer):
    """What all layers that replace a module of the attention have in common: one active adapter."""

    adapter_layer_names: tuple[str, ...] = ()
    # PEFT's disable_input_dtype_casting switches it: here weights are cast, inputs never.
    cast_input_dtype_enabled = True

    def __init__(self, base_layer: nn.Module, shape: HeadShape, family: Family) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.shape = shape
        self.family = family
        self.merged_adapters: list[str] = []
        # In a list, which does not make it a child; a deep copy's list holds the copy's layer.
        self._keys: list[SharedProjection] = []
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict())

    def active(self) -> str | None:
        """Name of the adapter in effect, None while the base's own heads are: it is off, or merged into them."""
        if self.disable_adapters or self.merged:
            return None
        names = [name for name in self.active_adapters if name in self.adapters()]
        if len(names) > 1:
            raise ValueError(f"Adapters {names} are active together, but attention has one set of K/V heads: set one.")
        return names[0] if names else None

    def adapters(self) -> nn.ModuleDict:
        """Adapter names (keys) this layer holds."""
        return getattr(self, self.adapter_layer_names[0])

    def follow(self, keys: SharedProjection) -> None:
        """Say which layer makes the keys; it holds the groups."""
        self._keys = [keys]

    @property
    def keys(self) -> SharedProjection:
        """The layer that makes the keys."""
        return self._keys[0] if self._keys else self

    def layout(self, adapter_name: str) -> HeadLayout:
        """The adapter's groups."""
        return self.keys.lora_groups[adapter_name]

    @property
    def shows_heads(self) -> bool:
        """Whether the attention is to see one K/V head per query head, not the shared heads in slots."""
        return self.keys.training or not self.family.grouped

    @property
    def decodes(self) -> bool:
        """Whether these are each query head's own K and V, of the base's D dimensions."""
        return self.shows_heads and self.shape.norm_span is None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Mark the adapter as merged: `AsymGQAModel.merge_adapter` has checked it and writes its heads."""
        self.merged_adapters += check_adapters_to_merge(self, adapter_names)

    def unmerge(self) -> None:
        """Take back `merge`, for `AsymGQAModel.unmerge_adapter`, which restores the weights."""
        self.merged_adapters.clear()

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names: list[str] | None):
        """The base's module; what the adapter holds goes into the plain model by `export`."""
        return self.base_layer

    def cast_to_base(self, adapter_name: str) -> None:
        """Cast an adapter to the dtype that the base computes in (PEFT's autocast_adapter_dtype=False)."""
        _, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        for name in self.adapter_layer_names:
            if adapter_name in getattr(self, name):
                getattr(self, name)[adapter_name].to(dtype)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's also casts to the base's dtype, which would round fp32 heads on loading with low_cpu_mem_usage.
        for name in self.adapter_layer_names:
            if adapter_name in getattr(self, name):
                getattr(self, name)[adapter_name].to(device or self._device())

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whole K/V projections are no low-rank update."""
        return False

    def _device(self) -> torch.device:
        return self.get_base_layer().weight.device

    def _dtype(self) -> torch.dtype:
        # PEFT's autocast_adapter_dtype decides afterwards; starting in fp32 keeps the mean of bf16 heads exact.
        return torch.float64 if self.get_base_layer().weight.dtype == torch.float64 else torch.float32


class SharedProjection(SharedLayer):
    """G shared heads for keys, values or both, in place of the base's projection.

    `lora_kv[adapter]` projects onto the shared heads; `lora_query_gain`, `lora_query_mix` (keys) and `lora_value_mix`
    (values) fit each query head to them and exist where the architecture leaves the basis free, `lora_query_scale`
    where a norm follows. `lora_groups` holds the groups; the values' layer has none of its own and asks the keys'.
    """

    adapter_layer_names = ("lora_kv", "lora_query_scale", "lora_query_gain", "lora_query_mix", "lora_value_mix")
    parts: tuple[str, ...] = ()

    def __init__(self, base_layer: nn.Module, shape: HeadShape, family: Family) -> None:
        super().__init__(base_layer, shape, family)
        # Not among adapter_layer_names: PEFT 0.20 casts what stands there to floating point.
        self.lora_groups = nn.ModuleDict()

    def update_layer(self, adapter_name: str, partition: Partition, shape: SharedShape, declared: bool) -> None:
        """Add an adapter; its shared heads are still to be written."""
        base, factory = self.shape, {"device": self._device(), "dtype": self._dtype()}
        rows = len(self.parts) * len(partition) * shape.head_dim
        bias = self.get_base_layer().bias is not None
        self.lora_kv[adapter_name] = SharedLinear(base.hidden_size, rows, bias=bias, **factory)
        heads = base.num_attention_heads
        if "key" in self.parts:
            self.lora_groups[adapter_name] = HeadLayout(partition, shape, self._device(), declared)
            if base.norm_span is not None:
                self.lora_query_scale[adapter_name] = HeadScale(shape, **factory)
            if base.free_keys and base.rotary_dim:
                self.lora_query_gain[adapter_name] = RotaryGain(shape, **factory)
            if base.free_keys and base.pass_dim:
                self.lora_query_mix[adapter_name] = HeadMix(heads, shape.pass_dim, base.pass_dim, **factory)
        if "value" in self.parts and base.free_values:
            self.lora_value_mix[adapter_name] = HeadMix(heads, base.head_dim, shape.head_dim, **factory)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter's heads, gains, mixes and groups."""
        if adapter_name in self.lora_groups:
            del self.lora_groups[adapter_name]
        super().delete_adapter(adapter_name)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, E) -> keys or values of the heads that the attention sees, (B, T, heads * dimensions)."""
        name = self.active()
        if name is None:
            return self.base_layer(x)
        (heads,) = self.heads_seen(name, x)
        return heads.flatten(-2)

    def heads_seen(self, adapter_name: str, x: Tensor) -> list[Tensor]:
        """(B, T, E) -> for each part the shared heads (B, T, G, W), or one per query head (B, T, H, D or W)."""
        width = self.layout(adapter_name).shape.head_dim
        shared = self.lora_kv[adapter_name](x).unflatten(-1, (len(self.parts), -1, width))
        seen = []
        for index, part in enumerate(self.parts):
            # Not unbind: OLMo clamps what it gets in place, which autograd forbids for one of several views.
            heads = shared.select(-3, index)
            if self.decodes and part == "value":
                heads = self.decode_values(adapter_name, heads)
            elif self.decodes:
                heads = self.decode_keys(adapter_name, heads)
            elif self.shows_heads and (part == "value" or self.shape.norm_span == "head"):
                # A norm over the whole layer must not see some keys several times: it repeats what it returns.
                heads = self.layout(adapter_name).to_query_heads(heads)
            seen.append(heads)
        return seen

    def decode_keys(self, adapter_name: str, shared: Tensor) -> Tensor:
        """Shared keys (B, T, G, W) -> each query head's own, (B, T, H, D)."""
        layout = self.layout(adapter_name)
        rotary, rest = layout.to_query_heads(shared).split([layout.shape.rotary_dim, layout.shape.pass_dim], dim=-1)
        if adapter_name in self.lora_query_gain:
            rotary = self.lora_query_gain[adapter_name].decode_key(rotary, layout)
        if adapter_name in self.lora_query_mix:
            rest = self.lora_query_mix[adapter_name].transposed(rest)
        return torch.cat((rotary, rest), dim=-1)

    def fit_queries(self, adapter_name: str, query: Tensor) -> Tensor:
        """Query heads (B, T, H, D) -> fitted to shared heads, in slots (B, T, G p, W) or one by one (B, T, H, W)."""
        layout = self.layout(adapter_name)
        if adapter_name in self.lora_query_scale:
            query = self.lora_query_scale[adapter_name](query)
        rotary, rest = query.split([self.shape.rotary_dim, self.shape.pass_dim], dim=-1)
        if adapter_name in self.lora_query_gain:
            rotary = self.lora_query_gain[adapter_name].fit_query(rotary, layout)
        if adapter_name in self.lora_query_mix:
            rest = self.lora_query_mix[adapter_name](rest)
        fitted = torch.cat((rotary, rest), dim=-1)
        if self.shows_heads or self.shape.norm_span == "layer":
            # A norm over the whole layer must see each head once: it scatters what it returns.
            return fitted
        return layout.scatter(fitted)

    def decode_values(self, adapter_name: str, shared: Tensor) -> Tensor:
        """Shared values (B, T, G, W) -> each query head's own, (B, T, H, D)."""
        return self._mixed(adapter_name, self.layout(adapter_name).to_query_heads(shared))

    def _mixed(self, adapter_name: str, heads: Tensor) -> Tensor:
        if adapter_name in self.lora_value_mix:
            return self.lora_value_mix[adapter_name](heads)
        return heads

    def fit_projected_queries(self, module: nn.Module, args: tuple, query: Tensor) -> Tensor | None:
        """Forward hook of q_proj: heads (B, T, H D) -> what `fit_queries` makes of them, (B, T, heads W)."""
        name = self.active()
        if name is None or self.decodes:
            return None
        return self.fit_queries(name, query.unflatten(-1, (-1, self.shape.head_dim))).flatten(-2)

    def gather_heads(self, module: nn.Module, args: tuple) -> tuple | None:
        """Forward pre-hook of the output projection: slots (B, T, G p W) -> mixed heads (B, T, H D)."""
        name = self.active()
        if name is None or self.decodes:
            return None
        layout = self.layout(name)
        heads = args[0].unflatten(-1, (-1, layout.shape.head_dim))
        if not self.shows_heads:
            heads = layout.gather(heads)
        return (self._mixed(name, heads).flatten(-2), *args[1:])

    def set_geometry(self, attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Forward pre-hook of the attention: tells it what heads it is about to see, and a wide head's frequencies.

        It runs before every forward, so no way of switching adapters can be missed, and it is traced by torch.compile.
        """
        shape, name = self.shape, self.active()
        if name is None:
            geometry = Geometry.of_base(shape)
        else:
            shared = self.layout(name).shape
            if self.shows_heads:
                # Without a look at the slots, which differ between layers: one compiled graph fits all of them.
                heads = kv_heads = shape.num_attention_heads
            else:
                slots = self.layout(name).slots
                heads, kv_heads = slots.num_slots, slots.kv_heads
            if self.decodes:
                shared = shape
            geometry = Geometry(heads, kv_heads, shared.head_dim, shared.rotary_dim)
        write_geometry(attention, self.family, geometry)
        if geometry.rotary_dim == shape.rotary_dim:
            return None
        positions = self.layout(name).widen_positions(kwargs["position_embeddings"])
        return args, {**kwargs, "position_embeddings": positions}


class SharedKey(SharedProjection):
    """Shared keys in place of k_proj."""

    parts = ("key",)


class SharedValue(SharedProjection):
    """Shared values in place of v_proj."""

    parts = ("value",)


class SharedQKV(SharedProjection):
    """Shared keys and values beside the base's queries, in place of a fused projection."""

    parts = ("key", "value")

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, E) -> q, k, v in the family's fused layout."""
        fused = self.base_layer(x)
        name = self.active()
        if name is None:
            return fused
        heads_axis = fused.dim() - 1
        heads = fused.unflatten(-1, (-1, self.shape.head_dim))
        query, _, _ = self.family.split_fused(heads, self.shape, heads_axis)
        if not self.decodes:
            query = self.fit_queries(name, query)
        return self.family.join_fused(query, *self.heads_seen(name, x), heads_axis).flatten(-2)


class SharedNorm(SharedLayer):
    """A norm of shared heads in place of the base's: over the W dimensions of one, or over all of the layer."""

    adapter_layer_names = ("lora_norm",)

    def update_layer(self, adapter_name: str, partition: Partition, shape: SharedShape, declared: bool) -> None:
        """Add an adapter; its scale is still to be written."""
        norm, rows = copy_without_hooks(self.get_base_layer()), shape.head_dim
        if self.shape.norm_span == "layer":
            rows *= self.heads_spanned(partition)
        norm.weight = nn.Parameter(torch.empty(rows, device=self._device(), dtype=self._dtype()))
        self.lora_norm[adapter_name] = norm

    def heads_spanned(self, partition: Partition) -> int:
        """How many heads a norm over the layer takes together."""
        raise NotImplementedError

    def arranged(self, adapter_name: str, heads: Tensor) -> Tensor:
        """Normed heads (B, T, heads, W) of the whole layer -> those that the attention sees."""
        raise NotImplementedError

    def forward(self, heads: Tensor) -> Tensor:
        """(..., D) or (B, T, heads D) under the base, W for D under an adapter -> normed."""
        name = self.active()
        if name is None:
            return self.base_layer(heads)
        normed = self.lora_norm[name](heads).to(heads.dtype)
        if self.shape.norm_span == "layer":
            width = self.layout(name).shape.head_dim
            normed = self.arranged(name, normed.unflatten(-1, (-1, width))).flatten(-2)
        return normed


class SharedKeyNorm(SharedNorm):
    """The norm of shared keys."""

    def heads_spanned(self, partition: Partition) -> int:
        """G."""
        return len(partition)

    def arranged(self, adapter_name: str, heads: Tensor) -> Tensor:
        """(B, T, G, W) -> the same, or one per query head."""
        if self.shows_heads:
            return self.layout(adapter_name).to_query_heads(heads)
        return heads


class SharedQueryNorm(SharedNorm):
    """The norm of queries that are fitted to shared keys."""

    def heads_spanned(self, partition: Partition) -> int:
        """H: empty slots would change the mean square."""
        return self.shape.num_attention_heads

    def arranged(self, adapter_name: str, heads: Tensor) -> Tensor:
        """(B, T, H, W) -> the same, or slots (B, T, G p, W)."""
        if self.shows_heads:
            return heads
        return self.layout(adapter_name).scatter(heads)


@dataclass(frozen=True)
class Geometry:
    """What heads an attention module sees: query heads or slots, K/V heads, their dimensions, those RoPE rotates."""

    slots: int
    kv_heads: int
    head_dim: int
    rotary_dim: int

    @classmethod
    def of_base(cls, shape: HeadShape) -> Geometry:
        """The base's own heads."""
        return cls(shape.num_attention_heads, shape.base_kv_heads, shape.head_dim, shape.rotary_dim)

    @property
    def slots_per_kv(self) -> int:
        """Query slots that share a K/V head."""
        return self.slots // self.kv_heads


def write_geometry(attention: nn.Module, family: Family, geometry: Geometry) -> None:
    """Tell an attention module what heads it is to see."""
    for attribute, figure in family.geometry.items():
        setattr(attention, attribute, getattr(geometry, figure))
    if family.config_heads:
        attention.config = with_head_count(attention.config, geometry.slots)


class HeadCountView:
    """A model's configuration with another number of attention heads; everything else is the live configuration."""

    def __init__(self, config, num_attention_heads: int) -> None:
        self.config = config
        self.num_attention_heads = num_attention_heads

    def __getattr__(self, name: str):
        if name.startswith("__"):  # copy and pickle probe these before `config` exists
            raise AttributeError(name)
        return getattr(self.config, name)


def with_head_count(config, num_attention_heads: int):
    """`config`, seen with `num_attention_heads` heads (the object itself where that is its own number)."""
    if config.num_attention_heads == num_attention_heads:
        return config
    if isinstance(config, HeadCountView):
        return with_head_count(config.config, num_attention_heads)
    return HeadCountView(config, num_attention_heads)


def base_weight(module: nn.Module) -> Tensor:
    """Weight of one of the base's projections, dequantised."""
    if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
        # bitsandbytes repacks 4-bit weights on their first inference on a CPU, and its own dequantisation then returns
        # wrong numbers without an error (0.50). What the layer computes is right.
        with torch.no_grad():
            columns = module(torch.eye(module.in_features, device=module.weight.device))
            return (columns if module.bias is None else columns - module.bias).T.contiguous()
    return dequantize_module_weight(module).detach()
