"""Streaming second moments of one layer's queries, keys and values: all that search and merge need to know.

Everything is a sum of outer products over tokens, so that memory does not grow with the number of tokens and the
sums of several processes simply add up. ``LayerStatistics`` accumulates, ``LayerMoments`` is the frozen result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.distributed as dist
from torch import Tensor

from ..heads import HeadShape
from .threads import map_in_threads

_ROOT_FLOOR = 1e-8
"""Least eigenvalue of a metric, relative to its largest: the root has an inverse, whatever the weights."""
_TINY = 1e-60


@dataclass(frozen=True)
class LayerMoments:
    """What calibration found out about one layer. F = R / 2 rotary frequencies, P = D - R pass-through dimensions.

    The Grams are *weighted*: each head's keys and values are measured in a metric that says what an error costs, so
    that an eigenvalue that is cut off is an error of the attention scores (keys) or of o_proj's output (values). The
    roots of the metrics are kept beside them, to get back to the heads' own bases.

    Attributes:
        shape: the layer's shape.
        tokens: tokens seen, padding excluded.
        key_gram: (F, K, K) complex128, Hermitian. E[sqrt(w_k w_l) kappa_k conj(kappa_l)] of the complex keys
            kappa_j = k[j] + i k[j + R/2], with the query energy w_k = sum over the query heads of k of E|q_j|^2.
        key_root: (F, K) sqrt(w_k).
        key_pass: (K P, K P) blocks S_k Cov(k, l) S_l of the pass-through keys. Centred: a constant key adds the same
            to every score of a query, which the softmax does not see.
        pass_root: (K, P, P) symmetric S_k with S_k S_k = sum over the query heads of k of E[q q^T].
        value_cov: (K D, K D) blocks S_k E[v_k v_l^T] S_l of the values. Not of the attention outputs: heads of equal
            values would look different by their patterns. Not centred: nothing downstream absorbs a constant.
        value_root: (K, D, D) symmetric S_k with S_k S_k = sum over the query heads h of k of W_o,h^T W_o,h.
        key_cosine, value_cosine: (K, K) mean over tokens of the cosine between two heads' k_proj / v_proj outputs.
    """

    shape: HeadShape
    tokens: int
    key_gram: Tensor
    key_root: Tensor
    key_pass: Tensor
    pass_root: Tensor
    value_cov: Tensor
    value_root: Tensor
    key_cosine: Tensor
    value_cosine: Tensor

    @property
    def key_energy(self) -> Tensor:
        """Mean squared attention score, were the phases of queries and keys independent; a scalar."""
        # Re(q conj(kappa)) of independent phases keeps half of |q|^2 |kappa|^2; a pass-through product keeps all.
        rotary = torch.diagonal(self.key_gram, dim1=-2, dim2=-1).real.sum() / 2
        return rotary + torch.diagonal(self.key_pass).sum()

    @property
    def value_energy(self) -> Tensor:
        """Mean squared contribution of the heads to o_proj's output, summed over heads; a scalar."""
        return torch.diagonal(self.value_cov).sum(dtype=torch.float64)

    def for_search(self) -> LayerMoments:
        """The same with values in float32, for costs under merge="principal".

        Eigenvalues take half the time, and their sums are still known to a millionth. In units of the values' energy,
        so that no activations underflow.
        """
        if not self.shape.free_values:  # averaged: there is no eigenvalue to compute
            return self
        energy = self.value_energy.clamp_min(torch.finfo(torch.float64).tiny)
        single = torch.empty_like(self.value_cov, dtype=torch.float32)
        return replace(self, value_cov=torch.div(self.value_cov, energy, out=single))

    def to(self, device: torch.device | str) -> LayerMoments:
        """The same moments on another device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {k: v.to(device, non_blocking=True) for k, v in values.items() if isinstance(v, Tensor)}
        if self.key_gram.is_cuda:  # through pinned memory, which is ten times as fast, but has to be waited for
            torch.cuda.synchronize(self.key_gram.device)
        return LayerMoments(**values | moved)


class LayerStatistics:
    """Accumulates one layer's sums over batches. Sums are float64; a batch's products are those of `outer_sum`.

    Args:
        shape: the layer's shape.
        device: where the sums live; batches may come from any device.
    """

    def __init__(self, shape: HeadShape, device: torch.device | str = "cpu"):
        self.shape = shape
        heads, frequencies, rest = shape.base_kv_heads, shape.rotary_dim // 2, shape.pass_dim

        def zeros(*size: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self._sums = {
            "tokens": zeros(1),
            "query_energy": zeros(frequencies, heads),
            "query_pass": zeros(heads, rest, rest),
            "key_gram": zeros(frequencies, heads, heads, dtype=torch.complex128),
            "key_pass": zeros(heads * rest, heads * rest),
            "key_pass_sum": zeros(heads * rest),
            "value_outer": zeros(heads * shape.head_dim, heads * shape.head_dim),
            "key_cosine": zeros(heads, heads),
            "value_cosine": zeros(heads, heads),
        }

    def update(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> None:
        """Add one batch.

        Args:
            query: (B, T, H D), queries before RoPE.
            key: (B, T, K D), keys before RoPE.
            value: (B, T, K D).
            mask: (B, T), nonzero at tokens that count; None counts all.
        """
        shape, device = self.shape, self._sums["tokens"].device
        query, key, value = (counted(activation, mask).to(device) for activation in (query, key, value))
        self._sums["tokens"] += len(key)
        self._sums["value_outer"] += outer_sum(value, value)
        query = query.unflatten(-1, (shape.num_attention_heads, shape.head_dim))
        key, value = (part.unflatten(-1, (shape.base_kv_heads, shape.head_dim)) for part in (key, value))
        self._sums["query_energy"] += self._query_energy(query[..., : shape.rotary_dim])
        self._sums["key_gram"] += _complex_gram(key[..., : shape.rotary_dim])
        self._add_pass(query[..., shape.rotary_dim :], key[..., shape.rotary_dim :])
        self._sums["key_cosine"] += _cosine_sum(key)
        self._sums["value_cosine"] += _cosine_sum(value)

    def _query_energy(self, query: Tensor) -> Tensor:  # (N, H, R) -> (F, K)
        energy = torch.linalg.vector_norm(query, dim=0, dtype=product_dtype(query)).square()
        per_pair = energy.unflatten(-1, (2, -1)).sum(1)
        return per_pair.unflatten(0, (self.shape.base_kv_heads, -1)).sum(1).T

    def _add_pass(self, query: Tensor, key: Tensor) -> None:  # (N, H, P), (N, K, P)
        kv_heads, queries = self.shape.base_kv_heads, self.shape.queries_per_kv
        query = query.unflatten(1, (kv_heads, queries)).transpose(0, 1).flatten(1, 2)  # (K, N r, P)
        self._sums["query_pass"] += products(query.mT, query)
        self._sums["key_pass"] += outer_sum(key.flatten(1), key.flatten(1))
        self._sums["key_pass_sum"] += key.flatten(1).sum(0, dtype=product_dtype(key))

    @property
    def tokens(self) -> int:
        """Tokens seen so far, on this rank until ``reduce``."""
        return int(self._sums["tokens"].item())

    def reduce(self) -> None:
        """Add up the sums of all ranks, in place; afterwards every rank holds the same bits."""
        sum_over_ranks(self._sums.values())

    def moments(self, output_weight: Tensor) -> LayerMoments:
        """Divide, weight and freeze.

        Args:
            output_weight: (E, H D), o_proj's weight; gives the metric of the values.

        Raises:
            ValueError: no token was seen, or an activation or weight is not finite.
        """
        if self.tokens == 0:
            raise ValueError("no token was seen: every position is masked; check attention_mask.")
        not_finite = [name for name, total in self._sums.items() if not torch.isfinite(total).all()]
        if not_finite:
            raise ValueError(f"NaN or inf in the activations (seen in {', '.join(not_finite)}): check the model.")
        shape, count = self.shape, self._sums["tokens"]
        sums = {name: total / count for name, total in self._sums.items()}
        key_root = _floor(sums["query_energy"]).sqrt()
        mean = sums["key_pass_sum"]
        pass_root = metric_root(sums["query_pass"])
        value_root = metric_root(output_metric(output_weight.to(count), shape))
        return LayerMoments(
            shape=shape,
            tokens=self.tokens,
            key_gram=_hermitian(sums["key_gram"]) * key_root[:, :, None] * key_root[:, None, :],
            key_root=key_root,
            key_pass=_weighted(sums["key_pass"] - mean[:, None] * mean, pass_root),
            pass_root=pass_root,
            value_cov=_weighted(sums["value_outer"], value_root),
            value_root=value_root,
            key_cosine=sums["key_cosine"],
            value_cosine=sums["value_cosine"],
        )


def output_metric(output_weight: Tensor, shape: HeadShape) -> Tensor:
    """What an error of a KV head's value costs at o_proj's output: (E, H D) -> (K, D, D), sum of W_o,h^T W_o,h."""
    per_head = output_weight.unflatten(1, (shape.base_kv_heads, shape.queries_per_kv, shape.head_dim))
    return torch.einsum("ekrd,ekrc->kdc", per_head, per_head)


def product_dtype(activation: Tensor) -> torch.dtype:
    """dtype of products of activations: float64, float32 for those of 16 bits, whose products it holds exactly."""
    return torch.float64 if activation.dtype in (torch.float32, torch.float64) else torch.float32


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


def counted(activation: Tensor, mask: Tensor | None) -> Tensor:
    """Tokens that count: (B, T, M) and a mask (B, T), nonzero where they do, or None for all -> (N, M)."""
    return activation.flatten(0, 1) if mask is None else activation[mask.bool().to(activation.device)]


def metric_root(metric: Tensor) -> Tensor:
    """Symmetric root of positive semi-definite (..., N, N), with eigenvalues floored so that it can be inverted."""
    if metric.shape[-1] == 0:
        return metric
    values, vectors = _eigh_of_each(_hermitian(metric))
    # Relative to the heaviest head too: a head that nothing reads must not get a root that underflows.
    floor = _ROOT_FLOOR * torch.maximum(values[..., -1:], values.max() * _ROOT_FLOOR)
    values = torch.maximum(values, floor.clamp_min(_TINY))
    return (vectors * values.sqrt().unsqueeze(-2)) @ vectors.mH


def sum_over_ranks(tensors: Iterator[Tensor] | Sequence[Tensor]) -> None:
    """Sum each tensor over torch.distributed's default group (accelerate's), in place; alone, do nothing."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    for tensor in tensors:
        shared = tensor.cuda() if dist.get_backend() == "nccl" else tensor.cpu()
        real = torch.view_as_real(shared) if shared.is_complex() else shared
        if real.numel():
            dist.all_reduce(real)
            dist.broadcast(real, src=0)  # same bits everywhere, so that every rank decides the same
        tensor.copy_(shared)


