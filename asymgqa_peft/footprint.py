"""What a plain checkpoint stores and caches, beside its base and beside the layout that was not chosen."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from accelerate import init_empty_weights
from transformers import PreTrainedModel

from .adapter.plan import ExportPlan, StockModel
from .evaluate import kv_cache_bytes_per_token
from .families import head_shape
from .files import written_beside


@dataclass(frozen=True)
class Footprint:
    """What one model stores and caches.

    Attributes:
        model_class: its stock class.
        query_slots: query heads per layer, empty ones included (`num_attention_heads`).
        kv_heads: K/V heads per layer in the cache (`num_key_value_heads`).
        parameters: their number; tied ones count once.
        parameter_bytes: their bytes, in the model's dtype.
        kv_bytes_per_token: bytes of K and V in the cache per token, over all layers.
    """

    model_class: str
    query_slots: int
    kv_heads: int
    parameters: int
    parameter_bytes: int
    kv_bytes_per_token: int

    def total_bytes(self, tokens: int) -> int:
        """Parameters and the cache of `tokens` tokens."""
        return self.parameter_bytes + tokens * self.kv_bytes_per_token


@dataclass(frozen=True)
class ExportReport:
    """What a conversion stores and caches, against its base.

    Attributes:
        base: before.
        plain: after.
        other: the layout that was not chosen for unequal groups: large groups' K/V heads stored more than once if
            `plain` stores each once, and the other way round. None where there is no other.
        cached_tokens: tokens in the cache at which total bytes are compared.
    """

    base: Footprint
    plain: Footprint
    other: Footprint | None
    cached_tokens: int

    def rows(self) -> list[dict[str, object]]:
        """One row per model; ratios are to the base."""
        models = {"base": self.base, "plain": self.plain} | ({"not chosen": self.other} if self.other else {})
        total = f"bytes with {self.cached_tokens:,} cached tokens"
        return [
            {"model": name}
            | asdict(model)
            | {
                "parameters / base": model.parameters / self.base.parameters,
                "kv_bytes / base": model.kv_bytes_per_token / self.base.kv_bytes_per_token,
                total: model.total_bytes(self.cached_tokens),
            }
            for name, model in models.items()
        ]

    def to_dict(self) -> dict[str, object]:
        """Plain values that survive JSON."""
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Write the report as JSON; a reader never sees half a file."""
        with written_beside(path) as beside:
            beside.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        """A table with one column per model."""
        rows = self.rows()
        lines = [[key, *(_cell(row[key]) for row in rows)] for key in rows[0]]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
            for line in lines
        )


def export_report(plain: PreTrainedModel, cached_tokens: int | None = None) -> ExportReport:
    """Heads, slots, parameters and cache of a merged model against its base, and against the layout not chosen.

    Args:
        plain: what `merge_and_unload` returned.
        cached_tokens: tokens in the cache for the total; default is what the layouts were compared at.

    Raises:
        ValueError: for a model that was not just merged: a saved checkpoint does not tell what its base was.
    """
    plan = getattr(plain, "export_plan", None)
    if not isinstance(plan, ExportPlan):
        raise ValueError(
            f"{type(plain).__name__} does not come from merge_and_unload(): a checkpoint does not tell what its base "
            "was, so make the report right after merging."
        )
    other = plan.other and _footprint(plan.other, plain)
    tokens = plan.cached_tokens if cached_tokens is None else cached_tokens
    return ExportReport(_footprint(plan.base, plain), _footprint(plan.plain, plain), other, tokens)


def _footprint(model: StockModel, plain: PreTrainedModel) -> Footprint:
    """Counted on an empty instance, so that models without weights here are counted as the one with them."""
    with init_empty_weights():
        empty = model.model_class(model.config)
    empty.tie_weights()  # out here: that context makes a new parameter of every one that is set
    parameters = sum(parameter.numel() for parameter in empty.parameters())
    return Footprint(
        model_class=model.model_class.__name__,
        query_slots=model.config.num_attention_heads,
        kv_heads=head_shape(model.config).base_kv_heads,
        parameters=parameters,
        parameter_bytes=parameters * plain.dtype.itemsize,
        kv_bytes_per_token=kv_cache_bytes_per_token(model.config, plain.dtype),
    )


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) else str(value)
