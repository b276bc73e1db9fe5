"""Merge one layer: one shared K/V head per group, and what each query head needs to undo the shared basis."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..choices import Merge, check_width
from ..groups import Group, Partition, query_heads
from ..heads import AttentionWeights, HeadShape, SharedHeads, SharedShape, join_bias, mean_heads, split_bias
from .aligned import Aligned
from .maps import Maps, MergeRule
from .mean import Mean
from .norms import fold_scales, through_norms
from .principal import Principal
from .statistics import LayerMoments
from .threads import map_in_threads

MERGES: dict[Merge, MergeRule] = {rule.name: rule for rule in (Mean(), Aligned(), Principal())}


def merge_layer(
    moments: LayerMoments | None, weights: AttentionWeights, partition: Partition, shape: SharedShape, merge: Merge
) -> SharedHeads:
    """Merge one layer's K and V by ``partition``.

    Where a clamp pins the heads' basis (``free_keys`` or ``free_values`` of the base's shape is False) the mean is
    taken, whatever ``merge``; `merge_notes` says so. ``moments`` may be None for the mean.

    Returns:
        Shared heads: in float64 what statistics decide, and as `mean_heads` gives them the means.

    Raises:
        ValueError: if the merge needs moments and there are none, or cannot make heads of this width.
    """
    check_width(merge, shape.head_dim, shape.base.head_dim)
    key_rule, value_rule = rules_for(merge, shape.base)
    if moments is None and (key_rule.needs_data or value_rule.needs_data):
        raise ValueError(f"merge={merge!r} needs calibration statistics: give moments, or use merge='mean'.")
    heads = mean_heads(weights, partition, shape)
    untouched = shape.head_dim == shape.base.head_dim and len(partition) == shape.base.base_kv_heads
    if shape.base.norm_span is not None and untouched:
        # Lone heads lose nothing as they are, and folded scales would change their norms' divisors.
        key_rule = MERGES["mean"]
    if key_rule.needs_data:
        heads = _with_keys(heads, key_rule, moments, weights)
    if value_rule.needs_data:
        heads = _with_values(heads, value_rule, moments, weights)
    return heads


def rules_for(merge: Merge, base: HeadShape) -> tuple[MergeRule, MergeRule]:
    """The merges of keys and of values: the mean where their basis is fixed."""
    key_rule = value_rule = MERGES[merge]
    if not base.free_keys:
        key_rule = MERGES["mean"]
    if not base.free_values:
        value_rule = MERGES["mean"]
    return key_rule, value_rule


def merge_notes(shape: HeadShape, merge: Merge) -> list[str]:
    """What `merge_layer` cannot do for heads of this shape, in sentences."""
    notes = []
    if merge != "mean" and not shape.free_keys:
        notes.append("keys are merged by their mean: a clamp after the projection fixes their basis.")
    if merge != "mean" and not shape.free_values:
        notes.append("values are merged by their mean: a clamp after the projection fixes their basis.")
    return notes


def _with_keys(heads: SharedHeads, rule: MergeRule, moments: LayerMoments, weights: AttentionWeights) -> SharedHeads:
    """The heads with keys, query gains and query mixes by the rule."""
    shape, base = heads.shape, heads.shape.base
    key = _rows_of_heads(weights.key, weights.key_bias, base)
    folded = None
    if base.norm_span is not None:
        folded = fold_scales(moments, weights)
    query_gain = key.new_ones(base.num_attention_heads, len(shape.frequencies), dtype=torch.complex128)
    query_mix = key.new_zeros(base.num_attention_heads, shape.pass_dim, base.pass_dim, dtype=torch.float64)

    def maps(group: Group) -> tuple[Maps, Maps | None]:
        members = torch.tensor([group], device=moments.key_gram.device)
        rotary = _of_one_group(rule.key_maps(*moments.key_blocks(members), shape.frequencies), key.device)
        if not base.pass_dim:
            return rotary, None
        passing = rule.vector_maps(*moments.pass_blocks(members), shape.pass_sources)
        return rotary, _of_one_group(passing, key.device)

    rows, rotary_maps = [], []
    for group, (rotary, passing) in zip(heads.partition, map_in_threads(maps, heads.partition), strict=True):
        rotary_maps.append(rotary)
        queries, members = query_heads(group, base.queries_per_kv), key[list(group)].double()
        if folded is not None:
            members = members * folded.key_rows[list(group)][..., None]
        encode, decode = rotary
        real, imaginary = members[:, list(shape.rotary_sources)].chunk(2, dim=1)
        turned = torch.einsum("jn,nje->je", encode, torch.complex(real.contiguous(), imaginary.contiguous()))
        shared = [turned.real, turned.imag]
        # Re(q conj(b s)) = Re(q conj(b) conj(s)): the query's gain is conj(b).
        query_gain[queries] = decode.conj().T.repeat_interleave(base.queries_per_kv, 0)
        if passing is not None:
            encode, decode = passing
            shared.append(encode @ members[:, base.rotary_dim :].flatten(0, 1))
            # q . (B s) = (B^T q) . s: the query's mix is B^T.
            mix = decode.unflatten(0, (len(group), base.pass_dim)).mT
            query_mix[queries] = mix.repeat_interleave(base.queries_per_kv, 0)
        rows.append(torch.cat(shared))
    weight, bias = split_bias(torch.stack(rows), weights.key_bias)
    heads = replace(
        heads,
        key=weight,
        key_bias=bias,
        query_gain=query_gain if base.rotary_dim else None,
        query_mix=query_mix if base.pass_dim else None,
    )
    if folded is None:
        return heads
    return through_norms(heads, rotary_maps, moments, folded)


def _with_values(heads: SharedHeads, rule: MergeRule, moments: LayerMoments, weights: AttentionWeights) -> SharedHeads:
    """The heads with values and value mixes by the rule."""
    shape, base = heads.shape, heads.shape.base
    value = _rows_of_heads(weights.value, weights.value_bias, base)
    value_mix = value.new_zeros(base.num_attention_heads, base.head_dim, shape.head_dim, dtype=torch.float64)

    def maps(group: Group) -> Maps:
        members = torch.tensor([group], device=moments.value_cov.device)
        return _of_one_group(rule.vector_maps(*moments.value_blocks(members), shape.value_sources), value.device)

    rows = []
    for group, (encode, decode) in zip(heads.partition, map_in_threads(maps, heads.partition), strict=True):
        rows.append(encode @ value[list(group)].double().flatten(0, 1))
        # v = B s: the value's mix is B.
        mix = decode.unflatten(0, (len(group), base.head_dim))
        value_mix[query_heads(group, base.queries_per_kv)] = mix.repeat_interleave(base.queries_per_kv, 0)
    weight, bias = split_bias(torch.stack(rows), weights.value_bias)
    return replace(heads, value=weight, value_bias=bias, value_mix=value_mix)


def _of_one_group(maps: Maps, device: torch.device) -> Maps:
    """Encode and decode of the only group of a batch, on the weights' device."""
    encode, decode = maps
    return encode[0].to(device), decode[0].to(device)


def _rows_of_heads(weight: Tensor, bias: Tensor | None, shape: HeadShape) -> Tensor:
    """(K D, E) and (K D,) -> (K, D, E + 1), in float64 a group at a time: all of them would fill a GPU's memory."""
    return join_bias(weight, bias).unflatten(0, (shape.base_kv_heads, shape.head_dim))
