"""What a merge is: two linear maps per group, and what they lose.

*Encode* makes the shared head out of its members' keys (or values), *decode* gives each member its own back. Keys have
one complex number per member and rotary pair of the shared head, so that both maps commute with RoPE; pass-through
keys and values have matrices. Encode goes into k_proj and v_proj, decode into q_proj (query gain, query mix) and
o_proj (value mix). Merges differ only in how they choose the two.

Axes: b candidate groups of n heads each, F rotary frequencies of the base, J = W_r / 2 rotary pairs of a shared head.
Pass-through keys and values are vectors: N dimensions of a base head (P or D), M of a shared head (W - W_r or W).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ..choices import Merge
from ..heads import part_members, selection
from .linalg import energy, times_blocks

Maps = tuple[Tensor, Tensor]
"""Encode and decode."""


class MergeRule(ABC):
    """How the heads of a group become one. A new merge is one subclass, entered in `merge.MERGES`.

    Attributes:
        name: what a user calls it.
        needs_data: whether the maps depend on calibration statistics. Those of a merge that does not are the ones of
            `mean_heads`.
    """

    name: Merge
    needs_data: bool = True

    @abstractmethod
    def key_maps(self, gram: Tensor, root: Tensor, frequencies: Sequence[int]) -> Maps:
        """Maps of the rotary keys.

        Args:
            gram: (b, F, n, n) complex, the members' part of `LayerMoments.key_gram`.
            root: (b, F, n) complex, that of `LayerMoments.key_root`.
            frequencies: for each of the J pairs of a shared head its frequency, ascending.

        Returns:
            Encode and decode, each (b, J, n) complex.
        """

    @abstractmethod
    def vector_maps(self, second: Tensor, roots: Tensor, sources: Sequence[int]) -> Maps:
        """Maps of the pass-through keys, or of the values.

        Args:
            second: (b, n N, n N), the members' part of `LayerMoments.key_pass` or ``value_cov``.
            roots: (b, n, N, N), that of ``pass_root`` or ``value_root``.
            sources: for each of the M dimensions of a shared head, which of the base's N it stands for.

        Returns:
            Encode (b, M, n N) and decode (b, n N, M).
        """

    def key_loss(self, gram: Tensor, root: Tensor, frequencies: Sequence[int]) -> Tensor:
        """Energy of the rotary keys that the maps lose, (b,), in the unit of `LayerMoments.key_energy`."""
        encode, decode = self.key_maps(gram, root, frequencies)
        turning = torch.tensor(frequencies, dtype=torch.long, device=gram.device)
        root_of_pair = root[:, turning]
        through_pair = (root_of_pair * decode)[..., :, None] * (encode / root_of_pair)[..., None, :]
        # All pairs of one frequency add up to what comes back of its keys.
        restored = torch.zeros_like(gram).index_add(1, turning, through_pair)
        lost = torch.eye(gram.shape[-1]).to(gram) - restored
        # Half of it shows in the scores: see `LayerMoments.key_energy`.
        return energy(lost, gram).sum(-1) / 2

    def vector_loss(self, second: Tensor, roots: Tensor, sources: Sequence[int]) -> Tensor:
        """Energy of the pass-through keys, or of the values, that the maps lose: (b,)."""
        if second.shape[-1] == 0:
            return second.new_zeros(len(second))
        encode, decode = self.vector_maps(second, roots, sources)
        decode = times_blocks(decode.mT, roots).mT
        encode = times_blocks(encode, torch.linalg.inv(roots))
        lost = torch.eye(second.shape[-1]).to(second) - decode @ encode
        return energy(lost, second)


def pair_parts(size: int, frequencies: Sequence[int]) -> Tensor:
    """`mean_heads`' own decode of rotary keys, for a group of ``size`` heads: (n, J) of 0 and 1."""
    return part_members((tuple(range(size)),), frequencies).double()


def vector_parts(size: int, dim: int, sources: Sequence[int]) -> Tensor:
    """`mean_heads`' own decode of pass-through keys or values, for a group of ``size`` heads: (n, N, M) of 0 and 1."""
    return selection(pair_parts(size, sources), sources, dim)
