"""Where plain checkpoints have been run: the table of `recipes/ENGINES.md`, as data."""

from __future__ import annotations

from typing import NamedTuple


class Engine(NamedTuple):
    """An engine that has loaded exports of the bundled model, a Llama, and given the adapter's logits."""

    name: str
    # Whether exports with heads wider than the base's were run, not only those of the base's width.
    runs_wide: bool = True
    # What it needs for wide heads beside the checkpoint.
    needs: str | None = None


ENGINES = (
    Engine("transformers"),
    Engine("mlx-lm"),
    Engine("ONNX Runtime"),
    Engine("OpenVINO"),
    Engine("CTranslate2", needs="recipes/convert_ctranslate2.py"),
    Engine("llama.cpp", needs="recipes/convert_gguf.py"),
    Engine("vLLM", runs_wide=False),
)
TESTED_CLASSES = ("LlamaForCausalLM", "MistralForCausalLM")
"""What the exports were; every other class was run in transformers alone."""


def engines_of(model_class: str, is_wide: bool) -> list[str]:
    """Engines in which checkpoints of this class, with wide heads or not, have been run, and what these need."""
    if model_class not in TESTED_CLASSES:
        return [ENGINES[0].name]
    found = []
    for engine in ENGINES:
        if not is_wide:
            found.append(engine.name)
        elif engine.runs_wide:
            found.append(f"{engine.name} with {engine.needs}" if engine.needs else engine.name)
    return found
