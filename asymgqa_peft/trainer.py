"""AsymGQATrainer: TRL's SFTTrainer plus self-distillation from the untouched base model.

Axes: B batch, T positions, N positions that count in the loss, E hidden size, V vocabulary, n rows of a chunk.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import is_triton_available
from trl import SFTTrainer

SHARED_PARAMETER_MARKS = ("lora_kv.", "lora_query_gain.", "lora_query_mix.", "lora_value_mix.", "lora_norm.")
CHUNK_BYTES = 2**27
_STATISTICS = ("distillation_loss", "sft_loss", "entropy", "mean_token_accuracy")


class AsymGQATrainer(SFTTrainer):
    r"""SFTTrainer whose teacher is the same model with the adapter disabled.

    With weight w and temperature τ, per position that SFT would train on (label not -100 after the shift):

        loss = (1 - w) * CE(label, student) + w * τ² * KL(softmax(teacher / τ) || softmax(student / τ))

    summed, and divided as SFTTrainer divides: by `num_items_in_batch`, so that gradient accumulation gives the
    trajectory of one large batch. The teacher sees the same inputs (padding, packing, position ids) in evaluation
    mode and costs a forward pass. Logits exist one chunk of positions at a time.

    Logged beside SFTTrainer's metrics, as means over tokens since the last log: `distillation_loss` (the second term
    without w) and `sft_loss` (the cross-entropy).

    Args:
        distillation_weight: w in [0, 1]. 0 is SFTTrainer, to the last bit; 1 needs no labels' content at all.
        temperature: τ > 0.
        kv_learning_rate_scale: learning rate of shared K/V heads (and their gains, mixes and norms), relative to
            that of the other parameters. They stay float32 whatever the base's dtype. Not applied to an optimizer
            that is passed in, or defined in a DeepSpeed config.
        **kwargs: SFTTrainer's.

    Raises:
        ValueError: for a bad argument, or an SFTConfig option that distillation does not define.
    """

    _tag_names = [*SFTTrainer._tag_names, "asymgqa"]

    chunk_bytes = CHUNK_BYTES  # of one chunk's float32 logits; working on a chunk takes about three times that

    def __init__(
        self,
        *args,
        distillation_weight: float = 1.0,
        temperature: float = 1.0,
        kv_learning_rate_scale: float = 0.5,
        **kwargs,
    ) -> None:
        _check_range("distillation_weight", distillation_weight, 0.0, 1.0, "0 is plain SFT, 1 pure distillation")
        _check_range("temperature", temperature, 1e-3, 1e3, "1 leaves the distributions as they are")
        _check_range("kv_learning_rate_scale", kv_learning_rate_scale, 0.0, 1e3, "1 treats K/V like LoRA")
        self.distillation_weight = float(distillation_weight)
        self.temperature = float(temperature)
        self.kv_learning_rate_scale = float(kv_learning_rate_scale)
        self._head_is_plain: bool | None = None  # does lm_head alone explain the logits? Measured on the first batch.
        self._sums = {"train": _Sums(), "eval": _Sums()}
        model = args[0] if args else kwargs.get("model")
        # On a quantised base SFTTrainer rounds trainable parameters to bf16 by giving them new storage. These
        # references keep the exact values alive; nothing is copied.
        exact = {name: p.data for name, p in _shared_parameters(model)} if isinstance(model, PeftModel) else {}
        super().__init__(*args, **kwargs)
        self._keep_shared_in_float32(exact)
        if self.distillation_weight > 0:
            self._check_distillable()

    def _keep_shared_in_float32(self, exact: dict[str, Tensor]) -> None:
        if self.is_deepspeed_enabled:  # ZeRO-3 gathers into buffers of one dtype
            return
        for name, parameter in _shared_parameters(self.model):
            if parameter.requires_grad and parameter.dtype != torch.float32:
                parameter.data = exact.get(name, parameter.data).to(parameter.device, torch.float32)

    def _check_distillable(self) -> None:
        if not isinstance(getattr(self.model, "base_model", None), BaseTuner):
            raise ValueError(
                f"distillation_weight={self.distillation_weight} needs an adapter to switch off for the teacher, got "
                f"{type(self.model).__name__}: pass a PeftModel or peft_config, or distillation_weight=0."
            )
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        undefined = {
            "loss_type": self.args.loss_type != "nll",
            "label_smoothing_factor": self.args.label_smoothing_factor > 0,
            "compute_loss_func": self.compute_loss_func is not None,
            "router_aux_loss_coef": self.aux_loss_enabled,
            "parallelism_config (context or sequence parallelism)": parallelism is not None
            and (parallelism.cp_enabled or parallelism.sp_enabled),
        }
        for option in (name for name, is_set in undefined.items() if is_set):
            raise ValueError(f"{option} is not defined for distillation: unset it, or use distillation_weight=0.")

    # ---- Loss ----

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """SFTTrainer's at weight 0; else the class docstring's, with `num_items_in_batch` as the divisor."""
        if self.distillation_weight == 0.0:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs["use_cache"] = False
        model_inputs = {name: value for name, value in inputs.items() if name != "labels"}
        total, sums = self._loss_sums(model, model_inputs, inputs["labels"][:, 1:])
        tokens = sums.tokens if num_items_in_batch is None else num_items_in_batch
        loss = total / torch.as_tensor(tokens, device=total.device).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # num_items_in_batch counts every rank's tokens, and DDP averages gradients over ranks.
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        self._record(sums, inputs)
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**model_inputs)

    def _loss_sums(self, model: nn.Module, inputs: dict[str, Any], labels: Tensor) -> tuple[Tensor, _ChunkSums]:
        """Summed loss (differentiable) and statistics. labels: (B, T - 1), the next token of positions 0 .. T - 2."""
        peft_model = self.accelerator.unwrap_model(model)
        trained, original = _output_layers(peft_model)
        softcap = getattr(peft_model.config.get_text_config(), "final_logit_softcapping", None)
        teacher = self._teacher_features(peft_model, inputs, labels, original, softcap)

        def losses(hidden: Tensor) -> tuple[Tensor, _ChunkSums]:
            student_head = Head.of(trained, softcap) if self._head_is_plain else Head()
            same_head = trained is original or not self._head_is_plain
            student = _next_token_rows(hidden, labels).to(teacher.device)
            return distillation_loss(
                student,
                teacher,
                labels[labels != -100].to(teacher.device),
                student_head=student_head,
                teacher_head=student_head if same_head else Head.of(original, softcap),
                weight=self.distillation_weight,
                temperature=self.temperature,
                chunk_bytes=self.chunk_bytes,
            )

        if not self._head_is_plain:
            return losses(model(**inputs).logits)
        (total, sums), logits = _call_with_tap(model, inputs, trained, losses)
        # FSDP2 gathers weights for backward when the wrapper's own output gets a gradient, so let it have one.
        return total + 0.0 * logits.sum(), sums

    def _teacher_features(
        self, model: PeftModel, inputs: dict[str, Any], labels: Tensor, head: nn.Module, softcap: float | None
    ) -> Tensor:
        """The base model's hidden states (N, E) where labels count; its logits (N, V) where a head is not plain."""

        def hidden_and_probe(hidden: Tensor) -> tuple[Tensor, Tensor | None]:
            hidden = hidden.to(head.weight.device)  # a device_map may have left them on another one
            return _next_token_rows(hidden, labels), _probe(head, softcap, hidden) if first else None

        first = self._head_is_plain is None
        with base_model_mode(model):
            if self._head_is_plain is not False and isinstance(head, nn.Linear):
                (features, expected), logits = _call_with_tap(model, inputs, head, hidden_and_probe)
                if not first:
                    return features
                self._head_is_plain = expected is not None and _same_logits(expected, logits[:, -1])
                if self._head_is_plain:
                    return features
            if first:
                self._head_is_plain = False
                warnings.warn(
                    f"{type(head).__name__} alone does not give this model's logits: they are computed whole, which "
                    "takes two full-vocabulary tensors.",
                    stacklevel=2,
                )
            return _next_token_rows(model(**inputs).logits, labels)

    # ---- Logging ----

    def _record(self, sums: _ChunkSums, inputs: dict[str, Any]) -> None:
        seen = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
        counts = torch.stack([sums.statistics.new_tensor(float(seen)), sums.statistics.new_tensor(float(sums.tokens))])
        gathered = self.accelerator.gather(torch.cat([counts, sums.statistics])[None]).sum(0).tolist()
        mode = "train" if self.model.training else "eval"
        self._sums[mode].add(tokens=gathered[1], values=gathered[2:])
        if mode == "train":
            self._total_train_tokens += int(gathered[0]) // self._tp_size
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means over tokens since the last log, then log as SFTTrainer does."""
        mode = "train" if self.model.training else "eval"
        prefix = "eval_" if mode == "eval" else ""
        logs.update({prefix + name: value for name, value in self._sums[mode].means().items()})
        self._sums[mode] = _Sums()
        super().log(logs, start_time)

    # ---- Optimizer ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, its groups split so that shared parameters have their own learning rate."""
        ours = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if ours and self.kv_learning_rate_scale != 1.0:
            split_shared_groups(optimizer, self.model if model is None else model, self.kv_learning_rate_scale)
        return optimizer


