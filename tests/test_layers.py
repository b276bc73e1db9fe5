"""Slots, gains, mixes and shared projections by themselves."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CASES, stock, wrap
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

from asymgqa_peft.adapter.layer import (
    HeadCountView,
    HeadMix,
    RotaryGain,
    SharedKey,
    SharedLinear,
    Slots,
    mean_over_groups,
    with_head_count,
    write_head_counts,
)
from asymgqa_peft.families import FAMILIES, head_shape
from asymgqa_peft.groups import slot_layout

CPU = torch.device("cpu")


@st.composite
def layouts(draw):
    """(partition, queries per KV head, slots per stored K/V head or None): any partition of up to 12 KV heads."""
    group_of = draw(st.lists(st.integers(0, 4), min_size=1, max_size=12))
    groups = [[k for k, g in enumerate(group_of) if g == group] for group in sorted(set(group_of))]
    order = draw(st.permutations(groups))
    return tuple(tuple(group) for group in order), draw(st.integers(1, 3)), draw(st.none() | st.integers(1, 12))


@given(layouts())
def test_every_query_head_meets_its_groups_kv_head(drawn):
    partition, queries_per_kv, slots_per_kv = drawn
    layout = slot_layout(partition, queries_per_kv, slots_per_kv)
    heads = sum(map(len, partition)) * queries_per_kv
    assert layout.num_slots == layout.kv_heads * layout.slots_per_kv
    assert sorted(head for head in layout.head_of_slot if head >= 0) == list(range(heads))
    for head in range(heads):
        slot = layout.slot_of_head[head]
        assert layout.head_of_slot[slot] == head
        assert head // queries_per_kv in partition[layout.kv_source[slot // layout.slots_per_kv]]
    assert set(layout.kv_source) == set(range(len(partition)))
    largest = max(len(group) for group in partition) * queries_per_kv
    if slots_per_kv == 1:
        assert layout.head_of_slot == tuple(range(heads))  # the MHA shape keeps the base's order
    elif slots_per_kv is None or slots_per_kv >= largest:
        assert layout.kv_source == tuple(range(len(partition)))  # stored once each


@given(layouts(), st.integers(0, 10**6))
@settings(max_examples=60)
def test_scatter_then_gather_is_the_identity_whatever_empty_slots_hold(drawn, seed: int):
    layout = slot_layout(*drawn)
    slots = Slots(layout, CPU)
    generator = torch.Generator().manual_seed(seed)
    heads = torch.randn(2, 3, len(layout.slot_of_head), 4, generator=generator, requires_grad=True)
    scattered = slots.scatter(heads)
    assert scattered.shape == (2, 3, layout.num_slots, 4)
    empty = torch.tensor(layout.head_of_slot) < 0
    for slot in (~empty).nonzero().flatten().tolist():
        assert torch.equal(scattered[..., slot, :], heads[..., layout.head_of_slot[slot], :])
    gathered = slots.gather(scattered.masked_fill(empty[:, None], torch.nan))
    assert torch.equal(gathered, heads)
    wanted = torch.randn(heads.shape, generator=generator)
    (gathered * wanted).sum().backward()
    assert torch.equal(heads.grad, wanted)  # the copies in empty slots send nothing back


@given(layouts(), st.integers(0, 10**6))
@settings(max_examples=60)
def test_slots_pair_as_grouped_attention_pairs(drawn, seed: int):
    """Repeating stored heads as attention does, every query head sees the shared head of its group."""
    partition, queries_per_kv, _ = drawn
    layout = slot_layout(*drawn)
    slots = Slots(layout, CPU)
    shared = torch.randn(1, 2, len(partition), 4, generator=torch.Generator().manual_seed(seed))
    repeated = repeat_kv(slots.store(shared).transpose(1, 2), layout.slots_per_kv).transpose(1, 2)
    seen = slots.gather(repeated)
    for group, members in enumerate(partition):
        for kv in members:
            for query in range(queries_per_kv):
                assert torch.equal(seen[:, :, kv * queries_per_kv + query], shared[:, :, group])


def test_gains_and_mixes_start_as_the_identity_with_weights_of_zero():
    x = torch.randn(2, 3, 4, 8)
    for fit in (RotaryGain(4, 8), RotaryGain(4, 4), HeadMix(4, 8), HeadMix(4, 5, start=3)):
        assert not fit.weight.any()
        assert torch.equal(fit(x), x)


def test_a_small_step_moves_a_bf16_gain_that_a_stored_one_would_swallow():
    gain, step = RotaryGain(4, 8).bfloat16(), 1e-3
    with torch.no_grad():
        gain.weight += step
    assert (gain.weight == torch.tensor(step).bfloat16()).all()
    assert torch.equal(torch.ones(1).bfloat16() + step, torch.ones(1).bfloat16())


@pytest.mark.parametrize("rotary", [8, 4])
def test_a_gain_is_a_complex_product_on_rotary_pairs(rotary: int):
    gain = RotaryGain(3, rotary, dtype=torch.float64)
    nn.init.normal_(gain.weight)
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    pairs = torch.complex(x[..., : rotary // 2], x[..., rotary // 2 : rotary])
    expected = pairs * (1 + torch.view_as_complex(gain.weight.detach()))
    y = gain(x)
    torch.testing.assert_close(torch.complex(y[..., : rotary // 2], y[..., rotary // 2 : rotary]), expected)
    assert torch.equal(y[..., rotary:], x[..., rotary:])


def test_a_gain_commutes_with_rope_and_a_mix_does_not():
    x = torch.randn(1, 6, 3, 8, dtype=torch.float64)
    angles = torch.arange(6.0).double()[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03]).double()
    cos, sin = (f(angles).repeat(1, 2)[None] for f in (torch.cos, torch.sin))

    def rotate(query: torch.Tensor) -> torch.Tensor:
        return apply_rotary_pos_emb(query, query, cos, sin, unsqueeze_dim=2)[0]

    gain, mix = RotaryGain(3, 8, dtype=torch.float64), HeadMix(3, 8, dtype=torch.float64)
    for fit in (gain, mix):
        nn.init.normal_(fit.weight)
    assert (rotate(gain(x)) - rotate(x)).abs().max() > 0.1
    torch.testing.assert_close(rotate(gain(x)), gain(rotate(x)))
    assert (rotate(mix(x)) - mix(rotate(x))).abs().max() > 0.1


def test_a_mix_is_one_matrix_per_head():
    mix = HeadMix(3, 5, start=3)
    nn.init.normal_(mix.weight)
    x = torch.randn(2, 4, 3, 8)
    y = mix(x)
    for head in range(3):
        expected = x[:, :, head, 3:] @ (torch.eye(5) + mix.weight[head]).T
        torch.testing.assert_close(y[:, :, head, 3:], expected)
    assert torch.equal(y[..., :3], x[..., :3])


def test_a_shared_linear_computes_in_its_inputs_dtype():
    linear, x = SharedLinear(6, 4), torch.randn(2, 6).bfloat16()
    assert linear(x).dtype == torch.bfloat16 and linear.weight.dtype == torch.float32
    exact = nn.functional.linear(x.float(), linear.weight, linear.bias)
    torch.testing.assert_close(linear(x).float(), exact, rtol=0.02, atol=0.02)
    linear(x).sum().backward()
    assert linear.weight.grad.dtype == torch.float32


def test_the_mean_over_groups_is_taken_in_fp32():
    heads = torch.tensor([1.0, 1.0, 256.0, 1.0]).bfloat16()[:, None]
    mean = mean_over_groups(heads, ((0, 2), (1, 3)))
    assert mean.dtype == torch.float32 and mean[:, None].flatten().tolist() == [128.5, 1.0]
    assert mean_over_groups(heads.double(), ((0, 1, 2, 3),)).dtype == torch.float64


@pytest.mark.parametrize("name", ["llama-bias", "qwen2-gqa", "phi3", "gpt_neox", "olmo2"])
def test_base_heads_and_the_mean_start(name: str):
    """Before any initialisation the shared heads are the group means of the base's, weights and biases."""
    case, base = CASES[name], stock(name)
    shape = head_shape(base.config)
    wrapped = wrap(copy.deepcopy(base), case.groups, seed=0)
    fresh = next(module for module in wrapped.modules() if hasattr(module, "share_mean"))
    assert not torch.equal(fresh.lora_kv["default"].weight, _means(fresh, case.groups[0]))
    fresh.share_mean("default", case.groups[0])
    assert torch.equal(fresh.lora_kv["default"].weight, _means(fresh, case.groups[0]))
    weight, bias = fresh.base_heads(fresh.parts[0])
    assert weight.shape == (case.kv_heads, shape.head_dim, shape.hidden_size)
    assert bias is None or bias.shape == (case.kv_heads, shape.head_dim)


