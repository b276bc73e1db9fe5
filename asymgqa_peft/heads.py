"""The one representation of a converted layer: its shared heads, from the merge to the adapter to the checkpoint.

Axes: E hidden size, H query heads and K KV heads of the base, D head dimension and R rotary dimensions of the base,
P = D - R, G shared heads, W dimensions of a shared head, of which W_r are rotary.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .groups import Partition

NormSpan = Literal["head", "layer"]
"""What one RMS norm between projection and RoPE takes together: a head, or all heads of the layer."""


@dataclass(frozen=True)
class HeadShape:
    """Shape of one attention layer of the base.

    Attributes:
        hidden_size: E, model width.
        num_attention_heads: H, query heads of the base.
        base_kv_heads: K, KV heads of the base; query head h follows KV head h // (H / K).
        head_dim: D.
        rotary_dim: R, leading dimensions of a head that RoPE rotates in half-split pairs (j, j + R/2); 0 without RoPE.
        free_keys: whether a query gain may undo a change of the keys' basis (not with a clamp in between).
        free_values: whether a value mix may undo a change of the values' basis.
        norm_span: of the norms that queries and keys pass before RoPE; None where there are none.
    """

    hidden_size: int
    num_attention_heads: int
    base_kv_heads: int
    head_dim: int
    rotary_dim: int
    free_keys: bool = True
    free_values: bool = True
    norm_span: NormSpan | None = None

    @property
    def queries_per_kv(self) -> int:
        """r = H / K."""
        return self.num_attention_heads // self.base_kv_heads

    @property
    def pass_dim(self) -> int:
        """P = D - R, dimensions of a key that RoPE leaves alone."""
        return self.head_dim - self.rotary_dim


@dataclass(frozen=True)
class SharedShape:
    """Shape of the shared heads of a model: the same in all of its layers, as one stock configuration has to say it.

    Attributes:
        base: shape of the base's layers.
        head_dim: W.
        frequencies: for each of the W_r / 2 rotary pairs of a shared head, which of the base's R / 2 frequencies it
            turns at; ascending. A head that is wider than the base's has several pairs for the same one.
    """

    base: HeadShape
    head_dim: int
    frequencies: tuple[int, ...]

    @classmethod
    def of_width(cls, base: HeadShape, head_dim: int | None = None) -> SharedShape:
        """Shape of heads of W dimensions; None is the base's D.

        Every frequency occurs equally often. What does not divide evenly goes to the slowest frequencies, where keys
        have most of their energy.
        """
        width = base.head_dim if head_dim is None else head_dim
        pairs = base.rotary_dim // 2
        wanted = width * base.rotary_dim // base.head_dim // 2
        counts = [0] * pairs
        for index in range(wanted):
            counts[pairs - 1 - index % pairs] += 1
        frequencies: list[int] = []
        for frequency, count in enumerate(counts):
            frequencies += [frequency] * count
        return cls(base, width, tuple(frequencies))

    @property
    def rotary_dim(self) -> int:
        """W_r, leading dimensions of a shared head that RoPE rotates in half-split pairs."""
        return 2 * len(self.frequencies)

    @property
    def pass_dim(self) -> int:
        """W - W_r."""
        return self.head_dim - self.rotary_dim

    @property
    def rotary_sources(self) -> tuple[int, ...]:
        """For each rotary dimension of a shared head, which of the base's R it stands for."""
        half = self.base.rotary_dim // 2
        return (*self.frequencies, *(frequency + half for frequency in self.frequencies))

    @property
    def pass_sources(self) -> tuple[int, ...]:
        """For each pass-through dimension of a shared key, which of the base's P it stands for."""
        return tuple(index % self.base.pass_dim for index in range(self.pass_dim))

    @property
    def value_sources(self) -> tuple[int, ...]:
        """For each dimension of a shared value, which of the base's D it stands for."""
        return tuple(index % self.base.head_dim for index in range(self.head_dim))


