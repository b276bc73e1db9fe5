"""From adapter to plain checkpoint: shared heads and slots written into stock classes with stock configurations."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import transformers
from accelerate import dispatch_model, init_empty_weights
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

from .families import Family, HeadShape, find_family, head_shape
from .groups import HeadGroups, SlotLayout, slot_layout
from .layers import SharedKeyNorm
from .sites import AttentionSite, attention_sites


@dataclass(frozen=True)
class ExportPlan:
    """What the plain checkpoint will be, decided before any module is touched.

    Attributes:
        model_class: stock class of the plain model.
        config: its configuration.
        layouts: slots of every layer; all store the same number of K/V heads.
        family, shape: of the base.
    """

    model_class: type[PreTrainedModel]
    config: PretrainedConfig
    layouts: tuple[SlotLayout, ...]
    family: Family
    shape: HeadShape


@dataclass(frozen=True)
class SharedTensors:
    """One layer's adapter, as it goes into the plain checkpoint.

    Attributes:
        key, value: weight (G, D, E) of the shared heads and bias (G, D) or None.
        query_gain: complex (H, R/2) or None; query_mix: (H, P, P) or None; value_mix: (H, D, D) or None.
        key_norm: (G, D) or None.
    """

    key: tuple[Tensor, Tensor | None]
    value: tuple[Tensor, Tensor | None]
    query_gain: Tensor | None
    query_mix: Tensor | None
    value_mix: Tensor | None
    key_norm: Tensor | None


def plan_export(model: PreTrainedModel, groups: HeadGroups) -> ExportPlan:
    """Decide class, configuration and slots of the plain checkpoint.

    Equal groups are ordinary GQA in the base's class. Unequal groups are padded to slots: in the family's padded
    class, or in the base's own with as many slots as its configuration accepts. Where neither configuration nor class
    knows a number of KV heads or a head dimension, K/V heads are stored more than once.

    Raises:
        ValueError: for a quantised base, or where no stock class can hold the groups; with the remedy.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            f"The base is quantised ({type(model.hf_quantizer).__name__}) and cannot hold new K/V heads: load the "
            "base in bf16, load the adapter onto it, and merge there."
        )
    config, family, shape = model.config, find_family(model.config), head_shape(model.config)
    if not family.grouped or not family.explicit_head_dim:
        return _plan_fixed_slots(model, groups, family, shape)
    refusal = None
    for model_class, config_class, slots, sets in _candidates(model, groups, family, shape):
        try:
            plain = _plain_config(config_class, config, groups, slots, shape, sets)
        except Exception as error:  # each version of transformers wraps a configuration's refusal in another class
            refusal = error
            continue
        return _plan(model_class, plain, groups, slots, family, shape)
    raise ValueError(
        f"No {type(config).__name__} holds {groups.num_key_value_heads} groups of up to "
        f"{groups.max_group_size * shape.queries_per_kv} query heads each. The last one tried says: "
        f"{_last_line(refusal)} The adapter is unchanged and stays usable; for a plain checkpoint train one with "
        "equal groups (grouping='symmetric') or another num_key_value_heads."
    ) from refusal


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].strip()


def _candidates(model, groups: HeadGroups, family: Family, shape: HeadShape) -> Iterator[tuple[type, type, int, dict]]:
    """(model class, configuration class, slots per K/V head, values to set), best first."""
    largest = groups.max_group_size * shape.queries_per_kv
    equal = {size for layer in range(len(groups.layers)) for size in groups.sizes(layer)} == {groups.max_group_size}
    if not equal and (padded := _padded_class(type(model), model.config, family)):
        yield *padded, largest, family.padded_as.sets
    for slots in range(largest, 2 * largest + 1):  # over-padded: some classes want hidden_size % slots == 0
        yield type(model), type(model.config), slots, {}


def _plan(model_class, config, groups: HeadGroups, slots_per_kv: int, family: Family, shape: HeadShape) -> ExportPlan:
    layouts = tuple(slot_layout(partition, shape.queries_per_kv, slots_per_kv) for partition in groups.layers)
    config.architectures = [model_class.__name__]
    _write_rope_fields(config, family)
    return ExportPlan(model_class, config, layouts, family, shape)


