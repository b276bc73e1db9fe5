"""What is refused before anything is changed: configurations that do not fit a model, files that do not fit either."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Collection, Mapping, Sequence

import torch
from accelerate import init_empty_weights
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..choices import check_width
from ..config import AsymGQAConfig
from ..families import Family
from ..groups import HeadGroups, default_max_group_size, split_evenly
from ..heads import HeadShape, SharedShape
from .offload import is_offloaded, weights_without_a_place
from .plan import is_quantised, plan_export
from .rope import refusal_of_rope
from .site import AttentionSite

_SIZES = ("in_features", "out_features", "num_embeddings", "embedding_dim")
"""What modules say of the shapes of their weights, packed ones included."""


def initial_groups(config: AsymGQAConfig, shape: HeadShape, num_layers: int) -> HeadGroups:
    """The groups to wrap with: those given, random ones, or neighbours until a search finds better ones.

    Raises:
        ValueError: where counts, groups or cap do not fit the model.
    """
    num_groups, base_heads = config.num_key_value_heads, shape.base_kv_heads
    if num_groups > base_heads:
        raise ValueError(f"num_key_value_heads={num_groups} exceeds the base's {base_heads} KV heads: choose fewer.")
    if config.grouping == "symmetric" and base_heads % num_groups:
        raise ValueError(
            f"num_key_value_heads={num_groups} does not divide the base's {base_heads} KV heads, and "
            "grouping='symmetric' wants groups of one size: choose a divisor, or grouping='asymmetric'."
        )
    cap = largest_group(config, shape)
    if config.max_group_size is not None and cap > base_heads:
        raise ValueError(f"max_group_size={cap} exceeds the base's {base_heads} KV heads: choose fewer, or None.")
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


def check_exportable(model: PreTrainedModel, config: AsymGQAConfig, groups: HeadGroups, heads: SharedShape) -> None:
    """Raise ValueError where no stock class holds the groups to wrap with, or those that a search may find.

    An adapter that comes from a file is only warned of: it answers as it did before.
    """
    try:
        if config.head_groups is None and config.grouping == "asymmetric":
            check_search_exportable(model, config, groups, heads)
        else:
            _plan_quietly(model, config, groups, heads, duplicate_kv_heads=True)
    except ValueError as error:
        if config.initialized is None:
            raise
        warnings.warn(f"merge_and_unload will refuse this adapter, or may after a search: {error}", stacklevel=2)


def check_search_exportable(
    model: PreTrainedModel, config: AsymGQAConfig, groups: HeadGroups, heads: SharedShape
) -> None:
    """Raise ValueError if a search may find groups that no stock class holds; the given ones say how many."""
    base_heads, num_groups = groups.base_kv_heads, groups.num_key_value_heads
    least, most = -(-base_heads // num_groups), min(largest_group(config, heads.base), base_heads - num_groups + 1)
    for size in range(least, most + 1):
        rest = split_evenly(range(size, base_heads), num_groups - 1)
        found = HeadGroups(((tuple(range(size)), *rest),) * len(groups.layers), base_heads)
        try:
            _plan_quietly(model, config, found, heads)
        except ValueError as error:
            remedy = f" Or max_group_size={size - 1}." if size > least else ""
            raise ValueError(
                f"grouping='asymmetric' may find groups of {size} KV heads, which could not be merged. {error}{remedy}"
            ) from error


def _plan_quietly(*args, **layout: bool) -> None:
    """`plan_export` without its warnings: what a plain checkpoint will be like is told where one is made."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan_export(*args, **layout)


def check_foldable(model: PreTrainedModel, sites: Sequence[AttentionSite], adapter_name: str) -> None:
    """Raise ValueError for an adapter that the base's weights cannot hold in their own shape."""
    reason = None
    for site in sites:
        layout = site.layout(adapter_name)
        if layout.shape.head_dim != site.shape.head_dim:
            reason = f"its heads have {layout.shape.head_dim} dimensions, the base's {site.shape.head_dim}"
        elif site.family.norm_span == "layer" and len(set(map(len, layout.partition))) > 1:
            reason = "a norm spans all keys, in which a head that is stored more often than others would count more"
    if is_offloaded(model):
        reason = "they are offloaded"
    if is_quantised(model):
        reason = f"they are quantised ({type(model.hf_quantizer).__name__})"
    if reason:
        raise ValueError(
            f"merge_adapter cannot write the adapter {adapter_name!r} into the base's weights: {reason}. Use "
            "merge_and_unload on an unquantised base, which makes a plain model of another shape."
        )


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


