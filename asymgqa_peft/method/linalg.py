"""Linear algebra that several modules of the method use: products of activations, blocks, eigenvalues and roots."""

from __future__ import annotations

import torch
from torch import Tensor

from .threads import map_in_threads

ROOT_FLOOR = 1e-8
"""Least eigenvalue of a metric, relative to its largest: the root has an inverse, whatever the weights."""
TINY = 1e-60
"""Least eigenvalue of a metric that is zero altogether."""


def product_dtype(activation: Tensor) -> torch.dtype:
    """dtype of products of activations: float64, float32 for those of 16 bits, whose products it holds exactly."""
    if activation.dtype in (torch.float32, torch.float64):
        return torch.float64
    return torch.float32


def outer_sum(left: Tensor, right: Tensor) -> Tensor:
    """Sum over tokens of outer products: (N, M), (N, P) -> (M, P) in `product_dtype`.

    On a GPU, 16-bit activations go into the product as they are, ten times as fast as in float32 and as accurate: both
    multiply them exactly and add up in float32.
    """
    return products(left.T[None], right[None])[0]


def products(left: Tensor, right: Tensor) -> Tensor:
    """(b, M, N) times (b, N, P) in `product_dtype`; for 16 bits on a GPU as `outer_sum`."""
    dtype = product_dtype(left)
    if left.is_cuda and left.dtype == right.dtype and dtype == torch.float32:
        return torch.bmm(left, right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)


def blocks_of(matrix: Tensor, members: Tensor, size: int) -> Tensor:
    """Rows and columns of the members' blocks: (K N, K N) of blocks of N, members (b, n) -> (b, n N, n N)."""
    rows = (members[:, :, None] * size + torch.arange(size, device=members.device)).flatten(1)
    return matrix[rows[:, :, None], rows[:, None, :]]


def times_blocks(matrix: Tensor, blocks: Tensor) -> Tensor:
    """(b, M, n N) times the block diagonal of (b, n, N, C): (b, M, n C)."""
    count, size = blocks.shape[1:3]
    return torch.einsum("bmnd,bndc->bmnc", matrix.unflatten(-1, (count, size)), blocks).flatten(-2)


def energy(left_over: Tensor, second: Tensor) -> Tensor:
    """tr(L C L^H): energy of what the map L (..., M, N) makes of vectors of second moment C (..., N, N)."""
    return ((left_over @ second) * left_over.conj()).real.sum((-2, -1))


def tail_energy(matrix: Tensor, rank: int) -> Tensor:
    """Sum of all but the ``rank`` largest eigenvalues of positive semi-definite (..., M, M), in float64."""
    size = matrix.shape[-1]
    if rank >= size or matrix.numel() == 0:
        return matrix.new_zeros(matrix.shape[:-2], dtype=torch.float64)
    diagonal = torch.diagonal(matrix, dim1=-2, dim2=-1).real
    if rank == 0:
        return diagonal.sum(-1, dtype=torch.float64)
    if size == 2:
        # In closed form, because there are thousands per layer: one per pair of heads and frequency.
        first, second = diagonal.unbind(-1)
        radius = torch.hypot((first - second) / 2, matrix[..., 0, 1].abs())
        return ((first + second) / 2 - radius).clamp_min(0)
    return torch.linalg.eigvalsh(matrix)[..., :-rank].clamp_min(0).sum(-1, dtype=torch.float64)


def hermitian(matrix: Tensor) -> Tensor:
    """The Hermitian part, which takes back what rounding added."""
    return (matrix + matrix.mH) / 2


def metric_root(metric: Tensor) -> Tensor:
    """Symmetric root of positive semi-definite (..., N, N), with eigenvalues floored so that it can be inverted."""
    if metric.shape[-1] == 0:
        return metric
    values, vectors = _eigh_of_each(hermitian(metric))
    # Relative to the heaviest head too: a head that nothing reads must not get a root that underflows.
    floor = ROOT_FLOOR * torch.maximum(values[..., -1:], values.max() * ROOT_FLOOR)
    values = torch.maximum(values, floor.clamp_min(TINY))
    return (vectors * values.sqrt().unsqueeze(-2)) @ vectors.mH


def _eigh_of_each(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """torch.linalg.eigh of (..., N, N) on the CPU, in threads."""
    size = matrices.shape[-1]
    found = map_in_threads(torch.linalg.eigh, matrices.cpu().reshape(-1, size, size).split(1))
    values = torch.cat([values for values, _ in found])
    vectors = torch.cat([vectors for _, vectors in found])
    return values.view(matrices.shape[:-1]).to(matrices.device), vectors.view(matrices.shape).to(matrices.device)
