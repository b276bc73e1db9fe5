"""What a conversion takes: bytes by formulas, checked against what a device has; hours by rates of one H200.

The formulas count tensors that exist at the fullest moment of the initialisation, the recovery and the merge, in the
order in which the code makes them; recipes/benchmarks/memory.py holds them against what is measured. Rates and
seconds are those of recipes/benchmarks/README.md ("Conversion", "Recovery's speed"); cards differ by their
published dense bf16 matrix ceilings and their memory, and by nothing else.

Axes: E hidden size, H query and K KV heads of D dimensions, W dimensions of a shared head, V vocabulary, M what the
first layers of an MLP make of a token (twice its intermediate size where it is gated).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel

from .distillation import CHUNK_BYTES
from .families import find_family, head_shape

# ------------------------------------------------------------------------------------------------------- what fits


TOLERANCE = 0.15
"""How far an estimate may be from what is measured: less than this above what is free, a run is not refused."""
_CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where Linux says how much a container may take: version 2 and version 1."""


def free_memory(device: torch.device | str) -> int:
    """Bytes that this process may still allocate on a GPU, or in main memory for any other device."""
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = psutil.virtual_memory().available + psutil.swap_memory().free
    for path in map(Path, _CGROUPS):
        limit = path.read_text().strip() if path.is_file() else "max"
        if limit != "max":
            used = psutil.Process().memory_info()
            # Pages of files, as of loaded weights, can be dropped.
            free = min(free, int(limit) - used.rss + used.shared)
    return free


def lack_of_memory(what: str, needed: float, device: torch.device | str, remedies: str) -> str | None:
    """Why something certainly does not fit on a device, in a sentence; None, with a warning, where it may not.

    Args:
        what: subject of the sentence.
        needed: bytes by estimate, beyond what is allocated already.
        device: where.
        remedies: what needs less.
    """
    device = torch.device(device)
    free = free_memory(device)
    if needed * (1 + TOLERANCE) <= free:
        return None
    place = f"on {device}" if device.type == "cuda" else "in main memory"
    sentence = f"{what} needs about {_gigabytes(needed)} {place}, {_gigabytes(free)} are free: {remedies}."
    if needed > free * (1 + TOLERANCE):
        return sentence
    warnings.warn(f"It may not fit. {sentence}", stacklevel=3)
    return None


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB"


# ---------------------------------------------------------------------------------------------------------- memory


# A weight in NF4 with a float32 scale for each 64 (Dettmers et al. 2023, arXiv 2305.14314), no double quantisation.
NF4_BYTES = 0.5 + 4 / 64
EXACT = 8
"""Bytes of a float64, in which statistics and refit are summed and solved."""
SINGLE = 4
"""Bytes of a float32: adapters, their gradients, each of Adam's two moments."""
CUDA_KERNELS = 940_000_000
"""Bytes of main memory that CUDA takes for the kernels of a run, loaded when first used: 0.93e9 to 1.03e9 in eight
recoveries of two shapes on an H100, torch 2.11."""


@dataclass(frozen=True)
class Sizes:
    """What memory goes by.

    Attributes:
        parameters: numbers in the base, tied ones once.
        linear: of them in the weights of linear layers, the head left out.
        layers: decoder layers.
        hidden: E.
        vocabulary: V.
        head_dim: D.
        queries, keys: H D and K D.
        wide_queries: H W.
        mlp: M.
        readers: linear layers of an MLP that read hidden states.
        norms: of hidden states in a layer.
        norms_heads: whether queries and keys are normed.
        itemsize: bytes of a weight, and of a hidden state.
    """

    parameters: int
    linear: int
    layers: int
    hidden: int
    vocabulary: int
    head_dim: int
    queries: int
    keys: int
    wide_queries: int
    mlp: int
    readers: int
    norms: int
    norms_heads: bool
    itemsize: int

    @classmethod
    def of(cls, base: PreTrainedModel, head_dim: int | None = None) -> Sizes:
        """Of a base with weights or without, wrapped or not, for shared heads of W = head_dim (None: D)."""
        family, shape = find_family(base.config), head_shape(base.config)
        attention = next(name for name, _ in base.named_modules() if name.rpartition(".")[2] == family.attention)
        # All layers are alike: of the first, what is not its attention.
        layer = base.get_submodule(attention.rpartition(".")[0])
        outputs = []
        for name, module in linear_layers(layer):
            if not name.startswith(f"{family.attention}."):
                outputs.append(module.out_features)
        norms = [module for module in layer.children() if "Norm" in type(module).__name__]
        embeddings = base.get_input_embeddings().weight
        return cls(
            parameters=sum(p.numel() for name, p in base.named_parameters() if ".lora_" not in name),
            linear=linear_weights(base),
            layers=base.config.num_hidden_layers,
            hidden=shape.hidden_size,
            vocabulary=len(embeddings),
            head_dim=shape.head_dim,
            queries=shape.num_attention_heads * shape.head_dim,
            keys=shape.base_kv_heads * shape.head_dim,
            wide_queries=shape.num_attention_heads * (head_dim or shape.head_dim),
            # The last one writes hidden states.
            mlp=sum(outputs[:-1]),
            readers=max(1, len(outputs) - 1),
            norms=len(norms),
            norms_heads=shape.norm_span is not None,
            itemsize=embeddings.itemsize,
        )

    @property
    def weights(self) -> int:
        """Bytes of the base."""
        return self.parameters * self.itemsize

    def in_4bit(self) -> tuple[Sizes, int]:
        """The same over a 4-bit base, and its bytes: all but linear layers in float32, as PEFT prepares it."""
        whole = self.parameters - self.linear
        return replace(self, itemsize=SINGLE), int(SINGLE * whole + NF4_BYTES * self.linear)


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The base's linear layers with their names, quantised ones included, under whatever adapters wrap them."""
    for name, module in model.named_modules():
        is_wrapper = hasattr(module, "base_layer")
        if hasattr(module, "out_features") and not is_wrapper and ".lora_" not in name:
            yield name, module


