"""Write the checkpoints that engines are tried on, and what the adapters themselves compute.

    python tests/engines/export.py out/engines/checkpoints

The bundled model at 4:1 of its cache, in float32, chosen and merged on activations: 4 heads of the base's 32
dimensions in "unequal" and "equal" groups, and 2 heads of 64 in "wide-unequal" and "wide-equal" ones. All are merged
into plain checkpoints by recipes/merge_and_push.py as a user would, the last of them in bfloat16 too. "base" is the
bundled model itself, a control: what an engine cannot do with that is not the export's doing. Beside every checkpoint
lies NAME.reference.safetensors with the adapter's logits before merging, prompt ids and greedy continuations.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from peft import get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from asymgqa_peft import AsymGQAConfig, initialize_asymgqa_weights
from recipes import merge_and_push
from recipes.stdlib_text import held_out_texts, token_blocks, validation_texts

REPOSITORY = Path(__file__).resolve().parent.parent.parent
BASE = REPOSITORY / "recipes" / "tiny_model"
EXPORTS = {
    "unequal": {"num_key_value_heads": 4, "grouping": "asymmetric"},
    "equal": {"num_key_value_heads": 4, "grouping": "symmetric"},
    "wide-unequal": {"num_key_value_heads": 2, "head_dim": 64, "grouping": "asymmetric"},
    "wide-equal": {"num_key_value_heads": 2, "head_dim": 64, "grouping": "symmetric"},
}
NEW_TOKENS = 32
# Code, prose, and what splits a tokenizer's rules: digits, accents, mixed white space, contractions.
PROMPTS = (
    "def read_lines(path):\n    with open(path) as file:\n        ",
    "The import statement combines two operations; it",
    "class Stack:\n    def push(self, item):\n        self.items.append(item)\n\n    def pop(self):\n",
    "naïve = 3.14159  # π ≈ 22/7, don't\n\n\t\tself.x  +=  1000",
    "import os\nimport sys\n\nfor name in sorted(os.listdir(",
    "If the string has no format specification, a",
)
LONG_PROMPT_TOKENS = 400
SMALLEST_MARGIN = 0.005  # between the two best logits of a greedy step; engines are allowed a difference of 0.001


def main(folder: Path) -> None:
    folder.mkdir(parents=True)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    prompts = [*PROMPTS, long_prompt(tokenizer)]
    base = load_base()
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    write_reference(folder / "base", base, tokenizer, prompts)
    for name, options in EXPORTS.items():
        model = initialised(load_base(), options, tokenizer)
        adapter = folder / f"{name}.adapter"
        model.save_pretrained(adapter)
        merge_and_push.main([str(adapter), "--output", str(folder / name), "--dtype", "float32"])
        write_reference(folder / name, model, tokenizer, prompts)
    # What people serve: the engine then computes in what it takes for such a folder.
    merge_and_push.main([str(adapter), "--output", str(folder / f"{name}.bfloat16"), "--dtype", "bfloat16"])


def long_prompt(tokenizer) -> str:
    return tokenizer.decode(tokenizer(held_out_texts()[0]).input_ids[:LONG_PROMPT_TOKENS])


def load_base() -> torch.nn.Module:
    """The bundled model in float32."""
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()


def initialised(base: torch.nn.Module, options: dict, tokenizer) -> torch.nn.Module:
    """The base wrapped with these fields of the configuration, groups and shared heads from activations."""
    model = get_peft_model(base, AsymGQAConfig(task_type="CAUSAL_LM", **options))
    blocks = token_blocks(validation_texts(), tokenizer, 512)[:32]
    initialize_asymgqa_weights(model, blocks.split(8))
    return model.eval()


@torch.no_grad()
def write_reference(checkpoint: Path, model, tokenizer, prompts: list[str]) -> None:
    """Ids (T,), logits (T, V), greedy tokens and their margins (n,) of every prompt, by the model as it is."""
    tensors = {}
    for index, prompt in enumerate(prompts):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        tensors[f"ids.{index}"] = ids[0]
        tensors[f"logits.{index}"] = model(input_ids=ids).logits[0]
        tensors[f"greedy.{index}"], tensors[f"margins.{index}"] = continuation(model, ids)
    decisive = sum(len(tensors[f"greedy.{index}"]) for index in range(len(prompts)))
    if decisive < NEW_TOKENS * len(prompts) / 2:
        raise SystemExit(f"{checkpoint.name}: only {decisive} greedy tokens are decisive, change prompts.")
    facts = {"prompts": json.dumps(prompts), "kv_heads": str(model_kv_heads(model))}
    save_file(tensors, checkpoint.with_name(checkpoint.name + ".reference.safetensors"), metadata=facts)


def continuation(model, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens after ids (1, T), and by how much each was the best, (n,).

    The first that ends the text or hangs on rounding is left out, and so is what follows.
    """
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "output_logits": True}
    result = model.generate(input_ids=ids, return_dict_in_generate=True, **options)
    tokens = result.sequences[0, ids.shape[1] :]
    best, second = torch.cat(result.logits).topk(2).values.unbind(-1)
    margins = best - second
    stops = ((margins < SMALLEST_MARGIN) | (tokens == model.config.eos_token_id)).nonzero().flatten().tolist()
    kept = slice(stops[0] if stops else None)
    return tokens[kept].clone(), margins[kept].clone()


def model_kv_heads(model) -> int:
    """K/V heads that the model's own cache holds."""
    ids = torch.tensor([[0]])
    return model(input_ids=ids, use_cache=True).past_key_values.layers[0].keys.shape[1]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
