"""Write checkpoints of the classes that stand in for GPT-NeoX and OPT, with what the adapters themselves compute.

    PYTHONPATH=tests python tests/engines/export_stand_ins.py out/engines/stand_ins
    .venv/engines/vllm/bin/python tests/engines/compare.py vllm serve_vllm out/engines/stand_ins/neox-equal out/results

Random models of two layers, E 256 and 8 heads, whose norms are far from the identity, with the bundled tokenizer:
GPT-NeoX at 2 KV heads in equal and unequal groups and of twice the width, OPT at 1, with its relu and with gelu.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from models import random_model, tiny_config, wrap
from safetensors.torch import save_file
from transformers import AutoTokenizer

BASE = Path(__file__).resolve().parents[2] / "recipes" / "tiny_model"
SIZES = {"vocab_size": 2048, "hidden_size": 256, "head_dim": None, "max_position_embeddings": 512}
NEOX = {**SIZES, "intermediate_size": 1024, "rotary_pct": 0.25}
OPT = {**SIZES, "ffn_dim": 1024, "word_embed_proj_dim": 256, "tie_word_embeddings": True}
EQUAL = [[[0, 2, 3, 5], [1, 4, 6, 7]], [[1, 2, 3, 4], [0, 5, 6, 7]]]
UNEQUAL = [[[0, 2, 3, 5, 7], [1, 4, 6]], [[1, 2, 3, 4, 7], [0, 5, 6]]]
ONE = [[list(range(8))]] * 2
EXPORTS = {  # model type, its configuration, groups, width
    "neox-equal": ("gpt_neox", NEOX, EQUAL, None),
    "neox-unequal": ("gpt_neox", NEOX, UNEQUAL, None),
    "neox-wide": ("gpt_neox", NEOX, EQUAL, 64),
    "opt": ("opt", OPT, ONE, None),
    "opt-gelu": ("opt", {**OPT, "activation_function": "gelu"}, ONE, None),
}
PROMPT_TOKENS = (12, 40, 200)


@torch.no_grad()
def main(folder: Path) -> None:
    folder.mkdir(parents=True)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    for name, (model_type, fields, groups, width) in EXPORTS.items():
        base, generator = random_model(tiny_config(model_type, **fields)), torch.Generator().manual_seed(3)
        for key, parameter in base.named_parameters():
            if "norm" in key:
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
            elif any(part in key for part in ("query_key_value.weight", "q_proj.weight", "k_proj.weight")):
                parameter.mul_(2)  # so that scores, and with them positions, matter
        model, tensors = wrap(base, groups, head_dim=width), {}
        for index, length in enumerate(PROMPT_TOKENS):
            ids = torch.randint(2, SIZES["vocab_size"], (1, length), generator=generator)
            tensors[f"ids.{index}"] = ids[0]
            tensors[f"logits.{index}"] = model(input_ids=ids).logits[0].contiguous()
            tokens = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)[0, length:]
            tensors[f"greedy.{index}"] = tokens.clone()
        model.merge_and_unload().save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        facts = {"prompts": json.dumps(["a"] * len(PROMPT_TOKENS)), "kv_heads": str(len(groups[0]))}
        save_file(tensors, folder / f"{name}.reference.safetensors", metadata=facts)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
