"""From adapter to plain checkpoint: shared heads and slots written into stock classes with stock configurations."""

from __future__ import annotations

import copy
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from accelerate import dispatch_model, init_empty_weights
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel

from ..families import StandIn
from ..groups import SlotLayout, group_of_heads
from ..heads import SharedHeads, SharedShape, join_bias, split_bias
from .layer import SharedLayer
from .offload import copy_without_hooks, in_place, is_offloaded
from .plan import ExportPlan
from .site import AttentionSite


class MergedWeights(Mapping[str, Tensor]):
    """The plain model's tensors by name, merged when they are asked for, a decoder layer at a time.

    Nothing of the model changes. The layer that was asked for last is kept, in main memory if it is offloaded.

    Attributes:
        empty: the plain model without weights.
        layers: numbers of the decoder layers, and None for what is in none of them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sites: Sequence[AttentionSite],
        plan: ExportPlan,
        readers: Sequence[Callable[[], SharedHeads]],
        unloaded: Callable[[nn.Module], nn.Module],
    ) -> None:
        """``readers`` read the shared heads of each layer; ``unloaded`` merges the LoRA of a part in place."""
        self.model, self.sites, self.plan, self.readers, self.unloaded = model, sites, plan, readers, unloaded
        self.layers = (None, *range(len(sites)))
        self.stand_in = plan.stand_in or StandIn(plan.base.config.model_type)
        self.empty = _empty_stock_model(model, plan, self.stand_in)
        # By their layers and names.
        self._wanted: dict[int | None, dict[str, Tensor]] = {layer: {} for layer in self.layers}
        self._layer_of: dict[str, int | None] = {}
        prefixes = {self.stand_in.rename(f"{site.layer_name}."): site.layer for site in sites}
        for name, tensor in self.empty.state_dict().items():
            self._layer_of[name] = next((prefixes[each] for each in prefixes if name.startswith(each)), None)
            self._wanted[self._layer_of[name]][name] = tensor
        self._kept: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        """A tensor of the plain model."""
        layer = self._layer_of[name]
        if name not in self._kept:
            # The last one makes room first.
            self._kept = {}
            self._kept = self.merged(layer)
        return self._kept[name]

    def __iter__(self) -> Iterator[str]:
        """Names of all tensors."""
        return iter(self._layer_of)

    def __len__(self) -> int:
        """Their number."""
        return len(self._layer_of)

    @torch.no_grad()
    def merged(self, layer: int | None) -> dict[str, Tensor]:
        """The tensors of a decoder layer, or of what is in none; what a merge leaves as it was, the base shares."""
        blocks = [self.model.get_submodule(site.layer_name) for site in self.sites]
        if layer is None:
            part, prefix, memo = self.model, "", {id(block): nn.Identity() for block in blocks}
            elsewhere = {module for block in blocks for module in block.modules()}
        else:
            part, prefix, memo, elsewhere = blocks[layer], f"{self.sites[layer].layer_name}.", {}, set()
        with in_place(module for module in part.modules() if module not in elsewhere) as was_offloaded:
            part = self.unloaded(_copy_to_merge(part, memo))
            if layer is not None:
                attention = part.get_submodule(self.sites[layer].name.removeprefix(prefix))
                site = replace(self.sites[layer], attention=attention)
                _write_layer(site, part, self.plan.layouts[layer], self.readers[layer](), self.plan)
            tensors = _renamed(part.state_dict(prefix=prefix), self.stand_in)
            if was_offloaded:
                tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
        if self.plan.stand_in is not None:
            _add_neutral(tensors, self._wanted[layer])
        return tensors


def _copy_to_merge(root: nn.Module, memo: dict) -> nn.Module:
    """A copy of a part of the base: it has its own weights where a merge changes them, and shares all others."""
    for tensor in (*root.parameters(), *root.buffers()):
        memo[id(tensor)] = tensor
    for module in root.modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, SharedLayer):
            for parameter in module.get_base_layer().parameters():
                memo[id(parameter)] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
    return copy_without_hooks(root, memo)


def plain_model(weights: MergedWeights, progressbar: bool) -> PreTrainedModel:
    """The plain model with all of its weights, where the base has them: strict loading proves names and shapes."""
    plain, model, tensors = weights.empty, weights.model, {}
    for layer in tqdm(weights.layers, desc="merging", unit="layer", disable=not progressbar):
        tensors |= weights.merged(layer)
    plain.load_state_dict(tensors, strict=True, assign=True)
    plain.tie_weights()
    device_map = getattr(model, "hf_device_map", None)
    if device_map and len(set(device_map.values())) > 1:
        return dispatch_model(plain, {weights.stand_in.rename(name): place for name, place in device_map.items()})
    return plain


def plain_model_to_save(weights: MergedWeights) -> PreTrainedModel:
    """The plain model without weights, whose `save_pretrained` asks for them file by file as of an offloaded one."""
    plain, model = weights.empty, weights.model
    dtypes = {}
    for name, tensor in model.state_dict().items():
        dtypes[weights.stand_in.rename(name.replace(".base_layer", ""))] = tensor.dtype
    for name, parameter in plain.named_parameters():
        # Tensors are shared out to files by their bytes.
        parameter.data = parameter.data.to(dtypes.get(name, model.dtype))
    plain.tie_weights()
    plain.hf_device_map = {"": "disk"}
    return add_hook_to_module(plain, AlignDevicesHook(weights_map=weights))


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


def _empty_stock_model(model: PreTrainedModel, plan: ExportPlan, stand_in: StandIn) -> PreTrainedModel:
    """A fresh instance of the stock class, as the base is but for its weights, which are on the meta device."""
    with init_empty_weights(include_buffers=False):
        plain = plan.plain.model_class(plan.plain.config)
    plain.export_plan = plan  # for export_report; not part of the configuration
    _place_buffers(model, plain, stand_in)
    if model.can_generate():
        plain.generation_config = _savable(model.generation_config)
    return plain.train(model.training)


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


def _add_neutral(tensors: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Biases and norms that a stand-in has and the base has not: zeros, and scales of ones."""
    fallback = next(iter(tensors.values()))
    for name, empty in wanted.items():
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
    fallback = model.device
    if is_offloaded(model):
        # In main memory, as the weights; what runs the model puts them where it runs.
        devices, fallback = {}, torch.device("cpu")
    loaded = plain.state_dict()
    for name, buffer in list(plain.named_buffers()):
        if name not in loaded:
            parent, _, attribute = name.rpartition(".")
            setattr(plain.get_submodule(parent), attribute, buffer.to(devices.get(name, fallback)))


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
