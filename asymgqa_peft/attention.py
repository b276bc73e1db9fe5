"""Decoding in transformers that reads shared K/V heads as the cache holds them, for those who use no engine.

transformers' sdpa writes K/V out for every query head as soon as a mask is given (a static cache, padding), since 5.23
under torch.compile only: any grouped-query model is then slower than the multi-head one it came from.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "grouped_sdpa"
_SPECIAL = ("cache", "position_bias", "softcap")
"""Options that change what is attended to or how: paged caches, biases of scores, capped scores."""


def register_grouped_sdpa() -> None:
    """Make "grouped_sdpa" known to transformers, for `model.set_attn_implementation("grouped_sdpa")`.

    It is sdpa, but a decoding step over shared heads expands nothing: masks, padding, static caches and torch.compile
    included. Works for any grouped-query model, wrapped or merged.
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
    """
    grouped_step = query.shape[2] == 1 and query.shape[1] != key.shape[1]
    one_mask = attention_mask is None or attention_mask.shape[1] == 1
    if not grouped_step or not one_mask or any(kwargs.get(name) is not None for name in _SPECIAL):
        kwargs |= {"dropout": dropout, "scaling": scaling}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    folded = fold(query, key.shape[1])
    out = F.scaled_dot_product_attention(folded, key, value, attention_mask, dropout, scale=scaling)
    return out.reshape(query.shape).transpose(1, 2).contiguous(), None


def fold(query: Tensor, kv_heads: int) -> Tensor:
    """(B, G p, 1, D) -> (B, G, p, D)."""
    return query.reshape(query.shape[0], kv_heads, -1, query.shape[-1])
