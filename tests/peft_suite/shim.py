"""A pytest plugin for PEFT's own tests: what they import beside it, and which cannot pass, each with its reason."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

import asymgqa_peft  # noqa: F401 (registers the method)

if "diffusers" not in sys.modules:
    # Imported by the common tests for those of image models, of which none runs here.
    diffusers = ModuleType("diffusers")
    diffusers.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
    sys.modules["diffusers"] = diffusers

CANNOT_PASS = {
    "test_merge_layers_multi": "merges two adapters into one model: attention has one set of K/V heads",
    "test_weighted_combination_of_adapters": "adds adapters up: their shared K/V heads live in different bases",
    "test_adding_multiple_adapters_with_bias_raises": "expects bias='all' to be refused for the second adapter: ours "
    "refuses it for the first, K/V biases belong to the shared heads",
}
"""Name of a test function -> why it cannot pass. One that does pass all the same is a failure."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        reason = CANNOT_PASS.get(item.originalname)
        if reason:
            item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
