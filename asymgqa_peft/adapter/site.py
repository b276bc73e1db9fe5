"""One attention layer: reads the base's projections, reads and writes an adapter's shared heads.

What differs between families in how projections are laid out (fused or not, with norms or without) is dealt with here
and in `families`; nobody else asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..families import Family, find_family, head_shape
from ..groups import Partition
from ..heads import AttentionWeights, HeadShape, SharedHeads, SharedShape, mean_heads
from .layer import (
    Geometry,
    SharedKey,
    SharedKeyNorm,
    SharedLayer,
    SharedProjection,
    SharedQKV,
    SharedValue,
    base_weight,
    write_geometry,
)

HeadWeights = tuple[Tensor, Tensor | None]
"""Weight (heads, dimensions, E) and bias (heads, dimensions) or None of one projection."""


@dataclass(frozen=True)
class AttentionSite:
    """One attention layer of a supported model, wrapped or not.

    Attributes:
        layer: index among the model's attention layers.
        name: the attention module's name in the model.
        attention: the attention module.
        family: its architecture's declaration.
        shape: its head counts and dimensions.
    """

    layer: int
    name: str
    attention: nn.Module
    family: Family
    shape: HeadShape

    # ---- its modules ----

    @property
    def query_source(self) -> nn.Module:
        """Module whose output is the attention's query: a norm over all heads, or the projection."""
        return getattr(self.attention, self.family.query_source)

    @property
    def key_source(self) -> nn.Module:
        """Module whose output is the attention's keys: a norm over all heads, or the projection."""
        return self.key_norm or self.key

    @property
    def key(self) -> nn.Module:
        """Module that makes the keys: a `SharedKey` or `SharedQKV` once wrapped."""
        return getattr(self.attention, self.family.shared_names[0])

    @property
    def value(self) -> nn.Module:
        """Module that makes the values: a `SharedValue` or `SharedQKV` once wrapped."""
        return getattr(self.attention, self.family.shared_names[-1])

    @property
    def output(self) -> nn.Module:
        """Output projection, LoRA-wrapped or not."""
        return getattr(self.attention, self.family.output)

    @property
    def query_norm(self) -> nn.Module | None:
        """Norm that spans all queries, or None."""
        return getattr(self.attention, self.family.query_norm) if self.family.query_norm else None

    @property
    def key_norm(self) -> nn.Module | None:
        """Norm that spans all keys, or None: a `SharedKeyNorm` once wrapped."""
        return getattr(self.attention, self.family.key_norm) if self.family.key_norm else None

    @property
    def is_fused(self) -> bool:
        """Whether one projection holds queries, keys and values."""
        return self.family.fused_qkv is not None

    @property
    def shared_names(self) -> tuple[str, ...]:
        """Full names of the modules that become shared."""
        names = list(self.family.shared_names)
        if self.family.key_norm:
            names.append(self.family.key_norm)
        return tuple(f"{self.name}.{name}" for name in names)

    def shared_layers(self) -> list[SharedProjection]:
        """The one or two shared projections, each once."""
        return [self.key] if self.is_fused else [self.key, self.value]

    # ---- the base ----

    def weights(self) -> AttentionWeights:
        """The base's projections, dequantised."""
        parts = {}
        for name, (weight, bias) in self._base_heads().items():
            parts[name] = weight.flatten(0, 1)
            parts[f"{name}_bias"] = None if bias is None else bias.flatten()
        key_norm = None if self.key_norm is None else base_layer(self.key_norm).weight.detach()
        return AttentionWeights(**parts, output=base_weight(base_layer(self.output)), key_norm=key_norm)

    def _base_heads(self) -> dict[str, HeadWeights]:
        if self.is_fused:
            weight, bias = self._heads_of(base_layer(self.key))
            weights = self.family.split_fused(weight, self.shape)
            biases = (None, None, None) if bias is None else self.family.split_fused(bias, self.shape)
            return dict(zip(("query", "key", "value"), zip(weights, biases, strict=True), strict=True))
        query = getattr(self.attention, self.family.query)
        modules = {"query": query, "key": self.key, "value": self.value}
        return {name: self._heads_of(base_layer(module)) for name, module in modules.items()}

    def _heads_of(self, linear: nn.Module) -> HeadWeights:
        weight = base_weight(linear).unflatten(0, (-1, self.shape.head_dim))
        if linear.bias is None:
            return weight, None
        return weight, linear.bias.detach().unflatten(0, (-1, self.shape.head_dim))

    def query_heads(self) -> HeadWeights:
        """Query heads of the plain model that is left once LoRA is merged, (H, D, E) and (H, D) or None."""
        return self._base_heads()["query"]

    def heads_of_outputs(self, outputs: dict[str, Tensor]) -> list[Tensor]:
        """Queries (B, T, H D), keys and values (B, T, K D), from what the modules of `sources` returned."""
        if not self.is_fused:
            return [outputs["query"], outputs["key"], outputs["value"]]
        fused = outputs["qkv"].unflatten(-1, (-1, self.shape.head_dim))
        return [part.flatten(-2) for part in self.family.split_fused(fused, self.shape, fused.dim() - 2)]

    def sources(self) -> dict[str, nn.Module]:
        """Modules whose outputs are queries, keys and values before RoPE."""
        if self.is_fused:
            return {"qkv": self.key}
        return {"query": self.query_source, "key": self.key_source, "value": self.value}

    # ---- the adapter ----

    def wrapped(self, name: str) -> SharedLayer:
        """A new tuner layer around the module of that name, one of `shared_names`."""
        attribute = name.rpartition(".")[2]
        if attribute == self.family.key_norm:
            layer_class = SharedKeyNorm
        elif self.is_fused:
            layer_class = SharedQKV
        elif attribute == self.family.key:
            layer_class = SharedKey
        else:
            layer_class = SharedValue
        return layer_class(getattr(self.attention, attribute), self.shape, self.family)

    def install_hooks(self) -> None:
        """Connect the shared layers with each other and with the attention around them."""
        # Bound methods, so that a deep copy's hooks belong to the copy.
        self.attention.register_forward_pre_hook(self.key.set_geometry, with_kwargs=True)
        if not self.is_fused:
            self.value.follow(self.key)
            self.query_source.register_forward_hook(self.key.scatter_queries)
        if self.key_norm is not None:
            self.key_norm.follow(self.key)
        self.output.register_forward_pre_hook(self.value.gather_heads)

    def restore_geometry(self) -> None:
        """Undo what the adapter last told the attention module about its heads."""
        write_geometry(self.attention, self.family, Geometry.of_base(self.shape))

    def partition(self, adapter_name: str) -> Partition:
        """The adapter's groups."""
        return self.key.layout(adapter_name).partition

    def cached_heads(self) -> tuple[int, int]:
        """K/V heads that the cache holds in evaluation mode, and their dimensions."""
        adapter_name = self.key.active() if isinstance(self.key, SharedProjection) else None
        if adapter_name is None:
            return self.shape.base_kv_heads, self.shape.head_dim
        if not self.family.grouped:
            return self.shape.num_attention_heads, self.shape.head_dim
        layout = self.key.layout(adapter_name)
        return layout.slots.kv_heads, layout.shape.head_dim

    def set_partition(self, adapter_name: str, partition: Partition, frequencies: tuple[int, ...]) -> None:
        """Lay the adapter's heads out for other groups and frequencies; its heads have to be written anew."""
        self.key.layout(adapter_name).set_partition(partition, frequencies)

    def shared_shape(self, adapter_name: str) -> SharedShape:
        """Shape of the adapter's shared heads."""
        return self.key.layout(adapter_name).shape

    def start(self, adapter_name: str) -> None:
        """Write the shared heads that need no data, unless the adapter is on the meta device, to be loaded."""
        linear = self.key.lora_kv[adapter_name]
        if linear.weight.is_meta or base_layer(self.key).weight.is_meta:
            return
        partition, shape = self.partition(adapter_name), self.shared_shape(adapter_name)
        declared = self.key.layout(adapter_name).declared
        self.write(adapter_name, mean_heads(self.weights(), partition, shape))
        self.key.layout(adapter_name).declared = declared

    def reader(self, adapter_name: str) -> Callable[[], SharedHeads]:
        """What reads the adapter's shared heads, also once the adapter's layers have left the model."""
        return _Reader(self, adapter_name)

    @torch.no_grad()
    def write(self, adapter_name: str, heads: SharedHeads) -> None:
        """Make these the adapter's shared heads, groups included."""
        self.key.layout(adapter_name).set_partition(heads.partition, heads.shape.frequencies)
        if self.is_fused:
            bias = None if heads.key_bias is None else torch.cat((heads.key_bias, heads.value_bias))
            _write_linear(self.key.lora_kv[adapter_name], torch.cat((heads.key, heads.value)), bias)
        else:
            _write_linear(self.key.lora_kv[adapter_name], heads.key, heads.key_bias)
            _write_linear(self.value.lora_kv[adapter_name], heads.value, heads.value_bias)
        if adapter_name in self.key.lora_query_gain:
            weight = self.key.lora_query_gain[adapter_name].weight
            if heads.query_gain is None:
                weight.zero_()
            else:
                is_first = self.key.layout(adapter_name).is_first.to(heads.query_gain.device)
                weight.copy_(torch.view_as_real(heads.query_gain.resolve_conj() - is_first))
        _write_mix(self.key.lora_query_mix, adapter_name, heads.query_mix)
        _write_mix(self.value.lora_value_mix, adapter_name, heads.value_mix)
        if heads.key_norm is not None:
            self.key_norm.lora_norm[adapter_name].weight.copy_(heads.key_norm.flatten())

    @torch.no_grad()
    def compose_value_mix(self, adapter_name: str, mix: Tensor) -> None:
        """Put another matrix (H, D, D) behind each head's value mix."""
        weight = self.value.lora_value_mix[adapter_name].weight
        identity = torch.eye(*weight.shape[1:]).to(mix)
        weight.copy_(mix @ (weight.to(mix) + identity) - identity)

    # ---- the plain model ----

    def replace_projections(
        self, query: HeadWeights, key: HeadWeights, value: HeadWeights, output: Tensor, unfuse: bool = False
    ) -> None:
        """Put plain projections of these heads in place; output is (E, heads * dimensions).

        With `unfuse` a fused projection becomes three.
        """
        like = self.output.weight
        if unfuse:
            delattr(self.attention, self.family.fused_qkv)
        if self.is_fused and not unfuse:
            weight = self.family.join_fused(query[0], key[0], value[0])
            bias = None if query[1] is None else self.family.join_fused(query[1], key[1], value[1])
            _replace_linear(self.attention, self.family.fused_qkv, weight.flatten(0, 1), bias, like)
        else:
            named = {self.family.query: query, self.family.key: key, self.family.value: value}
            for name, (weight, bias) in named.items():
                _replace_linear(self.attention, name, weight.flatten(0, 1), bias, like)
        _replace_linear(self.attention, self.family.output, output, self.output.bias, like)


