"""Tuner layers for shared K/V heads, and the hooks that fit query heads to them.

Axes: B batch, T positions, E hidden size, H query heads and K KV heads of the base, G shared heads, D head
dimension, R rotary dimensions, p slots per stored K/V head. A `SharedKey` and a `SharedValue` stand where k_proj and
v_proj stood (`SharedQKV` where the base fuses them) and keep the originals; queries are scattered into slots after
q_proj and heads gathered back before o_proj, so that the attention itself sees ordinary GQA.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from ..families import Family
from ..groups import Partition, SlotLayout, slot_layout
from ..heads import HeadShape

_CACHES = ("past_key_values", "cache")
"""What attention modules and paged attention functions call their cache."""


class SharedLinear(nn.Linear):
    """Projection onto shared heads in the input's dtype: fp32 weights over a bf16 base cost no fp32 product."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, E) -> (B, T, out)."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class RotaryGain(nn.Module):
    """A complex gain per query head and rotary frequency; it commutes with RoPE.

    `weight` (H, R/2, 2) holds real and imaginary part of gain - 1: near zero, bf16 resolves small steps and weight
    decay pulls towards the identity.
    """

    def __init__(self, num_heads: int, rotary_dim: int, **factory) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_heads, rotary_dim // 2, 2, **factory))

    def forward(self, query: Tensor) -> Tensor:
        """(B, T, H, D) -> (B, T, H, D): rotates and scales the pairs (j, j + R/2) of the first R dimensions."""
        half = self.weight.shape[1]
        real, imag = self.weight.to(query.dtype).unbind(-1)
        first, second, rest = query.split([half, half, query.shape[-1] - 2 * half], dim=-1)
        turned = (first + first * real - second * imag, second + second * real + first * imag, rest)
        return torch.cat(turned, dim=-1)


class HeadMix(nn.Module):
    """A square matrix per query head on the dimensions from `start` on; `weight` (H, P, P) holds matrix - identity."""

    def __init__(self, num_heads: int, size: int, start: int = 0, **factory) -> None:
        super().__init__()
        self.start = start
        self.weight = nn.Parameter(torch.zeros(num_heads, size, size, **factory))

    def forward(self, heads: Tensor) -> Tensor:
        """(B, T, H, D) -> (B, T, H, D): each head's vector x becomes (I + weight) x."""
        part = heads[..., self.start :]
        mixed = part + torch.einsum("...hd,hed->...he", part, self.weight.to(heads.dtype))
        return torch.cat((heads[..., : self.start], mixed), dim=-1) if self.start else mixed


class Slots(nn.Module):
    """Index buffers of one layer's `SlotLayout`, and the moves between heads and slots."""

    def __init__(self, layout: SlotLayout, device: torch.device) -> None:
        super().__init__()
        self.layout = layout
        # An empty slot takes a copy of some head: nothing reads what comes of it, and one gather is all it costs.
        head_of_slot = [max(head, 0) for head in layout.head_of_slot]
        indices = {"kv_source": layout.kv_source, "head_of_slot": head_of_slot, "slot_of_head": layout.slot_of_head}
        for name, index in indices.items():
            # Not persistent: they follow from head_groups, and a file must not be able to contradict it.
            self.register_buffer(name, torch.tensor(index, device=device), persistent=False)
        self.moves_queries = layout.head_of_slot != tuple(range(len(layout.slot_of_head)))
        self.copies_shared = layout.kv_source != tuple(range(max(layout.kv_source) + 1))

    def store(self, shared: Tensor) -> Tensor:
        """Shared heads (B, T, G, D) -> stored heads (B, T, kv_heads, D)."""
        return shared.index_select(-2, self.kv_source) if self.copies_shared else shared

    def scatter(self, heads: Tensor) -> Tensor:
        """Query heads (B, T, H, D) -> slots (B, T, slots, D); what an empty slot holds is of no account."""
        return heads.index_select(-2, self.head_of_slot) if self.moves_queries else heads

    def gather(self, slots: Tensor) -> Tensor:
        """Slots (B, T, slots, D) -> query heads (B, T, H, D)."""
        return slots.index_select(-2, self.slot_of_head) if self.moves_queries else slots


