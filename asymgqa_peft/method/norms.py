"""Keys and queries through the RMS norms that some bases have between projection and RoPE.

A norm fixes the scale of what passes, not its basis. So what is merged is what comes after the norm, and the norm acts
on the shared head. Its scale gamma is split: what the two dimensions of a rotary pair have in common, which commutes
with RoPE, stays a norm's scale; the rest goes into the rows of the projections. Then gains act in front of the norms
as they do in front of RoPE. What is lost beyond the merge's own loss is how the divisor of a head differs, from token
to token, from the divisor of the shared head.

Axes: as in `statistics`; G groups of n heads, J = W_r / 2 rotary pairs of a shared head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..groups import Partition, query_heads
from ..heads import AttentionWeights, HeadShape, SharedHeads
from .maps import Maps
from .statistics import LayerMoments


@dataclass(frozen=True)
class FoldedScales:
    """The scales of a layer's norms, taken apart.

    Attributes:
        key_rows: (K, D) factors of the base's key rows, before they are encoded.
        key_pairs: (F,) scale that stays the norm's; ones where a norm spans the layer, which needs no common one.
        query_rows: (H, D) factors of the base's query rows.
        query_pairs: (H, F) what stays, the same for all heads where a norm spans one.
    """

    key_rows: Tensor
    key_pairs: Tensor
    query_rows: Tensor
    query_pairs: Tensor


def fold_scales(moments: LayerMoments, weights: AttentionWeights) -> FoldedScales:
    """Take the norms' scales apart, float64 on the weights' device."""
    base = moments.shape
    query_pairs, query_rows = _split(weights.query_norm.double().reshape(-1, base.head_dim))
    query_pairs = query_pairs.expand(base.num_attention_heads, -1)
    query_rows = query_rows.expand(base.num_attention_heads, -1)
    if base.norm_span == "layer":
        # All keys have one divisor, so that a scale is as good in the rows.
        key_rows = weights.key_norm.double().unflatten(0, (-1, base.head_dim))
        return FoldedScales(key_rows, torch.ones_like(query_pairs[0]), query_rows, query_pairs)
    key_pairs, key_rows = _split(weights.key_norm.double())
    divisors = _root_mean_square(moments.key_power, base).to(key_rows)
    return FoldedScales(key_rows / divisors[:, None], key_pairs, query_rows, query_pairs)


def through_norms(heads: SharedHeads, maps: list[Maps], moments: LayerMoments, folded: FoldedScales) -> SharedHeads:
    """Give heads whose rows are encoded with folded scales the norms that make keys and logits of the right size.

    Args:
        heads: with key rows, key bias and query gains by the maps, as if there were no norm.
        maps: encode and decode (J, n) complex of each group's rotary keys.
        moments: of the normed queries and keys.
        folded: what the key rows were multiplied with.
    """
    energies = []
    for group, (encode, decode) in zip(heads.partition, maps, strict=True):
        energies.append(_energies(moments, group, encode, decode, heads.shape.frequencies))
    shared = torch.stack([energy for energy, _ in energies]).to(heads.key)
    kept = heads.key.new_zeros(moments.key_power.shape)
    for group, (_, restored) in zip(heads.partition, energies, strict=True):
        kept[list(group)] = restored.to(kept)
    if moments.shape.norm_span == "head":
        return _norm_per_head(heads, shared, kept, moments, folded)
    return _norm_per_layer(heads, shared, moments, folded)


def divisor_spread(rows: Tensor, shared_rows: Tensor, group_of_row: Tensor) -> float:
    """How much the divisors of shared heads differ from those of the heads they stand for, beyond a constant factor.

    Args:
        rows: (N, heads, D) what the base's norm gets at N tokens.
        shared_rows: (N, groups, W) what the shared norm gets.
        group_of_row: (heads,) which of the groups each head has.

    Returns:
        Root mean square over tokens of the relative difference; 0 where the norms do the same.
    """
    own = rows.double().square().mean(-1).clamp_min(1e-30).log() / 2
    shared = shared_rows.double().square().mean(-1).clamp_min(1e-30).log() / 2
    difference = own - shared[:, group_of_row]
    return (difference - difference.mean(0)).square().mean().sqrt().item()


def _norm_per_head(
    heads: SharedHeads, shared: Tensor, kept: Tensor, moments: LayerMoments, folded: FoldedScales
) -> SharedHeads:
    """Every shared head and every query has a divisor of its own; their norms have one scale for all heads.

    Of the shared keys' energies (G, J) and the energies that members get back of their own, (K, F).
    """
    shape, base = heads.shape, heads.shape.base
    pairs = list(shape.frequencies)
    key_scale, query_scale = folded.key_pairs[pairs], folded.query_pairs[0, pairs]
    divisors = (shared / _nonzero(key_scale).square()).sum(-1).div(shape.head_dim).sqrt()  # (G,)
    # Rows of the base's own size: epsilon's share and the pace of training stay as they were.
    sizes = _group_means(_root_mean_square(moments.key_power, base).to(divisors).square(), heads.partition).sqrt()
    factor = sizes / _nonzero(divisors)
    query_energy = moments.query_energy.to(shared) / _nonzero(folded.query_pairs).square()  # (H, F)
    fitted = heads.query_gain.abs().square() * query_energy[:, pairs]
    query_divisors = fitted.sum(-1).div(shape.head_dim).sqrt()  # (H,)
    # A head's logits come out by this factor too small or large; one number for all keeps their mean energy.
    group_of_query = _group_of_query(heads.partition, base)
    logit_factor = 1 / _nonzero(query_divisors * divisors[group_of_query])
    energy = (moments.query_energy.to(kept) * kept.repeat_interleave(base.queries_per_kv, 0)).sum(-1)
    correction = (energy.sum() / _nonzero((energy * logit_factor.square()).sum())).sqrt()
    return replace(
        heads,
        key=heads.key * factor[:, None, None],
        key_bias=None if heads.key_bias is None else heads.key_bias * factor[:, None],
        query_scale=folded.query_rows,
        query_norm=torch.cat((query_scale, query_scale)) * correction,
        key_norm=torch.cat((key_scale, key_scale)),
    )


def _norm_per_layer(heads: SharedHeads, shared: Tensor, moments: LayerMoments, folded: FoldedScales) -> SharedHeads:
    """One divisor for all keys and one for all queries; every pair of every head has a scale of its own.

    So rows may have any size, which the scale takes back. They get the size that leaves each frequency of each group
    its share of the divisor. Of the shared keys' energies (G, J).
    """
    shape, base = heads.shape, heads.shape.base
    pairs = torch.tensor(shape.frequencies, device=shared.device)
    copies = torch.zeros_like(folded.key_pairs).index_add(0, pairs, torch.ones_like(pairs, dtype=shared.dtype))
    widening = shape.head_dim / base.head_dim
    # Keys: what the rows make before the norm, over all tokens.
    power = moments.key_power.to(shared)
    mean_power = power.sum() / (base.base_kv_heads * base.head_dim)
    per_group = torch.stack([power[list(group)].sum(0) for group in heads.partition])[:, pairs]
    wanted = per_group / copies[pairs] * (widening * len(heads.partition) / base.base_kv_heads)
    key_factor = _ratio(wanted, shared * mean_power).sqrt()  # (G, J)
    # Queries.
    power = moments.query_power.to(shared)
    mean_power = power.sum() / (base.num_attention_heads * base.head_dim)
    fitted = heads.query_gain.abs().square() * (moments.query_energy.to(shared) * mean_power)[:, pairs]
    per_frequency = torch.zeros_like(power).index_add(1, pairs, fitted)
    query_factor = _ratio(power * widening, per_frequency).sqrt()[:, pairs]  # (H, J)
    both = torch.cat((key_factor, key_factor), dim=1)
    return replace(
        heads,
        key=heads.key * both[..., None],
        key_bias=None if heads.key_bias is None else heads.key_bias * both,
        query_gain=heads.query_gain * (query_factor * folded.query_pairs[:, pairs]),
        query_scale=folded.query_rows,
        query_norm=torch.cat((1 / query_factor, 1 / query_factor), dim=1),
        key_norm=1 / both,
    )


def _energies(
    moments: LayerMoments, group: tuple[int, ...], encode: Tensor, decode: Tensor, frequencies: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Mean squares of a group's shared key, (J,), and of what its members get back of their own keys, (n, F)."""
    gram, root = moments.key_blocks(torch.tensor([group], device=moments.key_gram.device))
    gram, root, encode, decode = gram[0], root[0], encode.to(gram), decode.to(gram)
    plain = gram / (root[:, :, None] * root[:, None, :])
    turning = torch.tensor(frequencies, device=gram.device)
    shared = torch.einsum("jn,jnm,jm->j", encode, plain[turning], encode.conj()).real
    through_pair = decode[:, :, None] * encode[:, None, :]
    restoring = torch.zeros_like(plain).index_add(0, turning, through_pair)
    restored = torch.einsum("fkn,fnm,fkm->kf", restoring, plain, restoring.conj()).real
    return shared, restored


