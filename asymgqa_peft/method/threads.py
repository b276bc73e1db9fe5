"""How many threads of the CPU work on what: many small eigenproblems at a time, each on one of them.

A GPU's solver takes matrices of a few hundred rows one after another and LAPACK gains nothing from several threads on
one of them, so that this is the fastest way to thousands of them on either machine.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

_of_this_thread = threading.local()

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@contextmanager
def share_of_cores() -> Iterator[None]:
    """As many threads for torch as this process has cores, where a launcher of several left it only one.

    torchrun and `accelerate launch` do so unless OMP_NUM_THREADS is set. The searches would then take so much longer
    that an initialisation on several GPUs is slower than on one.
    """
    allowed, processes = torch.get_num_threads(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if allowed == 1 and processes > 1:
        # Not all systems know which cores a process may use.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // processes))
    try:
        yield
    finally:
        torch.set_num_threads(allowed)


def use_threads(count: int) -> None:
    """Say how many threads torch may use for what this thread calls; what other threads said stays."""
    # A thread's first look takes over what any thread has set last: it must not come after its own setting.
    torch.get_num_threads()
    torch.set_num_threads(count)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for factorisations of narrow matrices: more gain nothing, and wait for each other at every column.

    Where neighbours keep the cores busy they wait long: a QR of 576 x 144 on two cores takes 20 to 35 times the time.
    """
    allowed = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(allowed)


def map_in_threads(function: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    """[function(item) for item in items], in as many threads as torch may use, each with a single-threaded torch."""
    allowed = torch.get_num_threads()
    if min(allowed, len(items)) <= 1:
        return [function(item) for item in items]
    try:
        return list(_workers(allowed).map(function, items))
    finally:
        # What new threads take over.
        torch.set_num_threads(allowed)


def _workers(count: int) -> ThreadPoolExecutor:
    """The calling thread's own, which end with it: starting them for every call would take longer than many a call."""
    # A process that was forked has none of its parent's threads.
    wanted = count, os.getpid()
    if getattr(_of_this_thread, "wanted", None) != wanted:
        _of_this_thread.wanted = wanted
        _of_this_thread.workers = ThreadPoolExecutor(count, initializer=use_threads, initargs=(1,))
    return _of_this_thread.workers
