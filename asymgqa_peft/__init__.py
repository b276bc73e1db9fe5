"""AsymGQA as a PEFT method: pretrained multi-head attention becomes grouped-query attention.

Importing the package registers the method (`PeftType.ASYM_GQA`), so that `get_peft_model` and
`PeftModel.from_pretrained` know it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .adapter.model import AsymGQAModel, register
from .config import AsymGQAConfig
from .groups import HeadGroups

if TYPE_CHECKING:
    from .footprint import ExportReport, export_report
    from .initialize import InitializationReport, initialize_asymgqa_weights
    from .trainer import AsymGQATrainer

__version__ = "0.1.0"
__all__ = [
    "AsymGQAConfig",
    "AsymGQAModel",
    "AsymGQATrainer",
    "ExportReport",
    "HeadGroups",
    "InitializationReport",
    "export_report",
    "initialize_asymgqa_weights",
]

_LAZY = {
    "AsymGQATrainer": "trainer",  # imports trl, which takes seconds
    "ExportReport": "footprint",
    "InitializationReport": "initialize",
    "export_report": "footprint",
    "initialize_asymgqa_weights": "initialize",
}

register()


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_LAZY[name]}", __name__), name)
