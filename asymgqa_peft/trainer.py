"""AsymGQATrainer: TRL's SFTTrainer plus self-distillation from the untouched base model.

Axes: B batch, T positions, N positions that count in the loss, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import TorchDynamoPlugin
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments
from trl import SFTTrainer

from .adapter.layer import SHARED_CONTAINERS, SharedLayer
from .adapter.offload import is_offloaded
from .distillation import CHUNK_BYTES, STATISTICS, LossSums, OutputLayer, distillation_loss

COMPILED_KINDS = 64
"""Graphs of one decoder layer that may be compiled."""


class AsymGQATrainer(SFTTrainer):
    r"""SFTTrainer whose teacher is the same model with the adapter disabled.

    With weight w and temperature τ, per position that SFT would train on (label not -100 after the shift):

        loss = (1 - w) * CE(label, student) + w * τ² * KL(softmax(teacher / τ) || softmax(student / τ))

    summed, and divided as SFTTrainer divides: by `num_items_in_batch`, so that gradient accumulation gives the
    trajectory of one large batch. The teacher sees the same inputs (padding, packing, position ids) in evaluation
    mode and costs a forward pass. Logits exist one chunk of positions at a time: they are computed from the hidden
    states and the output layer (lm_head).

    With `torch_compile=True` decoder layers are compiled one by one for the time of `train`: the model as a whole has
    hooks that break it up, and layers of one kind share what is compiled.

    Logged beside SFTTrainer's metrics, as means over tokens since the last log: `distillation_loss` (the second term
    without w) and `sft_loss` (the cross-entropy).

    Args:
        distillation_weight: w in [0, 1]. 0 is SFTTrainer, to the last bit. At 1 labels only say which positions count.
        temperature: τ > 0.
        kv_learning_rate_scale: learning rate of shared K/V heads (and their gains, mixes and norms), relative to
            that of the other parameters. They stay float32 whatever the base's dtype. Not applied to an optimizer
            that is passed in, or defined in a DeepSpeed config.

    Raises:
        ValueError: for a bad argument, several GPUs visible to one process, an SFTConfig option that distillation
            does not define, a model without shared heads, with nothing to train or with an offloaded base. On the
            first batch, for a model whose output layer is not linear or does not reproduce the model's logits.
    """

    _tag_names = [*SFTTrainer._tag_names, "asymgqa"]
    chunk_bytes = CHUNK_BYTES

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: TrainingArguments | None = None,
        *more,
        distillation_weight: float = 1.0,
        temperature: float = 1.0,
        kv_learning_rate_scale: float = 0.5,
        **kwargs,
    ) -> None:
        _check_range("distillation_weight", distillation_weight, 0.0, 1.0, "0 is plain SFT, 1 pure distillation")
        _check_range("temperature", temperature, 1e-3, 1e3, "1 leaves the distributions as they are")
        _check_range("kv_learning_rate_scale", kv_learning_rate_scale, 0.0, 1e3, "1 treats K/V like LoRA")
        if args is not None:
            _check_gpus(model, args)
        self.distillation_weight = float(distillation_weight)
        self.temperature = float(temperature)
        self.kv_learning_rate_scale = float(kv_learning_rate_scale)
        self._output_layer_is_checked = False
        # Tokens and STATISTICS since the last log, in float64 on the host.
        empty = torch.zeros(1 + len(STATISTICS), dtype=torch.float64)
        self._running_sums = {"train": empty, "eval": empty.clone()}
        # On a quantised base SFTTrainer rounds trainable parameters to bf16 by giving them new storage. These
        # references keep the exact values alive; nothing is copied.
        exact_values = {}
        if isinstance(model, nn.Module) and is_offloaded(model):
            raise ValueError(
                "model has an offloaded base (device_map places weights on cpu or disk), which a backward pass cannot "
                "load again: save the adapter, and train it on a base in 4 bits, on more GPUs, or under FSDP."
            )
        if isinstance(model, PeftModel):
            for name, parameter in _shared_head_parameters(model):
                exact_values[name] = parameter.data
        super().__init__(model, args, *more, **kwargs)
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ValueError(
                f"{type(self.model).__name__} has no parameter to train: load the adapter with is_trainable=True."
            )
        # bf16 would swallow most steps of a usual size. ZeRO-3 gathers into buffers of one dtype, so there they keep
        # the dtype of the others.
        if not self.is_deepspeed_enabled:
            for name, parameter in _shared_head_parameters(self.model):
                if parameter.requires_grad and parameter.dtype != torch.float32:
                    values = exact_values.get(name, parameter.data)
                    parameter.data = values.to(parameter.device, torch.float32)
        if self.distillation_weight > 0:
            self._check_distillable()

    def create_accelerator_and_postprocess(self) -> None:
        """The Trainer's, without its compilation of the whole model where `train` compiles the layers."""
        super().create_accelerator_and_postprocess()
        if self._compiles_layers:
            self.accelerator.state.dynamo_plugin = TorchDynamoPlugin(backend="no")

    @property
    def _compiles_layers(self) -> bool:
        return self.args.torch_compile and self.distillation_weight > 0

    def train(self, *args, **kwargs):
        """SFTTrainer's, with compiled layers under `torch_compile`."""
        if not self._compiles_layers:
            return super().train(*args, **kwargs)
        layers = self.accelerator.unwrap_model(self.model).base_model.decoder_layers
        with layers_compiled(layers, backend=self.args.torch_compile_backend, mode=self.args.torch_compile_mode):
            return super().train(*args, **kwargs)

    def evaluate(self, *args, **kwargs):
        """SFTTrainer's, with layers as they are: slots and lengths differ from those of training, batch by batch."""
        if not self._compiles_layers:
            return super().evaluate(*args, **kwargs)
        with torch.compiler.set_stance("force_eager"):
            return super().evaluate(*args, **kwargs)

    def _check_distillable(self) -> None:
        if not any(isinstance(module, SharedLayer) for module in self.model.modules()):
            raise ValueError(
                f"distillation_weight={self.distillation_weight} needs an AsymGQA adapter, whose base is the teacher, "
                f"got {type(self.model).__name__} without one: pass a PeftModel or peft_config of AsymGQAConfig, or "
                "distillation_weight=0."
            )
        parallelism = self.accelerator.parallelism_config
        splits_sequences = parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled)
        undefined = {
            "loss_type": self.args.loss_type != "nll",
            "label_smoothing_factor": self.args.label_smoothing_factor > 0,
            "compute_loss_func": self.compute_loss_func is not None,
            "router_aux_loss_coef": self.aux_loss_enabled,
            "parallelism_config (context or sequence parallelism)": splits_sequences,
        }
        for option, is_set in undefined.items():
            if is_set:
                raise ValueError(f"{option} is not defined for distillation: unset it, or use distillation_weight=0.")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """SFTTrainer's at weight 0; else the class docstring's, with `num_items_in_batch` as the divisor."""
        if self.distillation_weight == 0.0:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs["use_cache"] = False
        model_inputs = dict(inputs)
        model_inputs.pop("labels")
        total, sums = self._summed_loss(model, model_inputs, inputs["labels"][:, 1:])
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

    def _summed_loss(self, model: nn.Module, inputs: dict[str, Any], labels: Tensor) -> tuple[Tensor, LossSums]:
        """Summed loss (differentiable) and statistics. labels: (B, T - 1), the next token of positions 0 .. T - 2."""
        peft_model = self.accelerator.unwrap_model(model)
        student_module, teacher_module = _output_modules(peft_model)
        softcap = getattr(peft_model.config.get_text_config(), "final_logit_softcapping", None)
        teacher = self._teacher_hidden(peft_model, inputs, labels, teacher_module, softcap)

        def loss_of(hidden: Tensor) -> tuple[Tensor, LossSums]:
            student_layer = teacher_layer = describe_output_layer(student_module, softcap, hidden.dtype)
            if teacher_module is not student_module:
                teacher_layer = describe_output_layer(teacher_module, softcap, hidden.dtype)
            return distillation_loss(
                _next_token_rows(hidden, labels).to(teacher.device),
                teacher,
                labels[labels != -100].to(teacher.device),
                student_layer=student_layer,
                teacher_layer=teacher_layer,
                weight=self.distillation_weight,
                temperature=self.temperature,
                chunk_bytes=self.chunk_bytes,
            )

        (total, sums), last_logits = _forward_with_hidden(model, inputs, student_module, loss_of)
        # FSDP2 gathers weights for backward when the wrapper's own output gets a gradient, so let it have one.
        return total + 0.0 * last_logits.sum(), sums

    def _teacher_hidden(
        self, model: PeftModel, inputs: dict[str, Any], labels: Tensor, module: nn.Module, softcap: float | None
    ) -> Tensor:
        """The base model's hidden states where labels count, (N, E). The first batch also checks its output layer."""
        is_first = not self._output_layer_is_checked
        if is_first and not isinstance(module, nn.Linear):
            raise _unfit_output_layer(module, "it is not a linear layer")

        def rows_and_check(hidden: Tensor) -> tuple[Tensor, Tensor | None]:
            hidden = hidden.to(module.weight.device)  # a device_map may have left them on another one
            expected = None
            if is_first:
                layer = describe_output_layer(module, softcap, hidden.dtype)
                expected = layer.logits(hidden[:, -1]).to(layer.weight.dtype)
            return _next_token_rows(hidden, labels), expected

        with base_model_mode(model):
            (teacher, expected), last_logits = _forward_with_hidden(model, inputs, module, rows_and_check)
        if is_first:
            _check_logits(module, expected, last_logits[:, -1])
            self._output_layer_is_checked = True
        return teacher

    def _record(self, sums: LossSums, inputs: dict[str, Any]) -> None:
        seen = inputs["input_ids"].numel()
        if "attention_mask" in inputs:
            seen = inputs["attention_mask"].sum()
        counts = sums.statistics.new_tensor([float(seen), float(sums.tokens)])
        # One gather over ranks and one copy to the host for all numbers.
        numbers = self.accelerator.gather(torch.cat([counts, sums.statistics])[None]).sum(0).cpu().double()
        self._running_sums[self._mode] += numbers[1:]
        if self._mode == "train":
            self._total_train_tokens += int(numbers[0]) // self._tp_size
        self._metrics[self._mode]["num_tokens"] = [self._total_train_tokens]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means over tokens since the last log, then log as SFTTrainer does."""
        prefix = {"train": "", "eval": "eval_"}[self._mode]
        tokens, *totals = self._running_sums[self._mode].tolist()
        if tokens > 0:
            for name, total in zip(STATISTICS, totals, strict=True):
                logs[prefix + name] = total / tokens
        self._running_sums[self._mode].zero_()
        super().log(logs, start_time)

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, its groups split so that shared parameters have their own learning rate."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.kv_learning_rate_scale != 1.0:
            split_shared_groups(optimizer, self.model if model is None else model, self.kv_learning_rate_scale)
        return optimizer


def split_shared_groups(optimizer: torch.optim.Optimizer, model: nn.Module, scale: float) -> None:
    """Move shared parameters into groups of their own, equal but for `scale` times the learning rate.

    The new groups come last, so that the first one, whose rate the Trainer logs, is not a scaled one. Their order
    depends on the model alone: a saved optimizer state fits on resume.

    Raises:
        ValueError: if the optimizer does not hold the shared parameters in groups (layer-wise optimizers).
    """
    shared = {id(parameter) for _, parameter in _shared_head_parameters(model) if parameter.requires_grad}
    found = set()
    for group in list(optimizer.param_groups):
        moved, kept = [], []
        for parameter in group["params"]:
            if id(parameter) in shared:
                moved.append(parameter)
                found.add(id(parameter))
            else:
                kept.append(parameter)
        if moved:
            group["params"] = kept
            optimizer.add_param_group({**group, "params": moved, "lr": group["lr"] * scale})
    if found != shared:
        raise ValueError(
            f"{type(optimizer).__name__} does not keep the shared K/V parameters in parameter groups, so "
            "kv_learning_rate_scale cannot apply: set it to 1, or choose another `optim`."
        )


@contextmanager
def layers_compiled(layers: Iterable[nn.Module], **options) -> Iterator[None]:
    """Layers that `torch.compile` has compiled inside, and that run as they were on exit."""
    try:
        for layer in layers:
            layer.compile(**options)
        # All layers share one graph per kind of call: teacher or student, with a gradient or without, first a fixed
        # and then any number of documents a row. Past the limit a kind of call would silently run uncompiled.
        limit = max(COMPILED_KINDS, torch._dynamo.config.recompile_limit)
        # Under DDP torch would split each layer's graph, which earlier versions refuse where layers are recomputed.
        # Its purpose, sums over ranks while other gradients are computed, is met by compiling a layer at a time.
        with torch._dynamo.config.patch(recompile_limit=limit, optimize_ddp=False):
            yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None


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


def _forward_with_hidden(
    model: nn.Module, inputs: dict[str, Any], module: nn.Module, use: Callable[[Tensor], Any]
) -> tuple[Any, Tensor]:
    """Call the model; `use` gets the hidden states that enter its output layer `module`, (B, T, E).

    The output layer itself computes the last position only, so that logits of all positions never exist. `use` runs
    inside the forward pass, where autocast is on and FSDP or ZeRO-3 has gathered the output layer's weight. Returns
    `use`'s result, and the model's logits of the last position, (B, 1, V).
    """
    results = []

    def keep_last_position(_: nn.Module, args: tuple) -> tuple:
        handle.remove()  # `use` may call the layer itself, see describe_output_layer
        results.append(use(args[0]))
        return (args[0][:, -1:],)

    handle = module.register_forward_pre_hook(keep_last_position)
    try:
        logits = model(**inputs).logits
    finally:
        handle.remove()
    (result,) = results
    return result, logits


def _output_modules(model: PeftModel) -> tuple[nn.Module, nn.Module]:
    """The student's output layer and the teacher's. They differ where `modules_to_save` names it."""
    module = model.get_base_model().get_output_embeddings()
    if not isinstance(module, ModulesToSaveWrapper):
        return module, module
    student = module.original_module
    if module.active_adapters:
        student = module.modules_to_save[module.active_adapters[0]]
    return student, module.original_module


def describe_output_layer(module: nn.Linear, softcap: float | None, hidden_dtype: torch.dtype) -> OutputLayer:
    """A linear output layer in the dtype in which the model itself runs it on hidden states of `hidden_dtype`."""
    weight, bias = module.weight, module.bias
    if not weight.is_floating_point() or weight.shape != (module.out_features, module.in_features):
        # Packed, or a shard that is not gathered at the moment. What the layer makes of the identity is right for
        # every kind of quantisation and sharding.
        with torch.no_grad():
            columns = module(torch.eye(module.in_features, dtype=hidden_dtype, device=weight.device))
            if bias is not None:
                columns = columns - bias
        weight = columns.t()
    dtype, device = weight.dtype, weight.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    if bias is not None:
        bias = bias.to(dtype)
    return OutputLayer(weight.to(dtype), bias, softcap)


def _check_logits(module: nn.Linear, expected: Tensor, logits: Tensor) -> None:
    """Refuse a model that does more to its logits than `OutputLayer` knows of. Both (B, V)."""
    if expected.shape != logits.shape:
        found = f"it gives logits of shape {tuple(expected.shape)}, the model {tuple(logits.shape)}"
        raise _unfit_output_layer(module, found)
    tolerance = 3e-2  # of half precision; 8-bit layers round their input too
    if expected.dtype == torch.float32 and module.weight.is_floating_point():
        tolerance = 1e-3
    difference, largest = (expected - logits).abs().max(), logits.abs().max()
    if not difference <= tolerance * largest:  # also where one of them is not a number
        found = "its weight, bias and softcap do not reproduce the model's logits: they differ by up to "
        raise _unfit_output_layer(module, f"{found}{difference:.3g}, where the largest is {largest:.3g}")


def _unfit_output_layer(module: nn.Module, found: str) -> ValueError:
    kind = type(module)
    return ValueError(
        f"Distillation computes logits from the output layer, a {kind.__module__}.{kind.__qualname__}, but {found}. "
        "Use distillation_weight=0, or a model whose lm_head is a plain linear layer."
    )


def _next_token_rows(values: Tensor, labels: Tensor) -> Tensor:
    """(B, T, E), (B, T - 1) -> (N, E): the rows that predict a label other than -100."""
    return values[:, :-1][(labels != -100).to(values.device)]


def _shared_head_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in model.named_parameters():
        if not set(name.split(".")).isdisjoint(SHARED_CONTAINERS):
            yield name, parameter


def _check_gpus(model: str | nn.Module, args: TrainingArguments) -> None:
    """Raise ValueError where the Trainer would use nn.DataParallel; TRL does so too, but wraps the model before."""
    # A model that device_map has put elsewhere is trained where it is; one that is loaded by name may be one of these.
    places = set((getattr(model, "hf_device_map", None) or {}).values()) - {"cpu", "disk"}
    is_placed = len(places) > 1 or any(args.device != torch.device(place) for place in places)
    if args.n_gpu > 1 and not isinstance(model, str) and not is_placed:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process, which nn.DataParallel would share: start with `accelerate "
            "launch` or `torchrun`, or make one visible (CUDA_VISIBLE_DEVICES=0)."
        )


def _check_range(name: str, value: float, low: float, high: float, remedy: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{name}={value!r} must be a number in [{low:g}, {high:g}]: {remedy}.")
