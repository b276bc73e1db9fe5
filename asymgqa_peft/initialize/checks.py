"""What must hold before an initialisation starts, and what is put back if it stops."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..adapter.checks import check_search_exportable
from ..adapter.model import AsymGQAModel
from ..adapter.offload import is_offloaded, weights_without_a_place
from ..adapter.site import base_layer
from ..estimates import Sizes, free_memory, initialization_need
from ..heads import AttentionWeights
from ..method.statistics import sum_over_ranks


def checked_model(model: PeftModel, adapter_name: str | None) -> tuple[AsymGQAModel, str]:
    """The tuner and the adapter's name, if the adapter can be initialised; ValueError otherwise."""
    tuner = getattr(model, "base_model", None)
    if not isinstance(model, PeftModel) or not isinstance(tuner, AsymGQAModel):
        raise ValueError(
            f"model is a {type(model).__name__}: pass what get_peft_model(base, AsymGQAConfig(...)) gave."
        )
    adapter_name = model.active_adapter if adapter_name is None else adapter_name
    if adapter_name not in tuner.peft_config:
        raise ValueError(f"adapter_name={adapter_name!r} is unknown, the model holds {list(tuner.peft_config)}.")
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if any(layer.merged for layer in layers):
        raise ValueError(
            "the adapter is merged: call unmerge_adapter() first, initialising needs the original weights."
        )
    if any(layer.disable_adapters for layer in layers):
        raise ValueError("the adapter is disabled: leave disable_adapter() first.")
    if weights_without_a_place(model):
        raise ValueError("some weights are on the meta device and were never loaded: place them on real devices.")
    config = tuner.peft_config[adapter_name]
    if config.grouping == "asymmetric":
        groups, heads = tuner.head_groups(adapter_name), tuner.sites[0].layout(adapter_name).shape
        check_search_exportable(tuner.model, config, groups, heads)
    return tuner, adapter_name


def check_memory(
    model: PeftModel, tuner: AsymGQAModel, adapter_name: str, batches: list[dict[str, Tensor]], starts: list[Tensor]
) -> None:
    """Raise ValueError, on all ranks alike, if the initialisation certainly does not fit; warn where it may not.

    Of what is read, `batches` are the caller's and `starts` are added to them.
    """
    if is_offloaded(tuner.model):
        # Its weights come and go, which is not estimated.
        return
    device = base_layer(tuner.sites[0].output).weight.device
    sizes = [batch["input_ids"].numel() for batch in batches]
    need = initialization_need(
        Sizes.of(tuner.model, tuner.sites[0].layout(adapter_name).shape.head_dim),
        trained=sum(tensor.numel() for _, tensor in _adapter_tensors(model, adapter_name)),
        tokens=sum(sizes) + sum(map(len, starts)),
        batch=max(sizes, default=0),
        refits=tuner.peft_config[adapter_name].refit_output,
        gpu_free=free_memory(device) if device.type == "cuda" else None,
    )
    remedies = f"pass fewer than {sum(sizes):,} tokens, in batches of less than {max(sizes, default=0):,}"
    if device.type == "cuda":
        remedies += ", or load the base in 4 bits"
    reason = need.lack("The initialisation", device, remedies)
    lacking = torch.tensor([float(reason is not None)], dtype=torch.float64)
    sum_over_ranks([lacking])
    if lacking.item():
        raise ValueError(reason or "The initialisation does not fit on another rank, whose error says what it needs.")


def check_finite(weights: AttentionWeights) -> None:
    """Raise ValueError for NaN or inf in the base's projections of a layer."""
    for name, tensor in vars(weights).items():
        if tensor is not None and not torch.isfinite(tensor).all():
            raise ValueError(f"NaN or inf in the base's {name} projection: check the checkpoint.")


@contextmanager
def all_or_nothing(model: PeftModel, tuner: AsymGQAModel, adapter_name: str) -> Iterator[None]:
    """On any error or interrupt, put the adapter's tensors and groups back; put back what was active in any case."""
    config, layouts = tuner.peft_config[adapter_name], [site.layout(adapter_name) for site in tuner.sites]
    groups = [(layout.partition, layout.shape.frequencies) for layout in layouts]
    head_groups, initialized = config.head_groups, config.initialized
    before = {name: tensor.detach().to("cpu", copy=True) for name, tensor in _adapter_tensors(model, adapter_name)}
    with ExitStack() as restored:
        for parameter in model.parameters():
            restored.callback(parameter.requires_grad_, parameter.requires_grad)
        restored.callback(model.set_adapter, model.active_adapter)
        restored.callback(tuner.enable_adapter_layers)
        try:
            yield
        except BaseException:
            for layout, (partition, frequencies) in zip(layouts, groups, strict=True):
                layout.set_partition(partition, frequencies)
            config.head_groups, config.initialized = head_groups, initialized
            for name, tensor in _adapter_tensors(model, adapter_name):
                tensor.copy_(before[name])
            raise


def _adapter_tensors(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, Tensor]]:
    return ((name, p.data) for name, p in model.named_parameters() if adapter_name in name.split("."))
