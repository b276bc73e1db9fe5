"""Attention in transformers that reads shared K/V heads, and packed rows, as they lie, for those who use no engine.

transformers' sdpa writes K/V out for every query head as soon as a mask is given (a static cache, padding), since 5.23
under torch.compile only: any grouped-query model is then slower than the multi-head one it came from. Rows into which
several documents are packed get a mask of all positions against all from it, and lose the flash kernels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "grouped_sdpa"
_SPECIAL = ("cache", "position_bias", "softcap")
"""Options that change what is attended to or how: paged caches, biases of scores, capped scores."""


def register_grouped_sdpa() -> None:
    """Make "grouped_sdpa" known to transformers, for `model.set_attn_implementation("grouped_sdpa")`.

    It is sdpa, but a decoding step over shared heads expands nothing: masks, padding, static caches and torch.compile
    included. And documents packed into one row, as TRL packs them, go through PyTorch's flash attention for sequences
    of different lengths on a GPU. Works for any grouped-query model, wrapped or merged.
    """
    AttentionInterface.register(NAME, grouped_sdpa)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def grouped_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' sdpa, with the query heads of a K/V head folded into query positions in a decoding step.

    The positions of a step all see the same keys, so query heads (B, G p, 1, D) may stand as (B, G, p, D) beside
    keys and values (B, G, S, D). Several positions, a mask of its own for every head, multi-head attention and
    `_SPECIAL` options go to sdpa as they are.

    Packed rows are known by `cu_seq_lens_q`, which TRL's collator gives with them: where their documents start. See
    `packed_attention`.
    """
    is_special = any(kwargs.get(name) is not None for name in _SPECIAL)
    if kwargs.get("cu_seq_lens_q") is not None and not is_special and is_packable(query, key, dropout):
        return packed_attention(query, key, value, scaling, **kwargs), None
    grouped_step = query.shape[2] == 1 and query.shape[1] != key.shape[1]
    one_mask = attention_mask is None or attention_mask.shape[1] == 1
    if not grouped_step or not one_mask or is_special:
        kwargs |= {"dropout": dropout, "scaling": scaling}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    folded = fold(query, key.shape[1])
    out = F.scaled_dot_product_attention(folded, key, value, attention_mask, dropout, scale=scaling)
    return out.reshape(query.shape).transpose(1, 2).contiguous(), None


def is_packable(query: Tensor, key: Tensor, dropout: float) -> bool:
    """Whether the kernel for packed rows can take them: one row, multi-head, half precision on a GPU, no dropout."""
    half = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
    return half and query.shape == key.shape and len(query) == 1 and dropout == 0.0


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    sliding_window: int | None = None,
    **_,
) -> Tensor:
    """Causal attention within each document of one row: (1, H, T, D) each -> (1, T, H, D).

    Args:
        cu_seq_lens_q: (documents + 1,) int32, where documents start, and T.
        max_length_q: length of the longest.
        sliding_window: how many positions a query sees, its own included; None for all before it.
    """
    window = (-1, 0)
    if sliding_window is not None:
        window = (sliding_window - 1, 0)
    rows = [heads[0].transpose(0, 1) for heads in (query, key, value)]
    starts, longest = (cu_seq_lens_q, cu_seq_lens_q), (max_length_q, max_length_q)
    return varlen_attn(*rows, *starts, *longest, scale=scaling, window_size=window)[None]


def fold(query: Tensor, kv_heads: int) -> Tensor:
    """(B, G p, 1, D) -> (B, G, p, D)."""
    return query.reshape(query.shape[0], kv_heads, -1, query.shape[-1])