def check_unadapted(model: nn.Module) -> None:
    """Raise ValueError for a model that carries adapters, of whatever kind."""
    for module in model.modules():
        if isinstance(module, PeftModel | BaseTuner | BaseTunerLayer | AuxiliaryTrainingWrapper):
            raise ValueError(
                f"The model carries an adapter already ({type(module).__name__}), which would be lost: merge first, "
                "model = model.merge_and_unload(), or drop it with unload(). A second AsymGQA adapter goes beside the "
                "first with add_adapter or load_adapter of its PeftModel."
            )


def check_modules(model: PreTrainedModel, sites: Sequence[AttentionSite]) -> None:
    """Raise one ValueError for all modules that are not what the model's configuration makes them.

    The plain model is made of the configuration, and a fresh instance of the base's class, without weights, says what
    that gives.
    """
    config, shape = copy.deepcopy(model.config), sites[0].shape
    config._attn_implementation = "eager"
    try:
        with init_empty_weights(include_buffers=False):
            fresh = type(model)(config)
    except Exception as error:  # each version of transformers wraps a refusal in another class
        raise _contradiction([f"{type(model).__name__} refuses it: {error}"]) from error
    problems = []
    if len(sites) != config.num_hidden_layers:
        problems.append(f"{len(sites)} different layers with attention, num_hidden_layers={config.num_hidden_layers}")
    if sites[0].family.rotary and (shape.rotary_dim % 2 or not 0 < shape.rotary_dim <= shape.head_dim):
        problems.append(f"{shape.rotary_dim} of {shape.head_dim} dimensions of a head are rotary, which come in pairs")
    attention = {site.name for site in sites}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, wanted in fresh.named_modules():
        found = modules.get(name)
        if found is None:
            problems.append(f"{name} is missing")
            continue
        for attribute, value in vars(wanted).items():
            # What an attention keeps beside weights stays behind when it is made anew, as its number of heads.
            says = attribute in _SIZES or (name in attention and isinstance(value, int | float))
            if says and attribute != "training" and getattr(found, attribute, value) != value:
                problems.append(f"{name}.{attribute} is {getattr(found, attribute)}, not {value}")
    if getattr(model, "hf_quantizer", None) is None and not is_sharded(model):
        problems += _differences(dict(model.named_parameters()), dict(fresh.named_parameters()))
    problems += _differences(dict(model.named_buffers()), dict(fresh.named_buffers()))
    if problems:
        raise _contradiction(problems)


