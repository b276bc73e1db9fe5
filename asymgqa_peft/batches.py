"""What a caller may pass as batches of tokens, checked before anything is computed from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

Batch = Mapping[str, Tensor] | Tensor
"""`input_ids` (B, T) with an optional `attention_mask` and optional `labels` of that shape, or token ids (B, T)."""


def checked_batches(batches: Iterable[Batch]) -> list[dict[str, Tensor]]:
    """All batches as dicts of `input_ids` and, where given, `attention_mask` and `labels`, each (B, T).

    Raises:
        ValueError: if `batches` is a single batch or none at all, or for the first batch that is malformed.
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
    checked = {"input_ids": ids}
    for name in ("attention_mask", "labels"):
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
