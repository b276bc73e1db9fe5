"""Many small eigenproblems at a time, each on one thread of the CPU.

A GPU's solver takes matrices of a few hundred rows one after another and LAPACK gains nothing from several threads on
one of them, so that this is the fastest way to thousands of them on either machine.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


_settings = threading.Lock()
_callers: list[int] = []
"""An entry for each call of `map_in_threads` that is running: how many threads torch may use outside of them."""


def map_in_threads(function: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    """[function(item) for item in items], in as many threads as torch may use, each with a single-threaded torch.

    Several callers at a time, from threads of their own, take as many each.
    """
    with _settings:
        threads = _callers[0] if _callers else torch.get_num_threads()
        _callers.append(threads)
        # For the threads started below, which would otherwise start as many each.
        torch.set_num_threads(1)
    try:
        if min(threads, len(items)) <= 1:
            return [function(item) for item in items]
        with ThreadPoolExecutor(min(threads, len(items))) as pool:
            return list(pool.map(function, items))
    finally:
        with _settings:
            _callers.pop()
            if not _callers:
                torch.set_num_threads(threads)