def _plan_fixed_slots(model, groups: HeadGroups, family: Family, shape: HeadShape) -> ExportPlan:
    """Exactly H slots: as many per K/V head as divide every group, large groups stored more than once."""
    sizes = [len(group) * shape.queries_per_kv for partition in groups.layers for group in partition]
    slots_per_kv = math.gcd(*sizes) if family.grouped else 1
    kv_heads = shape.num_attention_heads // slots_per_kv
    if kv_heads > groups.num_key_value_heads:
        shrinks = "shrinks less than the adapter's" if kv_heads < shape.base_kv_heads else "does not shrink"
        warnings.warn(
            f"{type(model.config).__name__} cannot express these groups: the plain checkpoint stores {kv_heads} KV "
            f"heads, not {groups.num_key_value_heads}, so its cache {shrinks}. Its logits are the adapter's.",
            stacklevel=5,
        )
    config = copy.deepcopy(model.config)
    if family.grouped:
        config.num_key_value_heads = kv_heads
    return _plan(type(model), config, groups, slots_per_kv, family, shape)


def _padded_class(model_class, config, family: Family) -> tuple[type, type] | None:
    """Model and configuration class that stand in for padded slots, if the base qualifies."""
    padded = family.padded_as
    if padded is None or any(getattr(config, name, value) != value for name, value in padded.needs.items()):
        return None
    config_class = CONFIG_MAPPING[padded.model_type]
    own, other = type(config).__name__.removesuffix("Config"), config_class.__name__.removesuffix("Config")
    stand_in = getattr(transformers, model_class.__name__.replace(own, other, 1), None)
    return None if stand_in is None else (stand_in, config_class)


def _plain_config(config_class, config, groups: HeadGroups, slots_per_kv: int, shape: HeadShape, sets: dict):
    """The plain configuration; raises whatever its class raises where it refuses the number of slots."""
    values = config.to_dict()
    values.pop("model_type", None)
    if config_class is not type(config):
        own = config_class().to_dict()
        values = {name: value for name, value in values.items() if name in own}
    num_slots = groups.num_key_value_heads * slots_per_kv
    values |= {"num_attention_heads": num_slots, "num_key_value_heads": groups.num_key_value_heads} | sets
    if num_slots != shape.num_attention_heads or values.get("head_dim") is not None:
        values["head_dim"] = shape.head_dim
    plain = config_class.from_dict(values)
    plain._attn_implementation = config._attn_implementation
    return plain


def _write_rope_fields(config: PretrainedConfig, family: Family) -> None:
    """Write the top-level RoPE fields that engines written for transformers 4 read; transformers 5 takes both."""
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict) or "rope_theta" not in parameters:
        return
    for entry, name in family.rope_fields.items():
        if entry in parameters:
            setattr(config, name, parameters[entry])
    if parameters.get("rope_type", "default") != "default":
        scaling = {entry: value for entry, value in parameters.items() if entry not in family.rope_fields}
        # Past the property of this name, which stands for rope_parameters and warns on assignment.
        vars(config)["rope_scaling"] = scaling


@torch.no_grad()
def shared_tensors(site: AttentionSite, adapter_name: str) -> SharedTensors:
    """Take one layer's adapter out of its tuner layers."""
    shape, tensors = site.shape, {}
    for layer in site.shared_layers():
        linear = layer.lora_kv[adapter_name]
        weights = linear.weight.detach().unflatten(0, (len(layer.parts), -1, shape.head_dim))
        biases = None if linear.bias is None else linear.bias.detach().unflatten(0, weights.shape[:3])
        for index, part in enumerate(layer.parts):
            tensors[part] = (weights[index], None if biases is None else biases[index])
    gain = _fit(site.key.lora_query_gain, adapter_name)
    norm = getattr(site.attention, site.family.key_norm) if site.family.key_norm else None
    return SharedTensors(
        key=tensors["key"],
        value=tensors["value"],
        query_gain=None if gain is None else torch.view_as_complex(gain) + 1,
        query_mix=_plus_identity(_fit(site.key.lora_query_mix, adapter_name)),
        value_mix=_plus_identity(_fit(site.value.lora_value_mix, adapter_name)),
        key_norm=_norm_scale(norm, adapter_name, shape),
    )


