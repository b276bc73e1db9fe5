"""Which base KV heads to put together: minimise the summed cost of the groups of a partition.

The cost of a group is a black box here, and an expensive one: an eigenproblem of |S| D dimensions. Groups are
therefore evaluated in batches and never twice, and a cheap surrogate made of pair costs decides which groups are worth
an evaluation at all.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, islice

import torch

from ..groups import Group, Partition
from .partitions import PartitionSpace
from .threads import one_thread

CostFunction = Callable[[Sequence[Group]], torch.Tensor]  # n groups -> their n costs
Score = Callable[[Sequence[Group]], list[float]]  # the same with a memory: exact costs or the surrogate

EXHAUSTIVE_HEADS = 8  # at most Bell(8) = 4140 partitions made of 255 groups: look at all of them
RESTARTS = 8  # random starts of the local search
EXACT_BUDGET = 128  # evaluate no further exchanges exactly once so many groups have been
WIDE_BUDGET = 48  # the same of wide heads, whose groups matter less and whose costs take eigenvalues of larger blocks
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
    pair_costs: torch.Tensor,
    exact_pairs: bool = True,
) -> SearchResult:
    """Partition ``range(K)`` into G groups so that the sum of ``costs`` over the groups is small.

    Up to `EXHAUSTIVE_HEADS` heads the result is the global optimum. Beyond, a surrogate made of pair costs is searched
    from the neighbour partition, an agglomerative one and random ones, by swaps of two heads and, unless
    ``symmetric``, moves of one. Exact costs calibrate it, compare its optima and, while fewer than `EXACT_BUDGET` are
    known, refine the best. The result is never worse than the neighbour partition. It is the same for a seed on any
    device, because differences below `RELATIVE_TOLERANCE` are ties, which go to the neighbour partition, then to the
    lexicographically first.

    Args:
        costs: maps a list of n groups (sorted tuples of int) to n costs, float64 on CPU. Called with at most `BATCH`
            groups at a time, in order of size, and never twice with the same group.
        base_kv_heads, num_groups: K and G.
        max_group_size: cap on a group's size, in heads; at least ceil(K / G).
        symmetric: equal sizes K / G instead of sizes in 1..max_group_size.
        seed: of the random starts.
        pair_costs: (K, K), how unlike any two heads are; only entries (i, j) with i < j are read.
        exact_pairs: whether ``pair_costs`` are what ``costs`` says of groups of two; otherwise they only rank pairs.

    Raises:
        ValueError: if no partition meets the bounds, or a cost is not finite.
    """
    space = PartitionSpace.checked(base_kv_heads, num_groups, max_group_size, symmetric)
    exact = ExactCosts(costs, EXACT_BUDGET if exact_pairs else WIDE_BUDGET)
    if base_kv_heads <= EXHAUSTIVE_HEADS:
        candidates = list(space.partitions(tuple(range(base_kv_heads)), num_groups))
        best = _cheapest(space, candidates, exact, _tolerance(candidates, exact))
    else:
        with one_thread():
            surrogate = PairSurrogate(pair_costs, base_kv_heads)
        if space.least < space.greatest:
            # With a single size, a scale per size would change nothing.
            smallest, draws = (3, CALIBRATION_DRAWS) if exact_pairs else (2, 1)
            surrogate.calibrate(exact, range(smallest, space.greatest + 1), draws, random.Random(seed))
        best = _search_by_surrogate(space, exact, surrogate, seed)
    cost, neighbour_cost = _totals([best, space.neighbour], exact)
    return SearchResult(best, cost, neighbour_cost, exact.evaluations)


class ExactCosts:
    """The cost function with a memory, called in batches."""

    def __init__(self, costs: CostFunction, budget: int):
        self._costs = costs
        self.budget = budget  # groups after which no further exchange is evaluated
        self._known: dict[Group, float] = {}

    def __call__(self, groups: Sequence[Group]) -> list[float]:
        # In order of size, so that a batched eigensolver finds equal shapes side by side.
        missing = sorted(set(groups).difference(self._known), key=lambda group: (len(group), group))
        for start in range(0, len(missing), BATCH):
            batch = missing[start : start + BATCH]
            costs = self._costs(batch)
            if costs.shape != (len(batch),):
                raise ValueError(
                    f"costs returned shape {tuple(costs.shape)} for {len(batch)} groups: return one each."
                )
            for group, cost in zip(batch, costs.tolist(), strict=True):
                if not math.isfinite(cost):
                    raise ValueError(
                        f"The cost of grouping heads {group} is {cost}: look for NaN or inf in activations."
                    )
                self._known[group] = cost
        return [self._known[group] for group in groups]

    def knows(self, groups: Sequence[Group]) -> bool:
        """Whether every one of the groups has been evaluated."""
        return all(group in self._known for group in groups)

    @property
    def evaluations(self) -> int:
        """Groups evaluated so far."""
        return len(self._known)


class PairSurrogate:
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
        # By size of the group, what the summed cost of its pairs is multiplied by; K + 1 for a move into all others.
        self.weights = [0.0]
        for size in range(1, base_kv_heads + 2):
            self.weights.append(2 / size)
        self._known: dict[Group, float] = {}

    def __call__(self, groups: Sequence[Group]) -> list[float]:
        for group in groups:
            if group not in self._known:
                pairs = sum(self._pairs[i][j] for i, j in combinations(group, 2))
                self._known[group] = self.weights[len(group)] * pairs
        return [self._known[group] for group in groups]

    def calibrate(self, exact: ExactCosts, sizes: range, draws: int, generator: random.Random) -> None:
        """Fit the scale of every size to the exact costs of groups grown greedily and of random ones."""
        heads = range(len(self._pairs))
        orders = []
        for _ in range(draws):
            orders.append(self._nearest_first(generator.choice(heads), sizes.stop - 1))
            orders.append(generator.sample(heads, len(heads)))
        samples = {}
        for size in sizes:
            samples[size] = [tuple(sorted(order[:size])) for order in orders]
        # One round of batches for all sizes; below, costs are looked up.
        exact(list(chain.from_iterable(samples.values())))
        for size, groups in samples.items():
            estimated = math.fsum(self(groups))
            # The scale may be zero: a wide head holds small groups without loss.
            if estimated > 0:
                self.weights[size] = math.fsum(exact(groups)) / estimated * 2 / size
        self._known.clear()

    def _nearest_first(self, head: int, count: int) -> list[int]:
        """``count`` heads from ``head`` on, each the cheapest to add to those before it."""
        order = [head]
        rest = [other for other in range(len(self._pairs)) if other != head]
        while len(order) < count:
            unions = [_united(tuple(order), (other,)) for other in rest]
            order.append(rest.pop(_argmin(self(unions))))
        return order


def _search_by_surrogate(space: PartitionSpace, exact: ExactCosts, surrogate: PairSurrogate, seed: int) -> Partition:
    """Search the surrogate, compare its best optima exactly, refine the best of them exactly."""
    generator = random.Random(seed)
    starts = [space.neighbour, _agglomerate(space, surrogate)]
    starts += [space.shuffled(generator) for _ in range(RESTARTS)]
    tolerance = _tolerance(starts, surrogate)
    optima = sorted({space.neighbour, *descend(space, starts, surrogate, tolerance)})
    ranked = _ranked(optima, _totals(optima, surrogate), tolerance)
    candidates = [space.neighbour, *ranked[:FINALISTS]]
    tolerance = _tolerance(candidates, exact)
    best = _cheapest(space, candidates, exact, tolerance)
    refined = _refine(space, best, surrogate, exact, tolerance)
    return _cheapest(space, [space.neighbour, refined], exact, tolerance)


def descend(
    space: PartitionSpace, starts: Sequence[Partition], surrogate: PairSurrogate, tolerance: float
) -> list[Partition]:
    """Where applying the best exchange of the surrogate until none improves leads from every start.

    All starts descend in step, because what an exchange adds to the surrogate has a closed form; in one thread, as
    waking others takes longer than tensors of this size do.
    """
    ends = list(starts)
    active = list(range(len(starts)))
    while active:
        with one_thread():
            changes = _changes_by_pairs(space, [ends[index] for index in active], surrogate)
        limit = changes.amin((1, 2), keepdim=True) + tolerance
        best: dict[int, Partition] = {}
        for row, head, target in ((changes < -tolerance) & (changes <= limit)).nonzero().tolist():
            index = active[row]
            exchange = tuple(sorted(space.exchanged(ends[index], head, target)))
            best[index] = min(best.get(index, exchange), exchange)
        for index, exchange in best.items():
            ends[index] = exchange
        active = list(best)
    return ends


def _changes_by_pairs(
    space: PartitionSpace, partitions: Sequence[Partition], surrogate: PairSurrogate
) -> torch.Tensor:
    """(n, K, K + G): what swapping head i with head j > i, or moving it to group g, adds; inf where not admitted."""
    labels = torch.zeros(len(partitions), space.base_kv_heads, dtype=torch.long)  # (n, K): group of each head
    for row, partition in enumerate(partitions):
        for index, group in enumerate(partition):
            labels[row, list(group)] = index
    member = torch.nn.functional.one_hot(labels, space.num_groups).double()  # (n, K, G)
    sizes = member.sum(1).long()  # (n, G)
    weights = torch.tensor(surrogate.weights, dtype=torch.float64)
    near = surrogate.matrix @ member  # (n, K, G): pairs of head i with the heads of group g
    within = (near * member).sum(1) / 2  # (n, G): pairs inside group g
    own_size, own_within = sizes.gather(1, labels), within.gather(1, labels)  # (n, K)
    own_near = (near * member).sum(2)  # (n, K)

    # What j in the place of i adds to the group of i; the transpose is the other half of the swap.
    replaced = (near @ member.mT).mT - own_near[:, :, None] - surrogate.matrix
    replaced = weights[own_size][:, :, None] * replaced
    swaps = replaced + replaced.mT
    apart = (labels[:, :, None] != labels[:, None, :]).triu(1)

    # What the group that i leaves and the group that i joins add to each other's cost.
    left = weights[own_size - 1] * (own_within - own_near) - weights[own_size] * own_within
    joined = weights[sizes + 1][:, None] * (within[:, None] + near) - (weights[sizes] * within)[:, None]
    moves = left[:, :, None] + joined
    admitted = (own_size > space.least)[:, :, None] & (sizes < space.greatest)[:, None] & (member == 0)
    return torch.cat([swaps, moves], 2).masked_fill(~torch.cat([apart, admitted], 2), math.inf)


def _refine(
    space: PartitionSpace, partition: Partition, surrogate: PairSurrogate, exact: ExactCosts, tolerance: float
) -> Partition:
    """Descend by exact costs within the budget, trying first the exchanges that the surrogate ranks first."""
    best: Partition | None = partition
    while best is not None:
        partition, best = best, None
        exchanges = space.exchanges(partition)
        expected = []
        for exchange in exchanges:
            expected.append(_expected_change(partition, exchange, surrogate, exact))
        # What is known costs nothing to look at.
        known, untried = [], []
        for exchange in _ranked(exchanges, expected, tolerance):
            (known if exact.knows(exchange) else untried).append(exchange)
        best = _best_exchange(partition, known, exact, tolerance)
        while best is None and untried and exact.evaluations < exact.budget:
            best = _best_exchange(partition, untried[:CONFIRM], exact, tolerance)
            untried = untried[CONFIRM:]
    return partition


def _expected_change(partition: Partition, exchange: Partition, surrogate: PairSurrogate, exact: ExactCosts) -> float:
    """What an exchange should add to the summed exact cost.

    A group that differs in one head from one whose exact cost is known shares most of the surrogate's error on it, so
    the known ratio of exact cost to estimate is carried over.
    """
    change = 0.0
    for before, after in zip(partition, exchange, strict=True):
        if before == after:
            continue
        cost = exact([before])[0]
        estimate_before, estimate_after = surrogate([before, after])
        if estimate_before > 0:
            estimate_after *= cost / estimate_before
        change += estimate_after - cost
    return change


def _best_exchange(
    partition: Partition, exchanges: Sequence[Partition], exact: ExactCosts, tolerance: float
) -> Partition | None:
    """The cheapest exchange, if it saves more than the tolerance; of tied ones the first in order of groups."""
    total, *totals = _totals([partition, *exchanges], exact)
    limit = min(totals, default=total) + tolerance
    tied = []
    for exchange, cost in zip(exchanges, totals, strict=True):
        if cost < total - tolerance and cost <= limit:
            tied.append(tuple(sorted(exchange)))
    return min(tied, default=None)


def _agglomerate(space: PartitionSpace, score: Score) -> Partition:
    """Start from single heads; unite the two groups whose union adds least cost until G are left."""
    groups: list[Group] = [(head,) for head in range(space.base_kv_heads)]
    while len(groups) > space.num_groups:
        pairs = []
        for first, second in combinations(groups, 2):
            if len(first) + len(second) <= space.greatest:
                pairs.append((first, second))
        if not pairs:
            # Every union would be too large, e.g. five groups of four under a cap of six.
            return _dissolve(space, groups, score)
        first, second = _cheapest_union(pairs, score)
        groups.remove(first)
        groups.remove(second)
        groups.append(_united(first, second))
    return tuple(sorted(groups))


def _dissolve(space: PartitionSpace, groups: Sequence[Group], score: Score) -> Partition:
    """Keep the G largest groups and hand out the heads of the others, each where it adds least cost."""
    by_size = sorted(groups, key=lambda group: (-len(group), group))
    kept, dissolved = by_size[: space.num_groups], by_size[space.num_groups :]
    for head in sorted(chain.from_iterable(dissolved)):
        pairs = [(group, (head,)) for group in kept if len(group) < space.greatest]
        group, _ = _cheapest_union(pairs, score)
        kept[kept.index(group)] = _united(group, (head,))
    return tuple(sorted(kept))


def _cheapest_union(pairs: Sequence[tuple[Group, Group]], score: Score) -> tuple[Group, Group]:
    """The pair of groups whose union adds least to the summed cost."""
    added = []
    for first, second in pairs:
        union, alone, other = score([_united(first, second), first, second])
        added.append(union - alone - other)
    return pairs[_argmin(added)]


def _cheapest(space: PartitionSpace, candidates: Sequence[Partition], score: Score, tolerance: float) -> Partition:
    """The cheapest candidate. Ties go to the neighbour partition, then to the first in order of groups."""
    totals = _totals(candidates, score)
    limit = min(totals) + tolerance
    tied = []
    for total, partition in zip(totals, candidates, strict=True):
        if total <= limit:
            tied.append(partition)
    if space.neighbour in tied:
        return space.neighbour
    return min(tied)


def _tolerance(partitions: Sequence[Partition], score: Score) -> float:
    """What summed costs may differ by and still be the same."""
    return RELATIVE_TOLERANCE * max(map(abs, _totals(partitions, score)))


def _totals(partitions: Sequence[Partition], score: Score) -> list[float]:
    """Summed cost of each partition, with all groups in one round of batches."""
    costs = iter(score(list(chain.from_iterable(partitions))))
    totals = []
    for partition in partitions:
        totals.append(math.fsum(islice(costs, len(partition))))
    return totals


def _ranked(partitions: Sequence[Partition], values: Sequence[float], tolerance: float) -> list[Partition]:
    """Partitions by value; those of equal value, on a grid that is coarser than noise, in order of groups."""
    keyed = []
    for value, partition in zip(values, partitions, strict=True):
        keyed.append((round(value / (tolerance or 1.0)), partition))
    return [partition for _, partition in sorted(keyed)]


def _argmin(values: Sequence[float]) -> int:
    """Index of the least value, the first of those that differ by noise only."""
    limit = min(values) + RELATIVE_TOLERANCE * max(abs(value) for value in values)
    return next(index for index, value in enumerate(values) if value <= limit)


def _united(first: Group, second: Group) -> Group:
    return tuple(sorted(first + second))
