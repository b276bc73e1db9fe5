"""What a user chooses by name, and which of the choices go together."""

from __future__ import annotations

from typing import Literal

Grouping = Literal["neighbour", "random", "symmetric", "asymmetric"]
Criterion = Literal["cosine", "residual"]
Merge = Literal["mean", "aligned", "principal"]

MERGES_OF_ANY_WIDTH: tuple[Merge, ...] = ("principal",)
"""Merges that can fill a shared head that is wider or narrower than the base's."""


def check_width(merge: Merge, head_dim: int | None, base_head_dim: int) -> None:
    """Raise ValueError if the merge cannot make shared heads of W = ``head_dim`` out of heads of D dimensions.

    Args:
        merge: how a group's heads become one.
        head_dim: W; None is D.
        base_head_dim: D.
    """
    if head_dim in (None, base_head_dim) or merge in MERGES_OF_ANY_WIDTH:
        return
    raise ValueError(
        f"head_dim={head_dim} does not go with merge={merge!r}, which averages heads in one basis of {base_head_dim} "
        'dimensions and has no others to fill: use merge="principal", or head_dim=None.'
    )
