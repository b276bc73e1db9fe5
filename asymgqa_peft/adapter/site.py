"""One attention layer: reads the base's projections, reads and writes an adapter's shared heads.

What differs between families in how projections are laid out (fused or not, with norms or without) is dealt with here
and in `families`; nobody else asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..families import Family, find_family, head_shape
from ..heads import AttentionWeights, HeadShape, SharedHeads, mean_heads
from .layer import (
    Geometry,
    SharedKey,
    SharedKeyNorm,
    SharedLayer,
    SharedProjection,
    SharedQKV,
    SharedQueryNorm,
    SharedValue,
    base_weight,
    write_geometry,
)
from .offload import in_place
from .slots import HeadLayout

FITS = ("query_scale", "query_gain", "query_mix", "value_mix")
"""What fits query heads to shared ones: fields of `SharedHeads`, and with "lora_" before them of the layers."""


@dataclass(frozen=True)
class AttentionSite:
    """One attention layer of a supported model, wrapped or not.

    Attributes:
        layer: index among the model's attention layers.
        name: the attention module's name in the model.
        attention: that module.
        family, shape: its architecture's declaration, its head counts and dimensions.
    """

    layer: int
    name: str
    attention: nn.Module
    family: Family
    shape: HeadShape

    @property
    def layer_name(self) -> str:
        """Name of the decoder layer that the attention is in."""
        return self.name.rpartition(".")[0]

    # ---- its modules ----

    @property
    def query(self) -> nn.Module:
        """Module that makes the queries, LoRA-wrapped or not; the fused projection where there is one."""
        return getattr(self.attention, self.family.fused_qkv or self.family.query)

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
        """Norm of the queries, or None: a `SharedQueryNorm` once wrapped."""
        return getattr(self.attention, self.family.query_norm) if self.family.query_norm else None

    @property
    def key_norm(self) -> nn.Module | None:
        """Norm of the keys, or None: a `SharedKeyNorm` once wrapped."""
        return getattr(self.attention, self.family.key_norm) if self.family.key_norm else None

    def norms(self) -> dict[str, nn.Module]:
        """The norms of queries and keys by their fields of `SharedHeads`; empty where there are none."""
        if self.family.norm_span is None:
            return {}
        return {"query_norm": self.query_norm, "key_norm": self.key_norm}

    @property
    def is_fused(self) -> bool:
        """Whether one projection holds queries, keys and values."""
        return self.family.fused_qkv is not None

    @property
    def shared_names(self) -> tuple[str, ...]:
        """Full names of the modules that become shared."""
        names = (*self.family.shared_names, self.family.key_norm, self.family.query_norm)
        return tuple(f"{self.name}.{name}" for name in names if name)

    def shared_layers(self) -> list[SharedProjection]:
        """The one or two shared projections, each once."""
        return [self.key] if self.is_fused else [self.key, self.value]

    # ---- the base ----

    def weights(self) -> AttentionWeights:
        """The base's projections, dequantised; in the plain model, before they are replaced, LoRA included."""
        names, parts = ("query", "key", "value"), {}
        if self.is_fused:
            linear = base_layer(self.key)
            tensors = {"": base_weight(linear), "_bias": linear.bias}
            for suffix, tensor in tensors.items():
                if tensor is not None:
                    heads = tensor.detach().unflatten(0, (-1, self.shape.head_dim))
                    for name, part in zip(names, self.family.split_fused(heads, self.shape), strict=True):
                        parts[name + suffix] = part.flatten(0, 1)
        else:
            for name in names:
                linear = base_layer(getattr(self.attention, getattr(self.family, name)))
                parts[name] = base_weight(linear)
                if linear.bias is not None:
                    parts[name + "_bias"] = linear.bias.detach()
        for name, norm in self.norms().items():
            parts[name] = base_layer(norm).weight.detach() + self.family.norm_offset
        return AttentionWeights(**parts, output=base_weight(base_layer(self.output)))

    def sources(self) -> dict[str, nn.Module]:
        """Modules whose outputs are queries, keys and values before norms and RoPE."""
        if self.is_fused:
            return {"qkv": self.key}
        return {"query": self.query, "key": self.key, "value": self.value}

    def heads_of_outputs(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """What `LayerStatistics.update` takes, from what the modules of `sources` returned."""
        if self.is_fused:
            fused = outputs["qkv"].unflatten(-1, (-1, self.shape.head_dim))
            parts = self.family.split_fused(fused, self.shape, fused.dim() - 2)
            return dict(zip(("query", "key", "value"), (part.flatten(-2) for part in parts), strict=True))
        heads = dict(outputs)
        if self.family.norm_span is not None:
            heads |= {"query_before_norm": outputs["query"], "key_before_norm": outputs["key"]}
            heads["query"] = self._normed(self.query_norm, outputs["query"])
            heads["key"] = self._normed(self.key_norm, outputs["key"])
        return heads

    def norm_inputs(self, outputs: dict[str, Tensor], adapter_name: str | None) -> dict[str, Tensor]:
        """What the norms of queries and keys take together, from what the modules of `sources` returned.

        Of the base, or of an adapter in evaluation mode: by their fields of `SharedHeads`, (tokens, heads, dimensions)
        of norms that span a head, (tokens, 1, all dimensions) of norms that span the layer.
        """
        width = self.shape.head_dim
        if adapter_name is not None:
            width = self.layout(adapter_name).shape.head_dim
        rows = {}
        for name, source in (("query_norm", "query"), ("key_norm", "key")):
            heads = outputs[source].unflatten(-1, (-1, width))
            if self.family.norm_span == "layer":
                heads = heads.flatten(-2).unsqueeze(-2)
            elif adapter_name is not None and source == "query":
                heads = self.layout(adapter_name).gather(heads)
            rows[name] = heads.flatten(0, -3)
        return rows

    def _normed(self, norm: nn.Module, rows: Tensor) -> Tensor:
        """Queries (B, T, H D) or keys (B, T, K D) through the base's norm."""
        norm = base_layer(norm)
        if self.family.norm_span == "layer":
            return norm(rows)
        return norm(rows.unflatten(-1, (-1, self.shape.head_dim))).flatten(-2)

    # ---- the adapter ----

    def wrapped(self, name: str) -> SharedLayer:
        """A new tuner layer around the module of that name, one of `shared_names`."""
        family, attribute = self.family, name.rpartition(".")[2]
        layer_classes = {
            family.key_norm: SharedKeyNorm,
            family.query_norm: SharedQueryNorm,
            family.key: SharedKey,
            family.value: SharedValue,
        }
        layer_class = layer_classes.get(attribute, SharedQKV)
        return layer_class(getattr(self.attention, attribute), self.shape, family)

    def install_hooks(self) -> None:
        """Connect the shared layers with each other and with the attention around them."""
        # Bound methods, so that a deep copy's hooks belong to the copy.
        self.attention.register_forward_pre_hook(self.key.set_geometry, with_kwargs=True)
        if not self.is_fused:
            self.value.follow(self.key)
            self.query.register_forward_hook(self.key.fit_projected_queries)
        for norm in self.norms().values():
            norm.follow(self.key)
        self.output.register_forward_pre_hook(self.value.gather_heads)

    def restore_geometry(self) -> None:
        """Undo what the adapter last told the attention module about its heads."""
        write_geometry(self.attention, self.family, Geometry.of_base(self.shape))

    def layout(self, adapter_name: str) -> HeadLayout:
        """The adapter's groups, and the shape of its shared heads."""
        return self.key.layout(adapter_name)

    def cached_heads(self) -> tuple[int, int]:
        """K/V heads that the cache holds in evaluation mode, and their dimensions."""
        adapter_name = self.key.active() if isinstance(self.key, SharedProjection) else None
        if adapter_name is None:
            return self.shape.base_kv_heads, self.shape.head_dim
        if not self.family.grouped:
            return self.shape.num_attention_heads, self.shape.head_dim
        layout = self.layout(adapter_name)
        return layout.slots.kv_heads, layout.shape.head_dim

    def start(self, adapter_name: str) -> None:
        """Write the shared heads that need no data, unless the adapter is on the meta device, to be loaded."""
        if self.key.lora_kv[adapter_name].weight.is_meta:
            return
        layout = self.layout(adapter_name)
        with in_place(self.attention.modules()):
            if not base_layer(self.key).weight.is_meta:
                self.write(adapter_name, mean_heads(self.weights(), layout.partition, layout.shape))

    def reader(self, adapter_name: str) -> Callable[[], SharedHeads]:
        """What reads the adapter's shared heads, also once its layers have left the model.

        It holds the adapter's own modules and nothing of the base's. K and V are views of the weights, gains and mixes
        float64.
        """
        layout = self.layout(adapter_name)
        projections = {layer.parts: layer.lora_kv[adapter_name] for layer in self.shared_layers()}
        fits = {}
        for layer in self.shared_layers():
            for name in FITS:
                modules = getattr(layer, f"lora_{name}")
                if adapter_name in modules:
                    fits[name] = modules[adapter_name]
        norms = {name: norm.lora_norm[adapter_name] for name, norm in self.norms().items()}
        offset, spans_layer = self.family.norm_offset, self.family.norm_span == "layer"

        @torch.no_grad()
        def read() -> SharedHeads:
            tensors = {}
            for parts, linear in projections.items():
                for suffix, tensor in (("", linear.weight), ("_bias", linear.bias)):
                    if tensor is not None:
                        heads = tensor.detach().unflatten(0, (len(parts), len(layout.partition), -1))
                        for part, each in zip(parts, heads, strict=True):
                            tensors[part + suffix] = each
            for name, fit in fits.items():
                tensors[name] = fit.read(layout)
            for name, norm in norms.items():
                # (W,), or (heads, W) where one norm spans the layer.
                scale = norm.weight.detach() + offset
                if spans_layer:
                    scale = scale.unflatten(0, (-1, layout.shape.head_dim))
                tensors[name] = scale
            return SharedHeads(layout.partition, layout.shape, **tensors)

        return read

    @torch.no_grad()
    def write(self, adapter_name: str, heads: SharedHeads) -> None:
        """Make these the adapter's shared heads, groups included."""
        layout = self.layout(adapter_name)
        layout.set_partition(heads.partition, heads.shape.frequencies)
        for layer in self.shared_layers():
            linear = layer.lora_kv[adapter_name]
            linear.weight.copy_(torch.cat([getattr(heads, part).flatten(0, 1) for part in layer.parts]))
            if linear.bias is not None:
                linear.bias.copy_(torch.cat([getattr(heads, f"{part}_bias").flatten() for part in layer.parts]))
            for name in FITS:
                modules = getattr(layer, f"lora_{name}")
                if adapter_name in modules:
                    modules[adapter_name].write(getattr(heads, name), layout)
        for name, norm in self.norms().items():
            norm.lora_norm[adapter_name].weight.copy_(getattr(heads, name).flatten() - self.family.norm_offset)

    @torch.no_grad()
    def compose_value_mix(self, adapter_name: str, mix: Tensor) -> None:
        """Put another matrix (H, D, D) behind each head's value mix."""
        value_mix, layout = self.value.lora_value_mix[adapter_name], self.layout(adapter_name)
        value_mix.write(mix @ value_mix.read(layout).to(mix), layout)

    @torch.no_grad()
    def write_base(self, query: Tensor, key: Tensor, value: Tensor, output: Tensor, norms: dict[str, Tensor]) -> None:
        """Overwrite the base's own tensors in place, with heads of its own shape; as for `replace_projections`."""
        family, projections = self.family, {}
        if self.is_fused:
            projections[family.fused_qkv] = family.join_fused(query, key, value)
        else:
            projections |= {family.query: query, family.key: key, family.value: value}
        for name, heads in projections.items():
            linear, rows = base_layer(getattr(self.attention, name)), heads.flatten(0, 1)
            linear.weight.copy_(rows[:, : self.shape.hidden_size])
            if linear.bias is not None:
                linear.bias.copy_(rows[:, -1])
        base_layer(self.output).weight.copy_(output)
        for name, scale in norms.items():
            base_layer(getattr(self, name)).weight.copy_(scale.flatten() - family.norm_offset)

    def base_parameters(self) -> list[nn.Parameter]:
        """What `write_base` overwrites, and the parameters beside it."""
        modules = [*self.sources().values(), *self.norms().values(), self.output]
        return [parameter for module in modules for parameter in base_layer(module).parameters()]

    # ---- the plain model ----

    def replace_projections(
        self, query: Tensor, key: Tensor, value: Tensor, output: Tensor, fused: str | None
    ) -> None:
        """Put plain projections of these heads in place.

        Args:
            query, key, value: (heads, dimensions, E), or (heads, dimensions, E + 1) with a bias as the last column.
            output: (E, heads * dimensions).
            fused: name of the one projection that holds q, k and v; None for three.
        """
        family, like = self.family, self.output.weight
        for name in (family.fused_qkv,) if self.is_fused else (family.query, family.key, family.value):
            delattr(self.attention, name)
        if fused:
            projections = {fused: family.join_fused(query, key, value)}
        else:
            projections = {family.query: query, family.key: key, family.value: value}
        for name, heads in projections.items():
            weight, bias = heads.flatten(0, 1), None
            if weight.shape[1] > self.shape.hidden_size:
                weight, bias = weight[:, :-1], weight[:, -1]
            _replace_linear(self.attention, name, weight, bias, like)
        _replace_linear(self.attention, family.output, output, self.output.bias, like)


def _replace_linear(attention: nn.Module, name: str, weight: Tensor, bias: Tensor | None, like: Tensor) -> None:
    new = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    new.weight = nn.Parameter(weight.to(like).contiguous())
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().to(like).contiguous())
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
    with ExitStack() as restored:
        for module in model.modules():
            restored.callback(setattr, module, "training", module.training)
        model.eval()
        yield
