"""What a user names on the command line, looked at before any work goes into it."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import cached_file

from asymgqa_peft.mistakes import in_one_line, message_of, model_called


def is_adapter(name: str) -> bool:
    """Whether a folder or repository holds an adapter, of whatever method."""
    return cached_file(name, "adapter_config.json", _raise_exceptions_for_missing_entries=False) is not None


def checked_model(name: str) -> PretrainedConfig:
    """The configuration of a checkpoint, or of the base that an adapter names; exits if there is no such model."""
    with in_one_line(model_called(name)):
        source = name
        if is_adapter(name):
            source = PeftConfig.from_pretrained(name).base_model_name_or_path
        config = AutoConfig.from_pretrained(source)
    folder = Path(name)
    if folder.is_dir() and not [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
        raise SystemExit(f"{name} has a configuration and no weights: take the folder that the model was saved in.")
    return config


def checked_models(names: list[str], same_vocabulary: bool) -> dict[str, PretrainedConfig]:
    """The models' configurations by name; exits if one is none or, if asked, has other tokens than the first."""
    configs = {name: checked_model(name) for name in names}
    first = configs[names[0]]
    for name, config in configs.items():
        if same_vocabulary and config.vocab_size != first.vocab_size:
            raise SystemExit(
                f"{name} has a vocabulary of {config.vocab_size}, {names[0]} one of {first.vocab_size}: on other "
                "tokens they cannot be compared. Measure them by themselves."
            )
    return configs


def checked_base(source: str, revision: str | None, adapter: str) -> PretrainedConfig:
    """The configuration of an adapter's base, of which no weights are read; exits if the adapter is of another."""
    with in_one_line(model_called(source)):
        config = AutoConfig.from_pretrained(source, revision=revision)
    try:
        with torch.device("meta"):
            PeftModel.from_pretrained(AutoModelForCausalLM.from_config(config), adapter, low_cpu_mem_usage=True)
    except (ValueError, RuntimeError) as error:
        # The first tensor or field that differs is enough.
        reason = " ".join(" ".join(str(error).splitlines()[:2]).split())
        raise SystemExit(f"{source} is not the base of {adapter}: {reason} Pass its own with --base.") from error
    return config


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model or adapter, of an adapter saved without one its base's; exits if there is none."""
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        with in_one_line(model_called(name)):
            if is_adapter(name):
                return load_tokenizer(PeftConfig.from_pretrained(name).base_model_name_or_path)
        raise SystemExit(
            f"{model_called(name)} has no tokenizer that can be loaded: put its base's tokenizer files there. "
            f"({message_of(error)})"
        ) from error
