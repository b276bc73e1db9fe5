"""Where plain checkpoints have been run: the tables of `recipes/ENGINES.md`, as data."""

from __future__ import annotations

# Engines that have loaded exports of the bundled model, narrow and wide, and given the adapter's logits -> the recipe
# that they need for wide heads.
ENGINES: dict[str, str | None] = {
    "transformers": None,
    "mlx-lm": None,
    "ONNX Runtime": None,
    "OpenVINO": None,
    "CTranslate2": "recipes/convert_ctranslate2.py",
    "llama.cpp": "recipes/convert_gguf.py",
    "vLLM": None,
}
RUN_EVERYWHERE = ("LlamaForCausalLM", "MistralForCausalLM")
"""What the exports of the bundled model were; of another class narrow ones were run in transformers alone."""

WIDE_CLASSES: dict[str, tuple[str, ...]] = {
    "LlamaForCausalLM": ("transformers", "vLLM", "mlx-lm", "OpenVINO", "ONNX Runtime", "llama.cpp"),
    "GemmaForCausalLM": ("transformers", "vLLM", "ONNX Runtime"),
    "Gemma2ForCausalLM": ("transformers", "vLLM"),
    "PhiForCausalLM": ("transformers", "vLLM"),
    "OlmoForCausalLM": ("transformers", "vLLM", "OpenVINO"),
}
"""Engines that compute wide heads of other classes than Mistral; Llama here is one with biases."""


def engines_of(model_class: str, is_wide: bool) -> list[str]:
    """Engines in which checkpoints of this class, with wide heads or not, have been run, and what these need."""
    if not is_wide:
        return list(ENGINES) if model_class in RUN_EVERYWHERE else ["transformers"]
    names = ENGINES if model_class == "MistralForCausalLM" else WIDE_CLASSES.get(model_class, ("transformers",))
    return [f"{name} with {ENGINES[name]}" if ENGINES[name] else name for name in names]
