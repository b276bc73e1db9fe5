"""The start without data: means of neighbouring heads, at the base's width and wider."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from asymgqa_peft.heads import AttentionWeights, HeadShape, SharedShape, mean_heads

HIDDEN = 20


def random_weights(shape: HeadShape) -> AttentionWeights:
    """Random projections with biases, in float64."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = shape.num_attention_heads * shape.head_dim, shape.base_kv_heads * shape.head_dim

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    return AttentionWeights(
        query=draw(queries, HIDDEN),
        key=draw(keys, HIDDEN),
        value=draw(keys, HIDDEN),
        output=draw(HIDDEN, queries),
        key_bias=draw(keys),
        value_bias=draw(keys),
    )


def own_heads(heads, shape: HeadShape) -> tuple[torch.Tensor, torch.Tensor]:
    """What each query head sees of shared heads: keys and values, each (H, D, E). Loops, matrices, nothing else."""
    shared = heads.shape
    keys, values = ([None] * shape.num_attention_heads for _ in range(2))
    half = shape.rotary_dim // 2
    for group, members in enumerate(heads.partition):
        for kv_head in members:
            for query in range(kv_head * shape.queries_per_kv, (kv_head + 1) * shape.queries_per_kv):
                key = torch.zeros(shape.head_dim, HIDDEN, dtype=torch.float64)
                for pair, frequency in enumerate(shared.frequencies):
                    gain = heads.query_gain[query, pair].real if heads.query_gain is not None else 1.0
                    key[frequency] += gain * heads.key[group, pair]
                    key[frequency + half] += gain * heads.key[group, pair + len(shared.frequencies)]
                rest = heads.key[group, shared.rotary_dim :]
                key[shape.rotary_dim :] = rest if heads.query_mix is None else heads.query_mix[query].double().T @ rest
                keys[query] = key
                value = heads.value[group]
                if heads.value_mix is not None:
                    value = heads.value_mix[query].double() @ value
                values[query] = value
    return torch.stack(keys), torch.stack(values)


SHAPES = {
    "mha": HeadShape(HIDDEN, 6, 6, 8, 8),
    "partial rotary, gqa": HeadShape(HIDDEN, 12, 6, 8, 4),
    "no rotary": HeadShape(HIDDEN, 6, 6, 8, 0),
}
PARTITION = ((0, 3, 4, 5), (1, 2))


@pytest.mark.parametrize("name", SHAPES)
def test_a_head_of_the_bases_width_is_the_mean_of_its_group(name):
    shape, weights = SHAPES[name], random_weights(SHAPES[name])
    heads = mean_heads(weights, PARTITION, SharedShape.of_width(shape))
    assert heads.query_gain is heads.query_mix is heads.value_mix is None
    for part in ("key", "value", "key_bias", "value_bias"):
        own = getattr(weights, part).unflatten(0, (6, 8))
        expected = torch.stack([own[list(group)].mean(0) for group in PARTITION])
        torch.testing.assert_close(getattr(heads, part), expected)


@pytest.mark.parametrize("name", SHAPES)
def test_a_head_as_wide_as_its_group_holds_every_head(name):
    shape, weights = SHAPES[name], random_weights(SHAPES[name])
    own_keys = weights.key.unflatten(0, (6, 8)).repeat_interleave(shape.queries_per_kv, 0)
    own_values = weights.value.unflatten(0, (6, 8)).repeat_interleave(shape.queries_per_kv, 0)
    narrow, _ = own_heads(mean_heads(weights, PARTITION, SharedShape.of_width(shape)), shape)
    assert (narrow - own_keys).abs().max() > 0.5
    heads = mean_heads(weights, PARTITION, SharedShape.of_width(shape, 32))
    assert heads.key.shape == heads.value.shape == (2, 32, HIDDEN)
    keys, values = own_heads(heads, shape)
    torch.testing.assert_close(keys, own_keys)
    torch.testing.assert_close(values, own_values)


@pytest.mark.parametrize("name", SHAPES)
def test_two_heads_of_double_width_are_the_means_of_half_groups(name):
    """Half of a group each, so that the wide head keeps what two narrow ones of the halves keep."""
    shape, weights = SHAPES[name], random_weights(SHAPES[name])
    wide = mean_heads(weights, PARTITION, SharedShape.of_width(shape, 16))
    halves = mean_heads(weights, ((0, 3), (4, 5), (1,), (2,)), SharedShape.of_width(shape))
    for seen, expected in zip(own_heads(wide, shape), own_heads(halves, shape), strict=True):
        torch.testing.assert_close(seen, expected)


def test_dimensions_that_do_not_divide_evenly_go_to_the_slowest_frequencies():
    shape = SharedShape.of_width(SHAPES["mha"], 12)
    assert Counter(shape.frequencies) == {0: 1, 1: 1, 2: 2, 3: 2}
    assert shape.frequencies == (0, 1, 2, 2, 3, 3)
    assert SharedShape.of_width(SHAPES["mha"], 16).frequencies == (0, 0, 1, 1, 2, 2, 3, 3)
    partial = SharedShape.of_width(SHAPES["partial rotary, gqa"], 12)
    assert (partial.rotary_dim, partial.pass_dim) == (6, 6)


def test_the_mean_of_16_bit_weights_is_taken_in_float32():
    shape = HeadShape(1, 2, 2, 2, 2)
    key = torch.tensor([[1.0], [1.0], [256.0], [1.0]]).bfloat16()
    weights = AttentionWeights(query=key, key=key, value=key, output=key.T)
    heads = mean_heads(weights, ((0, 1),), SharedShape.of_width(shape))
    assert heads.key.dtype == torch.float32 and heads.key.flatten().tolist() == [128.5, 1.0]
