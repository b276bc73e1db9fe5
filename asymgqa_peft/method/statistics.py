"""Streaming second moments of one layer's queries, keys and values: all that search and merge need to know.

Everything is a sum of outer products over tokens, so that memory does not grow with the number of tokens and the
sums of several processes simply add up. ``LayerStatistics`` accumulates, ``LayerMoments`` is the frozen result.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

import torch
import torch.distributed as dist
from torch import Tensor

from ..heads import HeadShape
from .linalg import (
    ROOT_FLOOR,
    TINY,
    blocks_of,
    hermitian,
    metric_root,
    outer_sum,
    product_dtype,
    products,
    times_blocks,
)

_HEADS_AT_A_TIME = 4
"""Whose rows of the values' covariance are weighted."""


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
        key_cosine, value_cosine: (K, K) mean over tokens of the cosine between two heads' keys or values.
        query_energy: (H, F) E|q_j|^2 of each query head.
        query_power: (H, F) the same of queries before their norm; None without norms.
        key_gram_before_norm: (F, K, K) complex128, E[kappa_k conj(kappa_l)] of keys before their norm; None without.
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
    query_energy: Tensor
    query_power: Tensor | None = None
    key_gram_before_norm: Tensor | None = None

    @property
    def key_power(self) -> Tensor:
        """(K, F) E|kappa_k|^2 of keys before their norm."""
        return self.key_gram_before_norm.diagonal(dim1=-2, dim2=-1).real.T

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

    def key_blocks(self, members: Tensor) -> tuple[Tensor, Tensor]:
        """``key_gram`` and ``key_root`` of b groups of n heads, (b, n): (b, F, n, n) and (b, F, n), both complex."""
        gram = self.key_gram[:, members[:, :, None], members[:, None, :]].transpose(0, 1)
        return gram, self.key_root[:, members].transpose(0, 1).to(gram.dtype)

    def pass_blocks(self, members: Tensor) -> tuple[Tensor, Tensor]:
        """``key_pass`` and ``pass_root`` of b groups of n heads, (b, n): (b, n P, n P) and (b, n, P, P)."""
        return blocks_of(self.key_pass, members, self.shape.pass_dim), self.pass_root[members]

    def value_blocks(self, members: Tensor) -> tuple[Tensor, Tensor]:
        """``value_cov`` and ``value_root`` of b groups of n heads, (b, n): (b, n D, n D) and (b, n, D, D)."""
        return blocks_of(self.value_cov, members, self.shape.head_dim), self.value_root[members]

    def for_search(self) -> LayerMoments:
        """The same with values in float32, for costs under merge="principal".

        Eigenvalues take half the time, and their sums are still known to a millionth. In units of the values' energy,
        so that no activations underflow.
        """
        if not self.shape.free_values:
            # Such values are averaged, and their costs take no eigenvalue.
            return self
        energy = self.value_energy.clamp_min(torch.finfo(torch.float64).tiny)
        single = torch.empty_like(self.value_cov, dtype=torch.float32)
        return replace(self, value_cov=torch.div(self.value_cov, energy, out=single))

    def to(self, device: torch.device | str) -> LayerMoments:
        """The same moments on another device."""
        moved = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                moved[field.name] = value.to(device, non_blocking=True)
        if self.key_gram.is_cuda:
            # Copies go through pinned memory, which is ten times as fast, but has to be waited for.
            torch.cuda.current_stream(self.key_gram.device).synchronize()
        return replace(self, **moved)


