"""Attention backends, ways to generate, checkpointing, compilation, low precision, copies."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from models import CACHE, CASES, MHA_GROUPS, adapted, left_padded, prompt, stock, wrap
from reference import dense_reference, greedy_alone, relative_error, rows_alone
from torch._dynamo.testing import CompileCounter
from transformers import DynamicCache, StaticCache

TOLERANCE = 5e-6  # of the largest logit, in fp32
MODELS = ["llama", "mistral"]  # MHA with llama3 RoPE; MHA with a sliding window shorter than the prompt


def reference(name: str):
    return dense_reference(stock(name), adapted(name), CASES[name].groups)


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("llama", "eager"),
        ("llama", "sdpa"),
        ("mistral", "eager"),
        ("mistral", "sdpa"),
        ("mistral", "flex_attention"),
        pytest.param("llama", "flex_attention", marks=pytest.mark.slow),  # compiles for 20 s
    ],
)
def test_left_padded_logits_equal_the_reference(name: str, attention: str):
    model = adapted(name)
    model.set_attn_implementation(attention)
    expected = rows_alone(reference(name), left_padded())
    assert relative_error(stock(name), left_padded(), expected) > 0.1
    assert relative_error(model, left_padded(), expected) < TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_beam_search_equals_the_reference(name: str):
    options = {"max_new_tokens": 8, "num_beams": 4, "num_return_sequences": 2, "do_sample": False}
    tokens = adapted(name).generate(input_ids=prompt(), **options)
    assert torch.equal(tokens, reference(name).generate(input_ids=prompt(), **options))
    assert not torch.equal(tokens, stock(name).generate(input_ids=prompt(), **options))


@pytest.mark.parametrize("name", MODELS)
def test_sampling_with_a_seed_equals_the_reference(name: str):
    options = {"max_new_tokens": 10, "do_sample": True, "temperature": 0.8, "top_k": 50}
    draws = []
    for model in (adapted(name), reference(name), stock(name)):
        torch.manual_seed(3)
        draws.append(model.generate(input_ids=prompt(batch=4), **options))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
@torch.no_grad()
def test_a_prompt_prefilled_in_chunks_gives_the_same_logits(name: str, cache_class):
    model, ids = adapted(name), prompt()
    expected = rows_alone(reference(name), {"input_ids": ids})
    options = {"max_cache_len": ids.shape[1]} if cache_class is StaticCache else {}
    cache = cache_class(config=model.config, **options)
    chunks = [model(chunk, **{CACHE: cache}).logits for chunk in ids.split([5, 1, 4, 2], dim=1)]
    error = (torch.cat(chunks, dim=1).double() - torch.stack(expected)).abs().max()
    assert error < TOLERANCE * torch.stack(expected).abs().max()
    assert {layer.keys.shape[1] for layer in cache.layers} == {3}


@pytest.mark.parametrize("name", MODELS)
def test_generate_with_chunked_prefill_and_static_cache(name: str):
    expected = greedy_alone(reference(name), {"input_ids": prompt()}, tokens=6)
    chunked, static = {"prefill_chunk_size": 5}, {"cache_implementation": "static"}
    for options in (chunked, static, chunked | static):
        tokens = adapted(name).generate(input_ids=prompt(), max_new_tokens=6, do_sample=False, **options)
        assert torch.equal(tokens[:, -6:], expected), options


def checkpoint(model, **kwargs) -> None:
    model.enable_input_require_grads()
    if hasattr(model, "activation_checkpointing_enable"):  # the name since transformers 5.23
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


def gradients(model, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["llama-bias", "mistral", "phi3-gqa", "llama-wide-odd", "phi-wide", "phi3-wide-gqa"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_loss_and_no_gradient(name: str, reentrant: bool):
    plain, checkpointed = adapted(name).train(), adapted(name).train()
    checkpoint(checkpointed, use_reentrant=reentrant)
    seen = []
    checkpointed.get_submodule("base_model.model.model.layers.0").self_attn.register_forward_hook(
        lambda *args: seen.append(torch.is_grad_enabled())
    )
    expected_loss, expected = gradients(plain, prompt())
    loss, actual = gradients(checkpointed, prompt())
    assert len(seen) == 2  # once more in backward: it did checkpoint
    assert torch.equal(loss, expected_loss)
    assert actual.keys() == expected.keys() and any("lora_kv" in key for key in actual)
    for key, gradient in expected.items():
        torch.testing.assert_close(actual[key], gradient, rtol=1e-5, atol=1e-7, msg=key)


def test_disabling_between_forward_and_backward_keeps_the_checkpointed_gradient():
    """What self-distillation does: the teacher runs while the student's graph waits for its backward."""
    model = adapted("llama").train()
    checkpoint(model, use_reentrant=False)
    loss = model(input_ids=prompt(), labels=prompt()).loss
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(prompt()).logits, stock("llama")(prompt()).logits)
    loss.backward()
    _, expected = gradients(adapted("llama").train(), prompt())
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[key], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["llama-bias", "qwen2-gqa", "olmo"])
def test_shared_gradients_are_the_sums_of_the_references_copies(name: str):
    groups = CASES[name].groups
    dense = reference(name).requires_grad_(True)
    dense_loss, dense_grads = gradients(dense, prompt())
    loss, grads = gradients(adapted(name), prompt())
    assert loss.item() == pytest.approx(dense_loss.item(), rel=1e-6)
    for layer, partition in enumerate(groups):
        for part in ("k_proj", "v_proj"):
            for kind in ("weight", "bias"):
                copies = dense_grads[f"model.layers.{layer}.self_attn.{part}.{kind}"].unflatten(0, (-1, 8))
                expected = torch.cat([copies[group].sum(0) for group in partition]).float()
                key = f"base_model.model.model.layers.{layer}.self_attn.{part}.lora_kv.default.{kind}"
                error = (grads[key] - expected).abs().max()
                # A key bias gets next to nothing; compare at the scale of the whole projection's gradient.
                assert error < 1e-5 * dense_grads[f"model.layers.{layer}.self_attn.{part}.weight"].abs().max()


