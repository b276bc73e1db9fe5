"""What sharing one K/V head costs a group, and how alike heads are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..choices import Criterion, Merge
from ..groups import Group
from ..heads import SharedShape
from .merge import rules_for
from .statistics import LayerMoments
from .threads import map_in_threads

KEY_WEIGHT, VALUE_WEIGHT = 1.0, 0.3
"""Relative key and value losses add up with these weights: better than 1 and 1 where four heads share one."""

CHUNK_ELEMENTS = 1 << 25
"""Candidate groups are evaluated in chunks of at most this many matrix entries (256 MiB in float64)."""
_PARTS_PER_THREAD = 4
"""Chunks that a thread gets of groups of one size, so that no thread waits long for the last one."""


def group_costs(
    moments: LayerMoments, groups: Sequence[Group], shape: SharedShape, criterion: Criterion, merge: Merge
) -> Tensor:
    """What sharing one K/V head costs each candidate group: (len(groups),) float64 on the moments' device.

    criterion="residual": energy of the keys that the chosen merge loses over the layer's key energy, times
    `KEY_WEIGHT`, plus the same of the values times `VALUE_WEIGHT`. For "principal" the losses are sums of eigenvalues:
    all but the n_f largest of a rotary frequency that a shared head has n_f times, all but the values' W largest.

    criterion="cosine": |S| (1 - c_S) / K with c_S the mean over pairs in S of the cosines of their keys and of their
    values, averaged; a lone head costs 0. Minimising the sum maximises the mean over heads of the cosine to their
    group mates, a lone head counting as 1.

    """
    costs = torch.zeros(len(groups), dtype=torch.float64, device=moments.key_gram.device)

    def evaluate(part: list[int]) -> Tensor:
        members = torch.tensor([tuple(groups[index]) for index in part], device=costs.device)
        if criterion == "cosine":
            return _cosine_costs(moments, members)
        return _residual_costs(moments, members, shape, merge)

    # A lone head has no mates, and loses nothing in a shared head that is as wide as itself.
    free_alone = criterion == "cosine" or shape.head_dim >= shape.base.head_dim
    parts = _parts_of_one_size(groups, shape, smallest=2 if free_alone else 1)
    for part, found in zip(parts, map_in_threads(evaluate, parts), strict=True):
        costs[part] = found
    return costs


def _parts_of_one_size(groups: Sequence[Group], shape: SharedShape, smallest: int) -> list[list[int]]:
    """Indices of the groups of at least ``smallest`` heads, in parts of groups of one size that are solved at once."""
    by_size: dict[int, list[int]] = {}
    for index, group in enumerate(groups):
        if len(group) >= smallest:
            by_size.setdefault(len(group), []).append(index)
    parts = []
    # The largest problems come first, or all threads wait for the last one.
    for size, indices in sorted(by_size.items(), reverse=True):
        elements = max((size * shape.base.head_dim) ** 2, size**2 * shape.base.rotary_dim)
        share = math.ceil(len(indices) / (_PARTS_PER_THREAD * torch.get_num_threads()))
        chunk = max(1, min(CHUNK_ELEMENTS // elements, share))
        parts += [indices[start : start + chunk] for start in range(0, len(indices), chunk)]
    return parts


def pair_costs(moments: LayerMoments, criterion: Criterion, merge: Merge) -> Tensor:
    """Cost of every pair that shares one head of the base's width, (K, K) float64 with zero diagonal.

    (2 / |S|) times the sum over pairs in S stands in for a larger group's cost: exact for the cosine, and for the
    residual of means in one metric; a good ranking for the other merges, at a fraction of their price. Groups that
    share a wider head are ranked by the same pairs: a head of twice the width holds any pair, which tells nothing.
    """
    shape = SharedShape.of_width(moments.shape)
    heads = moments.shape.base_kv_heads
    first, second = torch.triu_indices(heads, heads, 1).unbind()
    costs = torch.zeros(heads, heads, dtype=torch.float64, device=moments.key_gram.device)
    pairs = list(zip(first.tolist(), second.tolist(), strict=True))
    costs[first, second] = group_costs(moments, pairs, shape, criterion, merge)
    return costs + costs.T


def head_similarity(moments: LayerMoments, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """How alike any two heads are, before and after choosing their bases: two (K, K), 1 where they are the same.

    ``pairs`` are the principal residual `pair_costs`.

    Before: mean cosine of keys and of values. After: 1 - (what the pair loses by the best sharing) / (energy of the
    weaker of the two), in the units of `group_costs`; 0 where the weaker head would have to be dropped.
    """
    shape = moments.shape
    rotary = torch.diagonal(moments.key_gram, dim1=-2, dim2=-1).real.sum(0) / 2
    passing = moments.key_pass.diagonal().unflatten(0, (shape.base_kv_heads, shape.pass_dim)).sum(-1)
    value = moments.value_cov.diagonal().unflatten(0, (shape.base_kv_heads, shape.head_dim)).sum(-1)
    energy = KEY_WEIGHT * (rotary + passing) / moments.key_energy + VALUE_WEIGHT * value / moments.value_energy
    weaker = torch.minimum(energy[:, None], energy).clamp_min(torch.finfo(energy.dtype).tiny)
    return (moments.key_cosine + moments.value_cosine) / 2, 1 - pairs / weaker


def _cosine_costs(moments: LayerMoments, members: Tensor) -> Tensor:
    cosine = (moments.key_cosine + moments.value_cosine) / 2
    size = members.shape[1]
    pairs = cosine[members[:, :, None], members[:, None, :]].sum((1, 2)) - cosine.diagonal()[members].sum(1)
    return (size - pairs / (size - 1)) / moments.shape.base_kv_heads


def _residual_costs(moments: LayerMoments, members: Tensor, shape: SharedShape, merge: Merge) -> Tensor:
    key_rule, value_rule = rules_for(merge, moments.shape)
    key_loss = key_rule.key_loss(*moments.key_blocks(members), shape.frequencies)
    key_loss = key_loss + key_rule.vector_loss(*moments.pass_blocks(members), shape.pass_sources)
    value_loss = value_rule.vector_loss(*moments.value_blocks(members), shape.value_sources)
    tiny = torch.finfo(torch.float64).tiny
    key_energy, value_energy = moments.key_energy.clamp_min(tiny), moments.value_energy.clamp_min(tiny)
    return KEY_WEIGHT * key_loss / key_energy + VALUE_WEIGHT * value_loss / value_energy