def _means(layer, partition) -> torch.Tensor:
    heads = [layer.base_heads(part)[0] for part in layer.parts]
    return torch.cat([weights[group].mean(0) for weights in heads for group in partition])


def test_the_fused_layouts_are_read_as_the_stock_models_read_them():
    """Query, key and value rows of Phi-3 (blocks) and GPT-NeoX (per head), against the models' own slicing."""
    for name in ("phi3-gqa", "gpt_neox"):
        model = wrap(copy.deepcopy(stock(name)), CASES[name].groups)
        layer = next(module for module in model.modules() if hasattr(module, "base_heads"))
        base, shape = layer.get_base_layer(), layer.shape
        x = torch.randn(1, 1, shape.hidden_size)
        fused = base(x)
        if name == "gpt_neox":
            expected = fused.view(1, 1, -1, 3 * shape.head_dim).chunk(3, dim=-1)
        else:
            sizes = [shape.num_attention_heads, shape.base_kv_heads, shape.base_kv_heads]
            expected = fused.unflatten(-1, (-1, shape.head_dim)).split(sizes, dim=-2)
        for part, heads in zip(("query", "key", "value"), expected, strict=True):
            weight, bias = layer.base_heads(part)
            actual = weight @ x[0, 0] + (0 if bias is None else bias)
            torch.testing.assert_close(actual, heads[0, 0])