class SharedLayer(nn.Module, BaseTunerLayer):
    """What all layers that replace a module of the attention have in common: one active adapter, nothing to fold."""

    adapter_layer_names: tuple[str, ...] = ()

    def __init__(self, base_layer: nn.Module, shape: HeadShape, family: Family) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.shape = shape
        self.family = family
        self.merged_adapters: list[str] = []
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict())

    def active(self) -> str | None:
        """Name of the adapter in effect, None while the base's own heads are."""
        if self.disable_adapters:
            self.unmerge()  # as LoRA layers do: both must come back with the same adapter
            return None
        names = [name for name in self.merged_adapters or self.active_adapters if name in self.adapters()]
        if len(names) > 1:
            raise ValueError(f"Adapters {names} are active together, but attention has one set of K/V heads: set one.")
        return names[0] if names else None

    def adapters(self) -> nn.ModuleDict:
        """Adapter names (keys) this layer holds."""
        return getattr(self, self.adapter_layer_names[0])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Mark the adapter as merged: shared heads replace the base's, there is no sum to fold."""
        names = check_adapters_to_merge(self, adapter_names)
        if len(names) + len(self.merged_adapters) > 1:
            raise ValueError(f"Adapters {self.merged_adapters + names} cannot be merged together: merge one.")
        if safe_merge and names and not all(p.isfinite().all() for p in self.adapters()[names[0]].parameters()):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {names[0]} seems to be broken.")
        self.merged_adapters += names

    def unmerge(self) -> None:
        """Take back `merge`."""
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
    (values) fit each query head to them and exist where the architecture leaves the basis free.
    """

    adapter_layer_names = ("lora_kv", "lora_query_gain", "lora_query_mix", "lora_value_mix")
    parts: tuple[str, ...] = ()

    def __init__(self, base_layer: nn.Module, shape: HeadShape, family: Family) -> None:
        super().__init__(base_layer, shape, family)
        self.lora_slots = nn.ModuleDict()  # layout while there is a cache
        self.lora_uncached = nn.ModuleDict()  # and while there is none
        self.cached = True
        self.partitions: dict[str, Partition] = {}

    def update_layer(self, adapter_name: str, partition: Partition) -> None:
        """Add an adapter whose shared heads are the mean of each group's base heads."""
        shape, factory = self.shape, {"device": self._device(), "dtype": self._dtype()}
        rows = len(self.parts) * len(partition) * shape.head_dim
        bias = self.get_base_layer().bias is not None
        self.lora_kv[adapter_name] = SharedLinear(shape.hidden_size, rows, bias=bias, **factory)
        if "key" in self.parts and shape.free_keys:
            if shape.rotary_dim:
                gain = RotaryGain(shape.num_attention_heads, shape.rotary_dim, **factory)
                self.lora_query_gain[adapter_name] = gain
            if shape.pass_dim:
                mix = HeadMix(shape.num_attention_heads, shape.pass_dim, start=shape.rotary_dim, **factory)
                self.lora_query_mix[adapter_name] = mix
        if "value" in self.parts and shape.free_values:
            self.lora_value_mix[adapter_name] = HeadMix(shape.num_attention_heads, shape.head_dim, **factory)
        self.set_partition(adapter_name, partition)
        if not any(parameter.is_meta for parameter in self.lora_kv[adapter_name].parameters()):
            self.share_mean(adapter_name, partition)
        self.set_adapter(self.active_adapters)

    def set_partition(self, adapter_name: str, partition: Partition) -> None:
        """Lay the adapter's query heads out for `partition`.

        Empty slots spare the cache and cost attention. Without a cache, as in training, groups of unequal size
        therefore take the shape of MHA: K/V heads are repeated for their query heads, and no slot is empty.
        """
        self.partitions[adapter_name] = partition
        layout = slot_layout(partition, self.shape.queries_per_kv, None if self.family.grouped else 1)
        slots = Slots(layout, self._device())
        self.lora_slots[adapter_name] = self.lora_uncached[adapter_name] = slots
        # Not under a norm that spans all stored keys: it would see some of them several times.
        if layout.num_slots > self.shape.num_attention_heads and not self.family.key_norm:
            per_head = slot_layout(partition, self.shape.queries_per_kv, 1)
            self.lora_uncached[adapter_name] = Slots(per_head, self._device())

    @torch.no_grad()
    def share_mean(self, adapter_name: str, partition: Partition) -> None:
        """Mean-pool the base's heads over each group (Ainslie et al., 2023, arXiv 2305.13245)."""
        shared = self.lora_kv[adapter_name]
        tensors = [self.base_heads(part) for part in self.parts]
        shared.weight.copy_(torch.cat([mean_over_groups(weight, partition) for weight, _ in tensors]))
        if shared.bias is not None:
            shared.bias.copy_(torch.cat([mean_over_groups(bias, partition) for _, bias in tensors]))

    def base_heads(self, part: str) -> tuple[Tensor, Tensor | None]:
        """Base weight (K, D, E) and bias (K, D) or None of "query", "key" or "value", dequantised."""
        base = self.get_base_layer()
        weight = base_weight(base)
        rows = self.base_rows(part, weight.device)
        bias = None if base.bias is None else base.bias.detach()[rows].unflatten(0, (-1, self.shape.head_dim))
        return weight[rows].unflatten(0, (-1, self.shape.head_dim)), bias

    def base_rows(self, part: str, device: torch.device) -> Tensor:
        """Rows of the base projection that make "query", "key" or "value"."""
        return torch.arange(self.get_base_layer().out_features, device=device)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter's heads, gains, mixes and slots."""
        if adapter_name in self.lora_slots:
            del self.lora_slots[adapter_name], self.lora_uncached[adapter_name]
        super().delete_adapter(adapter_name)

    def shared_heads(self, adapter_name: str, x: Tensor) -> list[Tensor]:
        """(B, T, E) -> stored heads (B, T, kv_heads, D) of each part."""
        heads = self.lora_kv[adapter_name](x).unflatten(-1, (len(self.parts), -1, self.shape.head_dim))
        # Not unbind: OLMo clamps what it gets in place, which autograd forbids for one of several views.
        parts = (heads.select(-3, index) for index in range(len(self.parts)))
        return [self.slots(adapter_name).store(part) for part in parts]

    def slots(self, adapter_name: str) -> Slots:
        """The layout in effect."""
        return (self.lora_slots if self.cached else self.lora_uncached)[adapter_name]

    def fit_queries(self, adapter_name: str, query: Tensor) -> Tensor:
        """Apply gain and mix to query heads (B, T, H, D) and scatter them into slots."""
        for fits in (self.lora_query_gain, self.lora_query_mix):
            if adapter_name in fits:
                query = fits[adapter_name](query)
        return self.slots(adapter_name).scatter(query)

    def gather_heads(self, module: nn.Module, args: tuple) -> tuple | None:
        """Forward pre-hook of the output projection: slots (B, T, slots * D) -> mixed heads (B, T, H * D)."""
        name = self.active()
        if name is None:
            return None
        heads = self.slots(name).gather(args[0].unflatten(-1, (-1, self.shape.head_dim)))
        if name in self.lora_value_mix:
            heads = self.lora_value_mix[name](heads)
        return (heads.flatten(-2), *args[1:])

    def scatter_queries(self, module: nn.Module, args: tuple, query: Tensor) -> Tensor | None:
        """Forward hook of the query's source: heads (B, T, H * D) -> fitted slots (B, T, slots * D)."""
        name = self.active()
        if name is None:
            return None
        return self.fit_queries(name, query.unflatten(-1, (-1, self.shape.head_dim))).flatten(-2)

    def set_head_counts(self, attention: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of the attention: the layout, and the head counts of whatever heads it is about to see.

        It runs before every forward, so no way of switching adapters can be missed, and it is traced by torch.compile.
        """
        # An attention that says nothing about its cache may have one.
        self.cached = "past_key_values" not in kwargs or any(kwargs.get(name) is not None for name in _CACHES)
        name = self.active()
        if name is None:
            write_head_counts(attention, self.family, self.shape.num_attention_heads, self.shape.base_kv_heads)
        else:
            layout = self.slots(name).layout
            write_head_counts(attention, self.family, layout.num_slots, layout.kv_heads)


class SharedKey(SharedProjection):
    """Shared keys in place of k_proj."""

    parts = ("key",)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, E) -> (B, T, kv_heads * D)."""
        name = self.active()
        return self.base_layer(x) if name is None else self.shared_heads(name, x)[0].flatten(-2)


class SharedValue(SharedProjection):
    """Shared values in place of v_proj."""

    parts = ("value",)
    forward = SharedKey.forward


class SharedQKV(SharedProjection):
    """Shared keys and values beside the base's queries, in place of a fused projection."""

    parts = ("key", "value")

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, E) -> q, k, v in the family's fused layout."""
        fused = self.base_layer(x)
        name = self.active()
        if name is None:
            return fused
        query = fused[..., self.base_rows("query", fused.device)].unflatten(-1, (-1, self.shape.head_dim))
        heads = [self.fit_queries(name, query), *self.shared_heads(name, x)]
        if self.family.fused_layout == "heads":
            return torch.stack(heads, dim=-2).flatten(-3)
        return torch.cat(heads, dim=-2).flatten(-2)

    def base_rows(self, part: str, device: torch.device) -> Tensor:
        """Rows of the base projection that make "query", "key" or "value"."""
        shape, index = self.shape, ("query", "key", "value").index(part)
        if self.family.fused_layout == "heads":
            rows = torch.arange(3 * shape.num_attention_heads * shape.head_dim, device=device)
            return rows.view(-1, 3, shape.head_dim)[:, index].flatten()
        counts = (shape.num_attention_heads, shape.base_kv_heads, shape.base_kv_heads)
        start = sum(counts[:index]) * shape.head_dim
        return torch.arange(start, start + counts[index] * shape.head_dim, device=device)


