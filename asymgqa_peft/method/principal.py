"""Principal: the best pair of maps there is in the metric of `LayerMoments`, by Eckart and Young.

A shared head keeps, per rotary frequency, as many top eigenvectors of the group's Gram as the frequency occurs in it,
and of the pass-through keys and of the values the top principal dimensions that its width holds. What is lost is the
sum of all other eigenvalues. Encode and decode leave the basis of what is kept open; it is chosen near that of
`mean_heads`, so that shared weights keep the base's scale, maps stay near 0 and 1, and a lone head is untouched.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from .linalg import tail_energy, times_blocks
from .maps import Maps, MergeRule, pair_parts, vector_parts


class Principal(MergeRule):
    """The best common subspace, of any width."""

    name = "principal"

    def key_maps(self, gram: Tensor, root: Tensor, frequencies: Sequence[int]) -> Maps:
        """Eigenvectors of the Gram; pairs that a small group has no eigenvector for stay zero."""
        size = gram.shape[-1]
        parts = pair_parts(size, frequencies).to(gram)
        vectors = torch.linalg.eigh(gram)[1]
        encode = gram.new_zeros(len(gram), len(frequencies), size)
        decode = torch.zeros_like(encode)
        for copies, chosen in frequencies_by_copies(frequencies, gram.shape[1]).items():
            if copies == 0:
                continue
            # Frequencies are ascending, so that the copies of one stand side by side: (f, copies).
            first = torch.tensor([frequencies.index(frequency) for frequency in chosen])
            places = first[:, None] + torch.arange(copies)
            part = parts[:, places[0]]
            filled = part.real.sum(0) > 0
            basis = vectors[:, chosen, :, -min(copies, size) :]
            found = _key_basis(basis, root[:, chosen], part[:, filled])
            encode[:, places[:, filled]], decode[:, places[:, filled]] = found
        return encode, decode

    def vector_maps(self, second: Tensor, roots: Tensor, sources: Sequence[int]) -> Maps:
        """Eigenvectors of the weighted covariance; dimensions that a small group does not fill stay zero."""
        count, size, dim, _ = roots.shape
        parts = vector_parts(size, dim, sources).to(second)
        filled = parts.sum((0, 1)) > 0
        kept = int(filled.sum())
        basis = torch.linalg.eigh(second)[1][..., -kept:]
        encode = second.new_zeros(count, len(sources), size * dim)
        decode = second.new_zeros(count, size * dim, len(sources))
        encode[:, filled], decode[:, :, filled] = _vector_basis(basis, roots, parts[..., filled])
        return encode, decode

    def key_loss(self, gram: Tensor, root: Tensor, frequencies: Sequence[int]) -> Tensor:
        """Sum of the eigenvalues that no pair keeps."""
        lost = gram.new_zeros(len(gram), dtype=torch.float64)
        for copies, chosen in frequencies_by_copies(frequencies, gram.shape[1]).items():
            lost += tail_energy(gram[:, chosen], copies).sum(-1)
        return lost / 2

    def vector_loss(self, second: Tensor, roots: Tensor, sources: Sequence[int]) -> Tensor:
        """Sum of the eigenvalues that no dimension keeps."""
        return tail_energy(second, len(sources))


def frequencies_by_copies(frequencies: Sequence[int], count: int) -> dict[int, list[int]]:
    """How often a shared head has a frequency -> those of the base's ``count`` frequencies that it has so often."""
    copies = Counter(frequencies)
    found: dict[int, list[int]] = {}
    for frequency in range(count):
        found.setdefault(copies[frequency], []).append(frequency)
    return found


def _key_basis(basis: Tensor, root: Tensor, part: Tensor) -> Maps:
    """Encode and decode of rotary keys in the basis nearest to the parts: gains of mean square 1 and mean phase 0.

    Of an orthonormal basis (b, f, n, c), the c eigenvectors that f frequencies keep, roots (b, f, n), and ``part``
    (n, c) of 0 and 1, which members each of the c pairs is the mean of in `mean_heads`: each (b, f, c, n).
    """
    size, copies = part.shape
    if copies > 1:
        # Procrustes: the unitary matrix that brings the eigenvectors nearest to the parts' own, weighted as they are.
        wanted = root[..., None] * part
        left, _, right = torch.linalg.svd(basis.mH @ (wanted / torch.linalg.vector_norm(wanted, dim=-2, keepdim=True)))
        basis = basis @ left @ right
    encode, decode = basis.mH * root[..., None, :], basis.mT / root[..., None, :]
    share = size / part.real.sum(0)[:, None]
    scale = (decode.abs().square().mean(-1, keepdim=True) * share).sqrt()
    scale = scale * torch.exp(1j * (decode * part.T).sum(-1, keepdim=True).angle())
    return encode * scale, decode / scale


def _vector_basis(basis: Tensor, roots: Tensor, parts: Tensor) -> Maps:
    """Encode and decode of vectors in the basis nearest to the parts, by a rotation and their mean metric.

    Of an orthonormal basis (b, n N, m), the m eigenvectors that are kept, roots S_k (b, n, N, N) of the members'
    metrics, and parts R_k (n, N, m) of 0 and 1, what `mean_heads` decodes with: (b, m, n N) and (b, n N, m).
    """
    encode = times_blocks(basis.mT, roots)
    decode = times_blocks(basis.mT, torch.linalg.inv(roots)).mT
    # Decode may be S_k^-1 U_k X with any X. It is R_k if X = Q M sqrt(n) with U_k Q = S_k R_k M^-1 / sqrt(n); that has
    # orthonormal columns if M M is the mean of R_k^T S_k S_k R_k. Q comes as near to it as a rotation can.
    metric = (parts.mT @ (roots @ roots) @ parts).mean(1)
    values, vectors = torch.linalg.eigh(metric)
    mean_root = (vectors * values.sqrt().unsqueeze(-2)) @ vectors.mT
    mean_inverse = (vectors / values.sqrt().unsqueeze(-2)) @ vectors.mT
    wanted = (roots @ parts @ mean_inverse.unsqueeze(1)).flatten(1, 2)
    left, _, right = torch.linalg.svd(basis.mT @ wanted)
    turn = left @ right
    scale = math.sqrt(roots.shape[1])
    return mean_inverse @ turn.mT @ encode / scale, decode @ turn @ mean_root * scale
