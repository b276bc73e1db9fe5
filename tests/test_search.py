"""Search: the best partition where that can be checked, never worse than neighbour everywhere."""

import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asymgqa_peft.groups import split_evenly
from asymgqa_peft.method import search
from asymgqa_peft.method.partitions import PartitionSpace
from asymgqa_peft.method.search import (
    BATCH,
    CONFIRM,
    EXACT_BUDGET,
    ExactCosts,
    PairSurrogate,
    descend,
    search_partition,
)


def pair_costs(cost, heads):
    """Costs (K, K) of all ordered pairs."""
    costs = torch.empty(heads, heads, dtype=torch.float64)
    for i, j in itertools.product(range(heads), repeat=2):
        costs[i, j] = cost((i, j))
    return costs


def canonical(groups):
    """A partition as the search writes it: heads in order, groups in order."""
    return tuple(sorted(tuple(sorted(group)) for group in groups))


class RandomCosts:
    """An arbitrary set function: every group draws its own cost. Records what it was asked."""

    def __init__(self, seed, levels=None, noise=0.0):
        self.seed, self.levels, self.noise, self.asked = seed, levels, noise, []

    def __call__(self, groups):
        assert 0 < len(groups) <= BATCH
        self.asked += groups
        return torch.tensor([self.cost(group) for group in groups], dtype=torch.float64)

    def cost(self, group):
        generator = random.Random(f"{self.seed} {group}")
        cost = generator.randrange(self.levels) if self.levels else generator.random()
        return cost * (1 + self.noise * random.uniform(-1, 1))

    def pairs(self, heads):
        return pair_costs(self.cost, heads)


class HiddenSubspaces:
    """Heads of ``dim`` dims whose values are random mixtures of their planted group's ``width`` hidden variables.

    The cost of a group is the energy that its best shared ``width``-dimensional subspace loses.
    """

    def __init__(self, sizes, dim, noise=0.0, seed=0, width=None):
        generator = torch.Generator().manual_seed(seed)
        draw = {"generator": generator, "dtype": torch.float64}
        self.heads, self.dim, self.width = sum(sizes), dim, width or dim
        order = torch.randperm(self.heads, generator=generator)
        self.planted = canonical(group.tolist() for group in order.split(list(sizes)))
        loadings = torch.zeros(self.heads * dim, len(sizes) * self.width, dtype=torch.float64)
        for index, group in enumerate(self.planted):
            hidden = slice(index * self.width, (index + 1) * self.width)
            for head in group:
                loadings[head * dim : (head + 1) * dim, hidden] = torch.randn(dim, self.width, **draw)
        spread = torch.rand(self.heads * dim, **draw)
        self.covariance = loadings @ loadings.T + noise * spread.diag()
        self.asked, self.known = [], {}

    def __call__(self, groups):
        self.asked += groups
        return torch.tensor([self.cost(group) for group in groups], dtype=torch.float64)

    def cost(self, group):
        if group not in self.known:
            self.known[group] = self.lost(group, self.width)
        return self.known[group]

    def lost(self, group, width):
        rows = torch.cat([torch.arange(head * self.dim, (head + 1) * self.dim) for head in group])
        spectrum = torch.linalg.eigvalsh(self.covariance[rows][:, rows])
        kept = min(width, len(spectrum))
        return float(spectrum[: len(spectrum) - kept].sum() / self.covariance.trace())

    def pairs(self):
        """Of heads that share one narrow head, whatever the width."""
        costs = torch.zeros(self.heads, self.heads, dtype=torch.float64)
        for i, j in itertools.combinations(range(self.heads), 2):
            costs[i, j] = self.lost((i, j), self.dim)
        return costs


