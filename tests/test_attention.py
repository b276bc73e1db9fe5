"""grouped_sdpa says what eager attention says, in a decoding step and of packed rows, and hands the rest to sdpa."""

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


STARTS = torch.tensor([0, 5, 6, 13], dtype=torch.int32)


def attention_by_document(query, key, value, starts, _, longest, __, scale, window_size):
    """What PyTorch's kernel for sequences of different lengths computes, (T, H, D), one of them at a time."""
    assert longest == starts.diff().max()
    parts = []
    for start, stop in zip(starts[:-1], starts[1:], strict=True):
        scores = torch.einsum("thd,shd->hts", query[start:stop], key[start:stop]) * scale
        seen = torch.ones_like(scores[0], dtype=torch.bool).tril()
        if window_size[0] >= 0:
            seen &= seen.triu(-window_size[0])
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        parts.append(torch.einsum("hts,shd->thd", weights, value[start:stop]))
    return torch.cat(parts)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "mistral", "phi3"])
def test_packed_documents_see_themselves_only(name: str):
    config = config_of(CASES[name])
    if name == "mistral":
        config.sliding_window = 3
    model = wrap(random_model(config, attention="sdpa"), CASES[name].groups).train()
    ids = torch.randint(3, 60, (1, 13), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(count) for count in STARTS.diff()])[None]
    packed = {"cu_seq_lens_q": STARTS, "cu_seq_lens_k": STARTS, "max_length_q": 7, "max_length_k": 7}
    inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    expected, together = model(**inputs).logits, model(input_ids=ids, use_cache=False).logits
    assert (expected - together).abs().max() > 1e-3
    model.get_base_model().set_attn_implementation("grouped_sdpa")
    # On a CPU there is no such kernel: sdpa and its mask.
    assert torch.equal(model(**inputs, **packed).logits, expected)
    with (
        mock.patch.object(attention, "is_packable", return_value=True),
        mock.patch.object(attention, "varlen_attn", side_effect=attention_by_document) as kernel,
    ):
        found = model(**inputs, **packed).logits
        assert torch.equal(model(**inputs).logits, expected)
    assert kernel.call_count == model.config.num_hidden_layers
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_what_the_kernel_of_packed_rows_cannot_take():
    heads = torch.zeros(1, 4, 9, 8, dtype=torch.bfloat16)
    # All that this machine lacks is the GPU.
    on_gpu = mock.Mock(wraps=heads, is_cuda=True, dtype=torch.bfloat16, shape=heads.shape, __len__=lambda _: 1)
    assert attention.is_packable(on_gpu, heads, 0.0)
    assert not attention.is_packable(heads, heads, 0.0)
    assert not attention.is_packable(on_gpu, heads[:, :2], 0.0)
    assert not attention.is_packable(on_gpu, heads, 0.1)
