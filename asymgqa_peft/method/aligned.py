"""Aligned: turn each head towards the group's mean, average, restore the norm (Jin et al. 2024, arXiv 2412.20677)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .linalg import energy, times_blocks
from .maps import Maps, MergeRule

_STEPS = 10
"""Turns of every head onto the mean of all."""
_LARGEST_NORM = 1e3
"""Heads that cancel each other are scaled up by no more than this."""


class Aligned(MergeRule):
    """The mean of heads that are turned first, one per rotary frequency or vector dimension: of the base's width."""

    name = "aligned"

    def key_maps(self, gram: Tensor, root: Tensor, frequencies: Sequence[int]) -> Maps:
        """One phase per head and frequency."""
        size = gram.shape[-1]
        gram = gram / (root[..., :, None] * root[..., None, :])
        turn = _align_phases(gram)
        total = torch.diagonal(gram, dim1=-2, dim2=-1).real.sum(-1)
        # Energy of sum_k c_k kappa_k: sum_kl c_k gram_kl conj(c_l).
        summed = torch.einsum("...k,...kl,...l->...", turn, gram, turn.conj()).real
        norm = _restored_norm(total, summed, size)
        return turn * norm.unsqueeze(-1) / size, turn.conj()

    def vector_maps(self, second: Tensor, roots: Tensor, sources: Sequence[int]) -> Maps:
        """One orthogonal matrix per head."""
        size, dim = roots.shape[1:3]
        inverse = torch.linalg.inv(roots)
        second = times_blocks(times_blocks(second, inverse).mT, inverse)
        encode = _align_vectors(second, dim)
        total = torch.diagonal(second, dim1=-2, dim2=-1).sum(-1)
        norm = _restored_norm(total, energy(encode, second), size)
        return encode * norm[:, None, None] / size, encode.mT


def _align_phases(gram: Tensor) -> Tensor:
    """Unit c (..., n) that bring the c_k kappa_k together: turned onto the strongest head, then onto the mean."""
    strongest = torch.diagonal(gram, dim1=-2, dim2=-1).real.argmax(-1)
    reference = gram.gather(-2, strongest[..., None, None].expand(*strongest.shape, 1, gram.shape[-1])).squeeze(-2)
    # The phase of E[kappa_ref conj(kappa_k)] turns head k onto the reference.
    turn = torch.exp(1j * reference.angle())
    for _ in range(_STEPS):
        turn = torch.exp(1j * (turn.unsqueeze(-2) @ gram).squeeze(-2).angle())
    return turn


def _align_vectors(second: Tensor, dim: int) -> Tensor:
    """Generalised Procrustes: orthogonal Q_k, side by side (b, N, n N), that bring the Q_k v_k together.

    ``second`` (b, n N, n N) are raw second moments, ``dim`` is N.
    """
    count, size = second.shape[0], second.shape[-1] // dim
    strongest = torch.diagonal(second, dim1=-2, dim2=-1).unflatten(-1, (size, dim)).sum(-1).argmax(-1)
    # The sum of the Q_k v_k starts as the strongest head alone.
    turn = second.new_zeros(count, size, dim, dim)
    turn[torch.arange(count), strongest] = torch.eye(dim).to(second)
    # Two heads are aligned in one step.
    steps = _STEPS if size > 2 else 1
    for _ in range(steps):
        # E[mean v_k^T]
        cross = (turn.transpose(1, 2).flatten(2) @ second).unflatten(-1, (size, dim)).transpose(1, 2)
        left, _, right = torch.linalg.svd(cross)
        turn = left @ right
    return turn.transpose(1, 2).flatten(2)


def _restored_norm(total: Tensor, summed: Tensor, size: int) -> Tensor:
    """Factor that gives the mean of ``size`` heads the heads' mean energy: total = sum of energies, of the sum."""
    tiny = torch.finfo(total.dtype).tiny
    factor = (total / size / (summed / size**2).clamp_min(tiny)).clamp_min(0).sqrt()
    return factor.clamp_max(_LARGEST_NORM)