def brute_force(cost, heads, num_groups, least, greatest):
    """Least summed cost by dynamic programming over bit masks: shares nothing with the search's enumeration."""
    best = {(0, 0): 0.0}
    for mask in range(1, 1 << heads):
        members = [head for head in range(heads) if mask >> head & 1]
        for size in range(least, min(greatest, len(members)) + 1):
            for others in itertools.combinations(members[1:], size - 1):
                group = (members[0], *others)
                rest = mask - sum(1 << head for head in group)
                for count in range(num_groups):
                    if (rest, count) in best:
                        total = best[rest, count] + cost(group)
                        best[mask, count + 1] = min(total, best.get((mask, count + 1), math.inf))
    return best[(1 << heads) - 1, num_groups]


def every_exchange(partition, least, greatest):
    """Every partition one swap or one move away, by trying all of them."""
    found = set()
    group_of = {}
    for index, group in enumerate(partition):
        group_of |= dict.fromkeys(group, index)
    for head, other in itertools.combinations(group_of, 2):
        swapped = group_of | {head: group_of[other], other: group_of[head]}
        found.add(in_groups(swapped, len(partition)))
    for head, target in itertools.product(group_of, range(len(partition))):
        moved = in_groups(group_of | {head: target}, len(partition))
        sizes = list(map(len, moved))
        if least <= min(sizes) and max(sizes) <= greatest:
            found.add(moved)
    return sorted(found - {partition})


def in_groups(group_of, num_groups):
    """The partition of heads whose groups are told one by one."""
    groups = [[] for _ in range(num_groups)]
    for head, group in group_of.items():
        groups[group].append(head)
    return canonical(groups)


def descend_by_trying(partition, total, space, tolerance):
    """The best exchange again and again until none improves; of tied ones, the first in order of groups."""
    while True:
        reached = {other: total(other) for other in every_exchange(partition, space.least, space.greatest)}
        least, present = min(reached.values(), default=math.inf), total(partition)
        if least >= present - tolerance:
            return partition
        for other in sorted(reached):
            if reached[other] <= least + tolerance and reached[other] < present - tolerance:
                partition = other
                break


def assert_admissible(result, heads, num_groups, least, greatest):
    partition = result.partition
    assert len(partition) == num_groups
    assert sorted(itertools.chain(*partition)) == list(range(heads))
    for group in partition:
        assert least <= len(group) <= greatest
    assert partition == canonical(partition)


@st.composite
def requests(draw, least_heads, most_heads):
    """K, G, cap, symmetric."""
    heads = draw(st.integers(least_heads, most_heads))
    symmetric = draw(st.booleans())
    counts = [count for count in range(1, heads + 1) if not symmetric or heads % count == 0]
    num_groups = draw(st.sampled_from(counts))
    cap = draw(st.integers(math.ceil(heads / num_groups), heads))
    return heads, num_groups, cap, symmetric