def _fit(fits: nn.ModuleDict, adapter_name: str) -> Tensor | None:
    return fits[adapter_name].weight.detach().double() if adapter_name in fits else None


def _plus_identity(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight + torch.eye(weight.shape[-1]).to(weight)


def _norm_scale(norm: SharedKeyNorm | None, adapter_name: str, shape: HeadShape) -> Tensor | None:
    return None if norm is None else norm.lora_norm[adapter_name].weight.detach().unflatten(0, (-1, shape.head_dim))


@torch.no_grad()
def export_plain_model(model: PreTrainedModel, plan: ExportPlan, tensors: Sequence[SharedTensors]) -> PreTrainedModel:
    """Write the shared heads into a model whose LoRA is merged, and return it as an instance of the stock class.

    A layer at a time: beside the model, one layer's projections in float64 are held.
    """
    for site, layout, shared in zip(attention_sites(model), plan.layouts, tensors, strict=True):
        _write_layer(site, layout, shared)
    return _as_stock_model(model, plan)


def _write_layer(site: AttentionSite, layout: SlotLayout, shared: SharedTensors) -> None:
    family, attention, shape = site.family, site.attention, site.shape
    key, value = (_stored(tensors, layout) for tensors in (shared.key, shared.value))
    query = _fitted_query(site, layout, shared)
    if family.query_norm:
        query = _spread_query_norm(getattr(attention, family.query_norm), query, layout, shape)
        stored = shared.key_norm[list(layout.kv_source)]
        _set_parameter(getattr(attention, family.key_norm), "weight", stored.flatten())
    if family.fused_qkv:
        heads = torch.stack if family.fused_layout == "heads" else torch.cat
        dim = 1 if family.fused_layout == "heads" else 0
        weight = heads([query[0], key[0], value[0]], dim=dim)
        bias = None if key[1] is None else heads([query[1], key[1], value[1]], dim=dim)
        _set_linear(attention, family.fused_qkv, weight, bias)
    else:
        for name, (weight, bias) in ((family.query, query), (family.key, key), (family.value, value)):
            _set_linear(attention, name, weight, bias)
    _set_output(attention, family.output, layout, shared, shape)


def _stored(heads: tuple[Tensor, Tensor | None], layout: SlotLayout) -> tuple[Tensor, Tensor | None]:
    weight, bias = heads
    source = list(layout.kv_source)
    return weight[source].double(), None if bias is None else bias[source].double()


def _fitted_query(site: AttentionSite, layout: SlotLayout, shared: SharedTensors) -> tuple[Tensor, Tensor | None]:
    """Query weight (slots, D, E) and bias (slots, D) with gain and mix folded in, zero in empty slots."""
    weight, bias = _query_heads(site)
    columns = weight.double() if bias is None else torch.cat((weight, bias[..., None]), dim=-1).double()
    columns = _apply_query_fit(columns, shared, site.shape)
    slots = _scatter(columns, layout)
    return (slots, None) if bias is None else (slots[..., :-1], slots[..., -1])


def _query_heads(site: AttentionSite) -> tuple[Tensor, Tensor | None]:
    shape, family = site.shape, site.family
    name = family.fused_qkv or family.query
    linear = getattr(site.attention, name)
    weight, bias = linear.weight, linear.bias
    if family.fused_qkv and family.fused_layout == "heads":
        weight, bias = (None if t is None else t.unflatten(0, (-1, 3, shape.head_dim))[:, 0] for t in (weight, bias))
        return weight, bias
    rows = shape.num_attention_heads * shape.head_dim
    weight, bias = (None if t is None else t[:rows].unflatten(0, (-1, shape.head_dim)) for t in (weight, bias))
    return weight, bias


def _apply_query_fit(columns: Tensor, shared: SharedTensors, shape: HeadShape) -> Tensor:
    """(H, D, C) -> (H, D, C): the complex gain on rotary pairs, the mix on the rest."""
    rotary, rest = columns.split([shape.rotary_dim, shape.pass_dim], dim=1)
    if shared.query_gain is not None:
        pairs = torch.complex(*rotary.chunk(2, dim=1)) * shared.query_gain[..., None]
        rotary = torch.cat((pairs.real, pairs.imag), dim=1)
    if shared.query_mix is not None:
        rest = shared.query_mix @ rest
    return torch.cat((rotary, rest), dim=1)


def _spread_query_norm(norm: nn.Module, query, layout: SlotLayout, shape: HeadShape):
    """Let a norm over all slots act as the base's over H heads: empty slots thin out the mean square.

    With queries scaled by sqrt(slots / H) the mean square, and so epsilon's share, is the base's; the norm's scale
    takes the factor back.
    """
    factor = math.sqrt(layout.num_slots / shape.num_attention_heads)
    scale = norm.weight.detach().double().unflatten(0, (-1, shape.head_dim)) / factor
    _set_parameter(norm, "weight", _scatter(scale, layout).flatten())
    weight, bias = query
    return weight * factor, None if bias is None else bias * factor


def _scatter(heads: Tensor, layout: SlotLayout) -> Tensor:
    slots = heads.new_zeros(layout.num_slots, *heads.shape[1:])
    slots[list(layout.slot_of_head)] = heads
    return slots


def _set_output(attention, name: str, layout: SlotLayout, shared: SharedTensors, shape: HeadShape) -> None:
    linear = getattr(attention, name)
    heads = linear.weight.double().unflatten(1, (-1, shape.head_dim)).transpose(0, 1)  # (H, E, D)
    if shared.value_mix is not None:
        heads = heads @ shared.value_mix
    weight = _scatter(heads, layout).transpose(0, 1).flatten(1)
    _replace_linear(attention, name, weight, linear.bias)


def _set_linear(attention: nn.Module, name: str, heads: Tensor, bias: Tensor | None) -> None:
    weight = heads.flatten(0, -2)
    _replace_linear(attention, name, weight, None if bias is None else bias.flatten())


def _replace_linear(attention: nn.Module, name: str, weight: Tensor, bias: Tensor | None) -> None:
    old = getattr(attention, name)
    new = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    new.weight = nn.Parameter(weight.to(old.weight).contiguous())
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().to(old.weight).contiguous())
    setattr(attention, name, new)


