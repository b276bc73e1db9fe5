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

from ..groups import Partition, group_of_heads
from ..heads import AttentionWeights, HeadShape, SharedHeads
from .maps import Maps
from .statistics import LayerMoments


@dataclass(frozen=True)
class FoldedScales:
    """The scales of a layer's norms, taken apart.

    Attributes:
        key_rows: (K, D) factors of the base's key rows, before they are encoded.
        key_gains: (K, F) what these factors come to for a rotary pair.
        key_pairs: (F,) scale that stays the norm's; ones where a norm spans the layer, which needs no common one.
        query_rows: (H, D) factors of the base's query rows.
        query_pairs: (H, F) what stays, the same for all heads where a norm spans one.
    """

    key_rows: Tensor
    key_gains: Tensor
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
        key_pairs = torch.ones_like(query_pairs[0])
    else:
        key_pairs, key_rows = _split(weights.key_norm.double())
        key_rows = key_rows / _root_mean_square(moments.key_power, base).to(key_rows)[:, None]
    return FoldedScales(key_rows, _signed_root_mean_square(key_rows), key_pairs, query_rows, query_pairs)


def through_norms(heads: SharedHeads, maps: list[Maps], moments: LayerMoments, folded: FoldedScales) -> SharedHeads:
    """Give heads whose rows are encoded with folded scales the norms that make keys and logits of the right size.

    Args:
        heads: with key rows, key bias and query gains by the maps, as if there were no norm.
        maps: encode and decode (J, n) complex of each group's rotary keys.
        moments: of the normed queries and keys.
        folded: what the key rows were multiplied with.
    """
    frequencies = torch.tensor(heads.shape.frequencies, device=moments.key_gram.device)
    shared = []
    kept = heads.key.new_zeros(folded.key_gains.shape)
    for group, (encode, decode) in zip(heads.partition, maps, strict=True):
        members = list(group)
        encode, decode = encode.to(moments.key_gram), decode.to(moments.key_gram)
        gains = folded.key_gains.to(encode)[members][:, frequencies].mT
        shared.append(_shared_energy(moments, members, encode * gains, frequencies))
        kept[members] = _restored_energy(moments, members, encode, decode, frequencies).to(kept)
    shared = torch.stack(shared).to(heads.key)
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
    difference = own - shared[:, group_of_row.to(shared.device)]
    return (difference - difference.mean(0)).square().mean().sqrt().item()


def _norm_per_head(
    heads: SharedHeads, shared: Tensor, kept: Tensor, moments: LayerMoments, folded: FoldedScales
) -> SharedHeads:
    """Every shared head and every query has a divisor of its own; their norms have one scale for all heads.

    Of the mean squares of what the shared norm gets, (G, J), and of what members get back of their own keys, (K, F).
    """
    shape, base = heads.shape, heads.shape.base
    pairs = list(shape.frequencies)
    key_scale, query_scale = folded.key_pairs[pairs], folded.query_pairs[0, pairs]
    divisors = shared.sum(-1).div(shape.head_dim).sqrt()  # (G,)
    # Rows of the base's own size: epsilon's share and the pace of training stay as they were.
    sizes = _group_means(_root_mean_square(moments.key_power, base).to(divisors).square(), heads.partition).sqrt()
    factor = sizes / _nonzero(divisors)
    query_energy = moments.query_energy.to(shared) / _nonzero(folded.query_pairs).square()  # (H, F)
    fitted = heads.query_gain.abs().square() * query_energy[:, pairs]
    query_divisors = fitted.sum(-1).div(shape.head_dim).sqrt()  # (H,)
    # A head's logits come out by this factor too small or large; one number for all keeps their mean energy.
    group_of_query = torch.tensor(group_of_heads(heads.partition)).repeat_interleave(base.queries_per_kv)
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
    its share of the divisor. Of the mean squares of what the shared norm gets, (G, J).
    """
    shape, base = heads.shape, heads.shape.base
    pairs = torch.tensor(shape.frequencies, device=shared.device)
    widening = shape.head_dim / base.head_dim
    # What the base's norm gets, and what the shared one gets from the pairs of each frequency: (G, F).
    power = moments.key_power.to(shared)
    own = torch.stack([power[list(group)].sum(0) for group in heads.partition])
    found = torch.zeros_like(own).index_add(1, pairs, shared)
    size = widening * len(heads.partition) / base.base_kv_heads
    key_factor = _ratio(own * size, found).sqrt()[:, pairs]  # (G, J)
    # The same of the queries, (H, F).
    own = moments.query_power.to(shared)
    fitted = heads.query_gain.abs().square() * (own * folded.query_pairs.square())[:, pairs]
    found = torch.zeros_like(own).index_add(1, pairs, fitted)
    query_factor = _ratio(own * widening, found).sqrt()[:, pairs]  # (H, J)
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


def _shared_energy(moments: LayerMoments, members: list[int], encode: Tensor, frequencies: Tensor) -> Tensor:
    """Mean squares (J,) of what ``encode`` (J, n) makes of the members' keys before their norm."""
    gram = moments.key_gram_before_norm[:, members][:, :, members]
    return torch.einsum("jn,jnm,jm->j", encode, gram[frequencies], encode.conj()).real


def _restored_energy(
    moments: LayerMoments, members: list[int], encode: Tensor, decode: Tensor, frequencies: Tensor
) -> Tensor:
    """Mean squares (n, F) of what members get back of their own normed keys, by encode and decode (J, n)."""
    gram, root = moments.key_blocks(torch.tensor([members], device=frequencies.device))
    gram = gram[0] / (root[0][:, :, None] * root[0][:, None, :])
    through_pair = decode[:, :, None] * encode[:, None, :]
    restoring = torch.zeros_like(gram).index_add(0, frequencies, through_pair)
    return torch.einsum("fkn,fnm,fkm->kf", restoring, gram, restoring.conj()).real


def _split(scale: Tensor) -> tuple[Tensor, Tensor]:
    """A norm's scale (..., D) -> what each rotary pair has in common (..., F), and what is left (..., D).

    The root mean square, which is positive: signs stay with the rows.
    """
    first, second = scale.chunk(2, dim=-1)
    common = ((first.square() + second.square()) / 2).sqrt()
    return common, scale / _nonzero(torch.cat((common, common), dim=-1))


def _signed_root_mean_square(rows: Tensor) -> Tensor:
    """Factors (K, D) of rows -> what they come to for a rotary pair, (K, F); signs are those of their means."""
    first, second = rows.chunk(2, dim=-1)
    size = ((first.square() + second.square()) / 2).sqrt()
    return torch.where(first + second < 0, -size, size)


def _root_mean_square(power: Tensor, base: HeadShape) -> Tensor:
    """Mean squares of rotary pairs (heads, F) -> what a norm of each head divides by at a mean token, (heads,)."""
    return _nonzero((power.sum(-1) / base.head_dim).sqrt())


def _group_means(values: Tensor, partition: Partition) -> Tensor:
    """(K,) -> (G,)."""
    return torch.stack([values[list(group)].mean() for group in partition])


def _nonzero(values: Tensor) -> Tensor:
    """Ones for zeros: what is zero throughout needs no division."""
    return torch.where(values == 0, torch.ones_like(values), values)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """A quotient, and 1 where one of the two is zero: rows that are zero throughout keep their size."""
    empty = (above == 0) | (below == 0)
    return torch.where(empty, torch.ones_like(above), above / _nonzero(below))
