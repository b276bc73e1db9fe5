"""Where the attention layers of a supported model are, what they hold, and how to look at it undisturbed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..families import Family, find_family, head_shape
from ..groups import Partition
from ..heads import AttentionWeights, HeadShape, SharedHeads, SharedShape
from .layer import SharedProjection, base_weight, write_head_counts


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

    @property
    def query_source(self) -> nn.Module:
        """Module whose output is the attention's query."""
        return getattr(self.attention, self.family.query_source)

    @property
    def output(self) -> nn.Module:
        """Output projection, LoRA-wrapped or not."""
        return getattr(self.attention, self.family.output)

    @property
    def key(self) -> nn.Module:
        """Module that makes the keys: a `SharedKey` or `SharedQKV` once wrapped."""
        return getattr(self.attention, self.family.shared_names[0])

    @property
    def value(self) -> nn.Module:
        """Module that makes the values: a `SharedValue` or `SharedQKV` once wrapped."""
        return getattr(self.attention, self.family.shared_names[-1])

    @property
    def shared_names(self) -> tuple[str, ...]:
        """Full names of the modules that become shared."""
        names = (*self.family.shared_names, *([self.family.key_norm] if self.family.key_norm else []))
        return tuple(f"{self.name}.{name}" for name in names)

    def shared_layers(self) -> list[SharedProjection]:
        """The one or two shared projections, each once."""
        return list(dict.fromkeys((self.key, self.value)))

    def weights(self) -> AttentionWeights:
        """The base's projections, dequantised."""
        query, query_bias = self._base_query()
        key, key_bias = self.key.base_heads("key")
        value, value_bias = self.value.base_heads("value")
        key_norm = None
        if self.family.key_norm:
            norm = _base_layer(getattr(self.attention, self.family.key_norm))
            key_norm = norm.weight.detach().unflatten(0, (-1, self.shape.head_dim))
        return AttentionWeights(
            query=query,
            key=key.flatten(0, 1),
            value=value.flatten(0, 1),
            output=base_weight(_base_layer(self.output)),
            query_bias=query_bias,
            key_bias=None if key_bias is None else key_bias.flatten(),
            value_bias=None if value_bias is None else value_bias.flatten(),
            key_norm=key_norm,
        )

    def _base_query(self) -> tuple[Tensor, Tensor | None]:
        if self.family.fused_qkv:
            weight, bias = self.key.base_heads("query")
            return weight.flatten(0, 1), None if bias is None else bias.flatten()
        linear = _base_layer(getattr(self.attention, self.family.query))
        return base_weight(linear), None if linear.bias is None else linear.bias.detach()

    def restore_head_counts(self) -> None:
        """Undo what the adapter last told the attention module about head counts."""
        write_head_counts(self.attention, self.family, self.shape.num_attention_heads, self.shape.base_kv_heads)

    def set_partition(self, adapter_name: str, partition: Partition) -> None:
        """Lay the adapter's heads out for another partition of the base KV heads."""
        for layer in self.shared_layers():
            layer.set_partition(adapter_name, partition)

    def reader(self, adapter_name: str) -> Callable[[], SharedHeads]:
        """What reads the adapter's shared heads, also once the adapter's layers have left the model.

        It holds the adapter's own modules, and nothing of the base's.
        """
        modules = {"query_gain": _entry(self.key.lora_query_gain, adapter_name)}
        modules["query_mix"] = _entry(self.key.lora_query_mix, adapter_name)
        modules["value_mix"] = _entry(self.value.lora_value_mix, adapter_name)
        if self.family.key_norm:
            modules["key_norm"] = getattr(self.attention, self.family.key_norm).lora_norm[adapter_name]
        projections = {layer.parts: layer.lora_kv[adapter_name] for layer in self.shared_layers()}
        partition, shape = self.key.partitions[adapter_name], SharedShape.of_width(self.shape)
        return partial(_read_heads, projections, modules, partition, shape)

    @torch.no_grad()
    def write(self, adapter_name: str, heads: SharedHeads) -> None:
        """Make these the adapter's shared heads, groups included."""
        self.set_partition(adapter_name, heads.partition)
        if self.family.fused_qkv:
            bias = None if heads.key_bias is None else torch.cat((heads.key_bias, heads.value_bias))
            _write_linear(self.key.lora_kv[adapter_name], torch.cat((heads.key, heads.value)), bias)
        else:
            _write_linear(self.key.lora_kv[adapter_name], heads.key, heads.key_bias)
            _write_linear(self.value.lora_kv[adapter_name], heads.value, heads.value_bias)
        if adapter_name in self.key.lora_query_gain:
            gain = self.key.lora_query_gain[adapter_name].weight
            if heads.query_gain is None:
                gain.zero_()
            else:
                gain.copy_(torch.view_as_real(heads.query_gain.resolve_conj() - 1))
        mixes = ((self.key.lora_query_mix, heads.query_mix), (self.value.lora_value_mix, heads.value_mix))
        for modules, mix in mixes:
            if adapter_name in modules:
                weight = modules[adapter_name].weight
                if mix is None:
                    weight.zero_()
                else:
                    weight.copy_(mix - torch.eye(mix.shape[-1]).to(mix))
        if heads.key_norm is not None:
            norm = getattr(self.attention, self.family.key_norm).lora_norm[adapter_name]
            norm.weight.copy_(heads.key_norm.flatten())

    @torch.no_grad()
    def compose_value_mix(self, adapter_name: str, mix: Tensor) -> None:
        """Put another matrix (H, D, D) behind each head's value mix."""
        weight = self.value.lora_value_mix[adapter_name].weight
        eye = torch.eye(weight.shape[-1]).to(mix)
        weight.copy_(mix @ (weight.to(mix) + eye) - eye)


