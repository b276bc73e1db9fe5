"""Recovery as a bare loop, for studies of many runs: what AsymGQATrainer does, several times as fast on small models.

AdamW, cosine schedule, clipping at 1, bf16 autocast over float32 weights, K/V and their mixes at a rate of their own.
It is faster because the teacher's last hidden states are computed once per text block for all runs, decoder layers
share one compiled graph, and a whole step is replayed as one CUDA graph.

Axes: N text blocks, B blocks of a step, T tokens of a block, E hidden size, V vocabulary, n positions of a chunk.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHUNK_BYTES = 2**28  # of the float32 logits of one chunk
BLOCKS_A_FORWARD = 32  # where no gradient is wanted


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of a recovery, the fields of `RecoveryOptions`."""
    parser.add_argument("--tokens", type=float, nargs="*", default=[8e6], help="recoveries, each from the start")
    parser.add_argument("--objective", choices=("kl", "sft"), default="kl", help="the base's logits, or the text")
    parser.add_argument(
        "--token-weights",
        choices=("none", "loss"),
        default="none",
        help="weight of a position's loss; loss: the base's own loss there, over its mean in the block",
    )
    parser.add_argument(
        "--match-hidden",
        type=float,
        default=0.0,
        metavar="WEIGHT",
        help="of the squared error of the hidden states after every layer, over the squared states of the base",
    )
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--kv-scale", type=float, default=0.5, help="rate of K/V and their mixes, over that of LoRA")
    parser.add_argument("--warmup", type=float, default=0.05, help="share of the steps")
    parser.add_argument("--ema", type=float, default=0.0, metavar="DECAY", help="keep an average of the weights")
    parser.add_argument("--batch-size", type=int, default=32, help="blocks a step")
    parser.add_argument("--micro-batch", type=int, help="blocks a forward; default: --batch-size")