def _complex_gram(keys: Tensor) -> Tensor:  # (N, K, R) -> (F, K, K), sum over tokens of kappa_k conj(kappa_l)
    heads = keys.shape[1]
    parts = keys.unflatten(-1, (2, -1)).permute(3, 2, 1, 0).flatten(1, 2)  # (F, 2 K, N): real parts, then imaginary
    real, mixed = products(parts, parts.mT).split(heads, dim=1)
    real, mixed = real.split(heads, dim=2), mixed.split(heads, dim=2)
    return torch.complex(real[0] + mixed[1], mixed[0] - real[1])


def _cosine_sum(heads: Tensor) -> Tensor:  # (N, K, D) -> (K, K)
    gram = products(heads, heads.mT)
    norm = gram.diagonal(dim1=-2, dim2=-1).sqrt().clamp_min(1e-12)
    return (gram / norm[:, :, None] / norm[:, None, :]).sum(0)


def _eigh_of_each(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """torch.linalg.eigh of (..., N, N) on the CPU, in threads."""
    parts = matrices.cpu().flatten(0, -3).split(1) if matrices.dim() > 2 else [matrices.cpu()]
    values, vectors = (torch.cat(part) for part in zip(*map_in_threads(torch.linalg.eigh, parts), strict=True))
    return values.view(matrices.shape[:-1]).to(matrices.device), vectors.view(matrices.shape).to(matrices.device)


def _floor(energy: Tensor) -> Tensor:
    return energy.clamp_min(max(_ROOT_FLOOR * energy.max().item(), _TINY)) if energy.numel() else energy


def _hermitian(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mH) / 2


def _weighted(outer: Tensor, root: Tensor) -> Tensor:  # (K N, K N), (K, N, N) -> blocks root_k outer_kl root_l
    heads, size = root.shape[:2]
    blocks = outer.reshape(heads, size, heads, size)
    half = torch.einsum("kab,kblc->kalc", root, blocks)
    full = torch.einsum("kalc,lcd->kald", half, root)
    return _hermitian(full.reshape(heads * size, heads * size))
