"""grouped_sdpa: a decoding step over folded query heads says what eager attention says, and hands the rest to sdpa."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from models import CACHE, CASES, config_of, left_padded, random_model, wrap
from transformers import DynamicCache, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from asymgqa_peft import attention

attention.register_grouped_sdpa()


@torch.no_grad()
def step_logits(model, implementation: str, static: bool, padded: bool) -> torch.Tensor:
    """Logits of one token after a prefill with sdpa."""
    inputs = left_padded(batch=3, length=9)
    inputs["attention_mask"] = inputs["attention_mask"] if padded else torch.ones_like(inputs["attention_mask"])
    config = model.config
    cache = StaticCache(config=config, max_cache_len=16) if static else DynamicCache(config=config)
    model.set_attn_implementation("sdpa")
    model(**inputs, **{CACHE: cache})
    model.set_attn_implementation(implementation)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    return model(input_ids=inputs["input_ids"][:, -1:], attention_mask=mask, **{CACHE: cache}).logits


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(("static", "padded"), [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2-gqa", "phi3", "gemma3"])
def test_a_decoding_step_equals_eager(name: str, static: bool, padded: bool, merged: bool):
    model = wrap(random_model(config_of(CASES[name]), attention="sdpa"), CASES[name].groups)
    model = model.merge_and_unload() if merged else model.get_base_model()
    expected = step_logits(model, "eager", static, padded)
    with mock.patch.object(attention, "fold", side_effect=attention.fold) as folded:
        found = step_logits(model, "grouped_sdpa", static, padded)
    assert folded.called
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("queries", "positions", "mask"),
    [(8, 3, None), (2, 1, None), (8, 1, torch.zeros(2, 8, 1, 5).index_fill(3, torch.tensor([1]), -9.0))],
    ids=["several positions", "multi-head", "a mask per head"],
)
def test_what_it_cannot_fold_is_sdpa_to_the_last_bit(queries: int, positions: int, mask):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, queries, positions, 4, generator=generator)
    key, value = torch.randn(2, 2, 2, 5, 4, generator=generator)
    module = SimpleNamespace(num_key_value_groups=queries // 2, is_causal=True)
    expected, _ = sdpa_attention_forward(module, query, key, value, mask)
    with mock.patch.object(attention, "fold") as folded:
        found, _ = attention.grouped_sdpa(module, query, key, value, mask)
    assert not folded.called and torch.equal(found, expected)
    if mask is not None:
        assert not torch.equal(sdpa_attention_forward(module, query, key, value, None)[0], expected)


def step() -> tuple[SimpleNamespace, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a decoding step over two shared heads gives to an attention function."""
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 2, 2, 5, 4, generator=generator)
    module = SimpleNamespace(num_key_value_groups=4, is_causal=True)
    return module, torch.randn(2, 8, 1, 4, generator=generator), key, value


@pytest.mark.parametrize("option", ["cache", "position_bias", "softcap"])
def test_options_that_change_the_scores_are_left_to_sdpa(option: str):
    value = object()
    with mock.patch.object(attention, "sdpa_attention_forward") as stock:
        assert attention.grouped_sdpa(*step(), None, scaling=0.3, **{option: value}) is stock.return_value
        attention.grouped_sdpa(*step(), None, scaling=0.3, **{option: None})
    assert stock.call_count == 1
    assert stock.call_args.kwargs == {"dropout": 0.0, "scaling": 0.3, option: value}


def test_scaling_and_dropout_reach_the_kernel():
    plain, scaled = (attention.grouped_sdpa(*step(), None, scaling=scaling)[0] for scaling in (None, 2.0))
    assert not torch.allclose(plain, scaled)
    torch.testing.assert_close(scaled, sdpa_attention_forward(*step(), None, scaling=2.0)[0])
    assert plain.any() and not attention.grouped_sdpa(*step(), None, dropout=1.0)[0].any()