@torch.no_grad()
def test_compiles_to_one_graph_with_and_one_without_the_adapter():
    torch._dynamo.reset()
    model, base = adapted("llama"), stock("llama")
    with model.disable_adapter():
        pass  # PEFT's flag becomes an attribute of each layer the first time, which costs one compilation
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    on, off = model(prompt()).logits, base(prompt()).logits
    for _ in range(2):
        assert torch.equal(compiled(prompt()).logits, on)
        with model.disable_adapter():
            assert torch.equal(compiled(prompt()).logits, off)
    assert counter.frame_count == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["phi3", "stablelm", "olmo2", "opt", "gpt_neox", "gemma3", "olmo-clipped"])
@torch.no_grad()
def test_every_way_of_setting_heads_compiles_to_one_graph(name: str):
    torch._dynamo.reset()
    model = adapted(name)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(prompt()).logits, model(prompt()).logits)
    with model.disable_adapter():
        assert torch.equal(compiled(prompt()).logits, stock(name)(prompt()).logits)


@pytest.mark.slow
@torch.no_grad()
def test_inductor_computes_the_same():
    torch._dynamo.reset()
    model = adapted("llama")
    compiled = torch.compile(model, fullgraph=True)
    expected = rows_alone(reference("llama"), {"input_ids": prompt()})
    assert relative_error(compiled, {"input_ids": prompt()}, expected) < TOLERANCE
    with model.disable_adapter():
        expected = [row.double() for row in stock("llama")(prompt()).logits]
        assert relative_error(compiled, {"input_ids": prompt()}, expected) < TOLERANCE


@torch.no_grad()
def test_torch_export_captures_the_adapter():
    model = adapted("llama")
    program = torch.export.export(model, (prompt(),), {"use_cache": False}, strict=False)
    other = prompt(seed=1)
    assert torch.equal(program.module()(other, use_cache=False).logits, model(other).logits)


@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2"])
@torch.no_grad()
def test_bf16_is_as_close_to_the_truth_as_the_merged_model(name: str):
    base = copy.deepcopy(stock(name)).bfloat16()
    model = wrap(copy.deepcopy(base), MHA_GROUPS)
    inputs = {"input_ids": prompt(batch=8, length=24)}
    truth = torch.stack(rows_alone(dense_reference(base, model, MHA_GROUPS), inputs))

    def error(logits: torch.Tensor) -> float:
        return (logits.double() - truth).square().mean().sqrt().item()

    assert model(**inputs).logits.dtype == torch.bfloat16
    adapter = error(model(**inputs).logits)
    merged = error(model.merge_and_unload()(**inputs).logits)
    assert 0 < adapter < 1.5 * merged


def _reload(model):
    return pickle.loads(pickle.dumps(model))


def _torch_reload(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _reload, _torch_reload])
@pytest.mark.parametrize("name", ["llama", "phi3", "olmo2"])
@torch.no_grad()
def test_the_hooks_of_a_copy_belong_to_the_copy(name: str, duplicate):
    for changed_first in (True, False):
        model = adapted(name)
        twin = duplicate(model)
        before = model(prompt()).logits
        assert torch.equal(twin(prompt()).logits, before)
        changed, kept = (twin, model) if changed_first else (model, twin)
        for key, parameter in changed.named_parameters():
            if "lora_value_mix" in key or "lora_query_gain" in key:  # applied by hooks only
                parameter.mul_(2)
        assert torch.equal(kept(prompt()).logits, before)
        assert (changed(prompt()).logits - before).abs().max() > 1e-3
        with changed.disable_adapter():  # the other one stays on
            assert torch.equal(changed(prompt()).logits, stock(name)(prompt()).logits)
            assert torch.equal(kept(prompt()).logits, before)
