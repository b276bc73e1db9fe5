"""fit_steps: what the steps minimise, against finite differences; what they gain in plain models; what they leave."""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing as mp
from models import CASES, adapter_config, config_of, left_padded, prompt, random_model, tensors
from peft import PeftModel, get_peft_model

from asymgqa_peft import initialize_asymgqa_weights
from asymgqa_peft.adapter.site import attention_sites
from asymgqa_peft.initialize import fit, walk

IDS = prompt(16, 24)


def fitted(name: str, steps: int, batches=None, dtype=torch.float32, **choices) -> PeftModel:
    choices = {"num_key_value_heads": 3, "r": 8, "head_dim": CASES[name].head_dim} | choices
    torch.manual_seed(0)
    model = get_peft_model(
        random_model(config_of(CASES[name])).to(dtype), adapter_config(fit_steps=steps, **choices)
    ).eval()
    initialize_asymgqa_weights(model, batches or IDS.split(4), progress=False)
    return model


@torch.no_grad()
def attention_outputs(model: torch.nn.Module, inputs: dict) -> torch.Tensor:
    """What the first layer's o_proj returns, (B, T, E)."""
    seen = []
    handle = attention_sites(model)[0].output.register_forward_hook(lambda _module, _args, output: seen.append(output))
    model(**inputs)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize(
    "name",
    ["qwen3", "qwen3-gqa", "qwen3-wide", "gemma3", "olmo2", "olmo2-wide"]
    + ["llama", "qwen2-wide-gqa", "phi3", "gpt_neox", "opt", "olmo-clipped"],
)
def test_plain_attention_comes_nearer_to_the_bases(name: str):
    """The stock model that comes of it, measured with no part of the adapter, on text that was not calibrated on."""
    ids = prompt(16, 24, seed=9)
    wanted = attention_outputs(random_model(config_of(CASES[name])), {"input_ids": ids})
    errors = []
    for steps in (0, 40):
        model = fitted(name, steps, prompt(48, 24, seed=4).split(8), refit_output=False)
        adapter = model(input_ids=ids).logits
        plain = model.merge_and_unload()
        torch.testing.assert_close(plain(input_ids=ids).logits, adapter, atol=1e-4, rtol=1e-4)
        errors.append((attention_outputs(plain, {"input_ids": ids}) - wanted).norm() / wanted.norm())
    assert errors[1] < 0.98 * errors[0]


@pytest.mark.parametrize("name", ["qwen3-gqa", "olmo2", "gemma3", "phi3", "llama-bias"])
def test_the_first_step_goes_down_the_gradient(name: str, monkeypatch):
    """Adam's first step moves every number by the learning rate, against the sign of its derivative."""
    rate, inputs = 1e-5, {"input_ids": prompt(4, 16), "attention_mask": torch.ones(4, 16, dtype=torch.long)}
    inputs["attention_mask"][0, 12:] = 0
    inputs["input_ids"][:, 0] = 1  # rows that begin alike: no batch of starts
    scales = torch.linspace(0.5, 2, 16, dtype=torch.float64)[:, None]
    monkeypatch.setattr(walk, "error_scales", lambda normed: scales.expand(*normed.shape[:2], 1))
    monkeypatch.setattr(fit, "PROJECTION_RATE", rate)
    monkeypatch.setattr(fit, "FACTOR_RATE", rate)
    model, stepped = (fitted(name, steps, [inputs], torch.float64, refit_output=False) for steps in (0, 1))
    after = dict(stepped.named_parameters())
    with model.disable_adapter():
        wanted = attention_outputs(model, inputs)
    counts = inputs["attention_mask"].bool()

    def error() -> float:
        return ((attention_outputs(model, inputs) - wanted) * scales)[counts].square().sum().item()

    layer = attention_sites(model)[0].name
    moved, generator = 0, torch.Generator().manual_seed(0)
    for parameter_name, parameter in model.named_parameters():
        change = after[parameter_name].detach() - parameter.detach()
        if f".{layer}." not in parameter_name or "default" not in parameter_name or ".o_proj." in parameter_name:
            if f".{layer}." in parameter_name or "layers" not in parameter_name:
                assert not change.any(), parameter_name
            continue
        entry = int(torch.randint(parameter.numel(), (1,), generator=generator))
        flat, before, values = parameter.data.view(-1), parameter.data.view(-1)[entry].item(), []
        for difference in (1e-3, -1e-3):
            flat[entry] = before + difference
            values.append(error())
        flat[entry] = before
        derivative = (values[0] - values[1]) / 2e-3
        if abs(derivative) > 1e-4:
            moved += 1
            assert change.view(-1)[entry].item() == pytest.approx(-rate * (1 if derivative > 0 else -1), rel=1e-2)
    assert moved >= 3


def test_steps_that_make_it_worse_are_taken_back_and_it_is_said(monkeypatch):
    expected = tensors(fitted("qwen3", 0))
    monkeypatch.setattr(fit, "PROJECTION_RATE", 1e3)
    monkeypatch.setattr(fit, "FACTOR_RATE", 1e3)
    model = fitted("qwen3", 0)
    model.peft_config["default"].fit_steps = 3
    report = initialize_asymgqa_weights(model, IDS.split(4), progress=False)
    assert all(torch.equal(tensors(model)[name], tensor) for name, tensor in expected.items())
    assert any("layers 0-1: the steps of fit_steps were taken back" in note for note in report.notes)


def test_padding_does_not_count():
    batches, others = [], []
    for seed in range(2):
        batch = left_padded(batch=8, length=24, seed=seed)
        batches.append(batch)
        others.append(batch | {"input_ids": torch.where(batch["attention_mask"].bool(), batch["input_ids"], 7)})
    start, expected, found = (tensors(fitted("qwen3", *each)) for each in ((0, batches), (6, batches), (6, others)))
    assert any(not torch.equal(expected[name], tensor) for name, tensor in start.items() if "lora_norm" in name)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-4)


def _fit_on_rank(rank: int, path: str, results) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{path}", rank=rank, world_size=2)
    model = fitted("qwen3", 5, [IDS[8 * rank : 8 * rank + 8]])
    results[rank] = {name: p.detach().numpy() for name, p in model.named_parameters() if p.requires_grad}
    torch.distributed.destroy_process_group()


def test_ranks_take_the_steps_of_one_process(tmp_path):
    alone = fitted("qwen3", 5, [IDS])
    results = mp.get_context("spawn").Manager().dict()
    mp.spawn(_fit_on_rank, args=(str(tmp_path / "rendezvous"), results), nprocs=2)
    first, second = results[0], results[1]
    for name, parameter in alone.named_parameters():
        if parameter.requires_grad:
            assert (first[name] == second[name]).all(), name
            scale = parameter.abs().max().item() + 1e-6
            assert abs(first[name] - parameter.detach().numpy()).max() < 1e-2 * scale, name
