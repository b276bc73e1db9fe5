"""What a model could be converted to, from its configuration alone: sizes, stock class, engines, cost, command."""

from __future__ import annotations

import math
import shlex
import warnings
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PretrainedConfig, PreTrainedModel

from .adapter.plan import StockModel
from .choices import Grouping
from .config import AsymGQAConfig
from .engines import engines_of
from .estimates import BATCH_SIZES, CARDS, SEQUENCE, SEQUENCES_PER_STEP, Estimate, estimate
from .families import find_family, head_shape
from .footprint import Footprint, export_report, footprint
from .groups import default_max_group_size, split_evenly
from .heads import HeadShape

SHARES = (Fraction(2, 3), Fraction(1, 2), Fraction(1, 4), Fraction(1, 8))
"""Of the base's cache, what is planned for; a choice takes as much or a little less."""
WIDEST = 256
"""Dimensions of a head beyond which FlashAttention has no kernels."""


@dataclass(frozen=True)
class Candidate:
    """One way to share heads: G heads of W dimensions, with the groups that need the most query slots."""

    num_key_value_heads: int
    head_dim: int
    grouping: Grouping
    largest_group: int


@dataclass(frozen=True)
class Choice:
    """A candidate on a model.

    Attributes:
        candidate: what is shared, and how.
        share: of the base's cache per token, K/V heads that a class has to store more than once included.
        plain: what the merged model stores, caches and computes; with unequal groups at most.
        cache_bytes: of the context and batch asked for.
        engines: where checkpoints of this class and width have been run.
        estimate: on the card asked for; None where it does not fit.
        notes: what the conversion would warn of.
        command: what to run next.
    """

    candidate: Candidate
    share: float
    plain: Footprint
    cache_bytes: int
    engines: list[str]
    estimate: Estimate | None
    notes: list[str]
    command: str


@dataclass(frozen=True)
class Plan:
    """A model as it is, what it could be converted to, and what of that it refuses, with the reason."""

    model: str
    base: Footprint
    base_cache_bytes: int
    context: int
    batch: int
    gpu: str
    choices: list[Choice]
    refused: list[str]

    def to_dict(self) -> dict[str, object]:
        """Plain values that survive JSON."""
        return asdict(self)


def plan(name: str, context: int | None = None, batch: int = 1, gpu: str = "h100") -> Plan:
    """Plan conversions of a model.

    Args:
        name: folder or Hub id, of which the configuration is read and nothing else.
        context: tokens of each sequence in the cache, and of the prompt that a prefill is counted for; default is
            what the model takes, up to 32,768.
        batch: sequences in the cache.
        gpu: one of `CARDS`.

    Raises:
        ValueError: for a model that cannot be converted, with the reason.
        OSError: if there is no configuration of that name.
    """
    config = load_config(name)
    if context is None:
        context = min(config.max_position_embeddings, 32_768)
    for option, value in (("context", context), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{option}={value} must be at least 1.")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    base = footprint(StockModel(type(model), config), model.dtype, context)
    choices, refused = [], {}
    for candidate in candidates(head_shape(config)):
        try:
            choices.append(_choice(name, model, candidate, context, batch, gpu))
        except ValueError as error:
            # The reason is the same for every width.
            refused.setdefault(str(error).partition(": ")[2] or str(error), str(error))
    if not choices:
        reason = "its cache is as small as shared heads would make it: one KV head a layer."
        raise ValueError(next(iter(refused.values()), reason))
    return Plan(
        model=name,
        base=base,
        base_cache_bytes=cache_bytes(config, base, context, batch),
        context=context,
        batch=batch,
        gpu=gpu,
        choices=choices,
        refused=list(refused.values()),
    )


def load_config(name: str) -> PretrainedConfig:
    """The configuration of a supported model by folder or Hub id; its weights are not looked at.

    Raises:
        ValueError: for an architecture that is not supported, or a checkpoint that is quantised.
        OSError: if there is none.
    """
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    find_family(config)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{name} is quantised, and its K/V heads cannot be merged: take the checkpoint that it was made from."
        )
    return config


def candidates(shape: HeadShape) -> list[Candidate]:
    """What makes sense for a base, largest cache first: at each share heads of its width, and wider ones.

    Groups are equal, unequal or both. Wide heads are twice as wide, or what comes next to it, and in equal groups
    where these exist: unequal ones have bought nothing there, and cost parameters. What fits a smaller share too is
    left to that.
    """
    heads, width = shape.base_kv_heads, shape.head_dim
    found, seen = [], set()
    for share, next_share in zip(SHARES, (*SHARES[1:], Fraction(0)), strict=True):
        numbers = share * heads * width
        for num_groups, head_dim in (_of_base_width(numbers, shape), _wider(numbers, shape)):
            takes = num_groups * head_dim
            if takes <= next_share * heads * width or (num_groups, head_dim) in seen:
                continue
            seen.add((num_groups, head_dim))
            evenly = math.ceil(heads / num_groups)
            cap = default_max_group_size(shape.num_attention_heads, heads, num_groups)
            cap = min(cap, heads - num_groups + 1)
            if heads % num_groups == 0:
                found.append(Candidate(num_groups, head_dim, "symmetric", evenly))
                if head_dim > width or cap == evenly:
                    continue
            found.append(Candidate(num_groups, head_dim, "asymmetric", cap))
    return sorted(found, key=lambda each: -each.num_key_value_heads * each.head_dim)


