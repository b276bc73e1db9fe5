"""From adapter to plain checkpoint: shared heads and slots written into stock classes with stock configurations."""

from __future__ import annotations

import copy
import math
import tempfile
import warnings
from collections.abc import Callable, Sequence

import torch
from accelerate import dispatch_model, init_empty_weights
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from ..families import StandIn
from ..groups import SlotLayout, group_of_heads
from ..heads import SharedHeads, SharedShape, join_bias, split_bias
from .plan import ExportPlan
from .site import AttentionSite, attention_sites


@torch.no_grad()
def export_plain_model(
    model: PreTrainedModel, plan: ExportPlan, readers: Sequence[Callable[[], SharedHeads]]
) -> PreTrainedModel:
    """Write the shared heads into a model whose LoRA is merged, and return it as an instance of the stock class.

    Each of the ``readers`` reads the shared heads of a layer. The model is used up, one projection at a time, its
    heads one by one in float64: beside it, less than a layer is held.
    """
    for site, layout, read in zip(attention_sites(model), plan.layouts, readers, strict=True):
        block = model.get_submodule(site.name.rpartition(".")[0])
        _write_layer(site, block, layout, read(), plan)
    return _as_stock_model(model, plan)


def _write_layer(
    site: AttentionSite, block: nn.Module, layout: SlotLayout, shared: SharedHeads, plan: ExportPlan
) -> None:
    query, scale = _fitted_queries(site, layout, shared), _scale_of_queries(shared.shape, plan)
    source = list(layout.kv_source)
    if site.family.norm_span is None:
        query = query * scale[:, None].to(query.device)
    else:
        query = _write_norms(site, layout, shared, query, scale)
    key = join_bias(shared.key, shared.key_bias)[source].double()
    value = join_bias(shared.value, shared.value_bias)[source].double()
    fused, folds = site.family.fused_qkv, {}
    if plan.stand_in is not None:
        fused, folds = plan.stand_in.fused_qkv, plan.stand_in.folds
    for behind, name in folds.items():
        norm = getattr(block, name)
        if behind == site.family.attention:
            query, key, value = (_behind_norm(rows, norm) for rows in (query, key, value))
        else:
            linear = block.get_submodule(behind)
            rows = _behind_norm(join_bias(linear.weight, linear.bias).double(), norm)
            weight, bias = split_bias(rows, norm.bias)
            linear.weight = nn.Parameter(weight.to(linear.weight))
            linear.bias = nn.Parameter(bias.to(linear.weight))
        # What is left of it, ones and zeros, comes with the stock class.
        delattr(block, name)
    site.replace_projections(query, key, value, _mixed_outputs(site, layout, shared), fused)


