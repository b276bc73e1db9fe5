"""Re-solve an output projection so that the grouped attention reproduces the original one, as a low-rank change."""

from __future__ import annotations

import copy
from functools import lru_cache

import torch
from torch import Tensor

from .linalg import TINY, outer_sum, times_blocks
from .statistics import sum_over_ranks, tokens_that_count
from .threads import one_thread

DAMPING = 1e-3
"""Ridge strength, relative to the mean diagonal of the inputs' Gram (1e-4 to 1e-2 gave perplexities within 0.3 %)."""

_MIX_DAMPING = 1e-4
"""Ridge strength of the heads' mixes, relative to the mean diagonal of W_h^T W_h."""

_SPARE_VECTORS, _STEPS = 16, 12
"""Of the subspace iteration that `low_rank` uses."""

_LEAST_SHARE = 1e-13
"""Of the vectors' energy, below which it does not make a vector as long as the others: far above rounding errors."""


class OutputRefit:
    """Streaming ridge regression of a layer's original attention output on the grouped model's.

    Minimises ||Y - (W + X) Z||^2 + lam ||X||^2 over the change X of o_proj, with Z (H D, N) the inputs of o_proj in
    the grouped model and Y (E, N) the outputs (without bias) in the original: X = R Q^-1 with the residual
    R = Y Z^T - W Z Z^T and Q = Z Z^T + lam I. Only the two Grams are kept.

    Args:
        weight: W, (E, H D), o_proj's weight.
        damping: lam relative to the mean diagonal of Z Z^T; tenfold where the sums do not stay positive definite.
        device: where the sums live; default is the weight's device.
    """

    def __init__(self, weight: Tensor, damping: float = DAMPING, device: torch.device | str | None = None):
        self.weight = weight.to(device=device or weight.device, dtype=torch.float64)
        self.damping = damping
        width = self.weight.shape[1]
        self._inputs = self.weight.new_zeros(width, width)
        self._cross = torch.zeros_like(self.weight)
        self._change: Tensor | None = None

    def update(self, inputs: Tensor, targets: Tensor, mask: Tensor | None = None) -> None:
        """Add one batch: inputs (B, T, H D) and targets (B, T, E) of Z^T and Y^T.

        A token's error counts as much as the scale that both its input and its target are multiplied by.

        Args:
            mask: (B, T), nonzero at tokens that count; None counts all.
        """
        inputs = tokens_that_count(inputs, mask).to(self.weight.device)
        targets = tokens_that_count(targets, mask).to(self.weight.device)
        self._inputs += outer_sum(inputs, inputs)
        self._cross += outer_sum(targets, inputs)
        self._change = None

    def reduce(self) -> None:
        """Add up the sums of all ranks, in place."""
        sum_over_ranks((self._inputs, self._cross))
        self._change = None

    def change(self) -> Tensor:
        """X, (E, H D): the full-rank ridge solution, less the weight.

        Raises:
            ValueError: an input or target was not finite.
        """
        if not (torch.isfinite(self._inputs).all() and torch.isfinite(self._cross).all()):
            raise ValueError("NaN or inf in the attention outputs of the grouped model.")
        if self._change is None:
            damping, fails = self.damping, True
            while fails:
                # Where nearly all energy has one direction, rounding in float32 may be more than the ridge.
                factor, fails = torch.linalg.cholesky_ex(self._damped(damping))
                damping *= 10
            self._change = torch.cholesky_solve(self._residual().T, factor).T
        return self._change

    def low_rank(self, rank: int, scaling: float = 1.0) -> tuple[Tensor, Tensor]:
        """The best change of the given rank as LoRA factors: lora_A (k, H D), lora_B (E, k), k = min(rank, E).

        ``scaling`` is what the adapter multiplies their product with; it is divided out.

        The objective at any X' is its minimum plus ||(X' - X) Q^(1/2)||_F^2, so the best X' of rank r is X projected
        on the top r left singular vectors of X Q^(1/2): eigenvectors of X Q X^T = X R^T (reduced-rank regression).
        It is at most the objective at 0: the reconstruction error on the calibration data never rises. The singular
        vectors of X itself would spend the rank on directions that no activation takes.
        """
        change = self.change()
        basis = _top_eigenvectors(change @ self._residual().T, rank)
        lora_a, lora_b = basis.T @ change, basis
        # Both factors become equally large, so that neither trains faster than the other. A change of nothing stays
        # unbalanced: both factors would be zero, and no gradient could leave it.
        balance = (lora_a.norm().clamp_min(1e-6 * self.weight.norm()) / lora_b.norm()).sqrt()
        share = abs(scaling) ** 0.5
        lora_a, lora_b = lora_a / (balance * share), lora_b * balance / share
        if scaling < 0:
            lora_b = -lora_b
        return lora_a, lora_b

    def output_mix(self, heads: int) -> Tensor:
        """(H, D, D) matrices N_h in front of each head's columns W_h: W_h N_h is nearest to the solution's columns.

        D is the width that o_proj reads from a head, whatever the width of the shared heads.

        They take the part of the change that stays within what a head writes anyway, at any rank, and leave less to
        the low-rank change.
        """
        columns = self.weight.unflatten(1, (heads, -1)).transpose(0, 1)
        wanted = (self.weight + self.change()).unflatten(1, (heads, -1)).transpose(0, 1)
        metric = columns.mT @ columns
        strength = _MIX_DAMPING * metric.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30)
        ridge = strength[:, None, None] * torch.eye(metric.shape[-1]).to(metric)
        return torch.linalg.solve(metric + ridge, columns.mT @ wanted + ridge)

    def with_output_mix(self, mix: Tensor) -> OutputRefit:
        """The same regression once the matrices (H, D, D) stand in front of o_proj and change its inputs."""
        turned, mixed = mix.mT[None], copy.copy(self)
        half = times_blocks(self._inputs[None], turned)
        mixed._inputs = times_blocks(half.mT, turned)[0]
        mixed._cross = times_blocks(self._cross[None], turned)[0]
        mixed._change = None
        return mixed

    def objective(self, change: Tensor) -> Tensor:
        """||Y - (W + X) Z||^2 - ||Y||^2 of a change X, from the sums alone; a scalar."""
        solution = self.weight + change
        return ((solution @ self._inputs) * solution).sum() - 2 * (solution * self._cross).sum()

    def _damped(self, damping: float) -> Tensor:
        damped = self._inputs.clone()
        damped.diagonal().add_(damping * self._inputs.diagonal().mean().clamp_min(1e-30))
        return damped

    def _residual(self) -> Tensor:
        return self._cross - self.weight @ self._inputs


