"""Beginnings of texts, of which a calibration holds too few."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

TOKENS_A_START = 32
"""Tokens of a text for each start taken from it, so that starts are 3 % of what is fitted."""


def row_starts(batches: list[dict[str, Tensor]], beginning: int | None) -> list[Tensor]:
    """Rows of a single token, taken at even distances from the batches' texts, as batches (B, 1).

    A row's first token attends to itself alone, so what enters o_proj there is unlike all else, and many models give
    it the states that all later tokens attend to (attention sinks, Xiao et al. 2024, arXiv 2309.17453; massive
    activations, Sun et al. 2024, arXiv 2402.17762). A few hundred texts have a few hundred first tokens, fewer than a
    fit has unknowns: it would be right for the rest of them and wrong for what the rest depends on.

    Args:
        batches: as checked; masked tokens are left out, packed texts begin where their positions do.
        beginning: the model's own token that texts begin with, if it has one; as often among the starts as there are
            texts.

    Returns:
        Batches no larger than the largest given; none if all texts begin alike, because then there is one such state,
        and the batches show it.
    """
    firsts, starts = set(), []
    for text in _texts(batches):
        firsts.add(int(text[0]))
        if beginning is not None:
            starts.append(torch.tensor([beginning]))
        starts.append(text[TOKENS_A_START // 2 :: TOKENS_A_START])
    if len(firsts) < 2:
        return []
    largest = max(batch["input_ids"].numel() for batch in batches)
    return list(torch.cat(starts)[:, None].split(largest))


def _texts(batches: list[dict[str, Tensor]]) -> Iterator[Tensor]:
    """The tokens of one text after the other, on the CPU."""
    for batch in batches:
        mask, positions = batch.get("attention_mask"), batch.get("position_ids")
        for index, row in enumerate(batch["input_ids"].cpu()):
            texts = [row]
            if mask is not None:
                texts = [row[mask[index].bool().cpu()]]
            elif positions is not None:
                # Packed documents, of which each begins at position 0.
                begins = (positions[index].cpu()[1:] == 0).nonzero().flatten() + 1
                texts = row.tensor_split(begins)
            yield from filter(len, texts)
