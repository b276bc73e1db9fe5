"""Where the attention layers of a supported model are, what they hold, and how to look at it undisturbed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .families import Family, HeadShape, find_family, head_shape
from .groups import Partition
from .layers import SharedProjection, base_weight, write_head_counts


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

    def weights(self) -> dict[str, Tensor | None]:
        """The base's projections, dequantised: query (H D, E), key and value (K D, E), output (E, H D), and biases."""
        tensors: dict[str, Tensor | None] = {"output": _base_linear(self.output)[0]}
        heads = {"key": self.key.base_heads("key"), "value": self.value.base_heads("value")}
        if self.family.fused_qkv:
            heads["query"] = self.key.base_heads("query")
        else:
            tensors["query"], tensors["query_bias"] = _base_linear(getattr(self.attention, self.family.query))
        for part, (weight, bias) in heads.items():
            tensors[part] = weight.flatten(0, 1)
            tensors[f"{part}_bias"] = None if bias is None else bias.flatten()
        return tensors

    def restore_head_counts(self) -> None:
        """Undo what the adapter last told the attention module about head counts."""
        write_head_counts(self.attention, self.family, self.shape.num_attention_heads, self.shape.base_kv_heads)

    def set_partition(self, adapter_name: str, partition: Partition) -> None:
        """Lay the adapter's heads out for another partition of the base KV heads."""
        for layer in self.shared_layers():
            layer.set_partition(adapter_name, partition)

    @torch.no_grad()
    def set_shared(
        self,
        adapter_name: str,
        key_weight: Tensor,
        value_weight: Tensor,
        key_bias: Tensor | None = None,
        value_bias: Tensor | None = None,
        query_gain: Tensor | None = None,
        query_mix: Tensor | None = None,
        value_mix: Tensor | None = None,
    ) -> None:
        """Write shared heads: weights (G D, E), biases (G D,), complex gain (H, R/2), mixes (H, P, P) and (H, D, D).

        A gain or mix of None is the identity.
        """
        if self.family.fused_qkv:
            bias = None if key_bias is None else torch.cat((key_bias, value_bias))
            _write_linear(self.key.lora_kv[adapter_name], torch.cat((key_weight, value_weight)), bias)
        else:
            _write_linear(self.key.lora_kv[adapter_name], key_weight, key_bias)
            _write_linear(self.value.lora_kv[adapter_name], value_weight, value_bias)
        if adapter_name in self.key.lora_query_gain:
            gain = self.key.lora_query_gain[adapter_name].weight
            gain.zero_() if query_gain is None else gain.copy_(torch.view_as_real(query_gain.resolve_conj() - 1))
        for fits, mix in ((self.key.lora_query_mix, query_mix), (self.value.lora_value_mix, value_mix)):
            if adapter_name in fits:
                weight = fits[adapter_name].weight
                weight.zero_() if mix is None else weight.copy_(mix - torch.eye(mix.shape[-1]).to(mix))

    @torch.no_grad()
    def compose_value_mix(self, adapter_name: str, mix: Tensor) -> None:
        """Put another matrix (H, D, D) behind each head's value mix."""
        weight = self.value.lora_value_mix[adapter_name].weight
        eye = torch.eye(weight.shape[-1]).to(mix)
        weight.copy_(mix @ (weight.to(mix) + eye) - eye)


def _base_linear(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return base_weight(base), None if base.bias is None else base.bias.detach()


def _write_linear(linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    linear.weight.copy_(weight)
    if linear.bias is not None:
        linear.bias.zero_() if bias is None else linear.bias.copy_(bias)


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
