"""One shared K/V head per group, and what each query head needs to undo the shared basis.

Every merge is a pair of linear maps per group: *encode* makes the shared head out of its members' keys (or values),
*decode* gives each member its own back. Keys have one complex number each per rotary frequency, so that both maps
commute with RoPE; pass-through keys and values have matrices. Encode goes into k_proj / v_proj, decode into q_proj
(query gain, query mix) and o_proj (value mix). The merges differ only in how they choose the two:

- mean: average, decode nothing (Ainslie et al., 2023).
- aligned: turn each head towards the group's mean, average, restore the norm (Jin et al., arXiv 2412.20677).
- principal: the best pair there is in the metric of `LayerMoments`, by Eckart-Young.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..groups import Group, Partition, query_heads
from ..heads import AttentionWeights, HeadShape, SharedHeads, SharedShape, mean_heads
from .statistics import LayerMoments
from .threads import map_in_threads

Merge = Literal["mean", "aligned", "principal"]
Criterion = Literal["cosine", "residual"]

KEY_WEIGHT, VALUE_WEIGHT = 1.0, 0.3
"""Relative key and value losses add up with these weights (measured: design 3.2)."""

_ALIGN_STEPS = 10
_CHUNK_ELEMENTS = 1 << 25
"""Candidate groups are evaluated in chunks of at most this many matrix entries (256 MiB in float64)."""
_PARTS_PER_THREAD = 4
"""Chunks that a thread gets of groups of one size, so that no thread waits long for the last one."""


def merge_layer(
    moments: LayerMoments | None, weights: AttentionWeights, partition: Partition, shape: SharedShape, merge: Merge
) -> SharedHeads:
    """Merge one layer's K and V by ``partition``; the result is in float64.

    Args:
        moments: what calibration found; None will do for merge="mean".
        weights: the base's projections.
        partition: groups of base KV heads.
        shape: of the shared heads.
        merge: "mean", "aligned" or "principal". Where a norm or clamp pins the heads' basis (``free_keys`` or
            ``free_values`` of the base's shape is False) the mean is taken; `merge_notes` says so.
    """
    base = shape.base
    key_merge, value_merge = _effective(base, merge)
    if moments is None and (key_merge, value_merge) != ("mean", "mean"):
        raise ValueError(f"merge={merge!r} needs calibration statistics: give moments, or use merge='mean'.")
    rotary, rest, dim = base.rotary_dim // 2, base.pass_dim, base.head_dim
    key, value = _heads(weights.key, weights.key_bias, base), _heads(weights.value, weights.value_bias, base)
    heads = base.num_attention_heads
    query_gain = key.new_ones(heads, rotary, dtype=torch.complex128)
    query_mix = torch.eye(rest).to(key).repeat(heads, 1, 1)
    value_mix = torch.eye(dim).to(key).repeat(heads, 1, 1)
    shared_keys, shared_values = [], []

    def maps(group: Group) -> list[Tensor]:
        members = torch.tensor([group], device=key.device if moments is None else moments.key_gram.device)
        key_maps = _key_maps(moments, members, base, key_merge)
        pass_maps = _pass_maps(moments, members, base, key_merge)
        return [*key_maps, *pass_maps, *_value_maps(moments, members, base, value_merge)]

    for group, found in zip(partition, map_in_threads(maps, partition), strict=True):
        queries = query_heads(group, base.queries_per_kv)
        encode, decode, pass_encode, pass_decode, value_encode, value_decode = (m.to(key.device) for m in found)
        shared_keys.append(_encode_key(key[list(group)], encode[0], pass_encode[0], base))
        shared_values.append(value_encode[0] @ value[list(group)].flatten(0, 1))
        # Re(q conj(b s)) = Re(q conj(b) conj(s)); q . (B s) = (B^T q) . s; v = B s.
        repeat = base.queries_per_kv
        query_gain[queries] = decode[0].conj().T.repeat_interleave(repeat, 0)
        query_mix[queries] = pass_decode[0].unflatten(0, (len(group), rest)).mT.repeat_interleave(repeat, 0)
        value_mix[queries] = value_decode[0].unflatten(0, (len(group), dim)).repeat_interleave(repeat, 0)
    key_weight, key_bias = _split_bias(torch.stack(shared_keys), weights.key_bias)
    value_weight, value_bias = _split_bias(torch.stack(shared_values), weights.value_bias)
    return SharedHeads(
        partition=partition,
        shape=shape,
        key=key_weight,
        value=value_weight,
        key_bias=key_bias,
        value_bias=value_bias,
        query_gain=query_gain if key_merge != "mean" and rotary else None,
        query_mix=query_mix if key_merge != "mean" and rest else None,
        value_mix=value_mix if value_merge != "mean" else None,
        key_norm=mean_heads(weights, partition, shape).key_norm,
    )


def merge_notes(shape: HeadShape, merge: Merge) -> list[str]:
    """What `merge_layer` cannot do for heads of this shape, in sentences."""
    notes = []
    if merge != "mean" and not shape.free_keys:
        notes.append("keys are merged by their mean: a norm or clamp after the projection fixes their basis.")
    if merge != "mean" and not shape.free_values:
        notes.append("values are merged by their mean: a clamp after the projection fixes their basis.")
    return notes


def group_costs(
    moments: LayerMoments,
    groups: Sequence[Group],
    shape: HeadShape,
    criterion: Criterion,
    merge: Merge,
    key_weight: float = KEY_WEIGHT,
    value_weight: float = VALUE_WEIGHT,
) -> Tensor:
    """What sharing one K/V head costs each candidate group: (len(groups),) float64 on the moments' device.

    criterion="residual": energy of the keys that the chosen merge loses over the layer's key energy, times
    ``key_weight``, plus the same of the values times ``value_weight``. For "principal" the losses are sums of
    eigenvalues, tr - lambda_max per rotary frequency and all but the D largest for the values.

    criterion="cosine": |S| (1 - c_S) / K with c_S the mean over pairs in S of the cosines of their keys and of their
    values, averaged; a lone head costs 0. Minimising the sum maximises the mean over heads of the cosine to their
    group mates, a lone head counting as 1.
    """
    costs = torch.zeros(len(groups), dtype=torch.float64, device=moments.key_gram.device)
    by_size: dict[int, list[int]] = {}
    parts: list[list[int]] = []
    for index, group in enumerate(groups):
        by_size.setdefault(len(group), []).append(index)
    for size, indices in by_size.items():
        if size == 1:
            continue
        largest = max((size * shape.head_dim) ** 2, size**2 * shape.rotary_dim)
        share = math.ceil(len(indices) / (_PARTS_PER_THREAD * torch.get_num_threads()))
        chunk = max(1, min(_CHUNK_ELEMENTS // largest, share))
        parts += [indices[start : start + chunk] for start in range(0, len(indices), chunk)]

    def evaluate(part: list[int]) -> Tensor:
        members = torch.tensor([tuple(groups[index]) for index in part], device=costs.device)
        if criterion == "cosine":
            return _cosine_costs(moments, members)
        return _residual_costs(moments, members, shape, merge, key_weight, value_weight)

    parts.sort(key=lambda part: -len(groups[part[0]]))  # the largest problems first, or all wait for the last one
    for part, found in zip(parts, map_in_threads(evaluate, parts), strict=True):
        costs[part] = found
    return costs


def pair_costs(
    moments: LayerMoments,
    shape: HeadShape,
    criterion: Criterion,
    merge: Merge,
    key_weight: float = KEY_WEIGHT,
    value_weight: float = VALUE_WEIGHT,
) -> Tensor:
    """Cost of every pair as a group, (K, K) float64 with zero diagonal.

    (2 / |S|) times the sum over pairs in S stands in for a larger group's cost: exact for the cosine, and for the
    residual of means in one metric; a good ranking for the other merges, at a fraction of their price.
    """
    heads = shape.base_kv_heads
    first, second = torch.triu_indices(heads, heads, 1).unbind()
    costs = torch.zeros(heads, heads, dtype=torch.float64, device=moments.key_gram.device)
    pairs = list(zip(first.tolist(), second.tolist(), strict=True))
    costs[first, second] = group_costs(moments, pairs, shape, criterion, merge, key_weight, value_weight)
    return costs + costs.T


def head_similarity(moments: LayerMoments, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """How alike any two heads are, before and after choosing their bases: two (K, K), 1 where they are the same.

    ``pairs`` are the principal residual ``pair_costs``.

    Before: mean cosine of keys and of values. After: 1 - (what the pair loses by the best sharing) / (energy of the
    weaker of the two), in the units of `group_costs`; 0 where the weaker head would have to be dropped.
    """
    shape = moments.shape
    rotary = torch.diagonal(moments.key_gram, dim1=-2, dim2=-1).real.sum(0) / 2
    rest = moments.key_pass.diagonal().unflatten(0, (shape.base_kv_heads, shape.pass_dim)).sum(-1)
    value = moments.value_cov.diagonal().unflatten(0, (shape.base_kv_heads, shape.head_dim)).sum(-1)
    energy = KEY_WEIGHT * (rotary + rest) / moments.key_energy + VALUE_WEIGHT * value / moments.value_energy
    weaker = torch.minimum(energy[:, None], energy).clamp_min(torch.finfo(energy.dtype).tiny)
    after = 1 - pairs / weaker
    return (moments.key_cosine + moments.value_cosine) / 2, after


def merge_losses(
    moments: LayerMoments, groups: Sequence[Group], shape: HeadShape, merge: Merge
) -> tuple[Tensor, Tensor]:
    """Key and value energy each group loses by the maps that ``merge_layer`` applies: two (len(groups),) tensors.

    Slower than ``group_costs`` and without its normalisation: the maps are built and their error is measured, where
    ``group_costs`` knows a formula.
    """
    key_merge, value_merge = _effective(shape, merge)
    keys, values = [], []
    for group in groups:
        members = torch.tensor([tuple(group)], device=moments.key_gram.device)
        keys.append(_key_loss(moments, members, shape, key_merge) + _pass_loss(moments, members, shape, key_merge))
        values.append(_value_loss(moments, members, shape, value_merge))
    return torch.cat(keys), torch.cat(values)


# ---------------------------------------------------------------------------------------------------- costs


def _cosine_costs(moments: LayerMoments, members: Tensor) -> Tensor:
    cosine = (moments.key_cosine + moments.value_cosine) / 2
    size = members.shape[1]
    pairs = cosine[members[:, :, None], members[:, None, :]].sum((1, 2)) - cosine.diagonal()[members].sum(1)
    return (size - pairs / (size - 1)) / moments.shape.base_kv_heads


def _residual_costs(
    moments: LayerMoments, members: Tensor, shape: HeadShape, merge: Merge, key_weight: float, value_weight: float
) -> Tensor:
    key_merge, value_merge = _effective(shape, merge)
    if key_merge == "principal":
        gram = _gram_block(moments, members)
        key_loss = _tail_energy(gram, 1).sum(-1) / 2
        if shape.pass_dim:
            key_loss = key_loss + _tail_energy(_block(moments.key_pass, members, shape.pass_dim), shape.pass_dim)
    else:
        key_loss = _key_loss(moments, members, shape, key_merge) + _pass_loss(moments, members, shape, key_merge)
    if value_merge == "principal":
        value_loss = _tail_energy(_block(moments.value_cov, members, shape.head_dim), shape.head_dim)
    else:
        value_loss = _value_loss(moments, members, shape, value_merge)
    tiny = torch.finfo(torch.float64).tiny
    key_energy, value_energy = moments.key_energy.clamp_min(tiny), moments.value_energy.clamp_min(tiny)
    return key_weight * key_loss / key_energy + value_weight * value_loss / value_energy


def _tail_energy(matrix: Tensor, rank: int) -> Tensor:
    """Sum of all but the ``rank`` largest eigenvalues of Hermitian (..., M, M)."""
    if matrix.shape[-3:-2] == (0,):  # no rotary frequency
        return matrix.new_zeros(matrix.shape[:-2], dtype=torch.float64)
    if matrix.shape[-1] == 2 and rank == 1:  # thousands per layer: one per pair of heads and frequency
        first, second = torch.diagonal(matrix, dim1=-2, dim2=-1).real.unbind(-1)
        return ((first + second) / 2 - torch.hypot((first - second) / 2, matrix[..., 0, 1].abs())).clamp_min(0)
    return torch.linalg.eigvalsh(matrix)[..., :-rank].clamp_min(0).sum(-1, dtype=torch.float64)


def _key_loss(moments: LayerMoments, members: Tensor, shape: HeadShape, merge: Merge) -> Tensor:
    encode, decode = _key_maps(moments, members, shape, merge)
    root = _root_block(moments, members)
    lost = torch.eye(members.shape[1]).to(root) - (root * decode)[..., :, None] * (encode / root)[..., None, :]
    return _energy(lost, _gram_block(moments, members)).sum(-1) / 2


def _pass_loss(moments: LayerMoments, members: Tensor, shape: HeadShape, merge: Merge) -> Tensor:
    maps = _pass_maps(moments, members, shape, merge)
    return _vector_loss(moments.key_pass, moments.pass_root, members, maps)


def _value_loss(moments: LayerMoments, members: Tensor, shape: HeadShape, merge: Merge) -> Tensor:
    maps = _value_maps(moments, members, shape, merge)
    return _vector_loss(moments.value_cov, moments.value_root, members, maps)


def _vector_loss(weighted: Tensor, root: Tensor, members: Tensor, maps: tuple[Tensor, Tensor]) -> Tensor:
    size = root.shape[-1]
    if size == 0:
        return weighted.new_zeros(len(members))
    encode, decode = maps
    decode = _times_blocks(decode.mT, root[members]).mT
    encode = _times_blocks(encode, torch.linalg.inv(root)[members])
    lost = torch.eye(encode.shape[-1]).to(encode) - decode @ encode
    return _energy(lost, _block(weighted, members, size))


def _energy(lost: Tensor, second: Tensor) -> Tensor:
    """tr(L C L^H): energy of what the map L leaves over."""
    return ((lost @ second) * lost.conj()).real.sum((-2, -1))


# ----------------------------------------------------------------------------------------- encode and decode
# Members are (b, n) indices of b candidate groups of n heads.
# Key maps: encode and decode (b, F, n). Vector maps, N = P or D: encode (b, N, n N), decode (b, n N, N).


def _key_maps(moments: LayerMoments | None, members: Tensor, shape: HeadShape, merge: Merge) -> tuple[Tensor, Tensor]:
    count, size = members.shape
    if merge == "mean" or not shape.rotary_dim:
        ones = torch.ones(count, shape.rotary_dim // 2, size, dtype=torch.complex128, device=members.device)
        return ones / size, ones
    gram, root = _gram_block(moments, members), _root_block(moments, members)
    if merge == "principal":
        top = torch.linalg.eigh(gram)[1][..., -1]
        return _balance_key(top.conj() * root, top / root)
    gram = gram / (root[..., :, None] * root[..., None, :])
    turn = _align_phases(gram)
    norm = _restored_norm(torch.diagonal(gram, dim1=-2, dim2=-1).real.sum(-1), _quadratic(turn, gram), size)
    return turn * norm.unsqueeze(-1) / size, turn.conj()


def _balance_key(encode: Tensor, decode: Tensor) -> tuple[Tensor, Tensor]:
    """Fix the scale that encode and decode leave open: gains of mean square 1 and mean phase 0, 1 for a lone head."""
    scale = decode.abs().square().mean(-1, keepdim=True).sqrt()
    scale = scale * torch.exp(1j * decode.sum(-1, keepdim=True).angle())
    return encode * scale, decode / scale


def _align_phases(gram: Tensor) -> Tensor:
    """Unit c (..., n) that bring the c_k kappa_k together: turned onto the strongest head, then onto the mean."""
    strongest = torch.diagonal(gram, dim1=-2, dim2=-1).real.argmax(-1)
    reference = gram.gather(-2, strongest[..., None, None].expand(*strongest.shape, 1, gram.shape[-1])).squeeze(-2)
    turn = torch.exp(1j * reference.angle())  # E[kappa_ref conj(kappa_k)] turns k onto the reference
    for _ in range(_ALIGN_STEPS):
        turn = torch.exp(1j * (turn.unsqueeze(-2) @ gram).squeeze(-2).angle())
    return turn


def _quadratic(turn: Tensor, gram: Tensor) -> Tensor:
    """Energy of sum_k c_k kappa_k: sum_kl c_k gram_kl conj(c_l)."""
    return torch.einsum("...k,...kl,...l->...", turn, gram, turn.conj()).real


def _restored_norm(total: Tensor, summed: Tensor, size: int) -> Tensor:
    """Factor that gives the mean of ``size`` heads the heads' mean energy: total = sum of energies, of the sum."""
    tiny = torch.finfo(total.dtype).tiny
    return (total / size / (summed / size**2).clamp_min(tiny)).clamp_min(0).sqrt().clamp_max(1e3)


