"""Which heads share one, as query slots of ordinary GQA, and what fits a query head to the shared head of its group.

Axes: B batch, T positions, H query heads and K KV heads of the base, D head dimension and R rotary dimensions of the
base, P = D - R, G shared heads of W dimensions, of which W_r are rotary, p query slots per shared head.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..groups import Partition, group_of_heads, slot_layout
from ..heads import SharedShape

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class HeadLayout(nn.Module):
    """The groups of one layer: the one place that holds them, and the moves between heads and slots that follow.

    The buffer `index` (K,), the group of each KV head, is saved and loaded with the weights, which mean nothing
    without it: whatever writes it, `load_state_dict` or an assignment, lays the heads out anew. A wide head's
    `frequencies` (W_r / 2,) travel in the same way. All other buffers follow from these.

    Args:
        partition: groups of base KV heads.
        shape: of the shared heads.
        device: of the buffers.
        declared: whether the groups stand in the adapter's configuration. A first file that says otherwise does not
            belong to it.
    """

    def __init__(self, partition: Partition, shape: SharedShape, device: torch.device, declared: bool) -> None:
        super().__init__()
        self.shape = shape
        self.declared = declared
        self.is_wide = shape.rotary_dim != shape.base.rotary_dim
        self.register_buffer("index", torch.tensor(group_of_heads(partition), device=device))
        if shape.head_dim != shape.base.head_dim:
            self.register_buffer("frequencies", torch.tensor(shape.frequencies, device=device))
        self._lay_out(partition)

    def _lay_out(self, partition: Partition) -> None:
        self.partition = partition
        self.slots = slot_layout(partition, self.shape.base.queries_per_kv)
        base, pairs, groups = self.shape.base, self.shape.frequencies, group_of_heads(partition)
        indices = {
            # An empty slot takes a copy of head 0: nothing reads what comes of it, and one gather is all it costs.
            "head_of_slot": [max(head, 0) for head in self.slots.head_of_slot],
            "slot_of_head": self.slots.slot_of_head,
            "group_of_query": [groups[head // base.queries_per_kv] for head in range(base.num_attention_heads)],
            "rotary_rows": self.shape.rotary_sources,
            # 1 for each pair that is the first to turn at its frequency, 0 for further ones.
            "is_first": [int(pairs.index(frequency) == pair) for pair, frequency in enumerate(pairs)],
        }
        for name, index in indices.items():
            buffer = torch.tensor(index, dtype=torch.long, device=self.index.device)
            self.register_buffer(name, buffer, persistent=False)
        self.moves_queries = self.slots.head_of_slot != tuple(range(len(self.slots.slot_of_head)))
        repeats = Counter(pairs).values()
        self.is_even = len(set(repeats)) == 1 and len(repeats) == base.rotary_dim // 2

    def set_partition(self, partition: Partition, frequencies: tuple[int, ...]) -> None:
        """Lay the heads out for other groups, and a wide head for other frequencies."""
        if frequencies != self.shape.frequencies:
            self.shape = replace(self.shape, frequencies=frequencies)
            self.frequencies.copy_(torch.tensor(frequencies))
        with torch.no_grad():
            self.index.copy_(torch.tensor(group_of_heads(partition)))
        self._lay_out(partition)

    def checked(self, index: Tensor | None, frequencies: Tensor | None) -> tuple[Partition, SharedShape]:
        """The groups and the shape that buffers of a file say; None for one that stays as it is.

        Raises:
            ValueError: unless `index` (K,) holds a group in range(G) for each head, none empty, and as the first to
                be loaded agrees with the configuration; unless `frequencies` fit the base.
        """
        partition, shape = self.partition, self.shape
        if index is not None:
            partition = self._checked_partition(index)
        if frequencies is not None:
            found, pairs = tuple(frequencies.tolist()), shape.base.rotary_dim // 2
            fits = len(found) == len(shape.frequencies) and set(found) <= set(range(pairs))
            if frequencies.dtype not in INTEGERS or not fits or list(found) != sorted(found):
                raise ValueError(
                    f"rotary frequencies in the weights are {found}: they must be {len(shape.frequencies)} of the "
                    f"base's 0..{pairs - 1}, in ascending order. The file is damaged or belongs to another base."
                )
            shape = replace(shape, frequencies=found)
        return partition, shape

    def _checked_partition(self, index: Tensor) -> Partition:
        heads, groups = self.shape.base.base_kv_heads, len(self.partition)
        if index.shape != (heads,) or index.dtype not in INTEGERS:
            raise ValueError(
                f"head groups in the weights are {index.dtype} of shape {tuple(index.shape)}: they must be "
                f"{heads} integers, the group of each KV head. The file is damaged or belongs to another base."
            )
        members: list[list[int]] = [[] for _ in range(groups)]
        for head, group in enumerate(index.tolist()):
            if not 0 <= group < groups:
                raise ValueError(f"head groups in the weights name group {group}, num_key_value_heads is {groups}.")
            members[group].append(head)
        if not all(members):
            raise ValueError(f"head groups in the weights leave a group empty: {index.tolist()}.")
        partition = tuple(map(tuple, members))
        if self.declared and partition != self.partition:
            raise ValueError(
                f"head_groups of the configuration and of the weights contradict each other: {self.partition} and "
                f"{partition}. Take both from one saved adapter, or leave head_groups out of the configuration."
            )
        return partition

    def __setattr__(self, name: str, value: object) -> None:
        if name in ("index", "frequencies") and name in self._buffers and not value.is_meta:
            # An assignment: transformers' own load_adapter, and load_state_dict(assign=True).
            self._adopt({name: value})
        super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        self._adopt(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _adopt(self, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
        index = tensors.get(prefix + "index")
        partition, self.shape = self.checked(index, tensors.get(prefix + "frequencies"))
        self.declared = self.declared and index is None
        self._lay_out(partition)

    def to_query_heads(self, shared: Tensor) -> Tensor:
        """Shared heads (B, T, G, W) -> (B, T, H, W), each query head with the one of its group."""
        return shared.index_select(-2, self.group_of_query)

    def scatter(self, heads: Tensor) -> Tensor:
        """Query heads (B, T, H, W) -> slots (B, T, G p, W). Nothing reads what an empty slot attends to."""
        if self.moves_queries:
            return heads.index_select(-2, self.head_of_slot)
        return heads

    def gather(self, slots: Tensor) -> Tensor:
        """Slots (B, T, G p, W) -> query heads (B, T, H, W)."""
        if self.moves_queries:
            return slots.index_select(-2, self.slot_of_head)
        return slots

    def widen_positions(self, positions: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """cos and sin (B, T, R) of the base -> those at the frequencies of a wide head, (B, T, W_r)."""
        cos, sin = positions
        return cos.index_select(-1, self.rotary_rows), sin.index_select(-1, self.rotary_rows)

    def sum_by_frequency(self, pairs: Tensor) -> Tensor:
        """(..., W_r / 2) -> (..., R / 2): the sum over all pairs of a shared head that turn at one frequency."""
        base_pairs = self.shape.base.rotary_dim // 2
        if self.is_even:
            return pairs.unflatten(-1, (base_pairs, -1)).sum(-1)
        frequencies = self.rotary_rows[: len(self.shape.frequencies)]
        turns_at = frequencies[:, None] == torch.arange(base_pairs, device=pairs.device)
        return pairs @ turns_at.to(pairs.dtype)


class RotaryGain(nn.Module):
    """A complex gain for each query head and rotary pair of the shared head; it commutes with RoPE.

    `weight` (H, W_r / 2, 2) holds real and imaginary part of the gain's deviation from 1 in the first pair of each
    frequency, and from 0 in further pairs of it: near zero, bf16 resolves small steps, and weight decay pulls towards
    the head as it is.
    """

    def __init__(self, shape: SharedShape, **factory) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape.base.num_attention_heads, len(shape.frequencies), 2, **factory))

    def read(self, layout: HeadLayout) -> Tensor:
        """The gains (H, W_r / 2), complex128."""
        return torch.view_as_complex(self.weight.detach().double()) + layout.is_first

    def write(self, gain: Tensor | None, layout: HeadLayout) -> None:
        """Make these the gains; None is the head as it is."""
        if gain is None:
            self.weight.zero_()
        else:
            self.weight.copy_(torch.view_as_real(gain.resolve_conj() - layout.is_first.to(gain.device)))

    def fit_query(self, query: Tensor, layout: HeadLayout) -> Tensor:
        """Rotary part of the queries (B, T, H, R) -> of the fitted queries, (B, T, H, W_r)."""
        if layout.is_wide:
            first, second = query.index_select(-1, layout.rotary_rows).chunk(2, dim=-1)
            real, imag = self._whole(layout, query.dtype)
            return torch.cat((first * real - second * imag, second * real + first * imag), dim=-1)
        first, second = query.chunk(2, dim=-1)
        real, imag = self.weight.to(query.dtype).unbind(-1)
        turned = (first + first * real - second * imag, second + second * real + first * imag)
        return torch.cat(turned, dim=-1)

    def _whole(self, layout: HeadLayout, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Real and imaginary part of a wide head's gains, each (H, W_r / 2): one product less per activation."""
        real, imag = self.weight.unbind(-1)
        return (real + layout.is_first).to(dtype), imag.to(dtype)

    def decode_key(self, shared: Tensor, layout: HeadLayout) -> Tensor:
        """Rotary part of the shared keys (B, T, H, W_r) -> each query head's own key, (B, T, H, R).

        Re(gain q conj(z)) = Re(q conj(conj(gain) z)): the conjugate gain does to the key what the gain does to the
        query. Pairs of one frequency add up.
        """
        first, second = shared.chunk(2, dim=-1)
        if layout.is_wide:
            real, imag = self._whole(layout, shared.dtype)
            own_first = layout.sum_by_frequency(first * real + second * imag)
            own_second = layout.sum_by_frequency(second * real - first * imag)
            return torch.cat((own_first, own_second), dim=-1)
        real, imag = self.weight.to(shared.dtype).unbind(-1)
        turned = (first + first * real + second * imag, second + second * real - first * imag)
        return torch.cat(turned, dim=-1)


