"""Mean: average the heads of a group (Ainslie et al. 2023, arXiv 2305.13245)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .maps import Maps, MergeRule, pair_parts, vector_parts


class Mean(MergeRule):
    """Shared heads are those of `mean_heads`; the maps say only what they lose."""

    name = "mean"
    needs_data = False

    def key_maps(self, gram: Tensor, root: Tensor, frequencies: Sequence[int]) -> Maps:
        """The mean of each pair's part of the group, and the same for each of its members."""
        decode = pair_parts(gram.shape[-1], frequencies).T.to(gram).expand(len(gram), -1, -1)
        return decode / decode.real.sum(-1, keepdim=True).clamp_min(1.0), decode

    def vector_maps(self, second: Tensor, roots: Tensor, sources: Sequence[int]) -> Maps:
        """The mean of each dimension's part of the group, and the same for each of its members."""
        size, dim = roots.shape[1:3]
        decode = vector_parts(size, dim, sources).flatten(0, 1).to(second).expand(len(second), -1, -1)
        return (decode / decode.sum(-2, keepdim=True).clamp_min(1.0)).mT, decode
