"""Plain TRL trains the adapter, given as a model or as `peft_config`; no network, no special trainer."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset
from models import BASES, GROUPS, adapter_config, logits, tiny_llama
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "dog", "run", "past", "two", "old", "trees"]
SENTENCES = ["the cat sat on a mat", "one dog run past two old trees", "a cat saw the dog and run"]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<unk>", "<eos>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>", model_max_length=64
    )


@pytest.fixture
def dataset() -> Dataset:
    """One batch that a model of any size can learn by heart."""
    return Dataset.from_dict({"text": SENTENCES})


def arguments(folder, **changes) -> SFTConfig:
    """A few steps on the CPU; nothing is reported anywhere."""
    fields = {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": [], "max_steps": 3, "logging_steps": 1,
        "per_device_train_batch_size": 3, "learning_rate": 2e-2, "save_steps": 3, "disable_tqdm": True, "seed": 0,
        "gradient_checkpointing": False, "lr_scheduler_type": "constant", "dataset_num_proc": None,
    }  # fmt: skip
    return SFTConfig(**fields | changes)


def losses(trainer: SFTTrainer) -> list[float]:
    """Logged training losses."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trainer_on(base, family, how: str, **kwargs) -> SFTTrainer:
    """A trainer on the adapter, wrapped by us or by TRL."""
    torch.manual_seed(0)
    config = adapter_config(GROUPS[family])
    if how == "wrapped":
        return SFTTrainer(model=get_peft_model(base, config), **kwargs)
    return SFTTrainer(model=base, peft_config=config, **kwargs)


@pytest.mark.parametrize("how", ["wrapped", "peft_config"])
def test_three_steps_of_sft(base, family, how, tokenizer, dataset, tmp_path):
    reference = logits(base)
    trainer = trainer_on(
        base, family, how, args=arguments(tmp_path), train_dataset=dataset, processing_class=tokenizer
    )
    model = trainer.model
    assert isinstance(model, PeftModel) and model.peft_config["default"].peft_type == "ASYM_GQA"
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer.train()

    values = losses(trainer)
    assert len(values) == 3 and all(map(math.isfinite, values)) and values[-1] < values[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    for part in ("lora_kv", "lora_query_gain", "lora_value_mix", "lora_B"):
        assert any(part in name for name in moved), part
    model.eval()
    with model.disable_adapter():
        assert torch.equal(logits(model), reference)

    checkpoint = tmp_path / "checkpoint-3"
    assert (checkpoint / "adapter_model.safetensors").exists()
    loaded = PeftModel.from_pretrained(BASES[family](), checkpoint)
    assert torch.equal(logits(loaded), logits(model)) and not torch.equal(logits(model), reference)


def test_a_batch_is_learnt_by_heart(tokenizer, dataset, tmp_path):
    args = arguments(tmp_path, max_steps=60, save_steps=1000)
    base = tiny_llama()
    torch.nn.init.ones_(base.model.norm.weight)  # else the logits are too small to become certain
    trainer = trainer_on(base, "llama", "peft_config", args=args, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    values = losses(trainer)
    assert values[-1] < 0.5 * values[0], values


def test_training_resumes_from_its_checkpoint(tokenizer, dataset, tmp_path):
    """Stopping after 2 of 4 steps and going on ends where 4 steps do."""
    results = []
    for steps, resume in ((4, False), (2, False), (4, True)):
        folder = tmp_path / ("whole" if not results else "parts")
        args = arguments(folder, max_steps=steps, save_steps=2)
        trainer = trainer_on(
            tiny_llama(), "llama", "wrapped", args=args, train_dataset=dataset, processing_class=tokenizer
        )
        trainer.train(resume_from_checkpoint=resume)
        results.append(logits(trainer.model.eval()))
    whole, half, resumed = results
    assert torch.allclose(resumed, whole, atol=1e-6) and not torch.allclose(half, whole, atol=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_checkpointing_changes_nothing(checkpointing, tokenizer, dataset, tmp_path):
    values = []
    for enabled in (False, checkpointing):
        args = arguments(tmp_path / str(enabled), gradient_checkpointing=enabled, save_steps=1000)
        trainer = trainer_on(
            tiny_llama(), "llama", "wrapped", args=args, train_dataset=dataset, processing_class=tokenizer
        )
        trainer.train()
        values.append(losses(trainer))
    assert values[0] == pytest.approx(values[1], abs=1e-5)


def test_a_trained_checkpoint_merges_after_reloading(tokenizer, dataset, tmp_path):
    """The path of the quickstart: train, save, reload, merge, load as a stock model."""
    tiny_llama().save_pretrained(tmp_path / "base")
    base = type(tiny_llama()).from_pretrained(tmp_path / "base")
    args = arguments(tmp_path / "run")
    trainer = trainer_on(base, "llama", "wrapped", args=args, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(model), logits(trainer.model.eval()))
    adapted = logits(model)
    plain = model.merge_and_unload()
    plain.save_pretrained(tmp_path / "plain")
    stock = type(plain).from_pretrained(tmp_path / "plain").eval()
    assert torch.allclose(logits(stock), adapted, atol=1e-5)
