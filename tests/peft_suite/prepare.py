"""Make PEFT's unpacked source release ready for `peft_suite.sh`: add our configuration, save models for the hub's."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
# What PEFT's own list of configurations says of LoRA, and our one required field.
ENTRY = """    (
        AsymGQAConfig,
        {
            "task_type": "CAUSAL_LM",
            "num_key_value_heads": 2,
            "r": 8,
            "lora_alpha": 32,
            "target_modules": None,
            "lora_dropout": 0.05,
            "bias": "none",
        },
    ),
"""
MODELS = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": "opt",
    "trl-internal-testing/tiny-random-LlamaForCausalLM": "llama",
    "peft-internal-testing/tiny-dummy-qwen2": "qwen2",
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": "gemma3_text",
    "hf-internal-testing/tiny-random-MistralForCausalLM": "mistral",
}


IMPORT = "from asymgqa_peft import AsymGQAConfig\n"
CLASSES = "if config_cls in (LoraConfig, AdaLoraConfig{}):"
# File -> places in it: a text, and what comes instead.
EDITS = {
    "test_decoder_models.py": {"\nALL_CONFIGS = [\n": f"\n{IMPORT}\nALL_CONFIGS = [\n{ENTRY}"},
    "test_config.py": {
        "\nALL_CONFIG_CLASSES = (\n": f"\n{IMPORT}\nALL_CONFIG_CLASSES = (\n"
        '    (AsymGQAConfig, {"num_key_value_heads": 2}),\n'
    },
    "testing_utils.py": {
        "\ndef set_init_weights_false": f"\n{IMPORT}\ndef set_init_weights_false",
        # Asked for by its very class.
        CLASSES.format(""): CLASSES.format(", AsymGQAConfig"),
    },
}
ADAPTERS = ["peft-internal-testing/tiny-opt-lora-revision"]
"""LoRA configurations that tests read."""


def main(suite: Path) -> None:
    (suite / "tests" / "__init__.py").touch()  # the source release lacks it
    for name, edits in EDITS.items():
        source = (suite / "tests" / name).read_text()
        for text, instead in edits.items():
            assert source.count(text) == 1, f"{name} has no {text!r} any more"
            source = source.replace(text, instead)
        (suite / "tests" / name).write_text(source)
    for name in ADAPTERS:
        LoraConfig(task_type="CAUSAL_LM").save_pretrained(suite / name)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "recipes" / "tiny_model")
    for name, model_type in MODELS.items():
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            model_type,
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=37,
            ffn_dim=37,
            word_embed_proj_dim=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=8,
            max_position_embeddings=512,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
        # As a name from the hub, it is looked up as a folder below the working one first.
        AutoModelForCausalLM.from_config(config).save_pretrained(suite / name)
        tokenizer.save_pretrained(suite / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