class LayerStatistics:
    """Accumulates one layer's sums over batches, in float64; a batch's products are those of `outer_sum`.

    Attributes:
        token_count: (1,) tokens that counted.
        query_energy: (H, F) sum of |q_f|^2 over tokens.
        query_power: (H, F) the same before the norm; None without norms.
        query_pass: (K, P, P) sum of q q^T of the pass-through queries, over the query heads of each KV head.
        key_gram: (F, K, K) complex, sum of kappa_k conj(kappa_l) of the complex keys.
        key_gram_before_norm: the same before the norm; None without norms.
        key_pass, key_pass_sum: (K P, K P) sum of outer products of the pass-through keys, and (K P,) their sum.
        value_outer: (K D, K D) sum of outer products of the values.
        key_cosine, value_cosine: (K, K) sum of the cosines between two heads' keys, and values.
    """

    def __init__(self, shape: HeadShape, device: torch.device | str = "cpu"):
        self.shape = shape
        heads, frequencies, passing = shape.base_kv_heads, shape.rotary_dim // 2, shape.pass_dim
        real = {"dtype": torch.float64, "device": device}
        self.token_count = torch.zeros(1, **real)
        self.query_energy = torch.zeros(shape.num_attention_heads, frequencies, **real)
        self.query_pass = torch.zeros(heads, passing, passing, **real)
        self.key_gram = torch.zeros(frequencies, heads, heads, dtype=torch.complex128, device=device)
        self.query_power = self.key_gram_before_norm = None
        if shape.norm_span is not None:
            self.query_power = torch.zeros_like(self.query_energy)
            self.key_gram_before_norm = torch.zeros_like(self.key_gram)
        self.key_pass = torch.zeros(heads * passing, heads * passing, **real)
        self.key_pass_sum = torch.zeros(heads * passing, **real)
        self.value_outer = torch.zeros(heads * shape.head_dim, heads * shape.head_dim, **real)
        self.key_cosine = torch.zeros(heads, heads, **real)
        self.value_cosine = torch.zeros(heads, heads, **real)

    @property
    def tokens(self) -> int:
        """Tokens seen so far, on this rank until ``reduce``."""
        return int(self.token_count.item())

    def update(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        query_before_norm: Tensor | None = None,
        key_before_norm: Tensor | None = None,
    ) -> None:
        """Add one batch.

        Args:
            query: (B, T, H D), queries before RoPE, behind their norm if they have one.
            key: (B, T, K D), keys before RoPE, likewise.
            value: (B, T, K D).
            mask: (B, T), nonzero at tokens that count; None counts all.
            query_before_norm, key_before_norm: as query and key, what a norm gets; needed where there are norms.
        """
        shape, device = self.shape, self.token_count.device
        query = tokens_that_count(query, mask).to(device)
        key = tokens_that_count(key, mask).to(device)
        value = tokens_that_count(value, mask).to(device)
        self.token_count += len(key)
        self.value_outer += outer_sum(value, value)
        if shape.norm_span is not None:
            self.query_power += self._pair_energy(tokens_that_count(query_before_norm, mask).to(device))
            key_rows = tokens_that_count(key_before_norm, mask).to(device).unflatten(-1, (shape.base_kv_heads, -1))
            self.key_gram_before_norm += _complex_gram(key_rows[..., : shape.rotary_dim])
        self.query_energy += self._pair_energy(query)
        # From here on by head: (N, H, D) and (N, K, D).
        query = query.unflatten(-1, (shape.num_attention_heads, shape.head_dim))
        key = key.unflatten(-1, (shape.base_kv_heads, shape.head_dim))
        value = value.unflatten(-1, (shape.base_kv_heads, shape.head_dim))
        self.key_gram += _complex_gram(key[..., : shape.rotary_dim])
        self._add_pass(query[..., shape.rotary_dim :], key[..., shape.rotary_dim :])
        self.key_cosine += _cosine_sum(key)
        self.value_cosine += _cosine_sum(value)

    def _pair_energy(self, rows: Tensor) -> Tensor:  # (N, heads D) -> (heads, F)
        rotary = rows.unflatten(-1, (-1, self.shape.head_dim))[..., : self.shape.rotary_dim]
        energy = torch.linalg.vector_norm(rotary, dim=0, dtype=product_dtype(rows)).square()
        return energy.unflatten(-1, (2, -1)).sum(1)

    def _add_pass(self, query: Tensor, key: Tensor) -> None:  # (N, H, P), (N, K, P)
        kv_heads, queries = self.shape.base_kv_heads, self.shape.queries_per_kv
        query = query.unflatten(1, (kv_heads, queries)).transpose(0, 1).flatten(1, 2)  # (K, N r, P)
        self.query_pass += products(query.mT, query)
        self.key_pass += outer_sum(key.flatten(1), key.flatten(1))
        self.key_pass_sum += key.flatten(1).sum(0, dtype=product_dtype(key))

    def _sums(self) -> dict[str, Tensor]:
        """All sums by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def reduce(self) -> None:
        """Add up the sums of all ranks, in place; afterwards every rank holds the same bits."""
        sum_over_ranks(self._sums().values())

    def moments(self, output_weight: Tensor) -> LayerMoments:
        """Divide, weight and freeze.

        Args:
            output_weight: (E, H D), o_proj's weight; gives the metric of the values.

        Raises:
            ValueError: no token was seen, or an activation or weight is not finite.
        """
        if self.tokens == 0:
            raise ValueError("no token was seen: every position is masked; check attention_mask.")
        not_finite = [name for name, total in self._sums().items() if not torch.isfinite(total).all()]
        if not_finite:
            raise ValueError(f"NaN or inf in the activations (seen in {', '.join(not_finite)}): check the model.")
        count = self.token_count
        query_energy = self.query_energy / count
        per_kv_head = query_energy.unflatten(0, (self.shape.base_kv_heads, -1)).sum(1).T
        key_root = _floored(per_kv_head).sqrt()
        pass_mean = self.key_pass_sum / count
        before_norm = {}
        if self.shape.norm_span is not None:
            before_norm["query_power"] = self.query_power / count
            before_norm["key_gram_before_norm"] = hermitian(self.key_gram_before_norm / count)
        pass_root = metric_root(self.query_pass / count)
        value_root = metric_root(output_metric(output_weight.to(count), self.shape))
        return LayerMoments(
            shape=self.shape,
            tokens=self.tokens,
            key_gram=hermitian(self.key_gram / count) * key_root[:, :, None] * key_root[:, None, :],
            key_root=key_root,
            key_pass=_weighted(self.key_pass / count - pass_mean[:, None] * pass_mean, pass_root),
            pass_root=pass_root,
            value_cov=_weighted(self.value_outer, value_root).div_(count),
            value_root=value_root,
            key_cosine=self.key_cosine / count,
            value_cosine=self.value_cosine / count,
            query_energy=query_energy,
            **before_norm,
        )


def output_metric(output_weight: Tensor, shape: HeadShape) -> Tensor:
    """What an error of a KV head's value costs at o_proj's output: (E, H D) -> (K, D, D), sum of W_o,h^T W_o,h."""
    per_head = output_weight.unflatten(1, (shape.base_kv_heads, shape.queries_per_kv, shape.head_dim))
    return torch.einsum("ekrd,ekrc->kdc", per_head, per_head)


def tokens_that_count(activation: Tensor, mask: Tensor | None) -> Tensor:
    """Tokens that a mask (B, T) leaves, nonzero where they count, or all for None: (B, T, M) -> (N, M)."""
    if mask is None:
        return activation.flatten(0, 1)
    return activation[mask.bool().to(activation.device)]


def sum_over_ranks(tensors: Iterable[Tensor]) -> None:
    """Sum each tensor over torch.distributed's default group (accelerate's), in place; alone, do nothing."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    for tensor in tensors:
        # NCCL reduces on the GPU only, the other backends on the CPU.
        shared = tensor.cuda() if dist.get_backend() == "nccl" else tensor.cpu()
        real = torch.view_as_real(shared) if shared.is_complex() else shared
        if real.numel():
            dist.all_reduce(real)
            # The same bits everywhere, so that every rank decides the same.
            dist.broadcast(real, src=0)
        tensor.copy_(shared)


