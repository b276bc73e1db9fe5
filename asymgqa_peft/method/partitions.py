"""The admissible partitions of the base KV heads into groups, and the small steps between them."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

from ..groups import Group, Partition, group_of_heads, split_evenly


@dataclass(frozen=True)
class PartitionSpace:
    """The admissible partitions: K heads in G groups of ``least`` to ``greatest`` heads.

    Symmetric groups are the case ``least == greatest``, which leaves swaps as the only exchanges.
    """

    base_kv_heads: int
    num_groups: int
    least: int
    greatest: int

    @classmethod
    def checked(cls, base_kv_heads: int, num_groups: int, max_group_size: int, symmetric: bool) -> PartitionSpace:
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
            # The first head's group comes first, so that no partition appears in another order.
            for others in combinations(heads[1:], size - 1):
                group = (heads[0], *others)
                rest = tuple(head for head in heads if head not in group)
                for tail in self.partitions(rest, num_groups - 1):
                    yield (group, *tail)

    def exchanges(self, partition: Partition) -> list[Partition]:
        """Every swap of two heads and every move of one head that the sizes admit, as `exchanged` gives them."""
        group_of, found = group_of_heads(partition), []
        for head in range(self.base_kv_heads):
            own = group_of[head]
            for target in range(head + 1, self.base_kv_heads):
                if group_of[target] != own:
                    found.append(self.exchanged(partition, head, target))
            for index, group in enumerate(partition):
                if index != own and len(partition[own]) > self.least and len(group) < self.greatest:
                    found.append(self.exchanged(partition, head, self.base_kv_heads + index))
        return found

    def exchanged(self, partition: Partition, head: int, target: int) -> Partition:
        """The partition with ``head`` swapped with head ``target``, or moved to group ``target - K``.

        Each group stands where the one it came from stood; the groups are not sorted.
        """
        groups = [set(group) for group in partition]
        own = next(group for group in groups if head in group)
        if target < self.base_kv_heads:
            joined = next(group for group in groups if target in group)
            joined.remove(target)
            own.add(target)
        else:
            joined = groups[target - self.base_kv_heads]
        own.remove(head)
        joined.add(head)
        return tuple(tuple(sorted(group)) for group in groups)