def linear_weights(model: PreTrainedModel) -> int:
    """Numbers in the weights of a base's linear layers but the head, which runs once per prompt for its last token."""
    head, weights = model.get_output_embeddings(), 0
    for _, module in linear_layers(model):
        if module is not head:
            weights += module.in_features * module.out_features
    return weights


def prefill_flops_per_token(model: PreTrainedModel, prompt_tokens: int) -> int:
    """Of a plain model, with weights or without, as `asymgqa_peft.footprint.Footprint` defines it."""
    shape = head_shape(model.config)
    attention = 2 * shape.num_attention_heads * shape.head_dim * (prompt_tokens + 1)
    return 2 * linear_weights(model) + model.config.num_hidden_layers * attention


@dataclass(frozen=True)
class Need:
    """Bytes at the fullest moment: on the device that computes, and in main memory beside it.

    Of a CPU both are main memory.
    """

    device: int
    main: int

    def lack(self, what: str, device: torch.device | str, remedies: str) -> str | None:
        """`lack_of_memory` of the one or the other."""
        if torch.device(device).type != "cuda":
            return lack_of_memory(what, self.device + self.main, device, remedies)
        lack_there = lack_of_memory(what, self.device, device, remedies)
        return lack_there or lack_of_memory(what, self.main, "cpu", remedies)


def initialization_need(
    sizes: Sizes, trained: int, tokens: int, batch: int, refits: bool, gpu_free: int | None = None
) -> Need:
    """Of `initialize_asymgqa_weights`, beyond the base and its adapter.

    Args:
        sizes: of the base.
        trained: numbers in the adapter, of which a copy is kept until the end.
        tokens: of all calibration batches on this rank.
        batch: tokens of the largest batch.
        refits: whether o_proj is refitted.
        gpu_free: bytes free on the GPU; None on a CPU.

    The moments of a layer that may be the fullest, as `asymgqa_peft.initialize.walk` comes to them:

    - targets: two streams of hidden states and the targets, and the activations of one MLP or attention.
    - refit, first batch: those three, the sums, and the products and attention outputs that are added to them.
    - refit, solved twice, beside two streams and o_proj's inputs in the place of the targets: while the value mix goes
      into the sums, four of (H D, H D) and four of (E, H D); while it is solved, two and six; while eigenvectors are
      sought, one, three, and two of (E, E).
    - converted stream: beside the same the output projection, with its LoRA's float32 path, or the MLP.
    - statistics: sums, roots and weighted covariance of the values, four of (K D, K D); then the merge, of which that
      sum is kept. A GPU does so for the next layer beside the refit, and main memory holds two layers' moments, which
      are being searched.

    Without a refit the original's stream is the only one.
    """
    item, hidden, queries, on_cpu = sizes.itemsize, sizes.hidden, sizes.queries, gpu_free is None
    streams = streams_kept(refits) * tokens * hidden * item
    lie_here = on_cpu or streams_on_gpu(streams, gpu_free)
    stream = tokens * hidden * item if lie_here else 0
    # Products of 16 bits are exact in float32, which a GPU multiplies without a cast.
    product = SINGLE if item == 2 else EXACT
    cast = product if on_cpu or item > 2 else 0
    widest = sizes.mlp // sizes.readers
    # LoRA's input and its output, before and after its scaling and added up, in float32.
    lora = item * (2 * queries + 3 * hidden) + SINGLE * (queries + 3 * hidden)
    forward = item * (max(sizes.mlp + widest, 6 * queries) + 3 * hidden)
    inputs, outputs, square = EXACT * queries**2, EXACT * hidden * queries, EXACT * hidden**2
    values = EXACT * sizes.keys**2
    statistics = max(4 * values, values + 2 * EXACT * sizes.keys * hidden)
    # In float64, and in float32 for the search.
    moments = values + values // 2
    if refits:
        attention = item * 6 * queries + cast * (hidden + queries)
        sums = inputs + 2 * outputs + product * (queries + hidden) * queries
        solve = max(4 * (inputs + outputs), 2 * inputs + 6 * outputs, inputs + 3 * outputs + 2 * square)
        attended = stream // hidden * queries
        beside = 0 if on_cpu else statistics
        fullest = max(
            2 * stream + statistics,
            3 * stream + batch * forward,
            3 * stream + sums + batch * attention + beside,
            2 * stream + attended + solve + beside,
            2 * stream + attended + batch * max(lora, forward) + beside,
        )
    else:
        fullest = stream + max(statistics, batch * forward)
    main = SINGLE * trained
    if not on_cpu:
        main += 2 * moments + CUDA_KERNELS
    if not lie_here:
        main += streams
    return Need(fullest, main)


