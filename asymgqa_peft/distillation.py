"""The distillation loss, in chunks of positions: tensors in, tensors out.

Axes: N positions that count in the loss, n positions of one chunk, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import is_triton_available

CHUNK_BYTES = 2**27
"""Size of one chunk's float32 logits. Working on a chunk takes about three times that."""

STATISTICS = ("distillation_loss", "sft_loss", "entropy", "mean_token_accuracy")
"""What is summed over positions beside the loss: τ² KL, cross-entropy, the student's entropy, its correct top-1."""


@dataclass(frozen=True)
class OutputLayer:
    """What turns hidden states into logits (lm_head): ``softcap * tanh((hidden @ weight.T + bias) / softcap)``.

    Attributes:
        weight: (V, E), in the dtype in which the matrix product runs.
        bias: (V,), or None.
        softcap: bound of the logits (Gemma 2), or None for logits without one.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None

    def uncapped_logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits before the softcap: (n, E) -> (n, V)."""
        hidden, weight = hidden.to(self.weight.dtype), self.weight.t()
        if hidden.device.type == "cuda" and hidden.dtype in (torch.bfloat16, torch.float16):
            # A product rounded to half precision would show in the KL divergence as a difference between the models.
            logits = torch.mm(hidden, weight, out_dtype=torch.float32)
        else:
            logits = torch.mm(hidden, weight).float()
        if self.bias is not None:
            logits.add_(self.bias)
        return logits

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits: (n, E) -> (n, V)."""
        return apply_softcap(self.uncapped_logits(hidden), self.softcap)


def apply_softcap(logits: Tensor, softcap: float | None) -> Tensor:
    """Bound logits of any shape to (-softcap, softcap), smoothly; None leaves them as they are."""
    if softcap is None:
        return logits
    return softcap * torch.tanh(logits / softcap)


class LossSums(NamedTuple):
    """Sums over `tokens` positions: `statistics`, (4,) float32, in the order of `STATISTICS`."""

    statistics: Tensor
    tokens: int


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    student_layer: OutputLayer,
    teacher_layer: OutputLayer,
    weight: float,
    temperature: float,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, LossSums]:
    """Distillation and cross-entropy without a tensor of (N, V). Up to rounding, the loss is

        s, t = student_layer.logits(student), teacher_layer.logits(teacher)
        ce = F.cross_entropy(s, labels, reduction="sum")
        kl = F.kl_div((s / τ).log_softmax(-1), (t / τ).log_softmax(-1), log_target=True, reduction="sum")
        loss = (1 - weight) * ce + weight * τ**2 * kl

    The gradient with respect to the student's hidden states is computed in the forward pass, while a chunk's logits
    exist. Backward only scales it, so no chunk is projected twice.

    Args:
        student: (N, E) hidden states, differentiable; float32, bfloat16 or float16.
        teacher: (N, E) hidden states.
        labels: (N,) token ids in [0, V).
        student_layer: its weight and bias get a gradient if they require one.
        teacher_layer: never gets a gradient.
        weight: w in [0, 1].
        temperature: τ > 0.
        chunk_bytes: size of the float32 logits of one chunk.

    Returns:
        The summed loss (a scalar), and the sums of `STATISTICS`.
    """
    rows = max(1, chunk_bytes // (4 * student_layer.weight.shape[0]))
    if rows > 128:
        rows = rows // 128 * 128  # whole tiles of the matrix product
    tensors = student, student_layer.weight, student_layer.bias, teacher, labels
    # Inside an autograd function gradients always count as off.
    settings = student_layer, teacher_layer, weight, temperature, rows, torch.is_grad_enabled()
    loss, statistics = _ChunkedDistillation.apply(*tensors, *settings)
    return loss, LossSums(statistics, len(labels))


class _ChunkedDistillation(torch.autograd.Function):
    """`distillation_loss` chunk by chunk, of `rows` positions each. Tensors that may need a gradient come first."""

    @staticmethod
    def forward(
        ctx, student, weight, bias, teacher, labels, student_layer, teacher_layer, kl_weight, temperature, rows, grad
    ):
        ctx.set_materialize_grads(False)
        # A row of the student's gradient is written once. Those of weight and bias add up chunks, hence in float32.
        student_gradient = weight_gradient = bias_gradient = gradient_dtype = None
        if grad and any(ctx.needs_input_grad[:3]):
            gradient_dtype = weight.dtype
            if ctx.needs_input_grad[0]:
                student_gradient = torch.zeros_like(student)
            if ctx.needs_input_grad[1]:
                weight_gradient = torch.zeros_like(weight, dtype=torch.float32)
            if ctx.needs_input_grad[2]:
                bias_gradient = torch.zeros_like(bias, dtype=torch.float32)
        sums = torch.zeros(1 + len(STATISTICS), dtype=torch.float32, device=student.device)
        terms, same_shape = chunk_terms_for(student.device)

        for start in range(0, len(labels), rows):
            stop = min(start + rows, len(labels))
            missing = 0
            if same_shape:
                missing = rows - (stop - start)
            hidden = F.pad(student[start:stop], (0, 0, 0, missing))
            teacher_hidden = F.pad(teacher[start:stop], (0, 0, 0, missing))
            chunk_sums, logits_gradient = terms(
                student_layer.uncapped_logits(hidden),
                teacher_layer.uncapped_logits(teacher_hidden),
                F.pad(labels[start:stop], (0, missing), value=-100),
                kl_weight,
                temperature,
                student_layer.softcap,
                teacher_layer.softcap,
                gradient_dtype,
            )
            sums += chunk_sums
            # From the chunk's logits (n, V) to hidden states (n, E), weight (V, E) and bias (V,).
            if student_gradient is not None:
                student_gradient[start:stop] = logits_gradient[: stop - start] @ weight
            if weight_gradient is not None:
                weight_gradient += logits_gradient.t() @ hidden.to(weight.dtype)
            if bias_gradient is not None:
                bias_gradient += logits_gradient.sum(0, dtype=torch.float32)

        ctx.save_for_backward(student_gradient, weight_gradient, bias_gradient)
        ctx.dtypes = (student.dtype, weight.dtype, None if bias is None else bias.dtype)
        loss, statistics = sums[0].clone(), sums[1:].clone()
        ctx.mark_non_differentiable(statistics)
        return loss, statistics

    @staticmethod
    def backward(ctx, scale, _):
        gradients = []
        for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True):
            if gradient is not None:
                gradient = (gradient * scale).to(dtype)
            gradients.append(gradient)
        return *gradients, *[None] * 8


_compile_once = cache(torch.compile)


def chunk_terms_for(device: torch.device) -> tuple[Callable, bool]:
    """`chunk_terms` as it runs on a device, and whether every chunk must be padded to the same shape."""
    if device.type == "cuda" and is_triton_available():
        # Eagerly, a dozen passes over the logits would cost as much as their projection: compile them into one. TRL's
        # own loss needs Triton on CUDA too, so this asks for nothing new. One shape means one compilation.
        return _compile_once(chunk_terms), True
    return chunk_terms, False


def chunk_terms(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    weight: float,
    temperature: float,
    student_softcap: float | None,
    teacher_softcap: float | None,
    gradient_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """Sums and gradient of one chunk; weight, temperature and softcaps as in `distillation_loss`.

    With q = softmax(s), q_τ = softmax(s / τ), p = softmax(t / τ) and y the one-hot label:
        d CE / d s = q - y,   d τ² KL / d s = τ (q_τ - p),   d c tanh(x / c) / d x = 1 - (s / c)².

    Args:
        student, teacher: (n, V) float32 logits before the softcap.
        labels: (n,) token ids; rows labelled -100 count for nothing.
        gradient_dtype: dtype of the gradient; None if none is wanted.

    Returns:
        Sums (5,) of the loss and `STATISTICS`, and the gradient of the loss by `student`, (n, V), or None.
    """
    student = apply_softcap(student, student_softcap)
    teacher = apply_softcap(teacher, teacher_softcap)
    log_q = F.log_softmax(student, -1)
    log_q_soft = log_q
    if temperature != 1.0:
        log_q_soft = F.log_softmax(student / temperature, -1)
    log_p = F.log_softmax(teacher / temperature, -1)
    p, q = log_p.exp(), log_q.exp()

    keep = (labels != -100).float()
    distillation = (keep * (temperature**2 * (p * (log_p - log_q_soft)).sum(-1))).sum()
    cross_entropy = (keep * -log_q.gather(-1, labels.clamp(min=0)[:, None])[:, 0]).sum()
    entropy = (keep * -(q * log_q).sum(-1)).sum()
    correct = (keep * (student.argmax(-1) == labels)).sum()
    loss = weight * distillation
    if weight < 1.0:
        loss = loss + (1 - weight) * cross_entropy
    sums = torch.stack([loss, distillation, cross_entropy, entropy, correct])
    if gradient_dtype is None:
        return sums, None

    gradient = (weight * temperature * keep[:, None]) * (log_q_soft.exp() - p)
    if weight < 1.0:
        one_hot = torch.arange(student.shape[-1], device=student.device) == labels[:, None]
        gradient = gradient + ((1 - weight) * keep[:, None]) * (q - one_hot.float())
    if student_softcap is not None:
        gradient = gradient * (1 - (student / student_softcap) ** 2)
    return sums, gradient.to(gradient_dtype)