def _differences(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """Tensors of another shape; and of other values, where those follow from the configuration."""
    problems = []
    for name, tensor in wanted.items():
        parent, _, attribute = name.rpartition(".")
        # Dynamic RoPE changes its frequencies with the length of the input, and keeps those it began with beside them.
        if name not in found or f"{parent}.original_{attribute}" in wanted:
            continue
        own = found[name]
        if own.shape != tensor.shape:
            problems.append(f"{name} has the shape {tuple(own.shape)}, not {tuple(tensor.shape)}")
        elif not own.is_meta and not tensor.is_meta and not own.cpu().double().allclose(tensor.double(), rtol=1e-2):
            problems.append(f"{name} has other values")
    return problems


def _contradiction(problems: list[str]) -> ValueError:
    listed = "\n  ".join(problems[:10])
    more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
    return ValueError(
        f"The model's modules contradict its configuration:\n  {listed}{more}\nMake the configuration say what the "
        "modules are, all layers alike, save that model and load it again."
    )


_OFFLOAD_FORBIDS = {
    "use_dora": "reads the base's weights beside its forward",
    "modules_to_save": "copies weights of the base",
    "trainable_token_indices": "copies weights of the base",
}
"""Fields of a configuration that need the base's weights where accelerate does not load them, and why."""


def check_on_devices(model: nn.Module, config: AsymGQAConfig) -> None:
    """Raise ValueError for a model whose weights cannot be read, or offloaded ones that an adapter would need."""
    lost = weights_without_a_place(model)
    if lost and getattr(model, "hf_device_map", None):
        raise ValueError(
            f"{len(lost)} weights, the first of them {lost[0]}, are on the meta device, and no hook of accelerate "
            "knows where to load them from: PeftModel.from_pretrained takes those of weights on disk away. Load the "
            "base again, and the adapter by model = get_peft_model(base, PeftConfig.from_pretrained(adapter)) and "
            "set_peft_model_state_dict(model, load_peft_weights(adapter))."
        )
    needs = [f"{field} {why}" for field, why in _OFFLOAD_FORBIDS.items() if getattr(config, field)]
    if needs and is_offloaded(model):
        raise ValueError(
            f"The base is offloaded, its weights are there only while they are used: {'; '.join(needs)}. Leave that "
            "unset, or load the base where all of it fits, e.g. device_map='auto' over more GPUs."
        )


def check_not_sharded(model: nn.Module) -> None:
    """Raise ValueError for a model whose heads are split over ranks."""
    if (getattr(model, "_tp_size", None) or 1) > 1:
        raise ValueError(
            "The model is tensor-parallel (tp_plan): its heads are split over ranks, and groups would cross them. "
            "Load it without tp_plan; use FSDP or a device_map."
        )


def tensor_problems(
    given: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    may_lack_groups: Collection[str],
    embeddings: Collection[str],
    tokens: int | None,
) -> list[str]:
    """What is wrong with an adapter's state dict: tensors missing, unknown, mis-shaped, of other dtypes, not finite.

    A whole model's state dict, as accelerate saves it, has all of the base's tensors too; an adapter's none but what
    PEFT saves with it where the vocabulary was resized: the base's embeddings with rows for the added tokens.

    Args:
        given: what is to be loaded, by name.
        own: what the model holds, all of its adapters and the base.
        may_lack_groups: adapters whose configuration says the groups, as files of version 0.1 do alone.
        embeddings: names of the base's tensors that an adapter's file may hold.
        tokens: how many of their rows are the base's own, the others having been added; None if nobody knows.
    """
    if not given:
        return ["it holds no tensor of this model"]
    adapters = {_adapter_of(key) for key in given if key in own} - {None}
    problems, replaced = [], []
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
    # Tied tensors are one and need to be given once.
    held = {id(own[key]) for key in given if key in own}
    is_whole = all(id(tensor) in held for key, tensor in own.items() if _is_of_base(key))
    for key, tensor in given.items():
        if key not in own:
            if not _is_second_copy(key, given):
                problems.append(f"unknown: {key}")
        elif ".lora_groups." in key:
            continue  # `HeadLayout.checked` knows more about them
        elif tensor.shape != own[key].shape:
            remedy = f" (resize_token_embeddings({len(tensor)}) of the base first)" if key in embeddings else ""
            problems.append(f"shape {tuple(tensor.shape)} instead of {tuple(own[key].shape)}: {key}{remedy}")
        elif tensor.is_floating_point() != own[key].is_floating_point():
            problems.append(f"dtype {tensor.dtype} instead of {own[key].dtype}: {key}")
        elif _is_of_base(key):
            if not is_whole and key not in embeddings:
                problems.append(f"a tensor of the base, which no adapter may change: {key}")
            elif not is_whole and (row := _first_changed_row(tensor, own[key])) is not None:
                if tokens is None:
                    replaced.append(key)
                elif row < tokens:
                    problems.append(
                        f"other embeddings of the base's own tokens, which no adapter may change: {key} (load it onto "
                        "a base that has them; train embeddings as modules_to_save or trainable_token_indices)"
                    )
        elif tensor.is_floating_point() and not _is_finite(tensor, own[key].dtype):
            problems.append(f"NaN or inf: {key}")
    if replaced and not problems:
        warnings.warn(
            f"The adapter file replaces the base's {', '.join(replaced)}, also while it is off.", stacklevel=4
        )
    return problems


def _is_second_copy(key: str, given: Mapping[str, Tensor]) -> bool:
    """Whether it holds a module that is trained whole once more, without the adapter's name.

    PEFT saves the head and the embeddings of a resized vocabulary so, and passes over it when it loads them.
    """
    module, mark, name = key.rpartition(".modules_to_save.")
    for other, tensor in given.items():
        named = mark and other != key and other.startswith(module + mark) and other.endswith(f".{name}")
        if named and torch.equal(tensor, given[key]):
            return True
    return False


def _first_changed_row(given: Tensor, own: Tensor) -> int | None:
    """The first row of an embedding that differs, in the narrower dtype of both."""
    given, own = given.to(own.device), own.detach()
    dtype = min(given.dtype, own.dtype, key=lambda each: each.itemsize)
    changed = (given.to(dtype) != own.to(dtype)).reshape(len(own), -1).any(1).nonzero()
    return int(changed[0]) if len(changed) else None


def own_tokens(config: PretrainedConfig) -> int | None:
    """The vocabulary of the checkpoint that a model came from, whatever it was resized to.

    None if the checkpoint cannot be looked up here.
    """
    if not config.name_or_path:
        return None
    try:
        saved, _ = type(config).get_config_dict(config.name_or_path, local_files_only=True)
    except OSError:
        return None
    return saved.get("vocab_size")


def _adapter_of(key: str) -> str | None:
    match = re.search(r"\.lora_\w+\.([^.]+)", key)
    return match and match.group(1)


def _is_of_base(key: str) -> bool:
    return not re.search(r"\.(lora_|modules_to_save\.|trainable_tokens_)", key)


def _is_finite(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether all values are finite in the dtype that they are loaded into; of a DTensor, those of this rank."""
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local()
    return tensor.is_meta or bool(tensor.to(dtype).isfinite().all())


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP or ZeRO-3 hold parameters under other names and shapes than a file does."""
    for name, parameter in model.named_parameters():
        if "_fsdp_wrapped_module" in name or hasattr(parameter, "ds_id"):
            return True
    return False