def _complex_gram(keys: Tensor) -> Tensor:  # (N, K, R) -> (F, K, K), sum over tokens of kappa_k conj(kappa_l)
    heads = keys.shape[1]
    # Real parts, then imaginary. Numbers move within their token only, which a GPU copies several times as fast.
    parts = keys.unflatten(-1, (2, -1)).permute(0, 3, 2, 1).flatten(2, 3).transpose(0, 1)  # (F, N, 2 K)
    real, mixed = products(parts.mT, parts).split(heads, dim=1)
    real, mixed = real.split(heads, dim=2), mixed.split(heads, dim=2)
    return torch.complex(real[0] + mixed[1], mixed[0] - real[1])


def _cosine_sum(heads: Tensor) -> Tensor:  # (N, K, D) -> (K, K)
    gram = products(heads, heads.mT)
    norm = gram.diagonal(dim1=-2, dim2=-1).sqrt().clamp_min(1e-12)
    return (gram / norm[:, :, None] / norm[:, None, :]).sum(0)


def _floored(energy: Tensor) -> Tensor:
    """Energies (F, K) that a root of can be divided by."""
    if energy.numel() == 0:
        return energy
    return energy.clamp_min(max(ROOT_FLOOR * energy.max().item(), TINY))


def _weighted(outer: Tensor, root: Tensor) -> Tensor:  # (K N, K N), (K, N, N) -> blocks root_k outer_kl root_l
    size = root.shape[1]
    if size == 0:
        return outer
    weighted = torch.empty_like(outer)
    # By rows of some heads: in float64 such a matrix of a 7B is 134 MB.
    rows = _HEADS_AT_A_TIME * size
    for own, part, into in zip(root.split(_HEADS_AT_A_TIME), outer.split(rows), weighted.split(rows), strict=True):
        half = (own @ part.unflatten(0, (-1, size))).flatten(0, 1)
        into.copy_(times_blocks(half[None], root[None])[0])
    return hermitian(weighted)
