"""Write wide heads in every class that holds them, and unequal groups of Qwen2's, on random models.

    python tests/engines/export_classes.py out/engines/classes

An engine has code of its own for a class, so that what it does with one says nothing of another. Two layers, 8 heads
of 32 become 2 of 64 (unequal groups: 2 of 32), in float32; references as for export.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from export import BASE, PROMPTS, long_prompt, write_reference
from models import random_model, tiny_config, wrap

SIZES = {
    "hidden_size": 256,
    "head_dim": 32,
    "intermediate_size": 320,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
EQUAL = [[[0, 2, 3, 5], [1, 4, 6, 7]], [[1, 2, 3, 4], [0, 5, 6, 7]]]
UNEQUAL = [[[0, 2, 3, 5, 7], [1, 4, 6]], [[1, 2, 4], [0, 3, 5, 6, 7]]]
GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}
TWO_LISTS = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1 + 0.05 * pair for pair in range(16)],
    "long_factor": [1 + 0.4 * pair for pair in range(16)],
    "original_max_position_embeddings": 64,
    "factor": 8.0,
}
LONG = {"sliding_window": None, "original_max_position_embeddings": 64, "rope_parameters": TWO_LISTS}
# Name -> model type, changes of its configuration, groups, width.
EXPORTS = {
    # As Llama, which wants the hidden size to be a multiple of the 10 slots; and as Qwen2, where it is not.
    "qwen2-unequal": ("qwen2", {"hidden_size": 320}, UNEQUAL, None),
    "qwen2-unequal-own": ("qwen2", {}, UNEQUAL, None),
    "qwen2-wide": ("qwen2", {}, EQUAL, 64),
    "gemma-wide": ("gemma", GEMMA, EQUAL, 64),
    "gemma2-wide": ("gemma2", {**GEMMA, "query_pre_attn_scalar": 32, "sliding_window": 512}, EQUAL, 64),
    "phi-wide": ("phi", {"partial_rotary_factor": 0.5, "head_dim": None}, EQUAL, 64),
    "olmo-wide": ("olmo", {}, EQUAL, 64),
    # As Mistral, with one list of factors for prompts of up to 64 tokens and another for longer ones.
    "phi3-longrope-wide": ("phi3", LONG, EQUAL, 64),
}


def main(folder: Path) -> None:
    folder.mkdir(parents=True)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    prompts = [*PROMPTS, long_prompt(tokenizer)]
    for name, (model_type, changes, groups, width) in EXPORTS.items():
        base = random_model(tiny_config(model_type, **SIZES | {"vocab_size": len(tokenizer)} | changes))
        with torch.no_grad():
            for parameter_name, parameter in base.named_parameters():
                # So that a model with other rotary frequencies is far away.
                if parameter_name.endswith(("q_proj.weight", "k_proj.weight")):
                    parameter.mul_(2)
        model = wrap(base, groups, head_dim=width)
        write_reference(folder / name, model, tokenizer, prompts)
        model.merge_and_unload().save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