def streams_kept(converts: bool) -> int:
    """Hidden states that are kept of each calibration token: the original's, the converted model's and the targets."""
    return 3 if converts else 1


def streams_on_gpu(streams: int, free: int) -> bool:
    """Whether hidden states and targets of all calibration tokens lie on the GPU: if they take half of its space."""
    return streams <= free / 2


def recovery_need(
    sizes: Sizes, trained: int, tokens: int, checkpointing: bool, autocast: bool, accumulates: bool, on_gpu: bool
) -> Need:
    """Of `AsymGQATrainer`, beyond the base and its adapter.

    Args:
        sizes: of the base.
        trained: numbers in the adapter.
        tokens: of one micro-batch.
        checkpointing: whether layers are recomputed in the backward pass.
        autocast: whether it runs in 16 bits (bf16, fp16).
        accumulates: whether several micro-batches make a step: gradients are there from the first on.
        on_gpu: where the loss runs compiled.

    Adam's two moments, then the fuller of two moments: the loss, or the backward pass of the last layer. A token keeps
    of a layer, in numbers of its dtype: what enters the MLP's activation and what comes of it (2 M), queries, keys,
    values and outputs of H D, and of H W what gains and mixes act on; the norms' inputs, in float32 where they cast;
    and under autocast a copy of its input for each LoRA. All of that is what autograd saves, as tests count it.
    """
    hidden, item = sizes.hidden, 2 if autocast else sizes.itemsize
    kept = kept_per_token(sizes, item)
    # Gradients of the MLP's inner numbers, with the float32 ones of LoRA's copies.
    backward = 3 * sizes.mlp + 11 * hidden if item == 2 else SINGLE * sizes.mlp
    if checkpointing:
        entering, layer = sizes.layers * hidden * sizes.itemsize, kept
    else:
        entering, layer = (sizes.layers - 1) * kept, kept
    gradients = SINGLE * trained
    casts = 2 * trained if autocast else 0
    chunk = min(CHUNK_BYTES, SINGLE * sizes.vocabulary * tokens)
    # Student, teacher and the gradient; a CPU does not fuse what lies between them.
    loss = (3 if on_gpu else 8) * chunk + 4 * hidden * item * tokens
    if autocast and sizes.itemsize == SINGLE:
        # The head in 16 bits.
        loss += item * sizes.vocabulary * hidden
    if not accumulates:
        # The one comes as the other goes.
        gradients = max(0, gradients - entering * tokens)
    backward_pass = gradients + (entering + layer + backward) * tokens
    at_loss = (SINGLE * trained if accumulates else 0) + entering * tokens + casts + loss
    if not checkpointing:
        at_loss += layer * tokens
        backward_pass += casts
    return Need(2 * SINGLE * trained + max(backward_pass, at_loss), CUDA_KERNELS if on_gpu else 0)


def kept_per_token(sizes: Sizes, item: int) -> int:
    """Bytes that autograd keeps of a token in one layer that computes in numbers of `item` bytes; see `recovery_need`.

    An activation that is spelled out in PyTorch (gelu_new) keeps more than its input.
    """
    casts = item == 2
    heads = sizes.wide_queries if sizes.norms_heads else sizes.queries
    numbers = 2 * sizes.mlp + (5 if casts else 4) * heads + 2 * sizes.wide_queries + sizes.norms * 2 * sizes.hidden
    if sizes.norms_heads:
        numbers += (6 if casts else 4) * sizes.wide_queries
    if casts:
        numbers += (2 + sizes.readers) * sizes.hidden
    return item * numbers