def _top_eigenvectors(matrix: Tensor, rank: int) -> Tensor:
    """Orthonormal (E, k) that span the leading eigenvectors of positive semi-definite (E, E), k = min(rank, E).

    By subspace iteration where that is far cheaper (E 4096, rank 32: seconds instead of half a minute). Whatever it
    leaves of the optimum, projecting on orthonormal vectors cannot raise the refit's objective.
    """
    symmetric = matrix + matrix.mT  # twice the matrix, up to rounding: the same eigenvectors
    size = 2 * rank + _SPARE_VECTORS
    if size * 4 > len(symmetric):
        with one_thread():
            return torch.linalg.eigh(symmetric)[1][:, -rank:]
    symmetric /= torch.linalg.matrix_norm(symmetric).clamp_min(TINY)
    basis = _random_vectors(len(symmetric), size).to(symmetric)
    for _ in range(_STEPS):
        product = symmetric @ basis
        with one_thread():
            basis = _well_conditioned(product)
    with one_thread():
        basis = torch.linalg.qr(basis)[0]
        # A GPU takes longer for a matrix of this size.
        vectors = torch.linalg.eigh((basis.T @ symmetric @ basis).cpu())[1]
    return basis @ vectors[:, -rank:].to(basis)


@lru_cache(maxsize=1)
def _random_vectors(length: int, count: int) -> Tensor:
    """The same (length, count) each time, in float64; drawn on the CPU, so that every device starts alike."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(length, count, generator=generator, dtype=torch.float64)


def _well_conditioned(vectors: Tensor) -> Tensor:
    """Nearly orthonormal (E, k) of the same span, by Cholesky: products, where a QR goes column by column."""
    gram = vectors.mT @ vectors
    # Nearly dependent vectors, of eigenvalues that do not count, stay short.
    gram.diagonal().add_(_LEAST_SHARE * gram.diagonal().sum() + TINY)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(gram), vectors.mT, upper=False).mT