def _split(scale: Tensor) -> tuple[Tensor, Tensor]:
    """A norm's scale (..., D) -> what each rotary pair has in common (..., F), and what is left (..., D).

    The root mean square, which is positive: signs stay with the rows.
    """
    first, second = scale.chunk(2, dim=-1)
    common = ((first.square() + second.square()) / 2).sqrt()
    return common, scale / _nonzero(torch.cat((common, common), dim=-1))


def _root_mean_square(power: Tensor, base: HeadShape) -> Tensor:
    """Mean squares of rotary pairs (heads, F) -> what a norm of each head divides by at a mean token, (heads,)."""
    return _nonzero((power.sum(-1) / base.head_dim).sqrt())


def _group_means(values: Tensor, partition: Partition) -> Tensor:
    """(K,) -> (G,)."""
    return torch.stack([values[list(group)].mean() for group in partition])


def _group_of_query(partition: Partition, base: HeadShape) -> Tensor:
    """The group of each query head, (H,)."""
    groups = torch.zeros(base.num_attention_heads, dtype=torch.long)
    for index, group in enumerate(partition):
        groups[query_heads(group, base.queries_per_kv)] = index
    return groups


def _nonzero(values: Tensor) -> Tensor:
    """Ones for zeros: what is zero throughout needs no division."""
    return torch.where(values == 0, torch.ones_like(values), values)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """A quotient, and 1 where one of the two is zero: rows that are zero throughout keep their size."""
    empty = (above == 0) | (below == 0)
    return torch.where(empty, torch.ones_like(above), above / _nonzero(below))
