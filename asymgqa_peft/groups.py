"""Which base KV heads share one K/V head, and how unequal groups become ordinary GQA slots."""

from __future__ import annotations

import math
import random
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

Group = tuple[int, ...]
Partition = tuple[Group, ...]


@dataclass(frozen=True)
class SlotLayout:
    """One layer's groups as ordinary GQA: ``kv_heads`` stored K/V heads with ``slots_per_kv`` query slots each.

    Query slot ``s`` attends with stored K/V head ``s // slots_per_kv``. A group with more query heads than
    ``slots_per_kv`` has its K/V head stored more than once.

    Attributes:
        slots_per_kv: p.
        kv_source: for each stored K/V head, the group it holds.
        head_of_slot: for each slot its query head, or -1 for an empty slot. Length ``kv_heads * slots_per_kv``.
        slot_of_head: for each query head its slot. Length H.
    """

    slots_per_kv: int
    kv_source: tuple[int, ...]
    head_of_slot: tuple[int, ...]
    slot_of_head: tuple[int, ...]

    @property
    def kv_heads(self) -> int:
        """K/V heads that the cache stores."""
        return len(self.kv_source)

    @property
    def num_slots(self) -> int:
        """Query slots, empty ones included."""
        return len(self.head_of_slot)


@dataclass(frozen=True)
class HeadGroups:
    """A partition of the base's K KV heads into G groups, for every layer: ``layers[l][g]`` is sorted head indices."""

    layers: tuple[Partition, ...]
    base_kv_heads: int

    @classmethod
    def from_lists(
        cls, head_groups: object, num_layers: int, base_kv_heads: int, num_key_value_heads: int
    ) -> HeadGroups:
        """Validate nested lists, as they stand in ``adapter_config.json``.

        Raises:
            ValueError: unless every layer partitions ``range(base_kv_heads)`` into ``num_key_value_heads`` groups.
        """
        validate_nesting(head_groups, num_key_value_heads)
        if len(head_groups) != num_layers:
            raise ValueError(
                f"head_groups has {len(head_groups)} layers, the model has {num_layers}: give one partition per layer."
            )
        layers = []
        for index, partition in enumerate(head_groups):
            heads = sorted(chain(*partition))
            if heads != list(range(base_kv_heads)):
                raise ValueError(
                    f"head_groups[{index}] must hold each base KV head 0..{base_kv_heads - 1} exactly once, got "
                    f"{_short(heads)}."
                )
            layers.append(tuple(map(tuple, map(sorted, partition))))
        return cls(tuple(layers), base_kv_heads)

    @classmethod
    def neighbour(cls, num_layers: int, base_kv_heads: int, num_key_value_heads: int) -> HeadGroups:
        """Contiguous groups of (nearly) equal size in every layer: classic GQA (Ainslie et al., 2023)."""
        partition = split_evenly(range(base_kv_heads), num_key_value_heads)
        return cls((partition,) * num_layers, base_kv_heads)

    @classmethod
    def random(cls, num_layers: int, base_kv_heads: int, num_key_value_heads: int, seed: int = 0) -> HeadGroups:
        """Groups of (nearly) equal size drawn at random, independently per layer: a control."""
        generator = random.Random(seed)
        layers = []
        for _ in range(num_layers):
            heads = list(range(base_kv_heads))
            generator.shuffle(heads)
            layers.append(split_evenly(heads, num_key_value_heads))
        return cls(tuple(layers), base_kv_heads)

    def to_lists(self) -> list[list[list[int]]]:
        """Nested lists that survive JSON."""
        return [list(map(list, partition)) for partition in self.layers]

    def sizes(self, layer: int) -> tuple[int, ...]:
        """Group sizes of one layer, in base KV heads."""
        return tuple(map(len, self.layers[layer]))

    @property
    def num_key_value_heads(self) -> int:
        """G, groups per layer."""
        return len(self.layers[0])

    @property
    def max_group_size(self) -> int:
        """Size of the largest group of all layers, in base KV heads."""
        return max(map(len, chain(*self.layers)))


