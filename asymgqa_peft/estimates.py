"""What a conversion takes on a GPU, estimated: what was measured on one H200, scaled to another model and card.

Rates, seconds and bytes are those of recipes/benchmarks/README.md ("Conversion", "Distillation's cost", "Adapter
overhead"); cards differ by their published dense bf16 matrix ceilings and their memory, and by nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from .footprint import linear_weights, prefill_flops_per_token


@dataclass(frozen=True)
class Card:
    """A GPU: bytes of memory and dense bf16 TFLOP/s with float32 sums, as published by its maker."""

    memory: float
    tflops: float

    @property
    def usable(self) -> float:
        """Bytes that tensors may take: the rest is the driver's, and lost between allocations."""
        return 0.95 * self.memory


CARDS = {
    "h100": Card(80e9, 989),
    "h200": Card(141e9, 989),
    "a100": Card(80e9, 312),
    "rtx4090": Card(24e9, 165),
}
MEASURED_ON = CARDS["h200"]

SEQUENCE, SEQUENCES_PER_STEP = 2048, 32
"""Tokens per sequence and sequences per step of the recovery, as in recipes/configs/."""
BATCH_SIZES = (4, 2, 1)
"""Sequences of a micro-batch, most first; the first is that of recipes/configs/llama2_7b.yaml."""
RECOVERY_TOKENS = 1500 * SEQUENCES_PER_STEP * SEQUENCE
CALIBRATION_TOKENS = 262_144

# Training FLOPs a second of AsymGQATrainer: 8,192 tokens in 0.3345 s, counted by `training_flops_per_token`.
RECOVERY_RATE = 2.62e14
# FLOPs of the base's prefill over the calibration tokens, by the seconds of the whole initialisation: Llama-2-7B, 54.1
# s for heads of the base's width and 63.5 s for heads twice as wide.
INITIALISATION_RATE = {False: 6.54e13, True: 5.57e13}
# A training step with heads twice as wide, by one with heads of the base's width.
WIDE_STEP = 1.05
# Of the recovery with checkpointing, bytes per token and unit of hidden size: one layer at work, and its loss.
LAYER_AT_WORK = 87
# Of the initialisation beyond weights and streams, bytes per unit of hidden size.
STATISTICS = 1.11e9 / 4096
# A linear layer's weight in NF4 with a float32 scale for each 64.
NF4_BYTES = 0.5 + 4 / 64


@dataclass(frozen=True)
class Estimate:
    """What initialisation and recovery take on a card.

    Attributes:
        load_in_4bit: whether the base has to be held in 4 bits to fit.
        batch_size: sequences per micro-batch of the recovery, the most that fit.
        initialization_bytes, recovery_bytes: GPU memory at the fullest moment.
        initialization_hours, recovery_hours: None over a 4-bit base, whose speed was not measured.
    """

    load_in_4bit: bool
    batch_size: int
    initialization_bytes: int
    recovery_bytes: int
    initialization_hours: float | None
    recovery_hours: float | None


def estimate(base: PreTrainedModel, trained: int, is_wide: bool, card: Card) -> Estimate | None:
    """What a conversion takes on a card; None if it does not fit even over a 4-bit base.

    Args:
        base: the model, without weights.
        trained: parameters of the adapter, held in float32, in training with their gradients and Adam's two moments.
        is_wide: whether shared heads are wider than the base's.
        card: the GPU.
    """
    parameters, linear, hidden = base.num_parameters(), linear_weights(base), base.config.hidden_size
    in_4bit = 2 * (parameters - linear) + NF4_BYTES * linear
    for load_in_4bit, weights in ((False, parameters * base.dtype.itemsize), (True, in_4bit)):
        initialization = weights + 4 * trained + STATISTICS * hidden
        streams = 3 * CALIBRATION_TOKENS * hidden * base.dtype.itemsize
        if streams <= (card.usable - initialization) / 2:
            # They lie in main memory otherwise.
            initialization += streams
        for batch_size in BATCH_SIZES:
            recovery = weights + 16 * trained + activation_bytes(base, batch_size * SEQUENCE)
            if max(initialization, recovery) <= card.usable:
                hours = (None, None) if load_in_4bit else _hours(base, is_wide, card)
                return Estimate(load_in_4bit, batch_size, int(initialization), int(recovery), *hours)
    return None


def activation_bytes(base: PreTrainedModel, tokens: int) -> int:
    """Of one micro-batch with checkpointing: the hidden states of all layers in 16 bits, and the layer at work."""
    return (2 * base.config.num_hidden_layers + LAYER_AT_WORK) * base.config.hidden_size * tokens


def training_flops_per_token(base: PreTrainedModel) -> int:
    """Of one token of recovery: teacher, student, its recomputation and the gradients, and three times the head."""
    head = base.get_output_embeddings().weight.numel()
    return 4 * prefill_flops_per_token(base, SEQUENCE) + 3 * 2 * head


def _hours(base: PreTrainedModel, is_wide: bool, card: Card) -> tuple[float, float]:
    """Of the initialisation and of the recovery."""
    per_hour = 3600 * card.tflops / MEASURED_ON.tflops
    read = CALIBRATION_TOKENS * prefill_flops_per_token(base, SEQUENCE)
    trained = RECOVERY_TOKENS * training_flops_per_token(base)
    if is_wide:
        trained *= WIDE_STEP
    return read / INITIALISATION_RATE[is_wide] / per_hour, trained / RECOVERY_RATE / per_hour
