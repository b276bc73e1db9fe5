"""Every family under one table of checks: the adapter against an independent dense float64 model."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from models import CACHE, CASES, VOCAB, adapted, config_of, left_padded, prompt, random_model, stock, wrap
from peft import PeftModel
from reference import dense_reference, greedy_alone, relative_error, rows_alone
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    PreTrainedModel,
    StaticCache,
)

from asymgqa_peft.adapter.site import attention_sites
from asymgqa_peft.families import FAMILIES

TOLERANCE = 5e-6  # of the largest logit, in fp32; measured 3e-7 to 9e-7
NO_SDPA = {"gemma2"}  # its soft cap: transformers 5.23 refuses, 5.17 leaves the cap out
QUERY_SCALE, QUERY_GAIN = "lora_query_scale", "lora_query_gain"
QUERY_MIX, VALUE_MIX = "lora_query_mix", "lora_value_mix"
FITS = {
    "qwen3": {QUERY_SCALE, QUERY_GAIN, VALUE_MIX},
    "gemma3_text": {QUERY_SCALE, QUERY_GAIN, VALUE_MIX},
    "olmo2": {QUERY_SCALE, QUERY_GAIN, VALUE_MIX},
    "olmo-clipped": set(),
    "opt": {QUERY_MIX, VALUE_MIX},
    "phi": {QUERY_GAIN, QUERY_MIX, VALUE_MIX},
    "stablelm": {QUERY_GAIN, QUERY_MIX, VALUE_MIX},
    "gpt_neox": {QUERY_GAIN, QUERY_MIX, VALUE_MIX},
    "phi3-gqa": {QUERY_GAIN, QUERY_MIX, VALUE_MIX},
}


@dataclass(frozen=True)
class Subject:
    """A case's base, its adapter, and what the adapter must compute. Tests leave all of it as it was."""

    base: PreTrainedModel
    model: PeftModel
    reference: PreTrainedModel


@cache
def subject(name: str) -> Subject:
    base, model = stock(name), adapted(name)
    return Subject(base, model, dense_reference(base, model, CASES[name].groups))


@cache
def expected_logits(name: str) -> list[torch.Tensor]:
    return rows_alone(subject(name).reference, left_padded())


def test_every_family_has_a_case_and_grouped_ones_a_gqa_base():
    cases = list(CASES.values())
    assert {case.model_type for case in cases} == set(FAMILIES)
    with_gqa_base = {case.model_type for case in cases if case.kv_heads < config_of(case).num_attention_heads}
    assert with_gqa_base == {name for name, family in FAMILIES.items() if family.grouped}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CASES)
def test_logits_equal_the_dense_reference(name: str, attention: str):
    if attention == "sdpa" and CASES[name].model_type in NO_SDPA:
        pytest.skip("the stock model has no sdpa")
    base, model = subject(name).base, subject(name).model
    assert relative_error(base, left_padded(), expected_logits(name)) > 0.1  # the adapter does something
    model.set_attn_implementation(attention)
    try:
        assert relative_error(model, left_padded(), expected_logits(name)) < TOLERANCE
    finally:
        model.set_attn_implementation("eager")


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_training_mode_shows_the_attention_the_bases_own_heads(name: str):
    """The same logits, and after the attention H heads of D: no empty slot, and no wide head but behind a norm."""
    model = adapted(name)
    site, seen = attention_sites(model)[0], []
    site.output.register_forward_pre_hook(lambda _module, args: seen.append(args[0].shape[-1]), prepend=True)
    assert relative_error(model.eval(), left_padded(), expected_logits(name)) < TOLERANCE
    for each in attention_sites(model):
        for layer in each.shared_layers():
            layer.train()  # and nothing else, whose dropout would show
    assert relative_error(model, left_padded(), expected_logits(name)) < TOLERANCE
    case, family = CASES[name], FAMILIES[CASES[name].model_type]
    width = case.head_dim or site.shape.head_dim
    own = site.shape.num_attention_heads * (width if family.norm_span else site.shape.head_dim)
    assert seen == [case.slots * width if family.grouped else own, own]


@pytest.mark.parametrize("name", ["llama", "llama-wide", "llama-wide-odd", "qwen2-gqa", "phi-wide", "phi3", "olmo2"])
def test_gradients_do_not_depend_on_the_shape_that_the_attention_sees(name: str):
    gradients = []
    for shows_heads in (True, False):
        model = adapted(name).double().train()
        if not shows_heads:
            for site in attention_sites(model):
                for layer in site.shared_layers():
                    layer.eval()
        assert {site.key.shows_heads for site in attention_sites(model)} == {shows_heads}
        model(input_ids=prompt(), labels=prompt()).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert len(gradients[0]) > 10 and gradients[0].keys() == gradients[1].keys()
    for parameter, gradient in gradients[0].items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(gradients[1][parameter], gradient, rtol=1e-6, atol=1e-8 * scale)


