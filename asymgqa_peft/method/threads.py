"""Many small eigenproblems at a time, each on one thread of the CPU.

A GPU's solver takes matrices of a few hundred rows one after another and LAPACK gains nothing from several threads on
one of them, so that this is the fastest way to thousands of them on either machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def map_in_threads(function: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    """[function(item) for item in items], in as many threads as torch may use, each with a single-threaded torch."""
    threads = torch.get_num_threads()
    if min(threads, len(items)) <= 1:
        return [function(item) for item in items]
    torch.set_num_threads(1)  # for the threads started below, which would otherwise start as many each
    try:
        with ThreadPoolExecutor(min(threads, len(items))) as pool:
            return list(pool.map(function, items))
    finally:
        torch.set_num_threads(threads)
