"""Perplexity, KL, cache bytes: against formulas written out, with padding and wrapped models."""

import math

import pytest
import torch
from peft import get_peft_model
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from asymgqa_peft import AsymGQAConfig
from asymgqa_peft.evaluate import decode_speed, kl_to_reference, kv_cache_bytes_per_token, perplexity


def tiny_llama(kv_heads: int = 4) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def token_losses(model, ids: torch.Tensor) -> list[float]:
    """Next-token losses of one unpadded sequence (T,), one prediction at a time."""
    probabilities = torch.softmax(model(ids[None]).logits[0].detach().double(), -1)
    return [-math.log(probabilities[t, ids[t + 1]]) for t in range(len(ids) - 1)]


def test_perplexity_is_token_weighted_over_batches_of_unequal_length():
    model = tiny_llama()
    short, long = torch.randint(0, 61, (1, 5)), torch.randint(0, 61, (1, 17))
    losses = token_losses(model, short[0]) + token_losses(model, long[0])
    expected = math.exp(sum(losses) / len(losses))
    mean_of_batches = math.exp(0.5 * (sum(losses[:4]) / 4 + sum(losses[4:]) / 16))
    assert abs(expected - mean_of_batches) > 1e-3 * expected  # the weighting matters here
    assert perplexity(model, [short, {"input_ids": long}]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_counted(side):
    model = tiny_llama()
    ids = torch.randint(0, 61, (1, 12))
    pad = torch.zeros(1, 6, dtype=torch.long)
    padded = torch.cat((pad, ids) if side == "left" else (ids, pad), dim=1)
    mask = torch.cat((pad, torch.ones_like(ids)) if side == "left" else (torch.ones_like(ids), pad), dim=1)
    expected = perplexity(model, [ids])
    assert perplexity(model, [{"input_ids": padded, "attention_mask": mask}]) == pytest.approx(expected, rel=1e-4)
    assert perplexity(model, [padded]) != pytest.approx(expected, rel=1e-2)


def test_kl_is_zero_to_itself_and_the_formula_to_another():
    model, other = tiny_llama(), tiny_llama()
    with torch.no_grad():
        other.lm_head.weight.mul_(1.7)
    ids = torch.randint(0, 61, (3, 9))
    p, q = (torch.log_softmax(m(ids).logits[:, :-1].double(), -1) for m in (other, model))
    expected = (p.exp() * (p - q)).sum(-1).mean().item()
    assert expected > 1e-2
    assert kl_to_reference(model, other, [ids]) == pytest.approx(expected, rel=1e-4)
    assert kl_to_reference(model, tiny_llama(), [ids]) == pytest.approx(0.0, abs=1e-9)


def test_kl_of_a_wrapped_model_to_its_own_base():
    base = tiny_llama()
    ids = torch.randint(0, 61, (2, 11))
    reference = tiny_llama()
    model = get_peft_model(base, AsymGQAConfig(num_key_value_heads=2, task_type="CAUSAL_LM"))
    own = kl_to_reference(model, model, [ids])
    assert own == pytest.approx(kl_to_reference(model, reference, [ids]), rel=1e-5)
    assert own > 1e-3


def test_cache_bytes_equal_what_a_cache_holds():
    base = tiny_llama()
    model = get_peft_model(
        base, AsymGQAConfig(num_key_value_heads=2, head_groups=[[[0, 1, 3], [2]]] * 2, task_type="CAUSAL_LM")
    ).eval()

    def held(use) -> int:
        cache = DynamicCache(config=base.config)
        use(torch.randint(0, 61, (1, 10)), past_key_values=cache)
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) // 10

    assert kv_cache_bytes_per_token(model, torch.float32) == held(model)
    with model.disable_adapter():
        assert (
            kv_cache_bytes_per_token(model, torch.float32)
            == held(model)
            == 2 * kv_cache_bytes_per_token(model, torch.float16)
        )
    assert held(model) * 2 == kv_cache_bytes_per_token(tiny_llama().config, torch.float32)
    plain = model.merge_and_unload()
    assert kv_cache_bytes_per_token(plain, torch.float32) == held(plain)


def test_mode_is_restored_and_speed_is_positive():
    model = tiny_llama().train()
    perplexity(model, [torch.randint(0, 61, (1, 4))])
    assert decode_speed(model, batch_size=1, context=4, new_tokens=2, repeats=1) > 0
    assert model.training


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no token"),
        ([torch.zeros(2, 1, dtype=torch.long)], "no token"),
        ([torch.zeros(3, dtype=torch.long)], "LongTensors"),
        ([torch.zeros(2, 3)], "LongTensors"),
        ([{"labels": torch.zeros(2, 3)}], "input_ids"),
        (["text"], "str"),
    ],
)
def test_bad_batches_are_named(batches, message):
    with pytest.raises(ValueError, match=message):
        perplexity(tiny_llama(), batches)