@pytest.mark.parametrize("name", CASES)
def test_greedy_generation_with_and_without_any_cache(name: str):
    inputs, model = left_padded(), subject(name).model
    expected = greedy_alone(subject(name).reference, inputs, tokens=6)
    assert not torch.equal(greedy_alone(subject(name).base, inputs, tokens=6), expected)
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False, **options)
        assert torch.equal(tokens[:, -6:], expected), options


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_caches_hold_the_shared_heads_only(name: str):
    case, model = CASES[name], subject(name).model
    # A family without a number of KV heads repeats the shared heads: nothing in its attention could read fewer.
    heads = case.num_groups if FAMILIES[case.model_type].grouped else 8
    static = StaticCache(model.config, max_cache_len=16)
    for cache_ in (None, static):
        stored = model(prompt(), **{CACHE: cache_}, use_cache=True).past_key_values
        assert [layer.keys.shape[1] for layer in stored.layers] == [heads] * 2
        assert [layer.values.shape[1] for layer in stored.layers] == [heads] * 2


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_disabling_is_bitwise_the_base_and_enabling_bitwise_the_adapter(name: str):
    base, model, inputs = subject(name).base, subject(name).model, left_padded()
    before = model(**inputs).logits
    for _ in range(2):
        with model.disable_adapter():
            assert torch.equal(model(**inputs).logits, base(**inputs).logits)
            tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert torch.equal(tokens, base.generate(**inputs, max_new_tokens=3, do_sample=False))
        assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("name", CASES)
def test_every_adapter_parameter_is_trained(name: str):
    model = adapted(name).train()
    model(input_ids=prompt(), labels=prompt()).loss.backward()
    trained = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(".lora_" in key for key in trained)
    still = [key for key, grad in trained.items() if grad is None or not grad.isfinite().all() or not grad.any()]
    # A key bias adds the same to all scores of a query; only RoPE or a key norm tells its positions apart.
    allowed = re.compile(r"k_proj\.lora_kv\.default\.bias") if not FAMILIES[CASES[name].model_type].rotary else None
    assert not [key for key in still if not (allowed and allowed.search(key))]


@pytest.mark.parametrize("name", CASES)
def test_basis_fits_exist_where_the_basis_is_free(name: str):
    case = CASES[name]
    found = {part for key, _ in subject(name).model.named_parameters() for part in key.split(".")}
    expected = FITS.get(name, FITS.get(case.model_type, {QUERY_GAIN, VALUE_MIX}))
    assert found & {QUERY_SCALE, QUERY_GAIN, QUERY_MIX, VALUE_MIX} == expected
    assert ("lora_norm" in found) == (case.model_type in ("olmo2", "qwen3", "gemma3_text"))


@pytest.mark.parametrize("name", ["llama", "phi", "opt", "olmo2", "phi3", "gpt_neox", "qwen2-gqa"])
@torch.no_grad()
def test_every_kind_of_parameter_changes_the_logits(name: str):
    before = subject(name).model(prompt()).logits
    kinds = {re.search(r"lora_\w+", key)[0] for key in dict(subject(name).model.named_parameters()) if ".lora_" in key}
    assert len(kinds) >= 4
    for kind in kinds:
        model = adapted(name)
        for key, parameter in model.named_parameters():
            if f".{kind}." in key:
                parameter.mul_(0.5)
        assert (model(prompt()).logits - before).abs().max() > 1e-3, kind


def test_unknown_architectures_are_refused_with_the_list_of_known_ones():
    bert = BertForMaskedLM(BertConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=4))
    with pytest.raises(ValueError, match=r"model_type='bert' is not supported.*Supported: gemma, gemma2.*stablelm"):
        wrap(bert, [[[0, 1, 2, 3]]])


def test_gpt2_is_refused_with_its_reason():
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=4))
    with pytest.raises(ValueError, match=r"model_type='gpt2' is not supported: Its projections are Conv1D.*Supported"):
        wrap(gpt2, [[[0, 1, 2, 3]]])


@pytest.mark.parametrize("model_type", ["phi", "stablelm"])
def test_per_head_layer_norms_are_refused_with_reason_and_remedy(model_type: str):
    case = CASES[model_type]
    base = random_model(config_of(replace(case, overrides=case.overrides | {"qk_layernorm": True, "hidden_size": 64})))
    before = base(prompt()).logits
    with pytest.raises(ValueError, match=rf"This {model_type} model .* qk_layernorm=True .* Use a "):
        wrap(base, CASES[model_type].groups)
    assert torch.equal(base(prompt()).logits, before)
