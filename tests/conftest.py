"""The environment of the tests and the fixtures of the three small bases. No test reaches the network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries read it
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from models import BASES, GROUPS, wrap

torch.set_num_threads(1)  # the suite runs in parallel processes, and the models are too small to gain from threads


@pytest.fixture(params=sorted(BASES))
def family(request) -> str:
    """Every one of the three bases in turn."""
    return request.param


@pytest.fixture
def base(family):
    """The family's untouched model."""
    return BASES[family]()


@pytest.fixture
def wrapped(base, family):
    """The model under an adapter of unequal groups with random weights."""
    return wrap(base, GROUPS[family])
