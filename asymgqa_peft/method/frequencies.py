"""Which rotary frequencies get the dimensions of a shared head whose width is no multiple of the base's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..groups import Partition
from ..heads import SharedShape
from .statistics import LayerMoments


def next_eigenvalues(moments: LayerMoments, partition: Partition, shape: SharedShape) -> Tensor:
    """Energy that one more pair of each frequency would keep: (F,), relative to the layer's key energy.

    That is the largest eigenvalue which the groups' shared heads leave out, summed over the groups; 0 for a group that
    has no more heads than its shared head has pairs of the frequency.

    ``shape`` is that of the shared heads so far.
    """
    count = moments.key_gram.shape[0]
    copies = [shape.frequencies.count(frequency) for frequency in range(count)]
    energies = torch.zeros(count, dtype=torch.float64, device=moments.key_gram.device)
    for group in partition:
        gram, _ = moments.key_blocks(torch.tensor([tuple(group)], device=energies.device))
        eigenvalues = torch.linalg.eigvalsh(gram[0]).clamp_min(0)
        for frequency in range(count):
            if copies[frequency] < len(group):
                energies[frequency] += eigenvalues[frequency, -1 - copies[frequency]]
    # Half of it shows in the scores: see `LayerMoments.key_energy`.
    return energies / 2 / moments.key_energy.clamp_min(torch.finfo(torch.float64).tiny)


def widened_frequencies(energies: Sequence[Tensor], shape: SharedShape, pairs: int) -> tuple[int, ...]:
    """Frequencies of shared heads of more rotary pairs: one more for each of those that keep most energy.

    Args:
        energies: (F,) per layer, from `next_eigenvalues`. They are added up, because all layers turn alike.
        shape: of the shared heads so far.
        pairs: W_r / 2 of the wider heads, at most F more than ``shape`` has.

    Returns:
        Ascending, as `SharedShape.frequencies`. Ties go to the slowest frequencies.

    Raises:
        ValueError: if there are fewer pairs than before, or more than one for each frequency to add.
    """
    total = torch.stack(list(energies)).sum(0)
    wanted = pairs - len(shape.frequencies)
    if not 0 <= wanted <= len(total):
        raise ValueError(
            f"pairs={pairs} must be {len(shape.frequencies)} to {len(shape.frequencies) + len(total)}: a frequency of "
            "the shared heads so far gets at most one more."
        )
    by_energy = sorted(range(len(total)), key=lambda frequency: (-total[frequency].item(), -frequency))
    return tuple(sorted((*shape.frequencies, *by_energy[:wanted])))