@torch.no_grad()
def _read_heads(
    projections: Mapping[tuple[str, ...], nn.Linear],
    modules: Mapping[str, nn.Module | None],
    partition: Partition,
    shape: SharedShape,
) -> SharedHeads:
    """An adapter's shared heads: views of its K/V weights, gains and mixes in float64."""
    tensors = {}
    for parts, linear in projections.items():
        split = (len(parts), -1, shape.head_dim)
        weights = linear.weight.detach().unflatten(0, split)
        biases = None if linear.bias is None else linear.bias.detach().unflatten(0, split)
        for index, part in enumerate(parts):
            tensors[part] = weights[index]
            tensors[f"{part}_bias"] = None if biases is None else biases[index]
    for name, module in modules.items():
        if module is None:
            continue
        weight = module.weight.detach()
        if name == "query_gain":
            tensors[name] = torch.view_as_complex(weight.double()) + 1
        elif name == "key_norm":
            tensors[name] = weight.unflatten(0, (-1, shape.head_dim))
        else:
            tensors[name] = weight.double() + torch.eye(weight.shape[-1]).to(weight.device, torch.float64)
    return SharedHeads(partition, shape, **tensors)


def _entry(modules: nn.ModuleDict, name: str) -> nn.Module | None:
    return modules[name] if name in modules else None


def _base_layer(module: nn.Module) -> nn.Module:
    """The base's own layer under whatever adapters wrap it."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _write_linear(linear: nn.Linear, heads: Tensor, bias: Tensor | None) -> None:
    linear.weight.copy_(heads.flatten(0, -2))
    if linear.bias is None:
        return
    if bias is None:
        linear.bias.zero_()
    else:
        linear.bias.copy_(bias.flatten())


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
    found = [
        (name, module)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] == family.attention and all(hasattr(module, part) for part in needed)
    ]
    if not found:
        raise ValueError(
            f"No attention layer {family.attention!r} with {', '.join(needed)} was found in {type(model).__name__}: "
            "pass the transformers model itself, before any other surgery."
        )
    return [AttentionSite(index, name, module, family, shape) for index, (name, module) in enumerate(found)]


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