def _behind_norm(rows: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Rows (..., E), or (..., E + 1) with a bias, that take the norm's scale and shift over -> (..., E + 1)."""
    weight, bias = rows.split([norm.weight.numel(), rows.shape[-1] - norm.weight.numel()], dim=-1)
    scale, shift = norm.weight.detach().double(), norm.bias.detach().double()
    return join_bias(weight * scale, weight @ shift + bias.sum(-1))


def fold_into_base(site: AttentionSite, shared: SharedHeads) -> None:
    """Write the shared heads into the base's own weights, in their shape: every KV head is the one of its group.

    The heads have the base's width, and no norm spans stored heads of unequal groups.
    """
    shape = site.shape
    source = group_of_heads(shared.partition)
    heads = tuple(range(shape.num_attention_heads))
    layout = SlotLayout(shape.queries_per_kv, tuple(source), head_of_slot=heads, slot_of_head=heads)
    norms = {name: getattr(shared, name) for name in site.norms()}
    if site.family.norm_span == "layer":
        norms["key_norm"] = norms["key_norm"][source]
    site.write_base(
        _fitted_queries(site, layout, shared),
        join_bias(shared.key, shared.key_bias)[source],
        join_bias(shared.value, shared.value_bias)[source],
        _mixed_outputs(site, layout, shared),
        norms,
    )


def _scale_of_queries(shape: SharedShape, plan: ExportPlan) -> Tensor:
    """(W,) factors that make up for what the plain class does otherwise to scores and to rotary embeddings."""
    scale = torch.full((shape.head_dim,), plan.query_scale, dtype=torch.float64)
    scale[: shape.rotary_dim] *= plan.rotary_scale
    return scale


def _write_norms(site: AttentionSite, layout: SlotLayout, shared: SharedHeads, query: Tensor, scale: Tensor) -> Tensor:
    """Write the norms' scales; what `scale` would do to queries before a norm, the norm would undo.

    Returns:
        Queries (slots, W, E) as their norm needs them.
    """
    query_norm, key_norm = shared.query_norm.double() * scale.to(query.device), shared.key_norm
    if site.family.norm_span == "layer":
        # A norm over all slots is to act as the adapter's over H heads, but empty slots thin out the mean square. With
        # queries scaled by sqrt(slots / H) it is that one, epsilon's share too; the norm's scale takes that back.
        factor = math.sqrt(layout.num_slots / site.shape.num_attention_heads)
        query = query * factor
        slots = query_norm.new_zeros(layout.num_slots, shared.shape.head_dim)
        slots[list(layout.slot_of_head)] = query_norm / factor
        query_norm, key_norm = slots, key_norm[list(layout.kv_source)]
    for norm, weight in ((site.query_norm, query_norm), (site.key_norm, key_norm)):
        norm.weight = nn.Parameter((weight.flatten() - site.family.norm_offset).to(norm.weight))
    return query


def _fitted_queries(site: AttentionSite, layout: SlotLayout, shared: SharedHeads) -> Tensor:
    """Queries (slots, W, E), with a bias (slots, W, E + 1), fitted to the shared heads; zero in empty slots."""
    weights, shape = site.weights(), shared.shape
    heads = join_bias(weights.query, weights.query_bias).unflatten(0, (-1, site.shape.head_dim))
    slots = heads.new_zeros(layout.num_slots, shape.head_dim, heads.shape[-1], dtype=torch.float64)
    for head, slot in enumerate(layout.slot_of_head):
        rows = heads[head].double()
        if shared.query_scale is not None:
            rows = rows * shared.query_scale[head][:, None]
        rotary, rest = rows.split([shape.base.rotary_dim, shape.base.pass_dim])
        pairs = torch.complex(*rotary.chunk(2))[list(shape.frequencies)]
        if shared.query_gain is not None:
            pairs = pairs * shared.query_gain[head][:, None]
        if shared.query_mix is not None:
            rest = shared.query_mix[head] @ rest
        slots[slot] = torch.cat((pairs.real, pairs.imag, rest))
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


def _as_stock_model(model: PreTrainedModel, plan: ExportPlan) -> PreTrainedModel:
    """A fresh instance of the stock class that takes over the tensors: strict loading proves names and shapes."""
    with init_empty_weights(include_buffers=False):
        plain = plan.plain.model_class(plan.plain.config)
    stand_in = plan.stand_in or StandIn(plan.base.config.model_type)
    tensors = _renamed(model.state_dict(), stand_in)
    if plan.stand_in is not None:
        _add_neutral(tensors, plain, model)
    plain.load_state_dict(tensors, strict=True, assign=True)
    plain.tie_weights()
    plain.export_plan = plan  # for export_report; not part of the configuration
    _place_buffers(model, plain, stand_in)
    if model.can_generate():
        plain.generation_config = _savable(model.generation_config)
    plain.train(model.training)
    device_map = getattr(model, "hf_device_map", None)
    if device_map and len(set(device_map.values())) > 1:
        return dispatch_model(plain, {stand_in.rename(name): device for name, device in device_map.items()})
    return plain


def _renamed(tensors: dict[str, Tensor], stand_in: StandIn) -> dict[str, Tensor]:
    """Tensors under the names of the plain class, which may have in parts what the base has as one."""
    renamed = {}
    for name, tensor in tensors.items():
        for ending, rows in stand_in.drops_rows.items():
            if name.endswith(ending):
                tensor = tensor[rows:].clone()
        ending = next((ending for ending in stand_in.splits if name.endswith(ending)), None)
        if ending is None:
            renamed[stand_in.rename(name)] = tensor
            continue
        parts = stand_in.splits[ending]
        for part, rows in zip(parts, tensor.chunk(len(parts)), strict=True):
            renamed[stand_in.rename(name.removesuffix(ending) + part)] = rows.clone()
    return renamed


def _add_neutral(tensors: dict[str, Tensor], plain: nn.Module, model: nn.Module) -> None:
    """Biases and norms that a stand-in has and the base has not: zeros, and scales of ones."""
    fallback = next(model.parameters())
    for name, empty in plain.state_dict().items():
        if name not in tensors and empty.dim() == 1:
            # Of the weight beside it: a head that was trained on its own may have another dtype.
            like = tensors.get(name.rpartition(".")[0] + ".weight", fallback)
            fill = torch.zeros if name.endswith("bias") else torch.ones
            tensors[name] = fill(len(empty), dtype=like.dtype, device=like.device)


def _place_buffers(model: nn.Module, plain: nn.Module, stand_in: StandIn) -> None:
    """Put what no state dict holds (rotary frequencies) where the model has it.

    It starts fresh: what a long input made of the model's, dynamic RoPE would not take back.
    """
    devices = {stand_in.rename(name): buffer.device for name, buffer in model.named_buffers()}
    loaded = plain.state_dict()
    for name, buffer in list(plain.named_buffers()):
        if name not in loaded:
            parent, _, attribute = name.rpartition(".")
            setattr(plain.get_submodule(parent), attribute, buffer.to(devices.get(name, model.device)))


def _savable(config: GenerationConfig) -> GenerationConfig:
    """A copy that can be saved: flags that its own mode of generation ignores would stop saving the model."""
    config, dropped = copy.deepcopy(config), {}
    if config.use_cache is False:
        config.use_cache = True  # as in `plan._stock`
    while (refusal := _refusal_to_save(config)) is not None:
        values, defaults = config.to_diff_dict(), vars(GenerationConfig())
        named = [name for name in values if f"`{name}`" in refusal]
        for name in named or values:
            dropped[name] = values[name]
            vars(config).pop(name, None)
            if name in defaults:
                setattr(config, name, defaults[name])
        if not named:
            break
    if dropped:
        warnings.warn(
            f"The generation configuration cannot be saved as it is: {dropped} were dropped from the plain model's.",
            stacklevel=7,  # who called merge_and_unload
        )
    return config


def _refusal_to_save(config: GenerationConfig) -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            config.save_pretrained(folder)
        except ValueError as error:
            return str(error)
    return None