class SharedKeyNorm(SharedLayer):
    """A key norm over G shared heads, in place of one that spans the base's K heads (OLMo-2)."""

    adapter_layer_names = ("lora_norm",)

    def update_layer(self, adapter_name: str, partition: Partition) -> None:
        """Add an adapter whose scale is the mean of each group's base heads."""
        base = self.get_base_layer()
        norm = copy.deepcopy(base)
        rows = len(partition) * self.shape.head_dim
        norm.weight = nn.Parameter(torch.empty(rows, device=self._device(), dtype=self._dtype()))
        self.lora_norm[adapter_name] = norm
        if not norm.weight.is_meta:
            scale = base.weight.detach().unflatten(0, (-1, self.shape.head_dim))
            norm.weight.data.copy_(mean_over_groups(scale, partition))
        self.set_adapter(self.active_adapters)

    def forward(self, keys: Tensor) -> Tensor:
        """(B, T, K * D) under the base, (B, T, G * D) under an adapter."""
        name = self.active()
        return self.base_layer(keys) if name is None else self.lora_norm[name](keys).to(keys.dtype)


def write_head_counts(attention: nn.Module, family: Family, slots: int, kv_heads: int) -> None:
    """Tell the attention module how many query slots and K/V heads it is to see."""
    counts = {"slots": slots, "kv_heads": kv_heads, "slots_per_kv": slots // kv_heads}
    for attribute, count in family.head_counts.items():
        setattr(attention, attribute, counts[count])
    if family.config_heads:
        attention.config = with_head_count(attention.config, slots)


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
    config = config.config if isinstance(config, HeadCountView) else config
    return config if config.num_attention_heads == num_attention_heads else HeadCountView(config, num_attention_heads)


def mean_over_groups(heads: Tensor, partition: Partition) -> Tensor:
    """Base heads (K, D, ...) -> shared heads (G * D, ...), averaged over each group in at least fp32."""
    heads = heads.to(torch.promote_types(heads.dtype, torch.float32))
    return torch.cat([heads[list(group)].mean(0) for group in partition])


def base_weight(module: nn.Module) -> Tensor:
    """Weight of one of the base's projections, dequantised."""
    if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
        # bitsandbytes repacks 4-bit weights on their first inference on a CPU, and its own dequantisation then returns
        # wrong numbers without an error (0.50). What the layer computes is right.
        with torch.no_grad():
            columns = module(torch.eye(module.in_features, device=module.weight.device))
            return (columns if module.bias is None else columns - module.bias).T.contiguous()
    return dequantize_module_weight(module).detach()