def validate_nesting(head_groups: object, num_groups: int) -> None:
    """Raise ValueError unless ``head_groups`` is a list (layer) of ``num_groups`` lists (group) of one int or more."""
    if not isinstance(head_groups, list | tuple) or not head_groups:
        raise ValueError(f"head_groups must be a list with one partition per layer, got {_short(head_groups)}.")
    for index, partition in enumerate(head_groups):
        where = f"head_groups[{index}]"
        if not isinstance(partition, list | tuple) or not all(isinstance(group, list | tuple) for group in partition):
            raise ValueError(f"{where} must be a list of lists of int, got {_short(partition)}.")
        for head in chain(*partition):
            if isinstance(head, bool) or not isinstance(head, int):
                raise ValueError(f"{where} must hold base KV head indices (int), got {_short(head)}.")
        if len(partition) != num_groups:
            raise ValueError(
                f"{where} has {len(partition)} groups, num_key_value_heads is {num_groups}: make them equal."
            )
        if not all(partition):
            raise ValueError(f"{where} has an empty group: every shared K/V head needs at least one base KV head.")


def split_evenly(heads: Sequence[int], num_groups: int) -> Partition:
    """Split ``heads`` in order into ``num_groups`` groups whose sizes differ by at most one."""
    groups, start = [], 0
    for group in range(1, num_groups + 1):
        end = len(heads) * group // num_groups
        groups.append(tuple(sorted(heads[start:end])))
        start = end
    return tuple(groups)


def default_max_group_size(num_attention_heads: int, base_kv_heads: int, num_key_value_heads: int) -> int:
    """Cap on a group's size in base KV heads: ceil(1.5 K / G), less where the padding would cost parameters.

    q_proj and o_proj are padded to G * cap * H/K slots and K/V shrink to G heads each; the cap keeps
    2 G cap H/K + 2 G <= 2 H + 2 K, the base's own count in units of D * E. It is never below ceil(K / G), the
    least that any partition needs.
    """
    group_slots = num_key_value_heads * (num_attention_heads // base_kv_heads)
    affordable = (num_attention_heads + base_kv_heads - num_key_value_heads) // group_slots
    wished = math.ceil(1.5 * base_kv_heads / num_key_value_heads)
    return max(math.ceil(base_kv_heads / num_key_value_heads), min(wished, affordable))


def group_of_heads(partition: Partition) -> list[int]:
    """The group of each base KV head, K long."""
    groups = [0] * sum(len(group) for group in partition)
    for index, group in enumerate(partition):
        for head in group:
            groups[head] = index
    return groups


def query_heads(group: Sequence[int], queries_per_kv: int) -> list[int]:
    """Query heads that follow the given base KV heads (r = ``queries_per_kv`` each)."""
    return [kv * queries_per_kv + query for kv in group for query in range(queries_per_kv)]


def slot_layout(partition: Partition, queries_per_kv: int, slots_per_kv: int | None = None) -> SlotLayout:
    """Lay one layer's groups out as GQA slots, for r = H / K query heads per KV head.

    p = ``slots_per_kv`` is by default the largest group's query heads, so that each group is stored once. With a
    smaller p a large group's K/V head is stored ceil(size / p) times; p = 1 is the MHA shape.
    """
    members = [query_heads(group, queries_per_kv) for group in partition]
    keep_order = slots_per_kv == 1  # MHA shape: keep the base's order of heads, nothing has to move
    slots_per_kv = slots_per_kv or max(map(len, members))
    kv_source: list[int] = []
    head_of_slot: list[int] = []
    for group, heads in enumerate(members):
        copies = math.ceil(len(heads) / slots_per_kv)
        kv_source += [group] * copies
        head_of_slot += heads + [-1] * (copies * slots_per_kv - len(heads))
    slot_of_head = [head_of_slot.index(head) for head in range(max(head_of_slot) + 1)]
    if keep_order:
        kv_source = [kv_source[slot] for slot in slot_of_head]
        head_of_slot = slot_of_head = sorted(head_of_slot)
    return SlotLayout(slots_per_kv, tuple(kv_source), tuple(head_of_slot), tuple(slot_of_head))


def _short(value: object) -> str:
    try:
        text = reprlib.repr(value)  # of a bounded depth: repr itself fails on a file's thousand nested brackets
    except ValueError:  # an int of more digits than Python converts
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."