@dataclass(frozen=True)
class AttentionWeights:
    """The base's projections of one layer.

    Attributes:
        query: (H D, E).
        key, value: (K D, E).
        output: (E, H D).
        query_bias, key_bias, value_bias: (H D,), (K D,), (K D,) or None.
        query_norm, key_norm: scales of the norms that queries and keys pass, or None: (D,) each of norms that span a
            head, (H D,) and (K D,) of norms that span the layer.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    query_bias: Tensor | None = None
    key_bias: Tensor | None = None
    value_bias: Tensor | None = None
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None


@dataclass(frozen=True)
class SharedHeads:
    """The shared heads of one layer, and what each query head needs to use one.

    Query head h of group g attends with shared head g: each rotary pair of the shared head gets the query pair of its
    frequency, times ``query_gain[h]``; the pass-through part of the query goes through ``query_mix[h]``; what the
    attention returns goes through ``value_mix[h]``. None stands for ones and identities: the head takes the shared
    head as it is. Where the base norms queries and keys, ``query_scale[h]`` multiplies the query first, and the norms
    act on what gains and mixes made: on heads of W dimensions.

    Attributes:
        partition: groups of base KV heads.
        shape: of the shared heads.
        key, value: (G, W, E).
        key_bias, value_bias: (G, W) or None.
        query_gain: (H, W_r / 2) complex.
        query_mix: (H, W - W_r, P).
        value_mix: (H, D, W).
        query_scale: (H, D).
        query_norm, key_norm: scales of the norms of fitted queries and shared keys, or None: (W,) each of norms that
            span a head, (H, W) and (G, W) of norms that span the layer.
    """

    partition: Partition
    shape: SharedShape
    key: Tensor
    value: Tensor
    key_bias: Tensor | None = None
    value_bias: Tensor | None = None
    query_gain: Tensor | None = None
    query_mix: Tensor | None = None
    value_mix: Tensor | None = None
    query_scale: Tensor | None = None
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None


def mean_heads(weights: AttentionWeights, partition: Partition, shape: SharedShape) -> SharedHeads:
    """Shared heads that need no data: means of neighbouring heads of a group (Ainslie et al. 2023, arXiv 2305.13245).

    A dimension that a shared head has n times is the mean over each of n neighbouring parts of the group, so that a
    head of width D is the mean of its group, and one as wide as the whole group holds every head. Computed in float32
    at least, in which the mean of 16-bit weights is exact enough.
    """
    base = shape.base
    pair_parts = part_members(partition, shape.frequencies)
    pass_parts = part_members(partition, shape.pass_sources)
    value_parts = part_members(partition, shape.value_sources)
    key_parts = torch.cat((pair_parts, pair_parts, pass_parts), dim=1)
    key_sources = [*shape.rotary_sources, *(base.rotary_dim + source for source in shape.pass_sources)]
    heads = SharedHeads(
        partition=partition,
        shape=shape,
        key=_mean_of_parts(weights.key, partition, key_sources, key_parts),
        value=_mean_of_parts(weights.value, partition, shape.value_sources, value_parts),
        key_bias=_mean_of_parts(weights.key_bias, partition, key_sources, key_parts),
        value_bias=_mean_of_parts(weights.value_bias, partition, shape.value_sources, value_parts),
    )
    if base.norm_span is not None:
        heads = replace(heads, **_mean_norms(weights, partition, shape, key_sources, key_parts))
    if shape.head_dim == base.head_dim:
        return heads
    gain = pair_parts.to(heads.key)
    own = {
        "query_gain": torch.complex(gain, torch.zeros_like(gain)),
        "query_mix": selection(pass_parts, shape.pass_sources, base.pass_dim).mT.to(gain),
        "value_mix": selection(value_parts, shape.value_sources, base.head_dim).to(gain),
    }
    for name, each in own.items():
        # All query heads of a KV head use the shared head alike.
        own[name] = each.repeat_interleave(base.queries_per_kv, 0)
    return replace(heads, **own)


def _mean_norms(
    weights: AttentionWeights, partition: Partition, shape: SharedShape, sources: list[int], parts: Tensor
) -> dict[str, Tensor]:
    """Scales of the norms around `mean_heads`, by their fields of `SharedHeads`."""
    dim, dtype = shape.base.head_dim, torch.promote_types(weights.key_norm.dtype, torch.float32)
    query_norm, key_norm = weights.query_norm.to(dtype), weights.key_norm.to(dtype)
    if shape.base.norm_span == "head":
        key_norm, query_norm = key_norm[sources], query_norm[sources]
    else:
        key_norm = _mean_of_parts(key_norm, partition, sources, parts)
        query_norm = query_norm.unflatten(0, (-1, dim))[:, sources]
    # A query fills D of the W dimensions, which its norm takes the mean square of.
    return {"key_norm": key_norm, "query_norm": query_norm * math.sqrt(dim / shape.head_dim)}


def part_members(partition: Partition, sources: Sequence[int]) -> Tensor:
    """Which heads each dimension of a shared head is the mean of, in `mean_heads`.

    Args:
        partition: groups of the K heads.
        sources: for each of J dimensions of a shared head, which dimension of a base head it stands for.

    Returns:
        (K, J) of 0 and 1: whether base head k has a share in dimension j of its group's shared head.
    """
    occurrences = Counter(sources)
    members = torch.zeros(sum(len(group) for group in partition), len(sources))
    seen: Counter[int] = Counter()
    for column, source in enumerate(sources):
        # The n-th dimension of one source takes the n-th part of each group.
        part, parts = seen[source], occurrences[source]
        seen[source] += 1
        for group in partition:
            start, end = len(group) * part // parts, len(group) * (part + 1) // parts
            members[list(group[start:end]), column] = 1.0
    return members


def selection(parts: Tensor, sources: Sequence[int], size: int) -> Tensor:
    """`part_members` (K, J) -> (K, size, J) of 0 and 1: what takes a head's dimensions out of the J shared ones."""
    chosen = parts.new_zeros(len(parts), size, len(sources))
    for column, source in enumerate(sources):
        chosen[:, source, column] = parts[:, column]
    return chosen


def join_bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    """(..., E) and (...,) -> (..., E + 1): as one more column a bias follows every change of basis."""
    if bias is None:
        return weight
    return torch.cat((weight, bias.unsqueeze(-1)), dim=-1)


def split_bias(rows: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Rows that `join_bias` made, or what came of them, apart again; ``bias`` is what was joined."""
    if bias is None:
        return rows, None
    return rows[..., :-1].contiguous(), rows[..., -1].contiguous()


def _mean_of_parts(rows: Tensor | None, partition: Partition, sources: Sequence[int], parts: Tensor) -> Tensor | None:
    """Rows of base heads (K D, ...) -> of shared heads (G, W, ...): the mean of rows ``sources[j]`` over part j."""
    if rows is None:
        return None
    heads = rows.unflatten(0, (len(parts), -1)).to(torch.promote_types(rows.dtype, torch.float32))
    sources, parts = list(sources), parts.to(heads)
    shared = []
    for group in partition:
        share = parts[list(group)].reshape(len(group), len(sources), *[1] * (heads.dim() - 2))
        total = (heads[list(group)][:, sources] * share).sum(0)
        # A group of fewer heads than parts leaves some dimensions without a head: they stay zero.
        shared.append(total / share.sum(0).clamp_min(1.0))
    return torch.stack(shared)