def _pass_maps(moments: LayerMoments | None, members: Tensor, shape: HeadShape, merge: Merge) -> tuple[Tensor, Tensor]:
    if merge == "mean" or not shape.pass_dim:
        return _mean_maps(members, shape.pass_dim)
    return _vector_maps(moments.key_pass, moments.pass_root, members, merge)


def _value_maps(
    moments: LayerMoments | None, members: Tensor, shape: HeadShape, merge: Merge
) -> tuple[Tensor, Tensor]:
    if merge == "mean":
        return _mean_maps(members, shape.head_dim)
    return _vector_maps(moments.value_cov, moments.value_root, members, merge)


def _mean_maps(members: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    count, size = members.shape
    eye = torch.eye(dim, dtype=torch.float64, device=members.device).repeat(count, 1, size)
    return eye / size, eye.mT


def _vector_maps(weighted: Tensor, root: Tensor, members: Tensor, merge: Merge) -> tuple[Tensor, Tensor]:
    dim = root.shape[-1]
    second, roots = _block(weighted, members, dim), root[members]
    inverse = torch.linalg.inv(roots)
    if merge == "principal":
        basis = torch.linalg.eigh(second)[1][..., -dim:]
        encode, decode = _times_blocks(basis.mT, roots), _times_blocks(basis.mT, inverse).mT
        return _balance_vectors(encode, decode, roots, basis)
    second = _times_blocks(_times_blocks(second, inverse).mT, inverse)
    return _align_vectors(second, dim)


def _balance_vectors(encode: Tensor, decode: Tensor, roots: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Fix the basis that encode and decode leave open: as near to the members' own as a rotation and their mean metric
    bring it, so that shared weights keep the base's scale, mixes stay near the identity, and a lone head is untouched.
    """
    size = roots.shape[1]
    metric = (roots @ roots).mean(1)
    values, vectors = torch.linalg.eigh(metric)
    mean_root = (vectors * values.sqrt().unsqueeze(-2)) @ vectors.mT
    mean_inverse = (vectors / values.sqrt().unsqueeze(-2)) @ vectors.mT
    # decode_k X = S_k^-1 U_k X; with X = Q mean_root sqrt(n) it is the identity if U_k Q = S_k mean_root^-1 / sqrt(n)
    wanted = (roots @ mean_inverse.unsqueeze(1)).flatten(1, 2)
    left, _, right = torch.linalg.svd(basis.mT @ wanted)
    turn = left @ right
    scale = math.sqrt(size)
    return mean_inverse @ turn.mT @ encode / scale, decode @ turn @ mean_root * scale


def _align_vectors(second: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Generalised Procrustes: orthogonal Q_k that bring the Q_k v_k together. (b, n N, n N) raw second moments."""
    count, size = second.shape[0], second.shape[-1] // dim
    strongest = torch.diagonal(second, dim1=-2, dim2=-1).unflatten(-1, (size, dim)).sum(-1).argmax(-1)
    pick = torch.eye(dim).to(second).repeat(count, 1, 1)
    turn = second.new_zeros(count, size, dim, dim)  # the sum of Q_k v_k starts as the strongest head alone
    turn[torch.arange(count), strongest] = pick
    for _ in range(_ALIGN_STEPS if size > 2 else 1):  # two heads are aligned in one step
        cross = (turn.transpose(1, 2).flatten(2) @ second).unflatten(-1, (size, dim)).transpose(1, 2)
        left, _, right = torch.linalg.svd(cross)  # E[mean v_k^T]
        turn = left @ right
    encode = turn.transpose(1, 2).flatten(2)
    total = torch.diagonal(second, dim1=-2, dim2=-1).sum(-1)
    norm = _restored_norm(total, _energy(encode, second), size)
    return encode * norm[:, None, None] / size, encode.mT


def _times_blocks(matrix: Tensor, blocks: Tensor) -> Tensor:
    """(b, M, n N) times the block diagonal of (b, n, N, N)."""
    size, dim = blocks.shape[1], blocks.shape[-1]
    return torch.einsum("bmnd,bndc->bmnc", matrix.unflatten(-1, (size, dim)), blocks).flatten(-2)


# ------------------------------------------------------------------------------------------------- plumbing


def _effective(shape: HeadShape, merge: Merge) -> tuple[Merge, Merge]:
    """The merges of keys and of values: the mean where their basis is fixed."""
    return merge if shape.free_keys else "mean", merge if shape.free_values else "mean"


def _gram_block(moments: LayerMoments, members: Tensor) -> Tensor:  # (b, F, n, n)
    return moments.key_gram[:, members[:, :, None], members[:, None, :]].transpose(0, 1)


def _root_block(moments: LayerMoments, members: Tensor) -> Tensor:  # (b, F, n) complex
    return moments.key_root[:, members].transpose(0, 1).to(moments.key_gram.dtype)


def _block(matrix: Tensor, members: Tensor, dim: int) -> Tensor:
    """Rows and columns of the members' blocks: (K N, K N), (b, n) -> (b, n N, n N)."""
    rows = (members[:, :, None] * dim + torch.arange(dim, device=members.device)).flatten(1)
    return matrix[rows[:, :, None], rows[:, None, :]]


def _heads(weight: Tensor, bias: Tensor | None, shape: HeadShape) -> Tensor:
    """(K D, E) and (K D,) -> (K, D, E + 1) float64: a bias is one more column and follows every change of basis."""
    columns = [weight] if bias is None else [weight, bias.unsqueeze(1)]
    return torch.cat(columns, dim=1).double().unflatten(0, (shape.base_kv_heads, shape.head_dim))


def _encode_key(key: Tensor, encode: Tensor, pass_encode: Tensor, shape: HeadShape) -> Tensor:
    """Members' key rows (n, D, E) -> the shared head's (D, E). encode (F, n) complex, pass_encode (P, n P)."""
    first, second, rest = key.split([shape.rotary_dim // 2, shape.rotary_dim // 2, shape.pass_dim], dim=1)
    rotary = torch.einsum("fn,nfe->fe", encode, torch.complex(first.contiguous(), second.contiguous()))
    return torch.cat((rotary.real, rotary.imag, pass_encode @ rest.flatten(0, 1)))


def _split_bias(rows: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return (rows, None) if bias is None else (rows[..., :-1].contiguous(), rows[..., -1].contiguous())
