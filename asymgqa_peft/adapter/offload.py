"""Bases that do not fit: accelerate keeps their weights in main memory or on disk until the module runs.

Its hook on each such module knows where the weights are, and where they are used. On the module they are empty.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from accelerate.hooks import AlignDevicesHook, remove_hook_from_module, remove_hook_from_submodules
from accelerate.utils import align_module_device, has_offloaded_params
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


def _offload_hook(module: nn.Module) -> AlignDevicesHook | None:
    """The hook that loads a module's own weights; None where they stay on a device."""
    hook = getattr(module, "_hf_hook", None)
    if isinstance(hook, AlignDevicesHook) and hook.weights_map is not None:
        return hook
    return None


@contextmanager
def in_place(modules: Iterable[nn.Module]) -> Iterator[bool]:
    """Offloaded weights of modules are where they are used, loaded once, until the end; yields whether there are any.

    What is written into them is lost then.
    """
    any_is = False
    with ExitStack() as restored:
        for module in modules:
            hook = _offload_hook(module)
            if hook is None or not any(parameter.is_meta for parameter in module.parameters(recurse=False)):
                continue
            any_is = True
            restored.callback(setattr, hook, "offload", hook.offload)
            hook.offload = True
            restored.enter_context(align_module_device(module))
            # Forwards inside find the weights in place: they neither load them again nor drop them.
            hook.offload = False
            restored.callback(setattr, hook, "offload", True)
        yield any_is


@contextmanager
def unnoticed(model: nn.Module) -> Iterator[None]:
    """PEFT takes an offloaded model for one that is not: it would keep in main memory whatever it loads."""
    with ExitStack() as restored:
        for module in model.modules():
            if has_offloaded_params(module):
                restored.callback(setattr, module._hf_hook, "offload", True)
                module._hf_hook.offload = False
        yield


def is_offloaded(model: nn.Module) -> bool:
    """Whether accelerate keeps weights of a model elsewhere until they are used."""
    return any(_offload_hook(module) is not None for module in model.modules())


def is_on_disk(model: nn.Module) -> bool:
    """Whether accelerate left weights of a model where they were on disk."""
    for module in model.modules():
        hook = _offload_hook(module)
        if hook is not None and torch.device("meta") in hook.original_devices.values():
            return True
    return False


def weights_without_a_place(model: nn.Module) -> list[str]:
    """Names of weights on the meta device that no hook knows from where to load."""
    names = []
    for name, module in model.named_modules():
        if _offload_hook(module) is None:
            names += [f"{name}.{own}" for own, each in module.named_parameters(recurse=False) if each.is_meta]
    return names


def device_of(model: nn.Module) -> torch.device:
    """Where a model's first weights are, or will be when it runs."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.is_meta and (hook := _offload_hook(module)) is not None:
                return torch.device(hook.execution_device)
            return parameter.device
    return torch.device("cpu")


def copy_without_hooks(module: nn.Module, memo: dict | None = None) -> nn.Module:
    """A deep copy of a module that is `in_place`, of which accelerate knows nothing."""
    memo = {} if memo is None else memo
    for part in module.modules():
        if hasattr(part, "_hf_hook"):
            # With the hook, all weights that it might load would be copied.
            memo[id(part._hf_hook)] = part._hf_hook
    copied = copy.deepcopy(module, memo)
    remove_hook_from_submodules(copied)
    for part in copied.modules():
        # What is left of a hook, the class's own forward: with it the module would hold itself, and its weights.
        if getattr(vars(part).get("forward"), "__func__", None) is type(part).forward:
            del part.forward
    return copied


def bring_adapter_home(model: nn.Module) -> None:
    """Put adapters back to where they are used after PEFT's from_pretrained has offloaded them with the base.

    An adapter is small, and fits queries and values with weights that no hook of a forward would load.
    """
    for layer in model.modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        for name, own in layer.named_modules():
            hook = _offload_hook(own)
            if name.partition(".")[0] in ("", "base_layer") or hook is None:
                continue
            device = hook.execution_device
            remove_hook_from_module(own)
            own.to(device)
