"""Fit a layer's shared heads to its original attention output, by gradient steps on the calibration batches.

The closed forms of `method` minimise the errors of keys and of values, which are not those of attention: where scores
are sharp, the softmax makes much of one error and nothing of another. This goes on from the closed forms and
minimises the error of what comes out of o_proj, over all that the adapter holds in front of it, layer by layer as
BRECQ reconstructs blocks (Li et al. 2021, arXiv 2102.05426). The forward is the layer's own, with all that a family
does in it, and what is fitted is what an adapter trains in any case, so that the result is exported like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress

import torch
from torch import Tensor

from ..adapter.site import AttentionSite, base_layer
from ..method.statistics import sum_over_ranks, tokens_that_count
from .streams import Stop, recording

PROJECTION_RATE, FACTOR_RATE = 1e-3, 1e-2
"""Adam's learning rates at the first step: of the rows of projections, LoRA's included, and of what multiplies heads
(gains, mixes, scales), whose size is about 1. They go to zero linearly."""


def fit_heads(
    site: AttentionSite,
    adapter_name: str,
    calls: list[Callable[[], Tensor]],
    targets: list[Tensor],
    scales: list[Tensor],
    masks: list[Tensor | None],
    output_weight: Tensor,
    steps: int,
    seed: int,
) -> bool:
    """Fit what the adapter holds in front of the layer's o_proj.

    Of several ranks each has batches of its own; gradients are summed, so that all take the same steps.

    Args:
        site: the layer; its shared heads are written, and LoRA that is to be fitted is active.
        adapter_name: whose tensors.
        calls: for each batch, what runs the decoder layer.
        targets: for each batch, what o_proj shall return without its bias, times `scales`, (B, T, E).
        scales: for each batch, (B, T, 1), what each token's error is multiplied by.
        masks: for each batch, (B, T), nonzero at tokens that count; None counts all.
        output_weight: (E, H D), o_proj's own weight.
        steps: of Adam, each on one batch.
        seed: of the order of batches, a new one each time that all have had their turn.

    Returns:
        Whether the error over all batches is smaller now. If it is not, everything is as it was.
    """
    parameters = _parameters(site, adapter_name)
    fitted = [parameter for group in parameters for parameter in group["params"]]
    start = [parameter.detach().clone() for parameter in fitted]
    with recording({}, {"heads": base_layer(site.output)}, stops=True) as record:

        def error(batch: int) -> Tensor:
            """Squared error of o_proj's output, summed over the tokens that count."""
            record.clear()
            with suppress(Stop):
                calls[batch]()
            heads = tokens_that_count(record["heads"], masks[batch])
            heads = heads.to(torch.promote_types(heads.dtype, torch.float32))
            wanted = tokens_that_count(targets[batch], masks[batch]).to(heads)
            scale = tokens_that_count(scales[batch], masks[batch]).to(heads)
            return (heads @ output_weight.to(heads).T * scale - wanted).square().sum()

        def total_error() -> float:
            total = torch.zeros(1, dtype=torch.float64)
            for batch in range(len(calls)):
                total += error(batch).item()
            sum_over_ranks([total])
            return total.item()

        before = total_error()
        # Adam divides by the gradients' size; this keeps them far from its epsilon, and from float16's limits.
        size = max(before, torch.finfo(torch.float32).tiny) / len(calls)
        optimizer = torch.optim.Adam(parameters, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        batches = _batches_in_turn(len(calls), seed)
        for parameter in fitted:
            parameter.requires_grad_(True)
        try:
            for _ in range(steps):
                optimizer.zero_grad()
                with torch.enable_grad():
                    (error(next(batches)) / size).backward()
                sum_over_ranks([parameter.grad for parameter in fitted if parameter.grad is not None])
                optimizer.step()
                schedule.step()
        finally:
            optimizer.zero_grad()
        # False also where it is not a number.
        better = total_error() < before
    if not better:
        for parameter, value in zip(fitted, start, strict=True):
            parameter.copy_(value)
    return better


def _parameters(site: AttentionSite, adapter_name: str) -> list[dict]:
    """Adam's groups: all that the adapter holds in the attention but o_proj's LoRA, which has a closed form."""
    projections, factors = [], []
    of_output = {id(parameter) for parameter in site.output.parameters()}
    for name, parameter in site.attention.named_parameters():
        parts = name.split(".")
        if adapter_name not in parts or id(parameter) in of_output:
            continue
        if {"lora_kv", "lora_A", "lora_B"}.intersection(parts):
            projections.append(parameter)
        else:
            factors.append(parameter)
    return [{"params": projections, "lr": PROJECTION_RATE}, {"params": factors, "lr": FACTOR_RATE}]


def _batches_in_turn(count: int, seed: int) -> Iterator[int]:
    """Indices of batches without an end, in a new order each time that all have had their turn."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()
