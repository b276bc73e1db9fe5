"""What a caller may pass as batches of tokens, checked before anything is computed from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

Batch = Mapping[str, Tensor] | Tensor
"""`input_ids` (B, T), optionally `attention_mask`, `position_ids` and `labels` of that shape, or token ids (B, T).

Positions that begin again within a row are packed documents, none of which attends to another: without a mask.
"""
_BESIDE_IDS = ("attention_mask", "position_ids", "labels")


def checked_batches(batches: Iterable[Batch]) -> list[dict[str, Tensor]]:
    """All batches as dicts of `input_ids` and what is given beside it, each (B, T).

    Raises:
        ValueError: if `batches` is a single batch or none at all, or for the first batch that is malformed or holds
            what would not be read.
    """
    if isinstance(batches, Tensor | Mapping) or not isinstance(batches, Iterable):
        raise ValueError(
            f"batches is a {type(batches).__name__}: pass an iterable of batches, e.g. input_ids.split(8)."
        )
    return [_checked_batch(index, batch) for index, batch in enumerate(batches)]


def _checked_batch(index: int, batch: object) -> dict[str, Tensor]:
    given = batch if isinstance(batch, Mapping) else {"input_ids": batch}
    ids = given.get("input_ids")
    holds_text = "input_ids" not in given and any(isinstance(value, str) for value in given.values())
    if isinstance(batch, str) or holds_text:
        raise ValueError(
            f"batches[{index}] is a {type(batch).__name__} of text: tokenise it, e.g. [tokenizer(text, "
            "return_tensors='pt', truncation=True, max_length=2048) for text in texts]."
        )
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or ids.numel() == 0:
        raise ValueError(
            f"batches[{index}]: input_ids must be integers of shape (B, T), got {_seen(ids)}: pass LongTensors "
            "(B, T), or dicts that hold one as 'input_ids'."
        )
    # Tokenizers write token_type_ids unasked, and no supported model has them.
    for name in sorted(given.keys() - {"input_ids", "token_type_ids", *_BESIDE_IDS}):
        if given[name] is not None:
            raise ValueError(
                f"batches[{index}] holds {name!r}, which is not read: only input_ids, {', '.join(_BESIDE_IDS)} are. "
                "Leave it out if the model does not need it."
            )
    checked = {"input_ids": ids}
    for name in _BESIDE_IDS:
        tensor = given.get(name)
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor) or tensor.shape != ids.shape:
            raise ValueError(
                f"batches[{index}]: {name} must have input_ids' shape {tuple(ids.shape)}, got {_seen(tensor)}: pad it "
                "as input_ids are, or leave it out."
            )
        checked[name] = tensor
    return checked


def _seen(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return type(value).__name__