class HeadScale(nn.Module):
    """A factor for each dimension of each query head; `weight` (H, D) holds its deviation from 1."""

    def __init__(self, shape: SharedShape, **factory) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape.base.num_attention_heads, shape.base.head_dim, **factory))

    def read(self, layout: HeadLayout) -> Tensor:
        """The factors (H, D), float64."""
        return 1.0 + self.weight.detach().double()

    def write(self, scale: Tensor | None, layout: HeadLayout) -> None:
        """Make these the factors; None is ones."""
        if scale is None:
            self.weight.zero_()
        else:
            self.weight.copy_(scale - 1.0)

    def forward(self, heads: Tensor) -> Tensor:
        """(B, T, H, D) -> the same, scaled."""
        return heads + heads * self.weight.to(heads.dtype)


class HeadMix(nn.Module):
    """A matrix for each query head; `weight` (H, M, N) holds its deviation from the identity's first M rows."""

    def __init__(self, num_heads: int, rows: int, columns: int, **factory) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_heads, rows, columns, **factory))

    def read(self, layout: HeadLayout) -> Tensor:
        """The matrices (H, M, N), float64."""
        deviation = self.weight.detach().double()
        return deviation + torch.eye(*deviation.shape[1:]).to(deviation)

    def write(self, matrices: Tensor | None, layout: HeadLayout) -> None:
        """Make these the matrices; None is the identity's first M rows."""
        if matrices is None:
            self.weight.zero_()
        else:
            self.weight.copy_(matrices - torch.eye(*matrices.shape[1:]).to(matrices))

    def forward(self, heads: Tensor) -> Tensor:
        """(B, T, H, N) -> (B, T, H, M): each head's vector through its matrix."""
        mixed = torch.einsum("...hn,hmn->...hm", heads, self.weight.to(heads.dtype))
        return _resized(heads, self.weight.shape[1]) + mixed

    def transposed(self, heads: Tensor) -> Tensor:
        """(B, T, H, M) -> (B, T, H, N): each head's vector through the transpose."""
        mixed = torch.einsum("...hm,hmn->...hn", heads, self.weight.to(heads.dtype))
        return _resized(heads, self.weight.shape[2]) + mixed


def _resized(vectors: Tensor, size: int) -> Tensor:
    """(..., N) -> (..., size): cut off, or filled up with zeros."""
    if vectors.shape[-1] >= size:
        return vectors[..., :size]
    return F.pad(vectors, (0, size - vectors.shape[-1]))
