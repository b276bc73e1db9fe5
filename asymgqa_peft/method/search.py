"""Which base KV heads to put together: minimise the summed cost of the groups of a partition.

The cost of a group is a black box here (`merge` knows what a group loses), and an expensive one: an eigenproblem of
|S| D dimensions. Groups are therefore evaluated in batches and never twice, and a cheap surrogate made of pair costs
decides which groups are worth an evaluation at all.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import NamedTuple, TypeVar

import torch

from ..groups import Group, Partition, split_evenly

CostFunction = Callable[[Sequence[Group]], torch.Tensor]  # n groups -> their n costs
Score = Callable[[Sequence[Group]], list[float]]  # the same with a memory: exact costs or the surrogate
_Item = TypeVar("_Item")
_Score = TypeVar("_Score", bound=Score)

EXHAUSTIVE_HEADS = 8  # at most Bell(8) = 4140 partitions made of 255 groups: look at all of them
RESTARTS = 8  # random starts of the local search
EXACT_BUDGET = 128  # with a surrogate: evaluate no further exchanges exactly once so many groups have been
FINALISTS = 4  # surrogate optima to compare exactly
CONFIRM = 8  # exchanges to evaluate exactly at a time, most promising first
CALIBRATION_DRAWS = 2  # greedy and random groups per size that fit the surrogate's scale
BATCH = 64  # groups per call of the cost function: 64 blocks of 768 x 768 float64 are 300 MB
RELATIVE_TOLERANCE = 1e-6  # of the costliest start: smaller differences are noise (device, order of summation)


@dataclass(frozen=True)
class SearchResult:
    """A partition and what it took to find it.

    Attributes:
        partition: G sorted groups, ordered by their first head.
        cost: summed exact cost of its groups.
        neighbour_cost: summed exact cost of the neighbour partition (contiguous groups); never below ``cost``.
        evaluations: groups whose exact cost was computed.
    """

    partition: Partition
    cost: float
    neighbour_cost: float
    evaluations: int


def search_partition(
    costs: CostFunction,
    base_kv_heads: int,
    num_groups: int,
    max_group_size: int,
    symmetric: bool,
    seed: int,
    pair_costs: torch.Tensor | None = None,
) -> SearchResult:
    """Partition ``range(K)`` into G groups so that the sum of ``costs`` over the groups is small.

    Up to `EXHAUSTIVE_HEADS` heads the result is the global optimum. Beyond, it is the best of several best-improvement
    local searches: from the neighbour partition, an agglomerative one and random ones; by swaps of two heads and,
    unless ``symmetric``, moves of one. It is never worse than the neighbour partition. It is the same for a seed on
    any device, because differences below `RELATIVE_TOLERANCE` are ties, which go to the neighbour partition, then to
    the lexicographically first.

    Args:
        costs: maps a list of n groups (sorted tuples of int) to n costs, float64 on CPU. Called with at most `BATCH`
            groups at a time, in order of size, and never twice with the same group.
        base_kv_heads: K, heads to partition.
        num_groups: G.
        max_group_size: cap on a group's size, in heads; at least ceil(K / G).
        symmetric: equal sizes K / G instead of sizes in 1..max_group_size.
        seed: of the random starts.
        pair_costs: (K, K), the cost of every pair of heads; only entries (i, j) with i < j are read. With it a
            surrogate is searched; groups are evaluated to calibrate it, to compare its optima and, while fewer than
            `EXACT_BUDGET` are known, to refine the best. Without it every candidate is evaluated.

    Raises:
        ValueError: if no partition meets the bounds, or a cost is not finite.
    """
    space = _Space.checked(base_kv_heads, num_groups, max_group_size, symmetric)
    exact = _ExactCosts(costs)
    if base_kv_heads <= EXHAUSTIVE_HEADS:
        candidates = list(space.partitions(tuple(range(base_kv_heads)), num_groups))
        best = _choose(space, candidates, exact, _tolerance(candidates, exact))
    elif pair_costs is None:
        optima, tolerance = _local_optima(space, exact, seed, _descend_all)
        best = _choose(space, optima, exact, tolerance)
    else:
        best = _surrogate_search(space, exact, pair_costs, seed)
    return SearchResult(best, _total(best, exact), _total(space.neighbour, exact), exact.evaluations)


class _Exchange(NamedTuple):
    """Two groups of a partition and what becomes of them."""

    before: tuple[Group, Group]
    after: tuple[Group, Group]

    def apply(self, partition: Partition) -> Partition:
        """The partition with the two groups replaced."""
        kept = [group for group in partition if group not in self.before]
        return tuple(sorted((*kept, *self.after)))


_Descent = Callable[["_Space", Sequence[Partition], _Score, float], list[Partition]]  # starts -> their local optima


@dataclass(frozen=True)
class _Space:
    """The admissible partitions: K heads in G groups of ``least`` to ``greatest`` heads.

    Symmetric groups are the case ``least == greatest``, which leaves swaps as the only exchanges.
    """

    base_kv_heads: int
    num_groups: int
    least: int
    greatest: int
    listed: dict[tuple[Group, Group], list[_Exchange]] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def checked(cls, base_kv_heads: int, num_groups: int, max_group_size: int, symmetric: bool) -> _Space:
        """The space of a valid request; ValueError otherwise."""
        if not 1 <= num_groups <= base_kv_heads:
            raise ValueError(
                f"Cannot form {num_groups} groups of {base_kv_heads} base KV heads: "
                f"set num_key_value_heads to 1..{base_kv_heads}."
            )
        if symmetric and base_kv_heads % num_groups:
            raise ValueError(
                f"{base_kv_heads} base KV heads do not split into {num_groups} groups of equal size: "
                f'set num_key_value_heads to a divisor of {base_kv_heads}, or grouping="asymmetric".'
            )
        needed = math.ceil(base_kv_heads / num_groups)
        if max_group_size < needed:
            raise ValueError(
                f"{num_groups} groups of at most {max_group_size} heads cannot hold {base_kv_heads} base KV heads: "
                f"set max_group_size to {needed} or more."
            )
        if symmetric:
            return cls(base_kv_heads, num_groups, needed, needed)
        return cls(base_kv_heads, num_groups, 1, min(max_group_size, base_kv_heads - num_groups + 1))

    @property
    def neighbour(self) -> Partition:
        """Contiguous groups of (nearly) equal size."""
        return split_evenly(range(self.base_kv_heads), self.num_groups)

    def shuffled(self, generator: random.Random) -> Partition:
        """Random groups of (nearly) equal size."""
        heads = generator.sample(range(self.base_kv_heads), self.base_kv_heads)
        return tuple(sorted(split_evenly(heads, self.num_groups)))

    def partitions(self, heads: Group, num_groups: int) -> Iterator[Partition]:
        """Every way to split ``heads`` into ``num_groups`` groups, each partition once."""
        if num_groups == 0:
            yield ()
            return
        spare = len(heads) - num_groups * self.least
        for size in range(self.least, min(self.greatest, self.least + spare) + 1):
            if len(heads) - size > (num_groups - 1) * self.greatest:
                continue
            for others in combinations(heads[1:], size - 1):
                group = (heads[0], *others)
                rest = tuple(head for head in heads if head not in group)
                yield from ((group, *tail) for tail in self.partitions(rest, num_groups - 1))

    def exchanges(self, partition: Partition) -> list[_Exchange]:
        """Every swap of two heads and every move of one head that the sizes admit."""
        return [exchange for pair in combinations(partition, 2) for exchange in self.between(pair)]

    def between(self, pair: tuple[Group, Group]) -> list[_Exchange]:
        """Exchanges of two groups, listed once: a step leaves all but two groups of a partition as they are."""
        if pair not in self.listed:
            first, second = pair
            rests = [(other, _without(second, other)) for other in second]
            found = []
            for head in first:
                without = _without(first, head)
                found += [_Exchange(pair, (_with(without, other), _with(rest, head))) for other, rest in rests]
            if len(first) > self.least and len(second) < self.greatest:
                found += [_Exchange(pair, (_without(first, head), _with(second, head))) for head in first]
            if len(second) > self.least and len(first) < self.greatest:
                found += [_Exchange(pair, (_with(first, head), _without(second, head))) for head in second]
            self.listed[pair] = found
        return self.listed[pair]


class _ExactCosts:
    """The cost function with a memory, called in batches."""

    def __init__(self, costs: CostFunction):
        self._costs = costs
        self._known: dict[Group, float] = {}

    def __call__(self, groups: Sequence[Group]) -> list[float]:
        # In order of size, so that a batched eigensolver finds equal shapes side by side.
        missing = sorted(set(groups) - self._known.keys(), key=lambda group: (len(group), group))
        for start in range(0, len(missing), BATCH):
            self._evaluate(missing[start : start + BATCH])
        return [self._known[group] for group in groups]

    def _evaluate(self, groups: list[Group]) -> None:
        values = self._costs(groups)
        if values.shape != (len(groups),):
            raise ValueError(f"costs returned shape {tuple(values.shape)} for {len(groups)} groups: return one each.")
        for group, value in zip(groups, values.tolist(), strict=True):
            if not math.isfinite(value):
                raise ValueError(f"The cost of grouping heads {group} is {value}: look for NaN or inf in activations.")
            self._known[group] = value

    def knows(self, groups: Sequence[Group]) -> bool:
        """Whether every one of the groups has been evaluated."""
        return all(group in self._known for group in groups)

    @property
    def evaluations(self) -> int:
        """Groups evaluated so far."""
        return len(self._known)


class _PairSurrogate:
    """Estimates a group's cost from its pairs: ``scale[|S|] * 2 / |S| * (sum of the costs of the pairs in S)``.

    At scale 1 this is exact for the squared error of replacing vectors by their mean, and for equally correlated heads
    replaced by their principal component. Eigenvalue losses of other groups grow faster with the size, evenly enough
    for one scale per size, fitted to a few exact costs. A single head costs nothing.
    """

    def __init__(self, pair_costs: torch.Tensor, base_kv_heads: int):
        if pair_costs.shape != (base_kv_heads, base_kv_heads):
            raise ValueError(
                f"pair_costs has shape {tuple(pair_costs.shape)}: "
                f"give ({base_kv_heads}, {base_kv_heads}), a row and a column per base KV head."
            )
        if not bool(pair_costs.triu(1).isfinite().all()):
            raise ValueError("pair_costs holds NaN or inf: look for NaN or inf in activations.")
        upper = pair_costs.to("cpu", torch.float64).triu(1)
        self.matrix = upper + upper.T  # (K, K)
        self._pairs = self.matrix.tolist()
        self._scale: dict[int, float] = {}
        self._known: dict[Group, float] = {}

    def __call__(self, groups: Sequence[Group]) -> list[float]:
        known = self._known
        return [known[group] if group in known else self._estimate(group) for group in groups]

    def _estimate(self, group: Group) -> float:
        pairs = sum(self._pairs[i][j] for i, j in combinations(group, 2))
        self._known[group] = self._weight(len(group)) * pairs
        return self._known[group]

    def _weight(self, size: int) -> float:
        return self._scale.get(size, 1.0) * 2 / size

    @property
    def weights(self) -> torch.Tensor:
        """(K + 2,): by size of the group, what the summed cost of its pairs is multiplied by."""
        return torch.tensor([0.0, *map(self._weight, range(1, len(self._pairs) + 2))], dtype=torch.float64)

    def calibrate(self, exact: _ExactCosts, max_group_size: int, generator: random.Random) -> None:
        """Fit the scale of every size to the exact costs of groups grown greedily and of random ones."""
        heads = range(len(self._pairs))
        orders = []
        for _ in range(CALIBRATION_DRAWS):
            orders += [self._nearest_first(generator.choice(heads), max_group_size)]
            orders += [generator.sample(heads, len(heads))]
        samples = {size: [tuple(sorted(order[:size])) for order in orders] for size in range(3, max_group_size + 1)}
        exact([group for groups in samples.values() for group in groups])  # one round of batches for all sizes
        scale = {}
        for size, groups in samples.items():
            actual, estimated = math.fsum(exact(groups)), math.fsum(self(groups))
            if actual > 0 and estimated > 0:
                scale[size] = actual / estimated
        self._scale = scale
        self._known.clear()

    def _nearest_first(self, head: int, count: int) -> list[int]:
        """``count`` heads from ``head`` on, each the cheapest to add to those before it."""
        order = [head]
        while len(order) < count:
            rest = [other for other in range(len(self._pairs)) if other not in order]
            order.append(rest[_argmin(self([_with(tuple(order), other) for other in rest]))])
        return order


def _surrogate_search(space: _Space, exact: _ExactCosts, pair_costs: torch.Tensor, seed: int) -> Partition:
    """Search the surrogate, compare its best optima exactly, refine the best of them exactly."""
    surrogate = _PairSurrogate(pair_costs, space.base_kv_heads)
    if space.least < space.greatest:  # with a single size, a scale per size changes nothing
        surrogate.calibrate(exact, space.greatest, random.Random(seed))
    ends, tolerance = _local_optima(space, surrogate, seed, _descend_by_pairs)
    optima = sorted(set(ends))
    ranked = _ranked(optima, [_total(partition, surrogate) for partition in optima], tolerance)
    candidates = [space.neighbour, *ranked[:FINALISTS]]
    tolerance = _tolerance(candidates, exact)
    best = _choose(space, candidates, exact, tolerance)
    refined = _refine(space, best, surrogate, exact, tolerance)
    return _choose(space, [space.neighbour, refined], exact, tolerance)


def _refine(
    space: _Space, partition: Partition, surrogate: _PairSurrogate, exact: _ExactCosts, tolerance: float
) -> Partition:
    """Descend by exact costs within the budget, trying first the exchanges that the surrogate ranks first."""
    while True:
        exchanges = space.exchanges(partition)
        expected = [_expected_change(exchange, surrogate, exact) for exchange in exchanges]
        ranked = _ranked(exchanges, expected, tolerance)
        best = _best_exchange(partition, [e for e in ranked if exact.knows(e.after)], exact, tolerance)
        untried = [exchange for exchange in ranked if not exact.knows(exchange.after)]
        while best is None and untried and exact.evaluations < EXACT_BUDGET:
            best = _best_exchange(partition, untried[:CONFIRM], exact, tolerance)
            untried = untried[CONFIRM:]
        if best is None:
            return partition
        partition = best.apply(partition)


def _expected_change(exchange: _Exchange, surrogate: _PairSurrogate, exact: _ExactCosts) -> float:
    """What an exchange should add to the summed exact cost.

    A group that differs in one head from one whose exact cost is known shares most of the surrogate's error on it, so
    the known ratio of exact cost to estimate is carried over.
    """
    change = 0.0
    for before, after in zip(exchange.before, exchange.after, strict=True):
        cost = exact([before])[0]
        estimate_before, estimate_after = surrogate([before, after])
        ratio = cost / estimate_before if estimate_before > 0 else 1.0
        change += estimate_after * ratio - cost
    return change


def _local_optima(space: _Space, score: _Score, seed: int, descend: _Descent[_Score]) -> tuple[list[Partition], float]:
    """Where local search ends from every start, with the neighbour partition itself, and the tolerance used."""
    generator = random.Random(seed)
    starts = [space.neighbour, _agglomerate(space, score)]
    starts += [space.shuffled(generator) for _ in range(RESTARTS)]
    tolerance = _tolerance(starts, score)
    return [space.neighbour, *descend(space, starts, score, tolerance)], tolerance


def _descend_by_pairs(
    space: _Space, starts: Sequence[Partition], surrogate: _PairSurrogate, tolerance: float
) -> list[Partition]:
    """`_descend_all` of the surrogate, all starts in step: what an exchange adds to it has a closed form."""
    ends = list(starts)
    active = list(range(len(starts)))
    while active:
        changes = _pair_changes(space, [ends[index] for index in active], surrogate)
        limit = changes.amin((1, 2), keepdim=True) + tolerance
        tied: dict[int, list[Partition]] = {}
        for row, head, target in ((changes < -tolerance) & (changes <= limit)).nonzero().tolist():
            exchanged = _exchanged(ends[active[row]], head, target, space.base_kv_heads)
            tied.setdefault(active[row], []).append(exchanged)
        for index, results in tied.items():
            ends[index] = min(results)
        active = list(tied)
    return ends


def _pair_changes(space: _Space, partitions: Sequence[Partition], surrogate: _PairSurrogate) -> torch.Tensor:
    """(n, K, K + G): what swapping head i with head j > i, or moving it to group g, adds; inf where not admitted."""
    heads, num_groups = space.base_kv_heads, space.num_groups
    owner = [{head: index for index, group in enumerate(partition) for head in group} for partition in partitions]
    labels = torch.tensor([[own[head] for head in range(heads)] for own in owner])  # (n, K): group of each head
    member = torch.nn.functional.one_hot(labels, num_groups).double()  # (n, K, G)
    sizes = member.sum(1).long()  # (n, G)
    weights = surrogate.weights
    near = surrogate.matrix @ member  # (n, K, G): pairs of head i with the heads of group g
    within = (near * member).sum(1) / 2  # (n, G): pairs inside group g
    own_size, own_within = sizes.gather(1, labels), within.gather(1, labels)  # (n, K)
    own_near = (near * member).sum(2)  # (n, K)

    # What j in the place of i adds to the group of i; the transpose is the other half of the swap.
    replaced = (near @ member.mT).mT - own_near[:, :, None] - surrogate.matrix
    replaced = weights[own_size][:, :, None] * replaced
    swaps = replaced + replaced.mT
    apart = (labels[:, :, None] != labels[:, None, :]).triu(1)

    left = weights[own_size - 1] * (own_within - own_near) - weights[own_size] * own_within
    joined = weights[sizes + 1][:, None] * (within[:, None] + near) - (weights[sizes] * within)[:, None]
    moves = left[:, :, None] + joined
    admitted = (own_size > space.least)[:, :, None] & (sizes < space.greatest)[:, None] & (member == 0)
    return torch.cat([swaps, moves], 2).masked_fill(~torch.cat([apart, admitted], 2), math.inf)


def _exchanged(partition: Partition, head: int, target: int, base_kv_heads: int) -> Partition:
    """The partition with ``head`` swapped with head ``target``, or moved to group ``target - K``."""
    if target < base_kv_heads:
        renamed = {head: target, target: head}
        return tuple(sorted(tuple(sorted(renamed.get(other, other) for other in group)) for group in partition))
    joined = partition[target - base_kv_heads]
    return tuple(sorted(_with(group, head) if group == joined else _without(group, head) for group in partition))


def _descend_all(space: _Space, starts: Sequence[Partition], score: Score, tolerance: float) -> list[Partition]:
    """Where applying the best exchange until none improves leads from every start."""
    return [_descend(space, start, score, tolerance) for start in starts]


def _descend(space: _Space, partition: Partition, score: Score, tolerance: float) -> Partition:
    while best := _best_exchange(partition, space.exchanges(partition), score, tolerance):
        partition = best.apply(partition)
    return partition


def _best_exchange(
    partition: Partition, exchanges: Sequence[_Exchange], score: Score, tolerance: float
) -> _Exchange | None:
    """The exchange that saves most, if more than the tolerance; of tied ones, the first result in order of groups."""
    changes = _changes(exchanges, score)
    best = min(changes, default=0.0)
    tied = [
        exchange
        for change, exchange in zip(changes, exchanges, strict=True)
        if change < -tolerance and change <= best + tolerance
    ]
    return min(tied, key=lambda exchange: exchange.apply(partition), default=None)


def _changes(exchanges: Sequence[_Exchange], score: Score) -> list[float]:
    """What each exchange adds to the summed cost."""
    values = score([group for exchange in exchanges for group in (*exchange.after, *exchange.before)])
    quads = zip(*(values[offset::4] for offset in range(4)), strict=True)
    return [after1 + after2 - before1 - before2 for after1, after2, before1, before2 in quads]


def _agglomerate(space: _Space, score: Score) -> Partition:
    """Start from single heads; unite the two groups whose union adds least cost until G are left."""
    groups: list[Group] = [(head,) for head in range(space.base_kv_heads)]
    while len(groups) > space.num_groups:
        pairs = [pair for pair in combinations(groups, 2) if len(pair[0]) + len(pair[1]) <= space.greatest]
        if not pairs:  # every union would be too large, e.g. five groups of four under a cap of six
            return _dissolve(space, groups, score)
        first, second = pairs[_argmin(_union_costs(pairs, score))]
        groups = [group for group in groups if group not in (first, second)] + [tuple(sorted(first + second))]
    return tuple(sorted(groups))


def _dissolve(space: _Space, groups: Sequence[Group], score: Score) -> Partition:
    """Keep the G largest groups and hand out the heads of the others, each where it adds least cost."""
    by_size = sorted(groups, key=lambda group: (-len(group), group))
    kept = by_size[: space.num_groups]
    for head in sorted(head for group in by_size[space.num_groups :] for head in group):
        pairs = [(group, (head,)) for group in kept if len(group) < space.greatest]
        group = pairs[_argmin(_union_costs(pairs, score))][0]
        kept[kept.index(group)] = _with(group, head)
    return tuple(sorted(kept))


def _union_costs(pairs: Sequence[tuple[Group, Group]], score: Score) -> list[float]:
    """What uniting each pair of groups adds to the summed cost."""
    values = score([group for first, second in pairs for group in (tuple(sorted(first + second)), first, second)])
    return [values[3 * i] - values[3 * i + 1] - values[3 * i + 2] for i in range(len(pairs))]


def _choose(space: _Space, candidates: Sequence[Partition], score: Score, tolerance: float) -> Partition:
    """The cheapest candidate. Ties go to the neighbour partition, then to the first in order of groups."""
    totals = [_total(partition, score) for partition in candidates]
    limit = min(totals) + tolerance
    tied = [partition for total, partition in zip(totals, candidates, strict=True) if total <= limit]
    return space.neighbour if space.neighbour in tied else min(tied)


def _tolerance(partitions: Sequence[Partition], score: Score) -> float:
    score([group for partition in partitions for group in partition])  # all in one round of batches
    return RELATIVE_TOLERANCE * max(abs(_total(partition, score)) for partition in partitions)


def _total(partition: Partition, score: Score) -> float:
    return math.fsum(score(partition))


def _ranked(items: Sequence[_Item], values: Sequence[float], tolerance: float) -> list[_Item]:
    """Items by value, those of equal value (on a grid that is coarser than noise) in their own order."""
    grid = tolerance or 1.0
    return [item for _, item in sorted((round(value / grid), item) for value, item in zip(values, items, strict=True))]


def _argmin(values: Sequence[float]) -> int:
    """Index of the least value, the first of those that differ by noise only."""
    limit = min(values) + RELATIVE_TOLERANCE * max(abs(value) for value in values)
    return next(index for index, value in enumerate(values) if value <= limit)


def _with(group: Group, head: int) -> Group:
    return tuple(sorted((*group, head)))


def _without(group: Group, head: int) -> Group:
    return tuple(other for other in group if other != head)