def _set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    setattr(module, name, nn.Parameter(value.to(getattr(module, name))))


def _as_stock_model(model: PreTrainedModel, plan: ExportPlan) -> PreTrainedModel:
    """A fresh instance of the stock class that takes over the tensors: strict loading proves names and shapes."""
    # Unloading a head that was trained on its own (modules_to_save) unties it, after the plan was made.
    plan.config.tie_word_embeddings = model.config.tie_word_embeddings
    with init_empty_weights(include_buffers=False):
        plain = plan.model_class(plan.config)
    plain.load_state_dict(model.state_dict(), strict=True, assign=True)
    plain.tie_weights()
    _take_over_buffers(model, plain)
    if model.can_generate():
        plain.generation_config = copy.deepcopy(model.generation_config)
    plain.train(model.training)
    device_map = getattr(model, "hf_device_map", None)
    return dispatch_model(plain, device_map) if device_map and len(set(device_map.values())) > 1 else plain


def _take_over_buffers(model: nn.Module, plain: nn.Module) -> None:
    """Buffers that no state dict holds (rotary frequencies), with their device."""
    buffers = dict(model.named_buffers())
    for name, _ in list(plain.named_buffers()):
        if name in buffers:
            parent, _, attribute = name.rpartition(".")
            setattr(plain.get_submodule(parent), attribute, buffers[name])