@settings(max_examples=60, deadline=None)
@given(request=requests(1, 7), seed=st.integers(0, 2**16))
def test_equals_brute_force_for_few_heads(request, seed):
    heads, num_groups, cap, symmetric = request
    costs = RandomCosts(seed)
    result = search_partition(costs, heads, num_groups, cap, symmetric, seed, costs.pairs(heads))
    least, greatest = (heads // num_groups,) * 2 if symmetric else (1, cap)
    assert_admissible(result, heads, num_groups, least, greatest)
    assert result.cost == pytest.approx(sum(map(costs.cost, result.partition)))
    assert result.cost == pytest.approx(brute_force(costs.cost, heads, num_groups, least, greatest), rel=1e-5)


@pytest.mark.parametrize(("num_groups", "cap", "symmetric"), [(4, 3, False), (3, 8, False), (2, 4, True)])
def test_equals_brute_force_for_eight_heads(num_groups, cap, symmetric):
    costs = RandomCosts(0)
    result = search_partition(costs, 8, num_groups, cap, symmetric, 0, costs.pairs(8))
    least, greatest = (8 // num_groups,) * 2 if symmetric else (1, cap)
    assert result.cost == pytest.approx(brute_force(costs.cost, 8, num_groups, least, greatest), rel=1e-5)
    assert result.cost < result.neighbour_cost


@settings(max_examples=15, deadline=None)
@given(request=requests(12, 16), seed=st.integers(0, 2**16))
def test_never_worse_than_neighbour(request, seed):
    heads, num_groups, cap, symmetric = request
    costs = RandomCosts(seed)
    result = search_partition(costs, heads, num_groups, cap, symmetric, seed, costs.pairs(heads))
    least, greatest = (heads // num_groups,) * 2 if symmetric else (1, cap)
    assert_admissible(result, heads, num_groups, least, greatest)
    neighbour = split_evenly(range(heads), num_groups)
    assert result.neighbour_cost == pytest.approx(sum(map(costs.cost, neighbour)))
    assert result.cost == pytest.approx(sum(map(costs.cost, result.partition)))
    assert result.cost <= result.neighbour_cost


@pytest.mark.parametrize(
    ("sizes", "dim", "noise"),
    [((1, 3, 5, 7), 4, 0.0), ((1, 3, 5, 7), 4, 0.1), ((1, 2, 3, 4, 4, 6, 6, 6), 3, 0.05)],
)
def test_planted_unequal_groups_are_found(sizes, dim, noise):
    costs = HiddenSubspaces(sizes, dim, noise)
    result = search_partition(costs, sum(sizes), len(sizes), max(sizes), False, 0, costs.pairs())
    assert result.partition == costs.planted
    assert result.cost < 0.1 * result.neighbour_cost  # the effect is there to be found


def test_planted_equal_groups_are_found():
    costs = HiddenSubspaces((4,) * 4, 4, noise=0.1)
    result = search_partition(costs, 16, 4, 6, True, 0, costs.pairs())
    assert result.partition == costs.planted
    assert max(map(len, costs.asked)) == 4


def test_cap_binds():
    costs = HiddenSubspaces((1, 3, 5, 7), 4)
    result = search_partition(costs, 16, 4, 5, False, 0, costs.pairs())
    assert_admissible(result, 16, 4, 1, 5)
    assert max(map(len, costs.asked)) == 5  # not even looked at beyond the cap


def test_surrogate_comes_close_to_the_optimum_with_few_evaluations():
    costs = HiddenSubspaces((1, 2, 4, 5), 4, noise=4.0)  # the planted groups are no longer the best
    optimum = brute_force(costs.cost, 12, 4, 1, 5)
    groups = sum(math.comb(12, size) for size in range(1, 6))
    frugal = search_partition(costs, 12, 4, 5, False, 0, costs.pairs())
    assert frugal.neighbour_cost - frugal.cost > 0.9 * (frugal.neighbour_cost - optimum) > 0
    assert frugal.evaluations <= EXACT_BUDGET + 2 * CONFIRM < groups / 10


def test_random_starts_find_what_the_others_miss(monkeypatch):
    vectors = torch.randn(24, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def error(group):
        members = vectors[list(group)]
        return float((members - members.mean(0)).square().sum())

    def found():
        return search_partition(costs, 24, 6, 8, False, 0, pair_costs(error, 24)).cost

    def costs(groups):
        return torch.tensor([error(group) for group in groups], dtype=torch.float64)

    with_them = found()
    monkeypatch.setattr(search, "RESTARTS", 0)
    assert with_them < 0.98 * found()


def test_no_group_is_evaluated_twice():
    costs = RandomCosts(3)
    result = search_partition(costs, 12, 4, 5, False, 0, costs.pairs(12))
    assert len(costs.asked) == len(set(costs.asked)) == result.evaluations


@pytest.mark.parametrize("heads", [7, 12])
def test_float_noise_does_not_change_the_result(heads):
    """Few distinct costs make many ties; noise such as another device's must not decide them."""

    def search(noise):
        costs = RandomCosts(5, levels=4, noise=noise)
        return search_partition(costs, heads, 3, 6, False, 0, costs.pairs(heads))

    clean = search(0.0)
    assert search(0.0) == clean
    assert {search(1e-10).partition for _ in range(5)} == {clean.partition}


@pytest.mark.parametrize("heads", [6, 12])
def test_neighbour_wins_ties(heads):
    pairs = torch.ones(heads, heads)
    result = search_partition(lambda groups: torch.ones(len(groups)), heads, 3, heads, False, 0, pairs)
    assert result.partition == split_evenly(range(heads), 3)
    assert result.cost == result.neighbour_cost == 3


def test_noise_is_measured_by_the_costliest():
    """Beside a cost of 1, 1e-9 is none; beside a cost of 0 it would be."""
    prices = {(0, 1): 1e-9, (0, 3): 1.0}

    def costs(groups):
        return torch.tensor([prices.get(group, 0.0) for group in groups], dtype=torch.float64)

    result = search_partition(costs, 4, 2, 2, True, 0, torch.zeros(4, 4))
    assert result.partition == ((0, 1), (2, 3)) and result.cost == 1e-9


@settings(max_examples=25, deadline=None)
@given(request=requests(9, 13), seed=st.integers(0, 2**16), levels=st.sampled_from([None, 3]))
def test_descent_in_closed_form_equals_descent_by_trying_every_exchange(request, seed, levels):
    """The surrogate's own values, one group at a time, lead every start to the same end; levels make ties."""
    heads, num_groups, cap, symmetric = request
    space = PartitionSpace.checked(heads, num_groups, cap, symmetric)
    costs = RandomCosts(seed, levels)
    surrogate = PairSurrogate(costs.pairs(heads), heads)
    generator = random.Random(seed)
    surrogate.calibrate(ExactCosts(costs, 1000), range(3, cap + 1), 2, generator)  # an arbitrary weight for every size
    starts = [space.shuffled(generator) for _ in range(3)]
    ends = descend(space, starts, surrogate, 1e-9)

    def total(partition):
        return sum(surrogate(partition))

    for start, end in zip(starts, ends, strict=True):
        assert end == descend_by_trying(start, total, space, 1e-9)
        assert total(end) <= total(start) + 1e-9


def test_descent_goes_somewhere():
    """Moves as well as swaps: the planted groups are unequal, the starts are not."""
    costs = HiddenSubspaces((1, 3, 5, 7), 4, noise=0.1)
    space = PartitionSpace.checked(16, 4, 7, False)
    starts = [space.shuffled(random.Random(seed)) for seed in range(8)]
    ends = descend(space, starts, PairSurrogate(costs.pairs(), 16), 1e-9)
    assert costs.planted in ends and costs.planted not in starts


@settings(max_examples=25, deadline=None)
@given(request=requests(2, 9), seed=st.integers(0, 2**16))
def test_exchanges_are_all_swaps_and_moves(request, seed):
    """Each group stands where the one it came from stood, so that at most two places change."""
    space = PartitionSpace.checked(*request)
    partition = space.shuffled(random.Random(seed))
    found = space.exchanges(partition)
    reached = set(map(canonical, found)) - {partition}
    assert sorted(reached) == every_exchange(partition, space.least, space.greatest)
    for exchange in found:
        changed = 0
        for before, after in zip(partition, exchange, strict=True):
            changed += before != after
            assert len(set(before) - set(after)) <= 1
        assert changed == 2


def test_pairs_tell_everything_about_a_mean():
    """The squared error of replacing vectors by their mean is 2 / |S| * sum of the pairs' errors: no scale is needed,
    and the surrogate finds the optimum."""
    vectors = torch.randn(10, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def error(group):
        members = vectors[list(group)]
        return float((members - members.mean(0)).square().sum())

    def costs(groups):
        return torch.tensor([error(group) for group in groups], dtype=torch.float64)

    found = search_partition(costs, 10, 4, 5, False, 0, pair_costs(error, 10))
    assert found.cost == pytest.approx(brute_force(error, 10, 4, 1, 5), rel=1e-6)


# ------------------------------------------------------------------------------------------------------ wide heads


@pytest.mark.parametrize(("sizes", "symmetric"), [((5, 5, 6), False), ((2, 4, 4, 6), False), ((4, 4, 4, 4), True)])
def test_planted_groups_of_heads_of_twice_the_width_are_found(sizes, symmetric):
    """Any pair is free then, and says nothing; what pairs lose in a narrow head still ranks groups."""
    costs = HiddenSubspaces(sizes, 3, noise=0.02, width=6)
    heads, pairs = sum(sizes), costs.pairs()
    assert costs([(0, 1), (2, 3)]).eq(0).all() and pairs[0, 1] > 0
    result = search_partition(costs, heads, len(sizes), max(sizes), symmetric, 0, pairs, exact_pairs=False)
    assert result.partition == costs.planted
    assert result.cost < 0.1 * result.neighbour_cost


def test_pairs_that_only_rank_are_calibrated():
    """In any unit: the exact costs set the scale of every size, that of groups of two here to zero."""
    costs = HiddenSubspaces((3, 4, 5), 3, noise=1.0, width=6)
    uneven = HiddenSubspaces((1, 3, 8), 3, noise=0.02, width=6)
    for each, cap in ((costs, 6), (uneven, 8)):
        results = set()
        for unit in (1.0, 4.0, 1024.0, 1 / 1024):
            results.add(search_partition(each, 12, 3, cap, False, 0, unit * each.pairs(), exact_pairs=False))
        assert len(results) == 1
    # Without a scale for every size the large group of the last ones looks too costly.
    assert results.pop().cost <= 1.001 * sum(map(uneven.cost, uneven.planted))
    surrogate = PairSurrogate(costs.pairs(), 12)
    surrogate.calibrate(ExactCosts(costs, 1000), range(2, 7), 2, random.Random(0))
    assert surrogate([(0, 1)]) == [0.0] and surrogate([(0, 1, 2)])[0] > 0


@pytest.mark.parametrize("symmetric", [False, True])
def test_where_nothing_costs_anything_groups_are_neighbours(symmetric):
    """Heads as wide as any two of the base's, or heads that are all the same."""
    for pairs in (torch.zeros(12, 12), torch.rand(12, 12, generator=torch.Generator().manual_seed(0))):
        result = search_partition(
            lambda groups: torch.zeros(len(groups)), 12, 6, 3, symmetric, 0, pairs, exact_pairs=False
        )
        assert result.partition == split_evenly(range(12), 6)
        assert result.cost == result.neighbour_cost == 0
        assert result.evaluations <= EXACT_BUDGET + 2 * CONFIRM


@pytest.mark.parametrize(
    ("heads", "num_groups", "cap", "symmetric", "remedy"),
    [
        (8, 9, 8, False, "num_key_value_heads to 1..8"),
        (8, 0, 8, False, "num_key_value_heads to 1..8"),
        (8, 3, 8, True, "a divisor of 8"),
        (8, 3, 2, False, "max_group_size to 3 or more"),
        (8, 4, 1, True, "max_group_size to 2 or more"),
    ],
)
def test_impossible_bounds_name_the_remedy(heads, num_groups, cap, symmetric, remedy):
    with pytest.raises(ValueError, match=remedy):
        search_partition(RandomCosts(0), heads, num_groups, cap, symmetric, 0, torch.zeros(heads, heads))


def test_bad_costs_are_refused():
    def not_a_number(groups):
        return torch.full((len(groups),), math.nan)

    with pytest.raises(ValueError, match="NaN or inf"):
        search_partition(not_a_number, 4, 2, 3, False, 0, torch.zeros(4, 4))
    with pytest.raises(ValueError, match="return one each"):
        search_partition(lambda groups: torch.zeros(3, 3), 4, 2, 3, False, 0, torch.zeros(4, 4))
    with pytest.raises(ValueError, match="row and a column per base KV head"):
        search_partition(RandomCosts(0), 12, 3, 6, False, 0, torch.zeros(3, 3))
    with pytest.raises(ValueError, match="pair_costs holds NaN"):
        search_partition(RandomCosts(0), 12, 3, 6, False, 0, torch.full((12, 12), math.inf))