def test_head_counts_follow_the_familys_declaration():
    config = copy.deepcopy(stock("phi3").config)
    attention = nn.Module()
    attention.config = config
    write_head_counts(attention, FAMILIES["phi3"], slots=15, kv_heads=3)
    assert (attention.num_key_value_heads, attention.num_key_value_groups) == (3, 5)
    assert attention.config.num_attention_heads == 15 and config.num_attention_heads == 8
    write_head_counts(attention, FAMILIES["phi3"], slots=12, kv_heads=3)
    assert attention.config.num_attention_heads == 12
    write_head_counts(attention, FAMILIES["phi3"], slots=8, kv_heads=8)
    assert attention.config is config


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda view: pickle.loads(pickle.dumps(view))])
def test_a_head_count_view_is_the_live_configuration_but_for_the_count(duplicate):
    config = copy.deepcopy(stock("phi3").config)
    view = with_head_count(config, 15)
    config.sliding_window = 7
    assert isinstance(view, HeadCountView) and view.sliding_window == 7 and view.num_attention_heads == 15
    twin = duplicate(view)
    assert twin.num_attention_heads == 15 and twin.hidden_size == config.hidden_size
    with pytest.raises(AttributeError):
        _ = view.no_such_field


def test_two_adapters_cannot_be_active_at_once():
    layer = SharedKey(nn.Linear(96, 64), head_shape(stock("mistral").config), FAMILIES["mistral"])
    for name, partition in (("a", CASES["mistral"].groups[0]), ("b", CASES["mistral"].groups[1])):
        layer.update_layer(name, tuple(tuple(group) for group in partition))
    layer.set_adapter(["a", "b"])
    with pytest.raises(ValueError, match=r"\['a', 'b'\] are active together, but attention has one set of K/V heads"):
        layer(torch.randn(1, 2, 96))
