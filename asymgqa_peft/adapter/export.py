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
from ..heads import SharedHeads
from .plan import ExportPlan
from .site import AttentionSite, HeadWeights, attention_sites


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
        _write_layer(site, layout, read(), plan)
    return _as_stock_model(model, plan)


def _write_layer(site: AttentionSite, layout: SlotLayout, shared: SharedHeads, plan: ExportPlan) -> None:
    query = _fitted_queries(site, layout, shared, plan)
    if site.query_norm is not None:
        query = _spread_query_norm(site, query, layout)
        stored = shared.key_norm[list(layout.kv_source)]
        _set_parameter(site.key_norm, "weight", stored.flatten())
    key = _stored(shared.key, shared.key_bias, layout)
    value = _stored(shared.value, shared.value_bias, layout)
    unfuse = plan.stand_in is not None and plan.stand_in.unfuses
    site.replace_projections(query, key, value, _mixed_outputs(site, layout, shared), unfuse)


def _stored(weight: Tensor, bias: Tensor | None, layout: SlotLayout) -> HeadWeights:
    source = list(layout.kv_source)
    return weight[source].double(), None if bias is None else bias[source].double()


def _fitted_queries(site: AttentionSite, layout: SlotLayout, shared: SharedHeads, plan: ExportPlan) -> HeadWeights:
    """Query weight (slots, W, E) and bias (slots, W), fitted to the shared heads; zero in empty slots."""
    weight, bias = site.query_heads()
    # A bias is one more column: it follows every change of basis.
    columns = weight if bias is None else torch.cat((weight, bias[..., None]), dim=-1)
    slots = columns.new_zeros(layout.num_slots, shared.shape.head_dim, columns.shape[-1], dtype=torch.float64)
    for head, slot in enumerate(layout.slot_of_head):
        slots[slot] = _fitted_query(columns[head].double(), shared, head, plan)
    if bias is None:
        return slots, None
    return slots[..., :-1], slots[..., -1]


def _fitted_query(columns: Tensor, shared: SharedHeads, head: int, plan: ExportPlan) -> Tensor:
    """(D, C) -> (W, C) of one query head: gains on rotary pairs, the mix on the rest, and the plain model's scales."""
    shape = shared.shape
    rotary, rest = columns.split([shape.base.rotary_dim, shape.base.pass_dim])
    pairs = torch.complex(*rotary.chunk(2))[list(shape.frequencies)]
    if shared.query_gain is not None:
        pairs = pairs * shared.query_gain[head][:, None]
    rotary = torch.cat((pairs.real, pairs.imag)) * plan.rotary_scale
    if shared.query_mix is not None:
        rest = shared.query_mix[head] @ rest
    return torch.cat((rotary, rest)) * plan.query_scale


def _spread_query_norm(site: AttentionSite, query: HeadWeights, layout: SlotLayout) -> HeadWeights:
    """Let a norm over all slots act as the base's over H heads: empty slots thin out the mean square.

    With queries scaled by sqrt(slots / H) the mean square, and so epsilon's share, is the base's; the norm's scale
    takes the factor back.
    """
    norm = site.query_norm
    factor = math.sqrt(layout.num_slots / site.shape.num_attention_heads)
    scale = norm.weight.detach().double().unflatten(0, (-1, site.shape.head_dim)) / factor
    slots = scale.new_zeros(layout.num_slots, site.shape.head_dim)
    slots[list(layout.slot_of_head)] = scale
    _set_parameter(norm, "weight", slots.flatten())
    weight, bias = query
    return weight * factor, None if bias is None else bias * factor


def _mixed_outputs(site: AttentionSite, layout: SlotLayout, shared: SharedHeads) -> Tensor:
    """Output weight (E, slots W) with the value mixes folded in; zero in empty slots."""
    weight = site.output.weight
    heads = weight.unflatten(1, (-1, site.shape.head_dim))  # (E, H, D)
    slots = heads.new_zeros(len(heads), layout.num_slots, shared.shape.head_dim)
    for head, slot in enumerate(layout.slot_of_head):
        columns = heads[:, head].double()
        if shared.value_mix is not None:
            columns = columns @ shared.value_mix[head]
        slots[:, slot] = columns.to(slots)
    return slots.flatten(1)


def _set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    setattr(module, name, nn.Parameter(value.to(getattr(module, name))))


def _as_stock_model(model: PreTrainedModel, plan: ExportPlan) -> PreTrainedModel:
    """A fresh instance of the stock class that takes over the tensors: strict loading proves names and shapes."""
    # Unloading a head that was trained on its own (modules_to_save) unties it, after the plan was made.
    plan.plain.config.tie_word_embeddings = model.config.tie_word_embeddings
    with init_empty_weights(include_buffers=False):
        plain = plan.plain.model_class(plan.plain.config)
    plain.load_state_dict(_renamed(model.state_dict(), plan), strict=True, assign=True)
    plain.tie_weights()
    plain.export_plan = plan  # for export_report; not part of the configuration
    _take_over_buffers(model, plain)
    if model.can_generate():
        plain.generation_config = copy.deepcopy(model.generation_config)
    plain.train(model.training)
    device_map = getattr(model, "hf_device_map", None)
    return dispatch_model(plain, device_map) if device_map and len(set(device_map.values())) > 1 else plain


def _renamed(tensors: dict[str, Tensor], plan: ExportPlan) -> dict[str, Tensor]:
    """Tensors under the names of the plain class, which may have in parts what the base has as one."""
    splits = {} if plan.stand_in is None else plan.stand_in.splits
    renamed = {}
    for name, tensor in tensors.items():
        ending = next((ending for ending in splits if name.endswith(ending)), None)
        if ending is None:
            renamed[name] = tensor
            continue
        parts = splits[ending]
        for part, rows in zip(parts, tensor.chunk(len(parts)), strict=True):
            renamed[name.removesuffix(ending) + part] = rows.clone()
    return renamed


def _take_over_buffers(model: nn.Module, plain: nn.Module) -> None:
    """Buffers that no state dict holds (rotary frequencies), with their device; a wide head has its own."""
    buffers = dict(model.named_buffers())
    for name, buffer in list(plain.named_buffers()):
        if name not in buffers:
            continue
        parent, _, attribute = name.rpartition(".")
        taken = buffers[name] if buffers[name].shape == buffer.shape else buffer.to(buffers[name].device)
        setattr(plain.get_submodule(parent), attribute, taken)
