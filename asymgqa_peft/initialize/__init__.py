"""Initialise an adapter from activations: one walk through the model, a decoder layer at a time, in closed forms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from peft import PeftModel
from torch import Tensor

from ..adapter.site import evaluating
from ..batches import checked_batches
from ..method.threads import share_of_cores
from .checks import all_or_nothing, check_memory, checked_model
from .report import InitializationReport
from .starts import row_starts
from .streams import Streams
from .walk import Walk

__all__ = ["InitializationReport", "initialize_asymgqa_weights"]


@torch.no_grad()
def initialize_asymgqa_weights(
    model: PeftModel,
    batches: Iterable[Mapping[str, Tensor] | Tensor],
    adapter_name: str | None = None,
    progress: bool = True,
) -> InitializationReport:
    """Choose groups, merge K and V, and refit the output projection, from calibration data.

    The model is walked as GPTQ walks it. Two streams of hidden states run through it, the original model's and the
    converted one's; at each layer, statistics of the original give groups and shared heads, and o_proj's LoRA starts
    from the change that best reproduces the original attention output on the converted stream. Where the configuration
    asks for `fit_steps`, so many gradient steps towards that output come before it, each on one batch. For these two,
    rows of single tokens are read beside the batches where texts begin differently (`row_starts`).

    Both streams and one layer's targets (3 x tokens x hidden size) lie on the GPU where they take at most half of what
    is free there, in main memory otherwise; one batch and one layer's sums lie on the layer's device. Of what
    accelerate offloads (device_map), at most two layers are there at a time. Small eigenproblems run on the CPU, in as
    many threads as torch may use; where a launcher of several processes left it only one, in as many as there are
    cores for each.

    All LoRA of the adapter starts anew: a second call initialises again.
    Under grouping="neighbour" or "random" the adapter's groups, given ones included, are kept; otherwise searched.
    What the adapter's choices do not need is not run: with such groups, merge="mean" and no refit the batches are not
    read.

    With several ranks each passes its own batches; sums are reduced, so that all end with the same groups and weights.

    Args:
        model: from `get_peft_model` with an `AsymGQAConfig`.
        batches: dicts with input_ids (B, T) and optionally attention_mask or position_ids (of packed rows), or
            LongTensors (B, T). A few ten thousand tokens of text like that of later use are plenty.
        adapter_name: which adapter; default the active one.
        progress: show a progress bar over layers.

    Raises:
        ValueError: for an unfit model or batches, too few tokens, memory that certainly does not hold it, or NaN and
            inf, with the layer. After any error or an interrupt the model is as it was before.
    """
    tuner, adapter_name = checked_model(model, adapter_name)
    streams = Streams(checked_batches(batches))
    walk = Walk(model, tuner, adapter_name, streams)
    walk.check_tokens()
    starts = []
    if walk.aimed:
        starts = row_starts(streams.batches, model.config.get_text_config().bos_token_id)
    if walk.reads_data:
        check_memory(model, tuner, adapter_name, streams.batches, starts)
    streams.add(starts)
    with evaluating(model), all_or_nothing(model, tuner, adapter_name), share_of_cores():
        model.set_adapter(adapter_name)
        return walk.run(progress)
