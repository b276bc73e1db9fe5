"""What test_hub.py runs in processes of their own, because huggingface_hub reads its environment on import.

    python tests/hub_client.py push|load-adapter|load-merged FOLDER

Each leaves logits.safetensors and, for `push`, errors.json in FOLDER.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

GROUPS = [[[0, 2, 3, 5], [1, 4]], [[1, 2], [0, 3, 4, 5]]]
IDS = torch.arange(2, 26).view(2, 12)


def push(folder: Path) -> None:
    """Every way to fail, then an adapter and a merged model."""
    from huggingface_hub import HfApi
    from peft import LoraConfig, get_peft_model

    from asymgqa_peft.hub import push_adapter_to_hub, push_merged_to_hub

    tokenizer = AutoTokenizer.from_pretrained("them/base")
    model, errors = wrapped_base(), Errors()
    card = {"evaluation": [{"model": "this model", "perplexity": 12.345678}], "calibration_data": "random ids"}

    def push_adapter(repo_id: str, pushed=model, **options) -> str:
        return push_adapter_to_hub(pushed, tokenizer, repo_id, **card, **options)

    token = os.environ.pop("HF_TOKEN")
    errors.record("missing token", push_adapter, "me/adapter")
    os.environ["HF_TOKEN"] = token
    errors.record("refused token", push_adapter, "me/adapter", token="hf_wrong")
    errors.record("bad id", push_adapter, "adapter")
    errors.record("public repo", push_adapter, "them/base", exist_ok=True)
    errors.record("not wrapped", push_adapter, "me/adapter", pushed=model.get_base_model())
    errors.record("unknown option", push_adapter, "me/adapter", calibration="random ids")
    errors.record("unknown base", push_adapter, "me/adapter", base_model="nobody/base")
    errors["repos before"] = HfApi().repo_exists("me/adapter")
    errors.record("interrupted", push_adapter, "me/adapter")  # the server breaks off the first commit
    errors["files after interruption"] = [file.rfilename for file in HfApi().model_info("me/adapter").siblings]
    push_adapter("me/adapter")
    errors.record("existing repo", push_adapter, "me/adapter")
    push_adapter("me/old", exist_ok=True)
    model.push_to_hub("me/adapter", private=True)  # PEFT's own

    with torch.no_grad():
        save_logits(folder, model)
    lora = get_peft_model(AutoModelForCausalLM.from_pretrained("them/base"), LoraConfig(target_modules=["q_proj"]))
    errors.record("not merged", push_merged_to_hub, lora, tokenizer, "me/merged")
    plain = model.merge_and_unload()
    errors.record("no adapter", push_adapter, "me/plain", pushed=plain)
    push_merged_to_hub(plain, tokenizer, "me/merged", private=False, **card)
    saved = AutoModelForCausalLM.from_pretrained("me/merged")
    errors.record("no memory", push_merged_to_hub, saved, tokenizer, "me/again")
    (folder / "errors.json").write_text(json.dumps(errors))


class Errors(dict):
    """Name of a failing call -> [type, message]."""

    def record(self, name: str, call, *args, **kwargs) -> None:
        try:
            self[name] = ["no error", str(call(*args, **kwargs))]
        except Exception as error:
            self[name] = [type(error).__name__, str(error)]


def wrapped_base():
    """The base by its repository id, with unequal groups and every trainable parameter random."""
    from models import wrap

    return wrap(AutoModelForCausalLM.from_pretrained("them/base"), GROUPS)


def load_adapter(folder: Path) -> None:
    """As the adapter's card says."""
    import asymgqa_peft  # noqa: F401, I001
    from peft import AutoPeftModelForCausalLM

    save_logits(folder, AutoPeftModelForCausalLM.from_pretrained("me/adapter").eval())


def load_merged(folder: Path) -> None:
    """As the merged model's card says, without this package."""
    model = AutoModelForCausalLM.from_pretrained("me/merged")
    tokenizer = AutoTokenizer.from_pretrained("me/merged")
    assert tokenizer.chat_template == "{{ messages[0].content }}"
    assert model.generation_config.max_new_tokens == 7
    save_logits(folder, model)
    assert not {"asymgqa_peft", "peft"} & sys.modules.keys()


@torch.no_grad()
def save_logits(folder: Path, model) -> None:
    cache = DynamicCache(config=model.config)
    logits = model(IDS, past_key_values=cache).logits
    save_file({"logits": logits, "keys": cache.layers[0].keys.contiguous()}, folder / "logits.safetensors")


if __name__ == "__main__":
    {"push": push, "load-adapter": load_adapter, "load-merged": load_merged}[sys.argv[1]](Path(sys.argv[2]))
