"""Make TRL's tests ready for `trl_suite.sh`: its data sets, models for the hub's, and an edit of their source."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import torch
import trl
import yaml
from datasets import DatasetDict
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parents[2]
DATASETS = ["zen", "zen_image", "toolcall", "harmony"]
"""`scripts/generate_..._dataset.py` of TRL."""

MODELS = {
    "tiny-Qwen2ForCausalLM-2.5": ("qwen2", "qwen2_5"),
    "tiny-Qwen3ForCausalLM": ("qwen3", "qwen3"),
    "tiny-GPTNeoXForCausalLM": ("gpt_neox", None),
    # Refused.
    "tiny-Cohere2ForCausalLM": ("cohere2", "cohere2"),
    "tiny-Glm4MoeForCausalLM": ("glm4_moe", "glm4moe"),
    "tiny-GptOssForCausalLM": ("gpt_oss", "gptoss"),
    "tiny-Qwen3MoeForCausalLM": ("qwen3_moe", "qwen3"),
    "tiny-Olmo3ForCausalLM": ("olmo3", None),
    "tiny-Lfm2ForCausalLM": ("lfm2", "lfm2"),
    "tiny-Lfm2ForCausalLM-2.5": ("lfm2", "lfm2_2_5"),
}
"""Name in trl-internal-testing -> architecture, and the chat template of TRL's that the tokenizer has."""


CHANGED = "assert not torch.equal(param, new_param)"
"""What TRL's tests say of every parameter after training."""

CHANGED_IF_TRAINED = "assert torch.equal(param, new_param) != new_param.requires_grad"
"""The same where all are trained; and what an adapter's base, which is frozen, must stay like."""


def save_datasets(suite: Path) -> list[str]:
    """Let TRL's scripts write the data sets into folders of the hub's names; all texts that are in them."""
    texts = []

    def save(dataset: DatasetDict, repo_id: str, config_name: str) -> None:
        folder = suite / repo_id
        (folder / config_name).mkdir(parents=True)
        for split, rows in dataset.items():
            if "tools" in rows.column_names:
                # As the hub has them.
                as_text = [json.dumps(tools) for tools in rows["tools"]]
                rows = rows.remove_columns("tools").add_column("tools", as_text)
            rows.to_parquet(folder / config_name / f"{split}.parquet")
            if "image" not in rows.column_names:
                texts.extend(str(row) for row in rows)
        configs = [{"config_name": each.name, "data_dir": each.name} for each in folder.iterdir() if each.is_dir()]
        (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")

    DatasetDict.push_to_hub = save
    sys.path.insert(0, str(suite / "scripts"))
    for name in DATASETS:
        script = importlib.import_module(f"generate_{name}_dataset")
        script.main(test_size=0.1, push_to_hub=True, repo_id=f"trl-internal-testing/{name.replace('_', '-')}")
    return texts


def save_model(folder: Path, model_type: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """A random model of a few thousand parameters."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_local_experts=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        layer_types=None,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def save_models(suite: Path, texts: list[str]) -> None:
    """All models with one tokenizer, which knows TRL's texts as well as large ones do: tests count its tokens."""
    bundled = AutoTokenizer.from_pretrained(ROOT / "recipes" / "tiny_model")
    tokenizer = bundled.train_new_from_iterator(texts, vocab_size=2048)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    templates = Path(trl.__file__).parent / "chat_templates"
    for name, (model_type, template) in MODELS.items():
        folder = suite / "trl-internal-testing" / name
        save_model(folder, model_type, tokenizer)
        tokenizer.chat_template = template and (templates / f"{template}.jinja").read_text()
        tokenizer.save_pretrained(folder)
    tokenizer.chat_template = (templates / "qwen3.jinja").read_text()
    tokenizer.save_pretrained(suite / "Qwen" / "Qwen3-4B")


def edit(path: Path) -> None:
    source = path.read_text()
    assert source.count(CHANGED) > 10, f"{path} has no {CHANGED!r} any more"
    path.write_text(source.replace(CHANGED, CHANGED_IF_TRAINED))


def main(suite: Path) -> None:
    save_models(suite, save_datasets(suite))
    edit(suite / "tests" / "test_sft_trainer.py")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
