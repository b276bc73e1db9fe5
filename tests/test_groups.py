"""Partitions and their layout as slots."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asymgqa_peft.groups import (
    HeadGroups,
    default_max_group_size,
    group_of_heads,
    query_heads,
    slot_layout,
    split_evenly,
)


@st.composite
def partitions(draw):
    """Any partition of up to 12 heads: groups in any order, heads of a group in any order."""
    heads = draw(st.permutations(range(draw(st.integers(1, 12)))))
    cuts = sorted(draw(st.sets(st.integers(1, len(heads) - 1)))) if len(heads) > 1 else []
    bounds = [0, *cuts, len(heads)]
    return [heads[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]


def sorted_groups(partition):
    return tuple(tuple(sorted(group)) for group in partition)


@given(partitions(), st.integers(1, 3))
def test_lists_survive_json(partition, layers):
    heads = sum(map(len, partition))
    groups = HeadGroups.from_lists([partition] * layers, layers, heads, len(partition))
    assert groups.layers == (sorted_groups(partition),) * layers
    assert groups.num_key_value_heads == len(partition)
    assert groups.sizes(0) == tuple(map(len, partition))
    assert groups.max_group_size == max(map(len, partition))
    restored = HeadGroups.from_lists(json.loads(json.dumps(groups.to_lists())), layers, heads, len(partition))
    assert restored == groups


@pytest.mark.parametrize(
    ("head_groups", "message"),
    [
        (None, "one partition per layer"),
        ([], "one partition per layer"),
        ("ab", "one partition per layer"),
        ([3], r"head_groups\[0\] must be a list of lists"),
        ([[0, 1, 2, 3]], r"head_groups\[0\] must be a list of lists"),
        ([[[0, 1, 2], 3]], r"head_groups\[0\] must be a list of lists"),
        ([[[0, 1], [2, 3.0]]], r"head_groups\[0\] must hold base KV head indices \(int\), got 3.0"),
        ([[[False, True], [2, 3]]], "got False"),
        ([[[0, 1], [2, 3]]] * 2, "has 2 layers, the model has 1"),
        ([[[0, 1, 2, 3]]], "has 1 groups, num_key_value_heads is 2"),
        ([[[0, 1, 2, 3], []]], "empty group"),
        ([[[0, 1], [1, 2, 3]]], "exactly once"),
        ([[[0, 1], [2, 4]]], r"0\.\.3 exactly once, got \[0, 1, 2, 4\]"),
        ([[[0, 1], [2]]], "exactly once"),
        ([[[0, 1], [2, -1]]], "exactly once"),
    ],
)
def test_bad_lists_are_refused(head_groups, message):
    with pytest.raises(ValueError, match=message):
        HeadGroups.from_lists(head_groups, num_layers=1, base_kv_heads=4, num_key_value_heads=2)


def test_the_faulty_layer_is_named():
    good, bad = [[0, 1], [2, 3]], [[0, 1], [2, 2]]
    with pytest.raises(ValueError, match=r"head_groups\[2\]"):
        HeadGroups.from_lists([good, good, bad], 3, 4, 2)


@given(st.integers(1, 40), st.data())
def test_even_groups_differ_by_one_head_at_most(heads, data):
    num_groups = data.draw(st.integers(1, heads))
    groups = split_evenly(range(heads), num_groups)
    assert len(groups) == num_groups
    assert [head for group in groups for head in group] == list(range(heads))
    assert {len(group) for group in groups} <= {heads // num_groups, math.ceil(heads / num_groups)}


@given(st.integers(1, 20), st.data())
def test_neighbour_and_random_are_valid(heads, data):
    num_groups = data.draw(st.integers(1, heads))
    for groups in (HeadGroups.neighbour(3, heads, num_groups), HeadGroups.random(3, heads, num_groups, seed=1)):
        assert HeadGroups.from_lists(groups.to_lists(), 3, heads, num_groups) == groups


def test_neighbour_is_classic_gqa():
    assert HeadGroups.neighbour(2, 4, 2).to_lists() == [[[0, 1], [2, 3]]] * 2


def test_random_follows_its_seed_and_differs_from_layer_to_layer():
    first, again, other = (HeadGroups.random(4, 16, 4, seed=seed) for seed in (0, 0, 1))
    assert first == again == HeadGroups.random(4, 16, 4) != other
    assert len(set(first.layers)) == 4


@pytest.mark.parametrize(
    ("query", "base", "shared", "cap"),
    [
        (16, 16, 8, 3),  # ceil(1.5 * 2)
        (16, 16, 4, 6),
        (32, 32, 8, 6),
        (16, 16, 2, 12),
        (16, 16, 16, 1),  # nothing to group: 2 slots would cost more than the base
        (15, 15, 5, 5),  # ceil(4.5)
        (32, 8, 4, 2),  # GQA: 2 * 3 * 4 * 4 slots would cost more than 32 + 8 heads; ceil(K / G) fits exactly
    ],
)
def test_default_cap(query, base, shared, cap):
    assert default_max_group_size(query, base, shared) == cap


@given(st.integers(1, 8), st.integers(1, 16), st.data())
def test_default_cap_admits_a_partition_and_never_grows_the_model(queries_per_kv, base, data):
    shared = data.draw(st.integers(1, base))
    query = queries_per_kv * base
    cap = default_max_group_size(query, base, shared)
    assert math.ceil(base / shared) <= cap <= math.ceil(1.5 * base / shared)
    parameters = 2 * shared * cap * queries_per_kv + 2 * shared
    assert parameters <= 2 * query + 2 * base or cap == math.ceil(base / shared)


@given(partitions())
def test_every_head_knows_its_group(partition):
    groups = group_of_heads(sorted_groups(partition))
    assert len(groups) == sum(map(len, partition))
    assert all(head in partition[group] for head, group in enumerate(groups))


def test_query_heads_follow_their_kv_head():
    assert query_heads((1, 3), 1) == [1, 3]
    assert query_heads((0, 2), 3) == [0, 1, 2, 6, 7, 8]


@given(partitions(), st.integers(1, 3), st.data())
def test_every_query_head_attends_with_its_own_group(partition, queries_per_kv, data):
    partition = sorted_groups(partition)
    largest = queries_per_kv * max(map(len, partition))
    slots_per_kv = data.draw(st.none() | st.integers(1, largest))
    layout = slot_layout(partition, queries_per_kv, slots_per_kv)
    heads = queries_per_kv * sum(map(len, partition))

    assert layout.slots_per_kv == (slots_per_kv or largest)
    assert layout.num_slots == layout.kv_heads * layout.slots_per_kv
    assert sorted(head for head in layout.head_of_slot if head >= 0) == list(range(heads))
    for head, slot in enumerate(layout.slot_of_head):
        assert layout.head_of_slot[slot] == head
        assert head // queries_per_kv in partition[layout.kv_source[slot // layout.slots_per_kv]]

    copies = [math.ceil(queries_per_kv * len(group) / layout.slots_per_kv) for group in partition]
    assert [layout.kv_source.count(group) for group in range(len(partition))] == copies


def test_default_layout_stores_every_group_once():
    layout = slot_layout(((0, 2, 3), (1,)), 1)
    assert layout.kv_source == (0, 1)
    assert layout.head_of_slot == (0, 2, 3, 1, -1, -1)
    assert layout.slot_of_head == (0, 3, 1, 2)


def test_small_slots_store_a_large_group_more_than_once():
    layout = slot_layout(((0, 2, 3), (1,)), 1, slots_per_kv=2)
    assert layout.kv_source == (0, 0, 1)
    assert layout.head_of_slot == (0, 2, 3, -1, 1, -1)


def test_one_slot_is_the_shape_and_order_of_multi_head_attention():
    layout = slot_layout(((0, 2, 3), (1,)), 1, slots_per_kv=1)
    assert layout.head_of_slot == layout.slot_of_head == (0, 1, 2, 3)
    assert layout.kv_source == (0, 1, 0, 0)
