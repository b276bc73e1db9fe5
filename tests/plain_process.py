"""Run in a process of its own: load plain checkpoints with stock transformers and write down what they compute."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


@torch.no_grad()
def main(root: Path) -> None:
    """For every folder of `root`: logits and greedy tokens for root/inputs.pt, and what the cache holds."""
    torch.set_num_threads(1)
    inputs = torch.load(root / "inputs.pt")
    facts, tensors = {}, {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        config = json.loads((folder / "config.json").read_text())
        # transformers 5.17 loads Gemma-2 under sdpa, which leaves its soft cap out.
        options = {"attn_implementation": "eager"} if config.get("attn_logit_softcapping") else {}
        model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
        model.eval()
        positions = {}
        if config["model_type"] == "gpt_bigcode":  # learned positions, which its forward counts from the first column
            positions["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
        output = model(**inputs, **positions, use_cache=True)
        tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)
        tensors[folder.name] = {"logits": output.logits, "tokens": tokens[:, -6:]}
        facts[folder.name] = {
            "class": type(model).__name__,
            "heads": [layer.keys.shape[1] for layer in output.past_key_values.layers],
            "dtype": str(model.dtype),
            "tied": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "rope_parameters": getattr(model.config, "rope_parameters", None),
            "top_p": model.generation_config.top_p,
            "problems": [name for kind in ("missing_keys", "unexpected_keys") for name in loading[kind]],
        }
    assert "asymgqa_peft" not in sys.modules and "peft" not in sys.modules
    torch.save(tensors, root / "tensors.pt")
    (root / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    for root in sys.argv[1:]:
        main(Path(root))