def _of_base_width(numbers: Fraction, shape: HeadShape) -> tuple[int, int]:
    """G and W of heads of the base's width that take at most so many numbers for K."""
    return int(numbers / shape.head_dim), shape.head_dim


def _wider(numbers: Fraction, shape: HeadShape) -> tuple[int, int]:
    """G and W of heads about twice as wide as the base's, which fill what they can of so many numbers for K."""
    step, best = shape.head_dim // 4, (0, 0)
    fewest = max(1, int(numbers / (2 * shape.head_dim)))
    for num_groups in (fewest, fewest + 1):
        width = min(int(numbers / num_groups), WIDEST) // step * step
        # One head more, none of them twice as wide, has to bring a tenth more.
        if width > shape.head_dim and num_groups * width > 1.1 * math.prod(best):
            best = (num_groups, width)
    return best


def _wrapped(config: PretrainedConfig, candidate: Candidate) -> PeftModel:
    """The model with an adapter, all without weights; groups as unequal as they may become."""
    layers, heads = config.num_hidden_layers, head_shape(config).base_kv_heads
    partition = split_evenly(range(heads), candidate.num_key_value_heads)
    if candidate.grouping == "asymmetric":
        partition, start = [], 0
        for left in reversed(range(candidate.num_key_value_heads)):
            # One head at least for each group that is left.
            end = min(start + candidate.largest_group, heads - left)
            partition.append(range(start, end))
            start = end
    adapter = AsymGQAConfig(
        num_key_value_heads=candidate.num_key_value_heads,
        head_dim=candidate.head_dim,
        grouping=candidate.grouping,
        head_groups=[[list(group) for group in partition]] * layers,
        task_type="CAUSAL_LM",
    )
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
        return get_peft_model(base, adapter, low_cpu_mem_usage=True)


def _choice(name: str, base: PreTrainedModel, candidate: Candidate, context: int, batch: int, gpu: str) -> Choice:
    """A candidate on a model; ValueError where the model refuses it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        model = _wrapped(base.config, candidate)
        report = export_report(model, prompt_tokens=context)
    notes = sorted({str(warning.message) for warning in caught if warning.category is UserWarning})
    share = report.plain.kv_bytes_per_token / report.base.kv_bytes_per_token
    if share >= 1:
        raise ValueError(" ".join(notes) or "its cache would not shrink.")
    is_wide = candidate.head_dim > report.base.head_dim
    trained, _ = model.get_nb_trainable_parameters()
    plain = report.plain.query_slots, report.plain.kv_heads, report.plain.head_dim
    needed = estimate(base, trained, plain, CARDS[gpu])
    return Choice(
        candidate=candidate,
        share=share,
        plain=report.plain,
        cache_bytes=cache_bytes(base.config, report.plain, context, batch),
        engines=engines_of(report.plain.model_class, is_wide),
        estimate=needed,
        notes=notes,
        command=command(name, base.config, candidate, needed),
    )


def cache_bytes(config: PretrainedConfig, model: Footprint, context: int, batch: int) -> int:
    """Of `batch` sequences of `context` tokens, of which a layer with a sliding window keeps its window."""
    layers = DynamicCache(config=config).layers
    tokens = sum(min(context, layer.sliding_window) if layer.is_sliding else context for layer in layers)
    return batch * tokens * model.kv_bytes_per_token // len(layers)


def command(name: str, config: PretrainedConfig, candidate: Candidate, needed: Estimate | None) -> str:
    """The recovery of a candidate by recipes/recover.py, as one line of a shell."""
    options = {"model_name_or_path": name, "num_key_value_heads": candidate.num_key_value_heads}
    if candidate.head_dim > head_shape(config).head_dim:
        options["head_dim"] = candidate.head_dim
    options["grouping"] = candidate.grouping
    if config.max_position_embeddings < SEQUENCE:
        options["max_length"] = config.max_position_embeddings
    if needed and needed.batch_size != BATCH_SIZES[0]:
        options["per_device_train_batch_size"] = needed.batch_size
        options["gradient_accumulation_steps"] = SEQUENCES_PER_STEP // needed.batch_size
    if needed and needed.load_in_4bit:
        options["load_in_4bit"] = "true"
    heads = f"{candidate.num_key_value_heads}x{candidate.head_dim}"
    options["output_dir"] = f"out/{Path(name).name}-{heads}-{candidate.grouping}"
    words = ["python", "recipes/recover.py", "--config", "recipes/configs/llama2_7b.yaml"]
    for option, value in options.items():
        words += [f"--{option}", str(value)]
    return shlex.join(words)