def split_shared_groups(optimizer: torch.optim.Optimizer, model: nn.Module, scale: float) -> None:
    """Move shared parameters into groups of their own, equal but for `scale` times the learning rate.

    The new groups come last, so that the first one, whose rate the Trainer logs, is not a scaled one. Their order
    depends on the model alone: a saved optimizer state fits on resume.

    Raises:
        ValueError: if the optimizer does not hold the shared parameters in groups (layer-wise optimizers).
    """
    shared = {id(p) for _, p in _shared_parameters(model) if p.requires_grad}
    found = set()
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if id(p) in shared]
        found.update(map(id, moved))
        if moved:
            group["params"] = [p for p in group["params"] if id(p) not in shared]
            optimizer.add_param_group({**group, "params": moved, "lr": group["lr"] * scale})
    if found != shared:
        raise ValueError(
            f"{type(optimizer).__name__} does not keep the shared K/V parameters in parameter groups, so "
            "kv_learning_rate_scale cannot apply: set it to 1, or choose another `optim`."
        )


# ---- Base model as teacher ----


@contextmanager
def base_model_mode(model: PeftModel) -> Iterator[None]:
    """The untouched base model for inference: adapter off, no gradient, no dropout; all restored on exit.

    A teacher's forward begins and ends before the student's, so checkpointed layers are recomputed in the student's
    mode. PEFT freezes adapter parameters while they are off, and on return unfreezes all of an active adapter: here
    the flags stay as they were throughout, for parameters that the user froze, and for FSDP2, which copies the flag
    when it first gathers a parameter.
    """
    # Linear layers have no dropout; bitsandbytes' would repack their weights for inference on a CPU.
    training = [module for module in model.modules() if module.training and not isinstance(module, nn.Linear)]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        # Not model.disable_adapter(): that first takes stock of every layer, at a third of this function's time.
        model.base_model.disable_adapter_layers()
        _restore(flags)
        for module in training:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        model.base_model.enable_adapter_layers()
        _restore(flags)
        for module in training:
            module.training = True


