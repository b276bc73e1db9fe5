"""A pytest plugin for TRL's own tests: AsymGQATrainer for SFTTrainer, and which tests cannot pass, with reasons."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from peft import PeftModel, TaskType
from trl import import_utils
from trl.trainer import sft_trainer

from asymgqa_peft import AsymGQAConfig, AsymGQATrainer


def absent(name: str) -> Callable:
    """Module attributes that TRL does not have: a checkout of another version imports them for tests of other things.

    They answer no to whether something is installed.
    """
    if name.startswith("__"):
        raise AttributeError(name)
    return lambda *args: False


import_utils.__getattr__ = sft_trainer.__getattr__ = absent

TRAINERS = {"SFTTrainer": None, "weight-0": 0.0, "weight-1": 1.0}
"""Name of a trainer -> its distillation_weight; TRL's own has none."""


EVERY, OURS, DISTILLING = tuple(TRAINERS), ("weight-0", "weight-1"), ("weight-1",)
UNDECLARED = "asymgqa_peft declares no such architecture, and refuses it"

CANNOT_PASS = {
    "tiny-Cohere2": (OURS, ValueError, UNDECLARED),
    "tiny-Glm4Moe": (OURS, ValueError, UNDECLARED),
    "tiny-GptOss": (OURS, ValueError, UNDECLARED),
    "tiny-Qwen3Moe": (OURS, ValueError, UNDECLARED),
    "tiny-Olmo3": (OURS, ValueError, UNDECLARED),
    "tiny-Lfm2": (OURS, ValueError, UNDECLARED),
    "test_train_gpt_oss": (OURS, ValueError, UNDECLARED),
    "test_train_completion_only_harmony": (OURS, ValueError, UNDECLARED + " (GPT-OSS)"),
    "test_train_moe_with_peft_config": (OURS, ValueError, "target_parameters is refused: it wraps no projections"),
    "test_train_model_dtype": (
        OURS,
        AssertionError,
        "expects float16 of everything: PEFT makes an adapter's parameters float32, LoRA's too",
    ),
    "test_train_with_set_chat_template_from_model": (
        OURS,
        ValueError,
        "TRL trains the tokens that the template adds in `embed_tokens`, which GPT-NeoX calls embed_in: the same "
        "with LoRA",
    ),
    "test_train_dft_loss": (DISTILLING, ValueError, "another loss is refused beside distillation"),
    "prompt_tuning": (DISTILLING, ValueError, "an adapter without shared heads has no teacher, and is refused"),
    "test_peft_with_quantization": (
        EVERY,
        AssertionError,
        "bitsandbytes casts the biases of its layers to another dtype, on a CPU of others than the test allows for",
    ),
}
"""What is in a test's name -> trainers with which it cannot pass, the error, and why. A pass would be a failure."""

NOT_RUN = {
    "vlm": "vision-language models are refused at wrapping, and no small ones are made here",
    "tiny-NemotronH": UNDECLARED + ", and no small one is made here",
    "test_trust_remote_code": "runs a model's own code from the hub, whose architecture nobody can have declared",
}
"""What is in a test's name -> why it is left out."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.cls is None or item.cls.__name__ != "TestSFTTrainer":
            continue
        for text, reason in NOT_RUN.items():
            if text in item.name:
                item.add_marker(pytest.mark.skip(reason=reason))
        for text, (trainers, error, reason) in CANNOT_PASS.items():
            if text in item.name and item.callspec.params["trainer"] in trainers:
                item.add_marker(pytest.mark.xfail(raises=error, reason=reason, strict=True))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("trainer", TRAINERS, indirect=True)


def adapter_config(**options) -> AsymGQAConfig:
    """What stands in for LoraConfig."""
    return AsymGQAConfig(num_key_value_heads=1, task_type=TaskType.CAUSAL_LM, **options)


@pytest.fixture(autouse=True)
def trainer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = TRAINERS[request.param]
    if weight is None:
        return

    def make(model, peft_config=None, **options) -> AsymGQATrainer:
        if peft_config is None and not isinstance(model, PeftModel):
            peft_config = adapter_config()
        return AsymGQATrainer(model, peft_config=peft_config, distillation_weight=weight, **options)

    monkeypatch.setattr(request.module, "SFTTrainer", make)
    monkeypatch.setattr(request.module, "LoraConfig", adapter_config)


@pytest.fixture
def lazy_shared_datadir(request: pytest.FixtureRequest) -> Path:
    """pytest-datadir's."""
    return Path(request.path).parent / "data"