class _Reader:
    """Reads an adapter's shared heads from its own modules, and holds nothing of the base's."""

    def __init__(self, site: AttentionSite, adapter_name: str) -> None:
        layout = site.key.layout(adapter_name)
        self.partition, self.shape, self.is_first = layout.partition, layout.shape, layout.is_first
        self.projections = {layer.parts: layer.lora_kv[adapter_name] for layer in site.shared_layers()}
        self.query_gain = _entry(site.key.lora_query_gain, adapter_name)
        self.query_mix = _entry(site.key.lora_query_mix, adapter_name)
        self.value_mix = _entry(site.value.lora_value_mix, adapter_name)
        self.key_norm = None if site.key_norm is None else site.key_norm.lora_norm[adapter_name]

    @torch.no_grad()
    def __call__(self) -> SharedHeads:
        """Views of the K/V weights; gains and mixes in float64."""
        tensors = {}
        for parts, linear in self.projections.items():
            split = (len(parts), len(self.partition), self.shape.head_dim)
            weights = linear.weight.detach().unflatten(0, split)
            biases = None if linear.bias is None else linear.bias.detach().unflatten(0, split)
            for index, part in enumerate(parts):
                tensors[part] = weights[index]
                tensors[f"{part}_bias"] = None if biases is None else biases[index]
        if self.query_gain is not None:
            deviation = self.query_gain.weight.detach().double()
            tensors["query_gain"] = torch.view_as_complex(deviation) + self.is_first
        for name, mix in (("query_mix", self.query_mix), ("value_mix", self.value_mix)):
            if mix is not None:
                deviation = mix.weight.detach().double()
                tensors[name] = deviation + torch.eye(*deviation.shape[1:]).to(deviation)
        if self.key_norm is not None:
            tensors["key_norm"] = self.key_norm.weight.detach().unflatten(0, (-1, self.shape.head_dim))
        return SharedHeads(self.partition, self.shape, **tensors)


