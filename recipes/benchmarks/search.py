r"""Time of grouping one layer: pair costs and search, on statistics of random heads that share hidden subspaces.

    python recipes/benchmarks/search.py --heads 32 --head-dim 128 --groups 8

Prints a table, with the share of the neighbour partition's cost that is left, and one JSON line.
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import torch

from asymgqa_peft.groups import default_max_group_size
from asymgqa_peft.heads import HeadShape, SharedShape
from asymgqa_peft.method.costs import group_costs, pair_costs
from asymgqa_peft.method.search import search_partition
from asymgqa_peft.method.statistics import LayerStatistics
from recipes.reporting import print_report


def main() -> None:
    args = parse_args()
    shape = HeadShape(args.heads * args.head_dim, args.heads, args.heads, args.head_dim, args.head_dim)
    moments = random_moments(shape, args.groups, args.tokens, args.seed)
    start = time.perf_counter()
    pairs = pair_costs(moments, "residual", "principal")
    paired = time.perf_counter()
    shared = SharedShape.of_width(shape, args.width)
    cap = default_max_group_size(args.heads, args.heads, args.groups)
    rows = []
    for grouping in ("symmetric", "asymmetric"):
        costs = partial(group_costs, moments, shape=shared, criterion="residual", merge="principal")
        begin = time.perf_counter()
        equal_sizes, exact_pairs = grouping == "symmetric", shared.head_dim == args.head_dim
        found = search_partition(costs, args.heads, args.groups, cap, equal_sizes, args.seed, pairs, exact_pairs)
        rows.append(
            {
                "grouping": grouping,
                "pair costs, s": paired - start,
                "search, s": time.perf_counter() - begin,
                "exact evaluations": found.evaluations,
                "cost / neighbour": found.cost / found.neighbour_cost,
            }
        )
    print_report(rows, arguments=vars(args))


def random_moments(shape: HeadShape, groups: int, tokens: int, seed: int):
    """Statistics of heads that mix one of `groups` hidden sources with noise of their own, each in its own basis."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    heads, dim = shape.num_attention_heads, shape.head_dim
    # Heads of one source belong together; their bases hide it from the raw cosine.
    source = torch.randint(groups, (heads,), generator=generator)
    basis = draw(heads, dim, dim) / dim**0.5
    statistics = LayerStatistics(shape)
    for _ in range(0, tokens, 512):
        hidden = draw(512, groups, dim)[:, source]
        key = torch.einsum("nhd,hde->nhe", hidden + draw(512, heads, dim), basis)
        value = torch.einsum("nhd,hde->nhe", hidden + draw(512, heads, dim), basis)
        statistics.update(draw(1, 512, heads * dim), key.flatten(1)[None], value.flatten(1)[None])
    return statistics.moments(draw(shape.hidden_size, heads * dim).double()).for_search()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=32, help="K, KV heads")
    parser.add_argument("--head-dim", type=int, default=128, help="D")
    parser.add_argument("--width", type=int, help="W, dimensions of a shared head; default D")
    parser.add_argument("--groups", type=int, default=8, help="G")
    parser.add_argument("--tokens", type=int, default=2048, help="random tokens of statistics")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