@dataclass(frozen=True)
class RecoveryOptions:
    """How to recover; the attributes are the options of `add_options`."""

    tokens: tuple[int, ...]
    objective: str
    token_weights: str
    match_hidden: float
    learning_rate: float
    kv_scale: float
    warmup: float
    ema: float
    batch_size: int
    micro_batch: int

    @classmethod
    def of(cls, args: argparse.Namespace) -> RecoveryOptions:
        """Out of the command line.

        Raises:
            ValueError: if --micro-batch does not divide --batch-size, or SFT is to learn from the base.
        """
        micro_batch = args.micro_batch or args.batch_size
        if args.batch_size % micro_batch:
            raise ValueError(f"--micro-batch {micro_batch} must divide --batch-size {args.batch_size}")
        if args.objective == "sft" and (args.match_hidden or args.token_weights != "none"):
            raise ValueError("--objective sft takes nothing from the base: leave out --match-hidden, --token-weights")
        return cls(
            tokens=tuple(int(tokens) for tokens in args.tokens),
            objective=args.objective,
            token_weights=args.token_weights,
            match_hidden=args.match_hidden,
            learning_rate=args.learning_rate,
            kv_scale=args.kv_scale,
            warmup=args.warmup,
            ema=args.ema,
            batch_size=args.batch_size,
            micro_batch=micro_batch,
        )

    def steps(self, tokens: int, block_size: int) -> int:
        """Optimiser steps of so many tokens."""
        return max(1, tokens // (self.batch_size * block_size))


# --------------------------------------------------------------------------------------------------- the model


class Stack:
    """The decoder layers of a Llama or a model of like layers, called one by one.

    The model's own forward would build a causal mask while a CUDA graph is captured, and lose flash attention.
    """

    def __init__(self, model: nn.Module, block_size: int) -> None:
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        if causal.config.model_type not in ("llama", "mistral", "qwen3", "olmo2"):
            raise SystemExit(f"{causal.config.model_type}: this script calls layers like Llama's only")
        self.inner = causal.model
        head = causal.get_output_embeddings().weight
        self.positions = torch.arange(block_size, device=head.device)[None]
        with torch.no_grad():
            self.rotary = self.inner.rotary_emb(head[:1, None], position_ids=self.positions)

    def after_layers(self, ids: Tensor) -> Iterator[Tensor]:
        """Token ids (B, T) -> the hidden states after every layer, each (B, T, E)."""
        states = self.inner.embed_tokens(ids)
        if torch.is_grad_enabled():
            # Else the first layer alone would get an input without gradient, and need a compiled graph of its own.
            states.requires_grad_()
        for layer in self.inner.layers:
            states = layer(
                states,
                attention_mask=None,
                position_ids=self.positions,
                position_embeddings=self.rotary,
            )
            if isinstance(states, tuple):
                states = states[0]
            yield states

    def hidden(self, ids: Tensor) -> Tensor:
        """Token ids (B, T) -> what enters the output layer, (B, T, E)."""
        for states in self.after_layers(ids):
            last = states
        return self.inner.norm(last)

    def compile(self) -> None:
        """Compile the layers; all of them have the same graph."""
        for layer in self.inner.layers:
            layer.compile(dynamic=False)


def works_in_bf16(device: torch.device) -> bool:
    """bf16 on a GPU, float32 on a CPU."""
    return device.type == "cuda"


def autocast(device: torch.device):
    """Mixed precision where it is wanted."""
    return torch.autocast(device.type, torch.bfloat16, enabled=works_in_bf16(device))


class RoundedWeights:
    """Frozen weights of the layers' matrices in bf16 while `in_use`, exact again afterwards.

    Autocast would round them to the same numbers at every use. Both kinds stay where they are, as a CUDA graph needs.
    """

    def __init__(self, stacks: list[Stack], device: torch.device) -> None:
        self.exact: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        if not works_in_bf16(device):
            return
        for stack in stacks:
            for module in stack.inner.layers.modules():
                if not isinstance(module, nn.Linear):
                    continue
                for parameter in module.parameters(recurse=False):
                    if not parameter.requires_grad:
                        self.exact.append((parameter, parameter.data, parameter.data.to(torch.bfloat16)))

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Round, and restore."""
        for parameter, _, rounded in self.exact:
            parameter.data = rounded
        try:
            yield
        finally:
            for parameter, exact, _ in self.exact:
                parameter.data = exact


@dataclass(frozen=True)
class Lessons:
    """What the base says about text blocks, at the T - 1 positions that predict.

    Attributes:
        states: (N, T - 1, E) its last hidden states, in the dtype the output layer works in.
        loss: (N, T - 1) its cross-entropy on the next token, over the mean of the block; None where nobody asks.
    """

    states: Tensor
    loss: Tensor | None


@torch.no_grad()
def lessons_of(base: nn.Module, head: Tensor, blocks: Tensor, with_loss: bool) -> Lessons:
    """Ask the base about blocks (N, T); head is its output layer (V, E) in the dtype it works in.

    Weights by the loss follow TransGQLA (Meng, 2026, arXiv 2605.15250, and its code), which weights calibration tokens
    by the teacher's loss with mean 1 per sample; here they weight the positions of a recovery.
    """
    count, length = blocks.shape
    device, stack = head.device, Stack(base, length)
    states = torch.empty(count, length - 1, head.shape[1], dtype=head.dtype, device=device)
    loss = torch.empty(count, length - 1, device=device) if with_loss else None
    for start in range(0, count, BLOCKS_A_FORWARD):
        ids = blocks[start : start + BLOCKS_A_FORWARD].to(device)
        with autocast(device):
            hidden = stack.hidden(ids)
        states[start : start + len(ids)] = hidden[:, :-1]
        if with_loss:
            for row, block in enumerate(ids, start):
                loss[row] = F.cross_entropy(logits(states[row], head), block[1:], reduction="none")
                loss[row] /= loss[row].mean()
    return Lessons(states, loss)


# ---------------------------------------------------------------------------------------------------- the loss


def kl_terms(
    student: Tensor, teacher: Tensor, labels: Tensor, weights: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Weighted sum of KL(teacher || student), and its gradient with respect to the student's logits.

    Args:
        student, teacher: logits (n, V).
        labels: (n,), not looked at.
        weights: (n,).
        dtype: of the gradient.
    """
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    p = log_p.exp()
    divergence = (p * (log_p - log_q)).sum(-1)
    return (weights * divergence).sum(), (weights[:, None] * (log_q.exp() - p)).to(dtype)


def sft_terms(
    student: Tensor, teacher: None, labels: Tensor, weights: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the cross-entropy on labels (n,), and its gradient; as `kl_terms`."""
    log_q = student.log_softmax(-1)
    one_hot = torch.arange(student.shape[-1], device=student.device) == labels[:, None]
    loss = -log_q.gather(-1, labels[:, None])[:, 0]
    return (weights * loss).sum(), (weights[:, None] * (log_q.exp() - one_hot.to(student.dtype))).to(dtype)


TERMS = {"kl": kl_terms, "sft": sft_terms}


def logits(features: Tensor, head: Tensor) -> Tensor:
    """Features (n, E) -> float32 logits (n, V); half-precision products are not rounded."""
    if features.is_cuda:
        return torch.mm(features, head.t(), out_dtype=torch.float32)
    return features @ head.t()


class LogitLoss(torch.autograd.Function):
    """Summed loss in chunks of `rows` positions; the gradient is formed while the logits are at hand."""

    @staticmethod
    def forward(ctx, student, teacher, labels, weights, head, rows, terms):
        """Features of student and teacher (or None) (n, E), labels (n,), weights (n,), output layer (V, E)."""
        gradient = torch.empty_like(student)
        total = torch.zeros((), device=student.device)
        for start in range(0, len(student), rows):
            chunk = slice(start, start + rows)
            teacher_logits = None
            if teacher is not None:
                teacher_logits = logits(teacher[chunk], head)
            student_logits = logits(student[chunk], head)
            loss, slope = terms(student_logits, teacher_logits, labels[chunk], weights[chunk], head.dtype)
            total += loss
            gradient[chunk] = slope @ head
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, scale):
        """Scale what `forward` found."""
        (gradient,) = ctx.saved_tensors
        return gradient * scale, *[None] * 6


def rows_per_chunk(micro_batch: int, block_size: int, vocabulary: int) -> int:
    """Whole blocks, as many as CHUNK_BYTES allow and as divide a micro-batch: all chunks have one shape."""
    blocks = max(1, CHUNK_BYTES // (4 * vocabulary * (block_size - 1)))
    while micro_batch % min(blocks, micro_batch):
        blocks -= 1
    return min(blocks, micro_batch) * (block_size - 1)


def hidden_error(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Mean over layers and positions of |s - t|^2 / |t|^2, for hidden states (B, T, E) of each layer.

    Relative at every position: a few tokens, the first above all, have states a thousand times as large as the rest.
    """
    total = torch.zeros((), device=student[0].device)
    for own, wanted in zip(student, teacher, strict=True):
        error = (own.float() - wanted.float()).square().sum(-1)
        total = total + (error / wanted.float().square().sum(-1)).mean()
    return total / len(student)


# ------------------------------------------------------------------------------------------------- the training


class Recovery:
    """One model's optimiser and step; `run` trains from the weights that the model has now.

    Args:
        model: PeftModel to train.
        base: the untouched model.
        head: its output layer, (V, E), in the dtype it works in.
        options: see there.
        block_size: T.
        compiled: compile the decoder layers too, not only the loss.
        graph: replay steps as a CUDA graph, on a GPU.
    """

    def __init__(
        self,
        model: nn.Module,
        base: nn.Module,
        head: Tensor,
        options: RecoveryOptions,
        block_size: int,
        compiled: bool = False,
        graph: bool = True,
    ) -> None:
        self.model, self.head, self.options = model.train(), head, options
        self.device, self.block_size = head.device, block_size
        self.stack = Stack(model, block_size)
        stacks = [self.stack]
        if options.match_hidden:
            # States after every layer of every block would not fit: the base runs in the step.
            self.base_stack = Stack(base, block_size)
            stacks.append(self.base_stack)
        self.rounded = RoundedWeights(stacks, self.device)
        self.terms: Callable = TERMS[options.objective]
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            self.terms = torch.compile(self.terms, dynamic=False)
        if compiled:
            for stack in stacks:
                stack.compile()
        self.rows = rows_per_chunk(options.micro_batch, block_size, len(head))

        lora, shared = [], []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                (lora if is_low_rank(name) else shared).append(parameter)
        self.parameters = lora + shared
        self.start = [parameter.detach().clone() for parameter in self.parameters]
        self.average = []
        if options.ema:
            self.average = [parameter.clone() for parameter in self.start]

        def rate() -> Tensor | float:
            # A CUDA graph reads it from the device.
            return torch.zeros((), device=self.device) if on_gpu else 0.0

        groups = [
            {"params": lora, "lr": rate(), "scale": 1.0},
            {"params": shared, "lr": rate(), "scale": options.kv_scale},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=rate(), weight_decay=0.0, fused=True if on_gpu else None, capturable=on_gpu
        )
        blocks = options.batch_size
        self.ids = torch.zeros(blocks, block_size, dtype=torch.long, device=self.device)
        self.teacher = torch.zeros(blocks, block_size - 1, head.shape[1], dtype=head.dtype, device=self.device)
        self.weights = torch.ones(blocks, block_size - 1, device=self.device)
        self.loss = torch.zeros((), device=self.device)
        self.graph = None
        self.mode = "eager"
        if on_gpu and graph:
            self.capture()

    def step(self) -> None:
        """Forward, backward and update on what `ids`, `teacher` and `weights` hold."""
        options = self.options
        self.optimizer.zero_grad(set_to_none=True)
        self.loss.zero_()
        for start in range(0, options.batch_size, options.micro_batch):
            loss = self.loss_of(slice(start, start + options.micro_batch))
            loss.backward()
            self.loss += loss.detach()
        nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self.optimizer.step()
        if self.average:
            with torch.no_grad():
                torch._foreach_lerp_(self.average, self.parameters, 1.0 - options.ema)

    def loss_of(self, part: slice) -> Tensor:
        """The loss of some blocks of the step, divided by the positions of all of them."""
        options = self.options
        with autocast(self.device):
            states = list(self.stack.after_layers(self.ids[part]))
            hidden = self.stack.inner.norm(states[-1])
        student = hidden[:, :-1].to(self.head.dtype).flatten(0, 1)
        teacher = None
        if options.objective == "kl":
            teacher = self.teacher[part].flatten(0, 1)
        labels, weights = self.ids[part, 1:].flatten(), self.weights[part].flatten()
        loss = LogitLoss.apply(student, teacher, labels, weights, self.head, self.rows, self.terms)
        loss = loss / self.weights.numel()
        if options.match_hidden:
            with torch.no_grad(), autocast(self.device):
                wanted = list(self.base_stack.after_layers(self.ids[part]))
            share = options.micro_batch / options.batch_size
            loss = loss + options.match_hidden * share * hidden_error(states, wanted)
        return loss

    def capture(self) -> None:
        """Record the step as a CUDA graph; where that fails, steps stay eager."""
        try:
            with self.rounded.in_use():
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    for _ in range(3):
                        self.step()
                torch.cuda.current_stream().wait_stream(side)
                self.reset()
                self.optimizer.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    self.step()
            self.graph, self.mode = graph, "graph"
        except Exception as error:
            print(f"# no CUDA graph, eager steps: {error!r}"[:500], flush=True)
            torch.cuda.synchronize()
            self.graph = None
            self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """The weights of the beginning, and an optimiser that has seen nothing."""
        for parameter, value in zip(self.parameters, self.start, strict=True):
            parameter.copy_(value)
        for average, value in zip(self.average, self.start, strict=False):
            average.copy_(value)
        for state in self.optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()

    def run(self, blocks: Tensor, lessons: Lessons | None, order: Tensor) -> dict:
        """Train on `order`, indices into blocks (N, T) and lessons; leaves the model in eval mode.

        Returns:
            Steps, seconds, tokens a second and the loss, some twenty times.
        """
        self.model.train()  # shared heads are decoded in training mode only
        self.reset()
        options, steps = self.options, len(order) // self.options.batch_size
        warmup = max(1, round(options.warmup * steps))
        order = order.to(self.device)
        losses, begin = [], time.perf_counter()
        with self.rounded.in_use():
            for step in range(steps):
                chosen = order[step * options.batch_size : (step + 1) * options.batch_size]
                torch.index_select(blocks, 0, chosen, out=self.ids)
                if options.objective == "kl":
                    torch.index_select(lessons.states, 0, chosen, out=self.teacher)
                if options.token_weights == "loss":
                    torch.index_select(lessons.loss, 0, chosen, out=self.weights)
                self.set_rate(options.learning_rate * cosine_factor(step, steps, warmup))
                if self.graph is None:
                    self.step()
                else:
                    self.graph.replay()
                if step % max(1, steps // 20) == 0 or step == steps - 1:
                    losses.append(self.loss.clone())
            losses = [round(loss.item(), 5) for loss in losses]
        seconds = time.perf_counter() - begin
        with torch.no_grad():
            for parameter, average in zip(self.parameters, self.average, strict=False):
                parameter.copy_(average)
        self.model.eval()
        tokens = steps * options.batch_size * self.block_size
        return {
            "steps": steps,
            "mode": self.mode,
            "train_seconds": round(seconds, 2),
            "tokens_per_second": round(tokens / seconds),
            "losses": losses,
        }

    def set_rate(self, rate: float) -> None:
        """Learning rate of the next step."""
        for group in self.optimizer.param_groups:
            if torch.is_tensor(group["lr"]):
                group["lr"].fill_(rate * group["scale"])
            else:
                group["lr"] = rate * group["scale"]


def is_low_rank(name: str) -> bool:
    """Whether a trained parameter is LoRA's; the others are shared heads, gains, mixes and norms."""
    return ".lora_A." in name or ".lora_B." in name


def cosine_factor(step: int, steps: int, warmup: int) -> float:
    """transformers' cosine schedule with warm-up."""
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
