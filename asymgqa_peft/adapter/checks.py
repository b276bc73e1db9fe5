"""What is refused before anything is changed: configurations that do not fit a model, files that do not fit either."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Collection, Mapping

from torch import Tensor, nn

from ..choices import check_width
from ..config import AsymGQAConfig
from ..families import Family
from ..groups import HeadGroups, default_max_group_size
from ..heads import HeadShape, SharedShape
from .rope import refusal_of_rope


def initial_groups(config: AsymGQAConfig, shape: HeadShape, num_layers: int) -> HeadGroups:
    """The groups to wrap with: those given, random ones, or neighbours until a search finds better ones.

    Raises:
        ValueError: where counts, groups or cap do not fit the model.
    """
    num_groups, base_heads = config.num_key_value_heads, shape.base_kv_heads
    if num_groups > base_heads:
        raise ValueError(f"num_key_value_heads={num_groups} exceeds the base's {base_heads} KV heads: choose fewer.")
    cap = largest_group(config, shape)
    if cap * num_groups < base_heads:
        raise ValueError(
            f"max_group_size={cap} is too small: {num_groups} groups cannot hold {base_heads} KV heads, "
            f"use at least {-(-base_heads // num_groups)}."
        )
    if config.head_groups is not None:
        return HeadGroups.from_lists(config.head_groups, num_layers, base_heads, num_groups)
    if config.grouping == "random":
        return HeadGroups.random(num_layers, base_heads, num_groups, config.seed)
    return HeadGroups.neighbour(num_layers, base_heads, num_groups)


def largest_group(config: AsymGQAConfig, shape: HeadShape) -> int:
    """How many base KV heads a group may hold."""
    if config.max_group_size is not None:
        return config.max_group_size
    if config.grouping == "symmetric":
        return -(-shape.base_kv_heads // config.num_key_value_heads)
    return default_max_group_size(shape.num_attention_heads, shape.base_kv_heads, config.num_key_value_heads)


def shared_shape(
    config: AsymGQAConfig, groups: HeadGroups, shape: HeadShape, family: Family, model: nn.Module
) -> SharedShape:
    """The shape of the shared heads that a configuration asks for, in the groups to wrap with.

    Raises:
        ValueError: for a width that the base, its class or the merge cannot have.
    """
    width, base_dim = config.head_dim, shape.head_dim
    if width in (None, base_dim):
        return SharedShape.of_width(shape)
    if width < base_dim:
        raise ValueError(
            f"head_dim={width} is less than the base's {base_dim}: narrower heads keep less than fewer ones of the "
            f"same bytes. Leave head_dim unset and lower num_key_value_heads."
        )
    if width * shape.rotary_dim % (2 * base_dim):
        raise ValueError(
            f"head_dim={width} makes {width * shape.rotary_dim / base_dim:g} rotary dimensions, which RoPE takes in "
            f"pairs: choose a multiple of {2 * base_dim // math.gcd(shape.rotary_dim, 2 * base_dim)}."
        )
    largest = groups.max_group_size * base_dim
    if config.grouping in ("symmetric", "asymmetric"):
        # A search may find larger groups than those to wrap with.
        largest = max(largest, largest_group(config, shape) * base_dim)
    if width > largest:
        raise ValueError(
            f"head_dim={width} exceeds the {largest} dimensions of the largest group, and would keep nothing more: "
            f"use {largest} or less, or fewer num_key_value_heads."
        )
    check_width(config.merge, width, base_dim)
    if reason := _refusal_of_width(shape, family, model, config.num_key_value_heads):
        raise ValueError(
            f"head_dim={width} cannot be had for this {model.config.model_type} model: {reason}. Leave head_dim unset."
        )
    if config.num_key_value_heads * width >= shape.base_kv_heads * base_dim:
        warnings.warn(
            f"num_key_value_heads={config.num_key_value_heads} of head_dim={width} take as much cache as the base's "
            f"{shape.base_kv_heads} of {base_dim}: nothing is saved.",
            stacklevel=2,
        )
    return SharedShape.of_width(shape, width)


def _refusal_of_width(shape: HeadShape, family: Family, model: nn.Module, kv_heads: int) -> str | None:
    if not shape.free_keys or not shape.free_values:
        return "a clamp between projection and attention fixes the width of its heads"
    if family.wide_as is not None:
        if reason := family.wide_as.refusal(type(model), model.config, kv_heads):
            return reason
    elif not family.grouped or not family.explicit_head_dim:
        return "its configuration knows no width of heads, so that no plain checkpoint could hold them"
    if family.rotary:
        return refusal_of_rope(model.config)
    return None


def check_modules_to_save(config: AsymGQAConfig, shared_names: Collection[str]) -> None:
    """Raise ValueError if modules_to_save names a shared projection or something that holds one."""
    for name in shared_names:
        parts = name.split(".")
        enclosing = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        for saved in config.modules_to_save or ():
            if any(module.endswith(saved) for module in enclosing):  # PEFT's rule
                raise ValueError(
                    f"modules_to_save names {saved!r}, which is or holds {name!r}: K and V are shared and trained "
                    "whole, leave it out."
                )


def check_not_sharded(model: nn.Module) -> None:
    """Raise ValueError for a model whose heads are split over ranks."""
    if (getattr(model, "_tp_size", None) or 1) > 1:
        raise ValueError(
            "The model is tensor-parallel (tp_plan): its heads are split over ranks, and groups would cross them. "
            "Load it without tp_plan; use FSDP or a device_map."
        )


def check_adapter_tensors(
    given: Mapping[str, Tensor], own: Mapping[str, Tensor], may_lack_groups: Collection[str]
) -> None:
    """Raise one ValueError for all tensors that are missing, unknown or mis-shaped in an adapter's state dict.

    Args:
        given: what is to be loaded, by name.
        own: what the model holds, all of its adapters and the base.
        may_lack_groups: adapters whose configuration says the groups, as files of version 0.1 do alone.
    """
    if any(".base_layer." in key for key in given):
        return  # a whole model's state dict, e.g. from accelerate
    adapters = {_adapter_of(key) for key in given if key in own} - {None}
    problems = []
    for key in own:
        if _adapter_of(key) not in adapters or key in given:
            continue
        if ".lora_groups." not in key:
            problems.append(f"missing: {key}")
        elif _adapter_of(key) not in may_lack_groups:
            problems.append(
                f"missing: {key}, the groups of its heads (files of asymgqa_peft 0.1 hold them in adapter_config.json "
                "alone: load it with PeftModel.from_pretrained, or under a new adapter name)"
            )
    for key, tensor in given.items():
        if key not in own:
            problems.append(f"unknown: {key}")
        elif tensor.shape != own[key].shape:
            problems.append(f"shape {tuple(tensor.shape)} instead of {tuple(own[key].shape)}: {key}")
    if not given:
        problems = ["it holds no tensor of this model"]
    if problems:
        lines = "\n  ".join(sorted(problems))
        raise ValueError(f"The adapter file does not fit this model and its adapter_config.json:\n  {lines}")


def _adapter_of(key: str) -> str | None:
    match = re.search(r"\.lora_\w+\.([^.]+)", key)
    return match and match.group(1)


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP or ZeRO-3 hold parameters under other names and shapes than a file does."""
    for name, parameter in model.named_parameters():
        if "_fsdp_wrapped_module" in name or hasattr(parameter, "ds_id"):
            return True
    return False
