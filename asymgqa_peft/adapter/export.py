"""From adapter to plain checkpoint: shared heads and slots written into stock classes with stock configurations."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from accelerate import dispatch_model, init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..groups import SlotLayout
from ..heads import HeadShape, SharedHeads
from .plan import ExportPlan
from .site import AttentionSite, attention_sites


@torch.no_grad()
def export_plain_model(
    model: PreTrainedModel, plan: ExportPlan, readers: Sequence[Callable[[], SharedHeads]]
) -> PreTrainedModel:
    """Write the shared heads into a model whose LoRA is merged, and return it as an instance of the stock class.

    Args:
        model: the base, its LoRA merged.
        plan: what it becomes.
        readers: for each layer, what reads its shared heads.

    One projection at a time, its heads one by one in float64: beside the model, less than a layer is held.
    """
    for site, layout, read in zip(attention_sites(model), plan.layouts, readers, strict=True):
        _write_layer(site, layout, read())
    return _as_stock_model(model, plan)


def _write_layer(site: AttentionSite, layout: SlotLayout, shared: SharedHeads) -> None:
    _set_inputs(site, layout, shared)
    _set_output(site, layout, shared)


def _set_inputs(site: AttentionSite, layout: SlotLayout, shared: SharedHeads) -> None:
    family, attention, shape = site.family, site.attention, site.shape
    key = _stored(shared.key, shared.key_bias, layout)
    value = _stored(shared.value, shared.value_bias, layout)
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


def _stored(weight: Tensor, bias: Tensor | None, layout: SlotLayout) -> tuple[Tensor, Tensor | None]:
    source = list(layout.kv_source)
    return weight[source].double(), None if bias is None else bias[source].double()


def _fitted_query(site: AttentionSite, layout: SlotLayout, shared: SharedHeads) -> tuple[Tensor, Tensor | None]:
    """Query weight (slots, D, E) and bias (slots, D) with gain and mix folded in, zero in empty slots."""
    weight, bias = _query_heads(site)
    columns = weight if bias is None else torch.cat((weight, bias[..., None]), dim=-1)
    slots = columns.new_zeros(layout.num_slots, *columns.shape[1:], dtype=torch.float64)
    for head, slot in enumerate(layout.slot_of_head):
        slots[slot] = _fit_query(columns[head].double(), shared, head, site.shape)
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


def _fit_query(columns: Tensor, shared: SharedHeads, head: int, shape: HeadShape) -> Tensor:
    """(D, C) -> (D, C) of one query head: the complex gain on rotary pairs, the mix on the rest."""
    rotary, rest = columns.split([shape.rotary_dim, shape.pass_dim])
    if shared.query_gain is not None:
        pairs = torch.complex(*rotary.chunk(2)) * shared.query_gain[head][:, None]
        rotary = torch.cat((pairs.real, pairs.imag))
    if shared.query_mix is not None:
        rest = shared.query_mix[head] @ rest
    return torch.cat((rotary, rest))


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


def _set_output(site: AttentionSite, layout: SlotLayout, shared: SharedHeads) -> None:
    linear, head_dim = site.output, site.shape.head_dim
    heads = linear.weight.unflatten(1, (-1, head_dim))  # (E, H, D)
    slots = heads.new_zeros(len(heads), layout.num_slots, head_dim)
    for head, slot in enumerate(layout.slot_of_head):
        columns = heads[:, head].double()
        if shared.value_mix is not None:
            columns = columns @ shared.value_mix[head]
        slots[:, slot] = columns.to(slots)
    _replace_linear(site.attention, site.family.output, slots.flatten(1), linear.bias)


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
    plan.plain.config.tie_word_embeddings = model.config.tie_word_embeddings
    with init_empty_weights(include_buffers=False):
        plain = plan.plain.model_class(plan.plain.config)
    plain.load_state_dict(model.state_dict(), strict=True, assign=True)
    plain.tie_weights()
    plain.export_plan = plan  # for export_report; not part of the configuration
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
