"""What a plain checkpoint stores, caches and computes, beside its base and beside the layout that was not chosen."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from .adapter.model import AsymGQAModel
from .adapter.plan import ExportPlan, StockModel
from .estimates import prefill_flops_per_token
from .evaluate import kv_cache_bytes_per_token
from .families import head_shape
from .files import save_json
from .tables import text_table

PROMPT_TOKENS = 4096
"""Length of the prompt that a prefill is counted for, where the model takes so long a one."""


@dataclass(frozen=True)
class Footprint:
    """What one model stores, caches and computes. Heads and slots are per layer, empty slots included.

    `parameters` counts tied ones once; bytes are in the model's dtype; `kv_bytes_per_token` is of all layers.
    `prefill_flops_per_token` is an average over a prompt of T tokens: 2 * (weights of all linear layers but the head)
    for the projections, and layers * 4 * query_slots * head_dim * (T + 1) / 2 for the attention, since the scores and
    the sum over values take 2 operations per dimension and a token sees (T + 1) / 2 tokens on average. Norms, RoPE
    and softmax are left out, and a sliding window is counted as if it reached all T tokens.
    """

    model_class: str
    query_slots: int
    kv_heads: int
    head_dim: int
    parameters: int
    parameter_bytes: int
    kv_bytes_per_token: int
    prefill_flops_per_token: int

    def total_bytes(self, tokens: int) -> int:
        """Parameters and the cache of `tokens` tokens."""
        return self.parameter_bytes + tokens * self.kv_bytes_per_token


@dataclass(frozen=True)
class ExportReport:
    """What a conversion stores, caches and computes, against its base.

    Attributes:
        other: the layout that was not chosen for unequal groups: large groups' K/V heads stored more than once if
            `plain` stores each once, and the other way round. None where there is no other.
        cached_tokens: tokens in the cache at which total bytes are compared.
        prompt_tokens: T, length of the prompt that `prefill_flops_per_token` is counted for.
    """

    base: Footprint
    plain: Footprint
    other: Footprint | None
    cached_tokens: int
    prompt_tokens: int

    def rows(self) -> list[dict[str, object]]:
        """One row per model; ratios are to the base."""
        rows, base = [], self.base
        for name, model in (("base", base), ("plain", self.plain), ("not chosen", self.other)):
            if model is None:
                continue
            row = {"model": name, **asdict(model)}
            row["parameters / base"] = model.parameters / base.parameters
            row["kv_bytes / base"] = model.kv_bytes_per_token / base.kv_bytes_per_token
            prefill = f"prefill_flops / base, {self.prompt_tokens:,} tokens"
            row[prefill] = model.prefill_flops_per_token / base.prefill_flops_per_token
            row[f"bytes with {self.cached_tokens:,} cached tokens"] = model.total_bytes(self.cached_tokens)
            rows.append(row)
        return rows

    def to_dict(self) -> dict[str, object]:
        """Plain values that survive JSON."""
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Write the report as JSON; a reader never sees half a file."""
        save_json(path, self.to_dict())

    def __str__(self) -> str:
        """A table with one column per model."""
        models, lines = self.rows(), []
        for quantity in list(models[0])[1:]:
            line = {"model": quantity}
            for model in models:
                value = model[quantity]
                if isinstance(value, float):  # a ratio
                    value = f"{value:.1%}"
                line[model["model"]] = value
            lines.append(line)
        return text_table(lines)


def export_report(
    model: PeftModel | PreTrainedModel,
    cached_tokens: int | None = None,
    *,
    duplicate_kv_heads: bool = False,
    prompt_tokens: int | None = None,
) -> ExportReport:
    """Heads, slots, parameters, cache and prefill of a conversion against its base and the layout not chosen.

    Args:
        model: a wrapped model, whose active adapter is looked at as `merge_and_unload` would merge it, without
            changing anything; or what `merge_and_unload` returned. The report is the same.
        cached_tokens, duplicate_kv_heads: as for `merge_and_unload`, the latter of a wrapped model only. Total bytes
            are compared at these tokens too.
        prompt_tokens: length of the prompt that a prefill is counted for; default is 4096, or the configuration's
            `max_position_embeddings` if that is less.

    Raises:
        ValueError: for any other model: a saved checkpoint does not tell what its base was; for a prompt of no
            token; and what `merge_and_unload` refuses.
    """
    plan = _plan_of(model, duplicate_kv_heads, cached_tokens)
    if cached_tokens is None:
        cached_tokens = plan.cached_tokens
    if prompt_tokens is None:
        prompt_tokens = min(PROMPT_TOKENS, plan.base.config.max_position_embeddings)
    if prompt_tokens < 1:
        raise ValueError(f"prompt_tokens={prompt_tokens} must be at least 1: give the length of a prompt.")
    base, plain = (footprint(stock, model.dtype, prompt_tokens) for stock in (plan.base, plan.plain))
    other = plan.other and footprint(plan.other, model.dtype, prompt_tokens)
    return ExportReport(base, plain, other, cached_tokens, prompt_tokens)


def _plan_of(model: PeftModel | PreTrainedModel, duplicate_kv_heads: bool, cached_tokens: int | None) -> ExportPlan:
    """The plan of what the model is going to be, or of what it has become."""
    tuner = getattr(model, "base_model", None)
    if isinstance(tuner, AsymGQAModel):
        layout = {"duplicate_kv_heads": duplicate_kv_heads, "cached_tokens": cached_tokens}
        return tuner.plan_export(model.active_adapter, **layout)
    if isinstance(model, PeftModel):
        raise ValueError(
            f"The adapter of this {type(model).__name__} is {type(tuner).__name__}, not AsymGQA: pass a model wrapped "
            "with AsymGQAConfig, or what its merge_and_unload() returned."
        )
    plan = ExportPlan.of(model)
    if duplicate_kv_heads:
        raise ValueError(
            "duplicate_kv_heads=True comes too late, the model is merged: pass it to merge_and_unload, or ask for the "
            "report of the wrapped model."
        )
    return plan


def footprint(stock: StockModel, dtype: torch.dtype, prompt_tokens: int) -> Footprint:
    """Counted on an empty instance, so that models without weights here are counted as the one with them."""
    with torch.device("meta"):
        empty = stock.model_class(stock.config)
    parameters = empty.num_parameters()
    shape = head_shape(stock.config)
    return Footprint(
        model_class=stock.model_class.__name__,
        query_slots=shape.num_attention_heads,
        kv_heads=shape.base_kv_heads,
        head_dim=shape.head_dim,
        parameters=parameters,
        parameter_bytes=parameters * dtype.itemsize,
        kv_bytes_per_token=kv_cache_bytes_per_token(stock.config, dtype),
        prefill_flops_per_token=prefill_flops_per_token(empty, prompt_tokens),
    )
