"""Slots, gains, mixes and shared projections by themselves."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CASES, adapter_config, stock
from peft import get_peft_model
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

from asymgqa_peft.adapter.layer import (
    Geometry,
    HeadCountView,
    SharedKey,
    SharedLinear,
    with_head_count,
    write_geometry,
)
from asymgqa_peft.adapter.site import attention_sites
from asymgqa_peft.adapter.slots import HeadLayout, HeadMix, HeadScale, RotaryGain
from asymgqa_peft.families import FAMILIES, head_shape
from asymgqa_peft.groups import slot_layout
from asymgqa_peft.heads import HeadShape, SharedShape

CPU = torch.device("cpu")


def layout_of(partition, queries_per_kv: int = 1, width: int = 8, rotary_dim: int = 8) -> HeadLayout:
    """The layout of heads with D = 8."""
    kv_heads = sum(len(group) for group in partition)
    base = HeadShape(96, kv_heads * queries_per_kv, kv_heads, 8, rotary_dim)
    return HeadLayout(partition, SharedShape.of_width(base, width), CPU, declared=False)


def rotate_by(angles: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    """RoPE by angles (T, pairs) on heads (B, T, H, 2 pairs)."""
    cos, sin = (f(angles).repeat(1, 2)[None] for f in (torch.cos, torch.sin))
    return apply_rotary_pos_emb(heads, heads, cos, sin, unsqueeze_dim=2)[0]


ANGLES = torch.arange(6.0).double()[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03]).double()


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
    partition, queries_per_kv, _ = drawn
    layout = layout_of(partition, queries_per_kv)
    generator = torch.Generator().manual_seed(seed)
    heads = torch.randn(2, 3, len(layout.slots.slot_of_head), 4, generator=generator, requires_grad=True)
    scattered = layout.scatter(heads)
    assert scattered.shape == (2, 3, layout.slots.num_slots, 4)
    empty = torch.tensor(layout.slots.head_of_slot) < 0
    for slot in (~empty).nonzero().flatten().tolist():
        assert torch.equal(scattered[..., slot, :], heads[..., layout.slots.head_of_slot[slot], :])
    gathered = layout.gather(scattered.masked_fill(empty[:, None], torch.nan))
    assert torch.equal(gathered, heads)
    wanted = torch.randn(heads.shape, generator=generator)
    (gathered * wanted).sum().backward()
    assert torch.equal(heads.grad, wanted)  # the copies in empty slots send nothing back


@given(layouts(), st.integers(0, 10**6))
@settings(max_examples=60)
def test_slots_pair_as_grouped_attention_pairs(drawn, seed: int):
    """Repeating shared heads as attention does, every query head sees the shared head of its group."""
    partition, queries_per_kv, _ = drawn
    layout = layout_of(partition, queries_per_kv)
    shared = torch.randn(1, 2, len(partition), 4, generator=torch.Generator().manual_seed(seed))
    repeated = repeat_kv(shared.transpose(1, 2), layout.slots.slots_per_kv).transpose(1, 2)
    seen = layout.gather(repeated)
    assert torch.equal(layout.to_query_heads(shared), seen)
    for group, members in enumerate(partition):
        for kv in members:
            for query in range(queries_per_kv):
                assert torch.equal(seen[:, :, kv * queries_per_kv + query], shared[:, :, group])


@pytest.mark.parametrize("rotary", [8, 4])
def test_gains_and_mixes_start_as_the_identity_with_weights_of_zero(rotary: int):
    x, layout = torch.randn(2, 3, 4, 8), layout_of(((0, 1), (2, 3)), rotary_dim=rotary)
    gain = RotaryGain(layout.shape)
    assert not gain.weight.any()
    assert torch.equal(gain.fit_query(x[..., :rotary], layout), x[..., :rotary])
    assert torch.equal(gain.decode_key(x[..., :rotary], layout), x[..., :rotary])
    mix = HeadMix(4, 8, 8)
    assert not mix.weight.any()
    assert torch.equal(mix(x), x) and torch.equal(mix.transposed(x), x)


def test_a_small_step_moves_a_bf16_gain_that_a_stored_one_would_swallow():
    gain, step = RotaryGain(layout_of(((0, 1),)).shape).bfloat16(), 1e-3
    with torch.no_grad():
        gain.weight += step
    assert (gain.weight == torch.tensor(step).bfloat16()).all()
    assert torch.equal(torch.ones(1).bfloat16() + step, torch.ones(1).bfloat16())


@pytest.mark.parametrize("width", [8, 12, 16, 24])
def test_a_gain_is_a_complex_product_on_the_pairs_of_its_frequencies(width: int):
    layout = layout_of(((0, 1, 2),), width=width)
    gain = RotaryGain(layout.shape, dtype=torch.float64)
    nn.init.normal_(gain.weight)
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    frequencies = list(layout.shape.frequencies)
    assert len(frequencies) == width // 2
    start = torch.tensor([float(f not in frequencies[:pair]) for pair, f in enumerate(frequencies)])
    complex_gain = start + torch.view_as_complex(gain.weight.detach())
    expected = torch.complex(x[..., :4], x[..., 4:])[..., frequencies] * complex_gain
    y = gain.fit_query(x, layout)
    torch.testing.assert_close(torch.complex(*y.chunk(2, -1)), expected)


@pytest.mark.parametrize("width", [8, 12, 16, 24])
def test_fitting_the_query_and_decoding_the_key_give_the_same_scores_under_rope(width: int):
    layout = layout_of(((0, 1, 2),), width=width)
    gain = RotaryGain(layout.shape, dtype=torch.float64)
    nn.init.normal_(gain.weight)
    query, shared = torch.randn(1, 6, 3, 8).double(), torch.randn(1, 6, 3, width).double()
    wide_angles = ANGLES[:, list(layout.shape.frequencies)]
    fitted = rotate_by(wide_angles, gain.fit_query(query, layout))
    scores = torch.einsum("bthd,bshd->bhts", fitted, rotate_by(wide_angles, shared))
    own = rotate_by(ANGLES, gain.decode_key(shared, layout))
    expected = torch.einsum("bthd,bshd->bhts", rotate_by(ANGLES, query), own)
    torch.testing.assert_close(scores, expected)
    assert expected.abs().max() > 1


def test_a_gain_commutes_with_rope_and_a_mix_does_not():
    x, layout = torch.randn(1, 6, 3, 8, dtype=torch.float64), layout_of(((0, 1, 2),))
    gain, mix = RotaryGain(layout.shape, dtype=torch.float64), HeadMix(3, 8, 8, dtype=torch.float64)
    for fit in (gain, mix):
        nn.init.normal_(fit.weight)
    rotated = rotate_by(ANGLES, x)
    assert (rotate_by(ANGLES, gain.fit_query(x, layout)) - rotated).abs().max() > 0.1
    torch.testing.assert_close(rotate_by(ANGLES, gain.fit_query(x, layout)), gain.fit_query(rotated, layout))
    assert (rotate_by(ANGLES, mix(x)) - mix(rotated)).abs().max() > 0.1


@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (8, 12), (8, 16), (12, 8)])
def test_a_mix_is_one_matrix_per_head(rows: int, columns: int):
    mix = HeadMix(3, rows, columns)
    nn.init.normal_(mix.weight)
    batch = 16  # larger than any dimension of a head
    x, y = torch.randn(batch, 4, 3, columns), torch.randn(batch, 4, 3, rows)
    for head in range(3):
        matrix = torch.eye(rows, columns) + mix.weight[head]
        torch.testing.assert_close(mix(x)[:, :, head], x[:, :, head] @ matrix.T)
        torch.testing.assert_close(mix.transposed(y)[:, :, head], y[:, :, head] @ matrix)


@torch.no_grad()
@pytest.mark.parametrize("width", [8, 12, 16])
def test_fits_do_what_was_written_and_read_as_it(width: int):
    layout = layout_of(((0, 2), (1,)), width=width)
    query, attended = torch.randn(2, 4, 3, 8).double(), torch.randn(2, 4, 3, width).double()
    factors, matrices = torch.randn(3, 8).double(), torch.randn(3, 8, width).double()
    gains = torch.randn(3, width // 2, dtype=torch.complex128)
    turned = torch.complex(*query.chunk(2, dim=-1))[..., list(layout.shape.frequencies)] * gains
    cases = [
        (HeadScale(layout.shape, dtype=torch.float64), factors, query, query * factors),
        (HeadMix(3, 8, width).double(), matrices, attended, torch.einsum("hmn,bthn->bthm", matrices, attended)),
        (RotaryGain(layout.shape, dtype=torch.float64), gains, query, torch.cat((turned.real, turned.imag), -1)),
    ]
    for fit, written, heads, expected in cases:
        fit.write(written, layout)
        torch.testing.assert_close(fit.read(layout), written)
        found = fit.fit_query(heads, layout) if isinstance(fit, RotaryGain) else fit(heads)
        torch.testing.assert_close(found, expected)
        fit.write(None, layout)
        assert not fit.weight.any()


def test_a_shared_linear_computes_in_its_inputs_dtype():
    linear, x = SharedLinear(6, 4), torch.randn(2, 6).bfloat16()
    assert linear(x).dtype == torch.bfloat16 and linear.weight.dtype == torch.float32
    exact = nn.functional.linear(x.float(), linear.weight, linear.bias)
    torch.testing.assert_close(linear(x).float(), exact, rtol=0.02, atol=0.02)
    linear(x).sum().backward()
    assert linear.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("name", ["llama-bias", "qwen2-gqa", "phi3", "gpt_neox", "olmo2"])
def test_before_any_initialisation_heads_are_the_means_of_their_groups(name: str):
    case, base = CASES[name], stock(name)
    model = get_peft_model(copy.deepcopy(base), adapter_config(case.groups))
    for site, partition in zip(attention_sites(model), case.groups, strict=True):
        heads, weights = site.reader("default")(), site.weights()
        assert heads.partition == tuple(tuple(sorted(group)) for group in partition)
        for part in ("key", "value", "key_bias", "value_bias"):
            own = getattr(weights, part)
            if own is None:
                assert getattr(heads, part) is None
                continue
            own = own.unflatten(0, (case.kv_heads, -1))
            expected = torch.stack([own[group].mean(0) for group in partition])
            torch.testing.assert_close(getattr(heads, part), expected)


def test_the_fused_layouts_are_read_as_the_stock_models_read_them():
    """Query, key and value rows of Phi-3 (blocks) and GPT-NeoX (per head), against the models' own slicing."""
    for name in ("phi3-gqa", "gpt_neox"):
        site = attention_sites(stock(name))[0]
        base, shape, weights = site.key, site.shape, site.weights()
        x = torch.randn(1, 1, shape.hidden_size)
        fused = base(x)
        if name == "gpt_neox":
            expected = fused.view(1, 1, -1, 3 * shape.head_dim).chunk(3, dim=-1)
        else:
            sizes = [shape.num_attention_heads, shape.base_kv_heads, shape.base_kv_heads]
            expected = fused.unflatten(-1, (-1, shape.head_dim)).split(sizes, dim=-2)
        for part, heads in zip(("query", "key", "value"), expected, strict=True):
            bias = getattr(weights, f"{part}_bias")
            actual = getattr(weights, part) @ x[0, 0] + (0 if bias is None else bias)
            torch.testing.assert_close(actual, heads[0, 0].flatten())


def test_geometry_follows_the_familys_declaration():
    config = copy.deepcopy(stock("phi3").config)
    attention = nn.Module()
    attention.config = config
    write_geometry(attention, FAMILIES["phi3"], Geometry(15, 3, 8, 8))
    assert (attention.num_key_value_heads, attention.num_key_value_groups) == (3, 5)
    assert attention.config.num_attention_heads == 15 and config.num_attention_heads == 8
    write_geometry(attention, FAMILIES["phi3"], Geometry(12, 3, 8, 8))
    assert attention.config.num_attention_heads == 12
    write_geometry(attention, FAMILIES["phi3"], Geometry(8, 8, 8, 8))
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
        layer.update_layer(name, tuple(map(tuple, partition)), SharedShape.of_width(layer.shape), declared=True)
    layer.set_adapter(["a", "b"])
    with pytest.raises(ValueError, match=r"\['a', 'b'\] are active together, but attention has one set of K/V heads"):
        layer(torch.randn(1, 2, 96))
