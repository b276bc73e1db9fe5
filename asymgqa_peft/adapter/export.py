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
from ..heads import SharedHeads, join_bias
from .plan import ExportPlan
from .site import AttentionSite, attention_sites


@torch.no_grad()
def export_plain_model(
    model: PreTrainedModel, plan: ExportPlan, readers: Sequence[Callable[[], SharedHeads]]
) -> PreTrainedModel:
    """Write the shared heads into a model whose LoRA is merged, and return it as an instance of the stock class.

    Each of the ``readers`` reads the shared heads of a layer. One projection at a time, its heads one by one in
    float64: beside the model, less than a layer is held.
    """
    for site, layout, read in zip(attention_sites(model), plan.layouts, readers, strict=True):
        _write_layer(site, layout, read(), plan)
    return _as_stock_model(model, plan)


def _write_layer(site: AttentionSite, layout: SlotLayout, shared: SharedHeads, plan: ExportPlan) -> None:
    query = _fitted_queries(site, layout, shared, plan)
    source = list(layout.kv_source)
    if site.query_norm is not None:
        # A norm over all slots is to act as the base's over H heads, but empty slots thin out the mean square. With
        # queries scaled by sqrt(slots / H) it is the base's, epsilon's share too; the norm's scale takes that back.
        factor = math.sqrt(layout.num_slots / site.shape.num_attention_heads)
        query = query * factor
        scale = site.query_norm.weight.detach().double().unflatten(0, (-1, site.shape.head_dim)) / factor
        slots = scale.new_zeros(layout.num_slots, site.shape.head_dim)
        slots[list(layout.slot_of_head)] = scale
        _set_weight(site.query_norm, slots.flatten())
        _set_weight(site.key_norm, shared.key_norm[source].flatten())
    key = join_bias(shared.key, shared.key_bias)[source].double()
    value = join_bias(shared.value, shared.value_bias)[source].double()
    unfuse = plan.stand_in is not None and plan.stand_in.unfuses
    site.replace_projections(query, key, value, _mixed_outputs(site, layout, shared), unfuse)


def _fitted_queries(site: AttentionSite, layout: SlotLayout, shared: SharedHeads, plan: ExportPlan) -> Tensor:
    """Queries (slots, W, E), with a bias (slots, W, E + 1), fitted to the shared heads; zero in empty slots."""
    weights, shape = site.weights(), shared.shape
    heads = join_bias(weights.query, weights.query_bias).unflatten(0, (-1, site.shape.head_dim))
    slots = heads.new_zeros(layout.num_slots, shape.head_dim, heads.shape[-1], dtype=torch.float64)
    for head, slot in enumerate(layout.slot_of_head):
        rotary, rest = heads[head].double().split([shape.base.rotary_dim, shape.base.pass_dim])
        pairs = torch.complex(*rotary.chunk(2))[list(shape.frequencies)]
        if shared.query_gain is not None:
            pairs = pairs * shared.query_gain[head][:, None]
        if shared.query_mix is not None:
            rest = shared.query_mix[head] @ rest
        rotary = torch.cat((pairs.real, pairs.imag)) * plan.rotary_scale
        slots[slot] = torch.cat((rotary, rest)) * plan.query_scale
    return slots


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


def _set_weight(module: nn.Module, weight: Tensor) -> None:
    module.weight = nn.Parameter(weight.to(module.weight))


def _as_stock_model(model: PreTrainedModel, plan: ExportPlan) -> PreTrainedModel:
    """A fresh instance of the stock class that takes over the tensors: strict loading proves names and shapes."""
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
    """Tensors under the names of the plain class, which may have parts of the base's tensors, and biases of 0."""
    splits, adds_bias = {}, ()
    if plan.stand_in is not None:
        splits = plan.stand_in.splits
        adds_bias = tuple(f"{projection}.weight" for projection in plan.stand_in.adds_bias)
    renamed = {}
    for name, tensor in tensors.items():
        if name.endswith(adds_bias):
            renamed[name.removesuffix("weight") + "bias"] = tensor.new_zeros(len(tensor))
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