def _entry(modules: nn.ModuleDict, name: str) -> nn.Module | None:
    if name in modules:
        return modules[name]
    return None


def _write_linear(linear: nn.Linear, heads: Tensor, bias: Tensor | None) -> None:
    linear.weight.copy_(heads.flatten(0, -2))
    if linear.bias is None:
        return
    if bias is None:
        linear.bias.zero_()
    else:
        linear.bias.copy_(bias.flatten())


def _write_mix(mixes: nn.ModuleDict, adapter_name: str, mix: Tensor | None) -> None:
    if adapter_name not in mixes:
        return
    weight = mixes[adapter_name].weight
    if mix is None:
        weight.zero_()
    else:
        weight.copy_(mix - torch.eye(*mix.shape[1:]).to(mix))


def _replace_linear(attention: nn.Module, name: str, weight: Tensor, bias: Tensor | None, like: Tensor) -> None:
    new = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    new.weight = nn.Parameter(weight.to(like).contiguous())
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().flatten().to(like).contiguous())
    setattr(attention, name, new)


def base_layer(module: nn.Module) -> nn.Module:
    """The base's own layer under whatever adapters wrap it."""
    if isinstance(module, BaseTunerLayer):
        return module.get_base_layer()
    return module


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside a PeftModel or tuner, or the model itself."""
    tuner = getattr(model, "base_model", None)
    if isinstance(tuner, LoraModel):
        return tuner.model
    return model.model if isinstance(model, LoraModel) else model


def attention_sites(model: nn.Module) -> list[AttentionSite]:
    """All attention layers of a supported model in order, wrapped or not.

    Raises:
        ValueError: if the architecture is not supported, or none of its attention layers was found.
    """
    model = unwrap(model)
    config = getattr(model, "config", None)
    family, shape = find_family(config), head_shape(config)
    needed = (*family.shared_names, family.output)
    sites = []
    for name, module in model.named_modules():
        is_attention = name.rpartition(".")[2] == family.attention
        if is_attention and all(hasattr(module, part) for part in needed):
            sites.append(AttentionSite(len(sites), name, module, family, shape))
    if not sites:
        raise ValueError(
            f"No attention layer {family.attention!r} with {', '.join(needed)} was found in {type(model).__name__}: "
            "pass the transformers model itself, before any other surgery."
        )
    return sites


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, each module's own mode restored: no dropout, no gradient checkpointing."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
