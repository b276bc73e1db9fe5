"""What an initialisation found and did."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ..files import save_json

Matrix = list[list[float]]


@dataclass(frozen=True)
class InitializationReport:
    """What `initialize_asymgqa_weights` found and did.

    Attributes:
        head_groups: groups of base KV heads, per layer.
        grouping, criterion, merge: the adapter's choices.
        costs: summed cost of the groups, per layer, in the unit of `asymgqa_peft.method.costs.group_costs`. Empty, as
            the next three, where no choice needs the statistics that they come from.
        neighbour_costs: the same of contiguous groups.
        similarity_before: per layer (K, K), mean cosine of two heads' keys and values as they are.
        similarity_after: per layer (K, K), how alike two heads are in the best bases; 1 is lossless sharing.
        tokens: tokens read, on all ranks, padding excluded; 0 where no choice needs data.
        seconds: wall time per stage. A search uses the CPU: on a GPU it runs beside the stages before it,
            "refit", "converted stream" and "targets", and "search" is what had to be waited for.
        search_seconds: what all searches of this rank took, waited for or not.
        peak_memory: bytes, the highest of a CUDA device, or of the process where none is used.
        notes: what could not be done, in sentences.
    """

    head_groups: list[list[list[int]]]
    grouping: str
    criterion: str
    merge: str
    costs: list[float]
    neighbour_costs: list[float]
    similarity_before: list[Matrix]
    similarity_after: list[Matrix]
    tokens: int
    seconds: dict[str, float]
    search_seconds: float
    peak_memory: int
    notes: list[str]

    def save(self, path: str | Path) -> None:
        """Write JSON, and the folder it goes to if need be; a reader never sees half a file."""
        save_json(path, asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> InitializationReport:
        """Read what `save` wrote.

        Raises:
            ValueError: if the file holds something else.
        """
        try:
            return cls(**json.loads(Path(path).read_text(encoding="utf-8")))
        except (TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{str(path)!r} is no InitializationReport ({error}): pass a file its save() wrote."
            ) from error