def evaluation_need(sizes: Sizes, tokens: int) -> Need:
    """Of `asymgqa_peft.evaluate.perplexity` on so many tokens at a time: logits, also in float32, and logarithms."""
    return Need((sizes.itemsize + 2 * SINGLE) * sizes.vocabulary * tokens, 0)


def merge_bytes(sizes: Sizes, slots: int, kv_heads: int, head_dim: int, copied: int | None = None) -> int:
    """Of `merge_and_unload`, beyond the base and its adapter, wherever these are.

    Args:
        sizes: of the base.
        slots: query slots of the plain model.
        kv_heads: its K/V heads.
        head_dim: W.
        copied: numbers in the linear layers that have a LoRA; None: in all but K and V.

    The plain model has these layers of its own, its attention projections, whose queries, keys and values are computed
    in float64 a layer at a time, and shares all else with the base.
    """
    hidden, stored = sizes.hidden, (slots + kv_heads) * head_dim
    if copied is None:
        copied = sizes.linear - sizes.layers * 2 * hidden * sizes.keys
    grown = sizes.layers * 2 * hidden * (stored - sizes.queries)
    return sizes.itemsize * (copied + grown) + EXACT * hidden * (slots + 2 * kv_heads) * head_dim


# ------------------------------------------------------------------------------------------- on which card, how long


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
CALIBRATION_TOKENS, CALIBRATION_BATCH = 262_144, 4 * SEQUENCE

# Training FLOPs a second of AsymGQATrainer with compiled layers: Llama-2-7B, 8,192 tokens in 0.8807 s, counted by
# `training_flops_per_token`.
RECOVERY_RATE = 5.09e14
# FLOPs of the base's prefill over the calibration tokens, by the seconds of the whole initialisation: Llama-2-7B, 32.5
# s for heads of the base's width, and 63.5 / 54.1 times that, as measured before, for heads twice as wide.
INITIALISATION_RATE = {False: 1.089e14, True: 9.28e13}
# A training step with heads twice as wide, by one with heads of the base's width.
WIDE_STEP = 1.05


@dataclass(frozen=True)
class Estimate:
    """What a conversion takes on a card.

    Attributes:
        load_in_4bit: whether the base has to be held in 4 bits to fit.
        batch_size: sequences per micro-batch of the recovery, the most that fit.
        initialization_bytes, recovery_bytes: GPU memory at the fullest moment, the first with its evaluation.
        main_bytes: main memory at the fullest moment, which is the initialisation's or that of a `merge_and_unload`
            there; recipes, which write a plain model layer by layer, need less. What PyTorch takes is not in it.
        initialization_hours, recovery_hours: None over a 4-bit base, whose speed was not measured.
    """

    load_in_4bit: bool
    batch_size: int
    initialization_bytes: int
    recovery_bytes: int
    main_bytes: int
    initialization_hours: float | None
    recovery_hours: float | None


def estimate(base: PreTrainedModel, trained: int, plain: Sequence[int], card: Card) -> Estimate | None:
    """What a conversion takes on a card; None if it does not fit even over a 4-bit base.

    Args:
        base: the model, without weights.
        trained: parameters of the adapter, held in float32.
        plain: query slots, K/V heads and their dimensions W of the merged model.
        card: the GPU.
    """
    slots, kv_heads, head_dim = plain
    sizes = Sizes.of(base, head_dim)
    adapter = SINGLE * trained
    merged = sizes.weights + adapter + merge_bytes(sizes, slots, kv_heads, head_dim)
    for load_in_4bit in (False, True):
        held, weights = sizes.in_4bit() if load_in_4bit else (sizes, sizes.weights)
        weights += adapter
        beyond = initialization_need(
            held, trained, CALIBRATION_TOKENS, CALIBRATION_BATCH, refits=True, gpu_free=int(card.usable - weights)
        )
        evaluation = evaluation_need(held, CALIBRATION_BATCH)
        initialization = weights + max(beyond.device, evaluation.device)
        for batch_size in BATCH_SIZES:
            tokens = batch_size * SEQUENCE
            recovery = weights + recovery_need(held, trained, tokens, True, True, True, on_gpu=True).device
            if max(initialization, recovery) <= card.usable:
                is_wide = head_dim > head_shape(base.config).head_dim
                hours = (None, None) if load_in_4bit else _hours(base, is_wide, card)
                main = max(beyond.main, merged)
                return Estimate(load_in_4bit, batch_size, initialization, recovery, main, *hours)
    return None


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