def _restore(flags: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, flag in flags:
        if parameter.requires_grad != flag:
            parameter.requires_grad_(flag)


def _call_with_tap(
    model: nn.Module, inputs: dict[str, Any], head: nn.Module, consume: Callable[[Tensor], Any]
) -> tuple[Any, Tensor]:
    """Call the model; `consume` gets what enters its head, (B, T, E), and the head only the last position.

    Returns `consume`'s result and the logits of the last position, (B, 1, V). The tap sits inside the forward pass,
    where autocast is on and FSDP has gathered the head's weight.
    """
    results = []

    def tap(module: nn.Module, args: tuple) -> tuple:
        results.append(consume(args[0]))
        return (args[0][:, -1:],)

    handle = head.register_forward_pre_hook(tap)
    try:
        logits = model(**inputs).logits
    finally:
        handle.remove()
    (result,) = results
    return result, logits


def _output_layers(model: PeftModel) -> tuple[nn.Module, nn.Module]:
    """The head that the student runs and the one that the teacher runs."""
    head = model.get_base_model().get_output_embeddings()
    if not isinstance(head, ModulesToSaveWrapper):
        return head, head
    active = head.active_adapters
    return head.modules_to_save[active[0]] if active else head.original_module, head.original_module


def _probe(head: nn.Linear, softcap: float | None, hidden: Tensor) -> Tensor | None:
    """What Head makes of the last position, (B, V), in the dtype it works in; None for a packed or sharded weight."""
    if not head.weight.is_floating_point() or head.weight.shape != (head.out_features, head.in_features):
        return None
    plain = Head.of(head, softcap)
    return plain.logits(hidden[:, -1]).to(plain.weight.dtype)


def _same_logits(expected: Tensor, logits: Tensor) -> bool:
    if expected.shape != logits.shape:
        return False
    tolerance = 1e-3 if expected.dtype == torch.float32 else 3e-2
    return bool((expected - logits).abs().max() <= tolerance * logits.abs().max())


def _next_token_rows(values: Tensor, labels: Tensor) -> Tensor:
    """(B, T, X), (B, T - 1) -> (N, X): the rows that predict a label other than -100."""
    return values[:, :-1][(labels != -100).to(values.device)]


# ---- Chunked loss ----


@dataclass(frozen=True)
class Head:
    """What turns features into logits: ``cap(features @ weight.T + bias)``, or nothing if the features are logits.

    Attributes:
        weight: (V, E), or None.
        bias: (V,), or None.
        softcap: c of ``c * tanh(logits / c)`` (Gemma 2), or None.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    softcap: float | None = None

    @classmethod
    def of(cls, linear: nn.Linear, softcap: float | None) -> Head:
        """A linear head in the dtype in which the model itself would run it."""
        device = linear.weight.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else linear.weight.dtype
        bias = None if linear.bias is None else linear.bias.to(dtype)
        return cls(linear.weight.to(dtype), bias, softcap)

    def scores(self, features: Tensor) -> Tensor:
        """Float32 logits before the softcap: (n, E) -> (n, V)."""
        if self.weight is None:
            return features.float()
        scores = _matmul_float32(features.to(self.weight.dtype), self.weight.t())
        return scores if self.bias is None else scores.add_(self.bias)

    def logits(self, features: Tensor) -> Tensor:
        """Float32 logits: (n, E) -> (n, V)."""
        return _cap(self.scores(features), self.softcap)


class _ChunkSums(NamedTuple):
    """Sums over positions: statistics (4,) in the order of _STATISTICS, and the number of positions."""

    statistics: Tensor
    tokens: int


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    student_head: Head,
    teacher_head: Head,
    weight: float,
    temperature: float,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, _ChunkSums]:
    """Distillation and cross-entropy without full-vocabulary tensors; equals, up to rounding,

        s, t = student_head.logits(student), teacher_head.logits(teacher)
        ce = F.cross_entropy(s, labels, reduction="sum")
        kl = F.kl_div((s / τ).log_softmax(-1), (t / τ).log_softmax(-1), log_target=True, reduction="sum")
        loss = (1 - weight) * ce + weight * τ**2 * kl

    The gradient with respect to the student's features is formed chunk by chunk in the forward pass, while the logits
    are at hand: backward only scales it, and nothing is projected twice.

    Args:
        student: (N, E) features, differentiable; float32, bfloat16 or float16.
        teacher: (N, E) features.
        labels: (N,) token ids in [0, V).
        student_head: its weight and bias get a gradient if they require one.
        teacher_head: never gets a gradient.
        weight: w in [0, 1].
        temperature: τ.
        chunk_bytes: size of the float32 logits of one chunk.

    Returns:
        The summed loss, and the sums of τ² KL, cross-entropy, student entropy and correct top-1 predictions.
    """
    vocabulary = student.shape[-1] if student_head.weight is None else student_head.weight.shape[0]
    rows = max(1, chunk_bytes // (4 * vocabulary))
    options = _Options(
        weight=weight,
        temperature=temperature,
        rows=rows if rows < 128 else rows // 128 * 128,  # whole matrix-multiplication tiles
        with_gradient=torch.is_grad_enabled(),
    )
    loss, statistics = _ChunkedDistillation.apply(
        student, student_head.weight, student_head.bias, student_head.softcap, teacher, teacher_head, labels, options
    )
    return loss, _ChunkSums(statistics, len(labels))


class _Options(NamedTuple):
    weight: float
    temperature: float
    rows: int
    with_gradient: bool


class _ChunkedDistillation(torch.autograd.Function):
    """See distillation_loss."""

    @staticmethod
    def forward(ctx, student, weight, bias, softcap, teacher, teacher_head, labels, options):
        ctx.set_materialize_grads(False)
        head = Head(weight, bias, softcap)
        inputs = (student, weight, bias)
        wanted = [options.with_gradient and needed for needed in ctx.needs_input_grad[:3]]
        # The student's gradient is written once per row; the head's are sums over chunks, hence in float32.
        dtypes = (student.dtype, torch.float32, torch.float32)
        gradients = [
            torch.zeros_like(x, dtype=dtype) if want else None
            for x, want, dtype in zip(inputs, wanted, dtypes, strict=True)
        ]
        sums = torch.zeros(1 + len(_STATISTICS), dtype=torch.float32, device=student.device)
        terms, padding = _terms_for(student.device)
        for start in range(0, len(labels), options.rows):
            chunk = slice(start, min(start + options.rows, len(labels)))
            missing = padding and options.rows - (chunk.stop - chunk.start)
            features = F.pad(student[chunk], (0, 0, 0, missing))
            chunk_sums, gradient = terms(
                head.scores(features),
                teacher_head.scores(F.pad(teacher[chunk], (0, 0, 0, missing))),
                F.pad(labels[chunk], (0, missing), value=-100),
                options.weight,
                options.temperature,
                softcap,
                teacher_head.softcap,
                (student if weight is None else weight).dtype if any(wanted) else None,
            )
            sums += chunk_sums
            _accumulate(gradients, gradient, features, weight, chunk)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        loss, statistics = sums[0].clone(), sums[1:].clone()
        ctx.mark_non_differentiable(statistics)
        return loss, statistics

    @staticmethod
    def backward(ctx, scale, _):
        gradients = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if g is None else (g * scale).to(dtype) for g, dtype in gradients), *(None,) * 5


def _accumulate(gradients, logit_gradient: Tensor | None, features: Tensor, weight: Tensor | None, chunk: slice):
    """Carry a chunk's gradient from its logits (n, V) to features (n, E), weight (V, E) and bias (V,)."""
    features_gradient, weight_gradient, bias_gradient = gradients
    if features_gradient is not None:
        rows = logit_gradient[: chunk.stop - chunk.start]
        features_gradient[chunk] = rows if weight is None else rows @ weight
    if weight_gradient is not None:
        weight_gradient += logit_gradient.t() @ features.to(weight.dtype)
    if bias_gradient is not None:
        bias_gradient += logit_gradient.sum(0, dtype=torch.float32)


def _chunk_terms(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    weight: float,
    temperature: float,
    student_cap: float | None,
    teacher_cap: float | None,
    gradient_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """One chunk. Scores (n, V) in float32, labels (n,) -> sums (loss, *_STATISTICS), d loss / d student scores (n, V).

    With q = softmax(s), q_τ = softmax(s / τ), p = softmax(t / τ), y the one-hot label:
        d CE / d s = q - y,   d τ² KL / d s = τ (q_τ - p),   d c tanh(x / c) / d x = 1 - (s / c)².
    Rows labelled -100 are padding and count for nothing.
    """
    student, teacher = _cap(student, student_cap), _cap(teacher, teacher_cap)
    log_q = F.log_softmax(student, -1)
    log_q_soft = log_q if temperature == 1.0 else F.log_softmax(student / temperature, -1)
    log_p = F.log_softmax(teacher / temperature, -1)
    p, q = log_p.exp(), log_q.exp()
    per_row = (
        temperature**2 * (p * (log_p - log_q_soft)).sum(-1),
        -log_q.gather(-1, labels.clamp(min=0)[:, None])[:, 0],
        -(q * log_q).sum(-1),
        student.argmax(-1) == labels,
    )
    keep = (labels != -100).float()
    distillation, ce, entropy, correct = ((keep * term).sum() for term in per_row)
    loss = weight * distillation
    if weight < 1.0:
        loss = loss + (1 - weight) * ce
    sums = torch.stack([loss, distillation, ce, entropy, correct])
    if gradient_dtype is None:
        return sums, None
    gradient = (weight * temperature * keep[:, None]) * (log_q_soft.exp() - p)
    if weight < 1.0:
        one_hot = torch.arange(student.shape[-1], device=student.device) == labels[:, None]
        gradient = gradient + ((1 - weight) * keep[:, None]) * (q - one_hot.float())
    if student_cap is not None:
        gradient = gradient * (1 - (student / student_cap) ** 2)
    return sums, gradient.to(gradient_dtype)


@cache
def _compiled_terms() -> Callable:
    return torch.compile(_chunk_terms)


def _terms_for(device: torch.device) -> tuple[Callable, bool]:
    """_chunk_terms for a device, and whether it wants every chunk padded to one shape.

    Fused on CUDA: in eager mode a dozen passes over the logits would cost as much as their projection. TRL's own loss
    needs Triton there, so compiling asks for nothing new. One shape means one compilation.
    """
    if device.type == "cuda" and is_triton_available():
        return _compiled_terms(), True
    return _chunk_terms, False


def _cap(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _matmul_float32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32; from half precision on CUDA without rounding, which KL would see as a difference."""
    if a.device.type == "cuda" and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b).float()


# ---- Bookkeeping ----


@dataclass
class _Sums:
    """Running sums of _STATISTICS over tokens, on the host."""

    tokens: float = 0.0
    values: tuple[float, ...] = (0.0,) * len(_STATISTICS)

    def add(self, tokens: float, values: list[float]) -> None:
        self.tokens += tokens
        self.values = tuple(old + new for old, new in zip(self.values, values, strict=True))

    def means(self) -> dict[str, float]:
        if self.tokens == 0:
            return {}
        return {name: value / self.tokens for name, value in zip(_STATISTICS, self.values, strict=True)}


def _shared_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in model.named_parameters():
        if any(mark in name for mark in SHARED_PARAMETER_MARKS):
            yield name, parameter


def _check_range(name: str, value: float, low: float, high: float, remedy: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{name}={value!r} must be a number in [{low:g}, {high:g}]: {remedy}.")
