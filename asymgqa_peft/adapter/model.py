"""The tuner: LoRA's, with K and V replaced by shared heads. Registers the method with PEFT."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import replace

from peft import PeftType
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from peft.utils import register_peft_method
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..config import AsymGQAConfig
from ..families import find_family, head_shape
from ..groups import HeadGroups, default_max_group_size
from ..heads import HeadShape
from .export import export_plain_model
from .layer import SharedKey, SharedKeyNorm, SharedLayer, SharedProjection, SharedQKV, SharedValue
from .plan import ExportPlan, plan_export
from .site import AttentionSite, attention_sites


class AsymGQAModel(LoraModel):
    """Grouped attention with shared, trainable K/V heads, and LoRA on the other projections.

    Args:
        model: a supported transformers model (see `asymgqa_peft.families.FAMILIES`).
        config: an `AsymGQAConfig`.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: create the adapter's weights on the meta device, to be filled from a file.
    """

    tuner_layer_cls = (LoraLayer, SharedLayer)

    def _prepare_adapter_config(self, peft_config: AsymGQAConfig, model_config: dict) -> AsymGQAConfig:
        # PEFT calls this before it changes anything: every check of config against model belongs here.
        sites = attention_sites(self.model)
        _check_not_sharded(self.model)
        peft_config.head_groups = initial_groups(peft_config, sites[0].shape, len(sites)).to_lists()
        self._shared_layer_index = {name: site.layer for site in sites for name in site.shared_names}
        _check_modules_to_save(peft_config, self._shared_layer_index)
        self._resolve_targets(peft_config)
        return peft_config

    def _resolve_targets(self, peft_config: AsymGQAConfig) -> None:
        targets = peft_config.target_modules
        if isinstance(targets, str) and targets.lower() == "all-linear":
            resolved = replace(peft_config)
            _maybe_include_all_linear_layers(resolved, self.model)
            targets = set(resolved.target_modules) - self._shared_layer_index.keys()
            peft_config.target_modules = _short_names(targets, self.model)
            return
        for name in self._shared_layer_index:
            if super()._check_target_module_exists(peft_config, name):
                raise ValueError(
                    f"target_modules={targets!r} matches {name!r}, but K and V are shared and trained whole: "
                    "leave them out."
                )

    def _check_target_module_exists(self, peft_config: AsymGQAConfig, key: str):
        # Shared projections are replaced whatever the LoRA filters (layers_to_transform, exclude_modules) say:
        # a model has one number of KV heads.
        return key in self._shared_layer_index or super()._check_target_module_exists(peft_config, key)

    def _create_and_replace(self, lora_config, adapter_name, target, target_name, parent, current_key, **kwargs):
        if current_key not in self._shared_layer_index:
            super()._create_and_replace(
                lora_config, adapter_name, target, target_name, parent, current_key=current_key, **kwargs
            )
            return
        # The groups were validated in _prepare_adapter_config; looking for all sites here would cost layers squared.
        groups = lora_config.head_groups[self._shared_layer_index[current_key]]
        layer = target if isinstance(target, SharedLayer) else _shared_layer(self.model, target_name, target)
        layer.update_layer(adapter_name, tuple(map(tuple, groups)))
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)
        if adapter_name not in self.active_adapters:
            layer.set_requires_grad(adapter_name, False)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        """Inject an adapter as LoRA does, then (re-)install the hooks that fit queries to shared heads."""
        # The groups are written into the config. In a copy: the caller may wrap another model with the same one.
        self.peft_config[adapter_name] = copy.copy(self.peft_config[adapter_name])
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        # Again for every adapter: a later one may have wrapped q_proj or o_proj, and the hooks belong outside.
        _remove_hooks(self.model)
        for site in attention_sites(self.model):
            _install_hooks(site)

    def head_groups(self, adapter_name: str) -> HeadGroups:
        """The groups of an adapter, validated against the model."""
        config, sites = self.peft_config[adapter_name], attention_sites(self.model)
        return HeadGroups.from_lists(
            config.head_groups, len(sites), sites[0].shape.base_kv_heads, config.num_key_value_heads
        )

    def set_head_groups(self, adapter_name: str, groups: HeadGroups) -> None:
        """Regroup an adapter's heads; its shared K/V keep their values and have to be merged anew by the caller."""
        for site in attention_sites(self.model):
            site.set_partition(adapter_name, groups.layers[site.layer])
        self.peft_config[adapter_name].head_groups = groups.to_lists()

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
        if autocast_adapter_dtype:
            return
        for module in self.model.modules():
            if isinstance(module, SharedLayer) and adapter_name in module.adapters():
                module.cast_to_base(adapter_name)

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *args) -> None:
        # Every way of loading a PeftModel passes here before a tensor is written. PEFT's own only warns about missing
        # tensors and says nothing about unknown ones.
        if not _is_sharded(self):
            own = {prefix + name: p.shape for name, p in self.named_parameters(remove_duplicate=False)}
            _check_adapter_tensors({k: v.shape for k, v in state_dict.items() if k.startswith(prefix)}, own)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate one adapter.

        Raises:
            ValueError: for several, which attention with one set of K/V heads cannot combine.
        """
        if not isinstance(adapter_name, str) and len(adapter_name) > 1:
            raise ValueError(f"adapter_name={adapter_name!r}: attention has one set of K/V heads, activate one.")
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; if it was the active one, one of the others becomes active in every layer."""
        was_active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)
        if was_active and self.peft_config:
            # PEFT lets every layer choose, and a LoRA layer knows only the adapters that target it.
            self.set_adapter(min(self.peft_config))

    def add_weighted_adapter(self, *args, **kwargs) -> None:
        """Refused: K/V heads of different adapters live in different bases and have no meaningful sum."""
        raise ValueError(
            "add_weighted_adapter cannot combine AsymGQA adapters: their shared K/V heads live in different bases. "
            "Train one adapter on both datasets instead."
        )

    def _enable_peft_forward_hooks(self, *args, **kwargs):
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "adapter_names= cannot mix adapters in one batch: each has its own number of K/V heads. "
                "Call set_adapter and run one batch per adapter."
            )
        return super()._enable_peft_forward_hooks(*args, **kwargs)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        *,
        duplicate_kv_heads: bool = False,
        cached_tokens: int | None = None,
    ) -> PreTrainedModel:
        """Merge one adapter and return a plain model: a stock class with a stock configuration.

        Args:
            progressbar, safe_merge, adapter_names: as for LoRA.
            duplicate_kv_heads: store the K/V head of a large group more than once where that takes fewer bytes of
                parameters and cache together than padding all groups to its size. The plain model then has more
                KV heads than `num_key_value_heads`; `export_report` shows both choices.
            cached_tokens: tokens in the cache, over all sequences, for that comparison; default is one sequence of
                the configuration's `max_position_embeddings`.

        Raises:
            ValueError: for several adapters, a quantised base, or groups that no stock class holds; nothing has
                changed then.
        """
        return self._unload_and_optionally_merge(
            progressbar=progressbar,
            safe_merge=safe_merge,
            adapter_names=adapter_names,
            duplicate_kv_heads=duplicate_kv_heads,
            cached_tokens=cached_tokens,
        )

    def plan_export(
        self, adapter_name: str, *, duplicate_kv_heads: bool = False, cached_tokens: int | None = None
    ) -> ExportPlan:
        """What `merge_and_unload` would make of an adapter; arguments and errors are the same, nothing is changed."""
        config, groups = self.peft_config[adapter_name], self.head_groups(adapter_name)
        return plan_export(self.model, config, groups, duplicate_kv_heads, cached_tokens)

    def _unload_and_optionally_merge(
        self, merge=True, progressbar=False, safe_merge=False, adapter_names=None, **layout: bool | int | None
    ):
        unload = super()._unload_and_optionally_merge
        if not merge:
            _remove_hooks(self.model)
            model = unload(merge=False, progressbar=progressbar)
            for site in attention_sites(model):
                site.restore_head_counts()
            return model
        name = self._adapter_to_merge(adapter_names)
        if safe_merge:
            self._check_finite(name)
        plan = self.plan_export(name, **layout)  # may refuse: nothing has changed yet
        readers = [site.reader(name) for site in attention_sites(self.model)]
        _remove_hooks(self.model)
        model = unload(merge=True, progressbar=progressbar, safe_merge=safe_merge, adapter_names=[name])
        return export_plain_model(model, plan, readers)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge one adapter in place; `unmerge_adapter` takes it back.

        Raises:
            ValueError: for several adapters, or one with NaNs under `safe_merge`; nothing is merged then.
        """
        name = self._adapter_to_merge(adapter_names)
        if safe_merge:
            self._check_finite(name)
        super().merge_adapter([name], safe_merge=safe_merge)

    def _check_finite(self, adapter_name: str) -> None:
        # Of all tensors beforehand: PEFT looks layer by layer, and leaves a half-merged model where it stops.
        named = [(name, p) for name, p in self.model.named_parameters() if adapter_name in name.split(".")]
        if broken := [name for name, parameter in named if not parameter.isfinite().all()]:
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken: {broken}."
            )

    def _adapter_to_merge(self, adapter_names: list[str] | None) -> str:
        names = adapter_names or self.active_adapters
        if len(names) != 1:
            raise ValueError(f"adapter_names={names!r}: attention has one set of K/V heads, merge one adapter.")
        if names[0] not in self.peft_config:
            raise ValueError(f"adapter_names={names!r}: unknown, the model holds {list(self.peft_config)}.")
        layers = [module for module in self.model.modules() if isinstance(module, SharedLayer)]
        if others := {name for layer in layers for name in layer.merged_adapters} - {names[0]}:
            raise ValueError(f"adapter_names={names!r}: {sorted(others)} is merged already, call unmerge_adapter().")
        return names[0]


def initial_groups(config: AsymGQAConfig, shape: HeadShape, num_layers: int) -> HeadGroups:
    """The groups to wrap with: those given, random ones, or neighbours until a search finds better ones.

    Raises:
        ValueError: where counts, groups or cap do not fit the model.
    """
    num_groups, base_heads = config.num_key_value_heads, shape.base_kv_heads
    if num_groups > base_heads:
        raise ValueError(f"num_key_value_heads={num_groups} exceeds the base's {base_heads} KV heads: choose fewer.")
    cap = config.max_group_size or default_max_group_size(shape.num_attention_heads, base_heads, num_groups)
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


def _short_names(targets: set[str], model: nn.Module) -> set[str]:
    """Last components of the names where they mean the same modules: what a person would have written."""
    short = {name.rpartition(".")[2] for name in targets}
    others = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} - targets
    return targets if any(name.rpartition(".")[2] in short for name in others) else short


def _check_modules_to_save(config: AsymGQAConfig, shared_names: Mapping[str, int]) -> None:
    for name in shared_names:
        parts = name.split(".")
        enclosing = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        for saved in config.modules_to_save or ():
            if any(module.endswith(saved) for module in enclosing):  # PEFT's rule
                raise ValueError(
                    f"modules_to_save names {saved!r}, which is or holds {name!r}: K and V are shared and trained "
                    "whole, leave it out."
                )


def _is_sharded(model: nn.Module) -> bool:
    """Whether FSDP or ZeRO-3 hold parameters under other names and shapes than a file does."""
    return any("_fsdp_wrapped_module" in name or hasattr(p, "ds_id") for name, p in model.named_parameters())


def _check_adapter_tensors(given: Mapping[str, tuple], own: Mapping[str, tuple]) -> None:
    """Raise one ValueError for all tensors that are missing, unknown or mis-shaped in an adapter's state dict.

    Args:
        given: name -> shape of what is to be loaded.
        own: name -> shape of what the model holds, all of its adapters and the base.
    """
    if any(".base_layer." in key for key in given):
        return  # a whole model's state dict, e.g. from accelerate
    names = {_adapter_of(key) for key in given if key in own}
    problems = [f"missing: {key}" for key in own if _adapter_of(key) in names - {None} and key not in given]
    problems += [f"unknown: {key}" for key in given if key not in own]
    problems += [
        f"shape {tuple(given[key])} instead of {tuple(own[key])}: {key}"
        for key in given.keys() & own.keys()
        if given[key] != own[key]
    ]
    if not given:
        problems = ["it holds no tensor of this model"]
    if problems:
        listed = "\n  ".join(sorted(problems))
        raise ValueError(f"The adapter file does not fit this model and its adapter_config.json:\n  {listed}")


def _adapter_of(key: str) -> str | None:
    match = re.search(r"\.lora_\w+\.([^.]+)", key)
    return match and match.group(1)


def _check_not_sharded(model: nn.Module) -> None:
    if (getattr(model, "_tp_size", None) or 1) > 1:
        raise ValueError(
            "The model is tensor-parallel (tp_plan): its heads are split over ranks, and groups would cross them. "
            "Load it without tp_plan; use FSDP or a device_map."
        )


def _shared_layer(model: nn.Module, target_name: str, base_layer: nn.Module) -> SharedLayer:
    family = find_family(model.config)
    classes = {
        family.fused_qkv: SharedQKV,
        family.key: SharedKey,
        family.value: SharedValue,
        family.key_norm: SharedKeyNorm,
    }
    return classes[target_name](base_layer, head_shape(model.config), family)


def _install_hooks(site: AttentionSite) -> None:
    # Bound methods, so that a deep copy's hooks belong to the copy.
    for layer in site.shared_layers():
        site.attention.register_forward_pre_hook(layer.set_head_counts, with_kwargs=True)
    if not site.family.fused_qkv:
        site.query_source.register_forward_hook(site.key.scatter_queries)
    site.output.register_forward_pre_hook(site.value.gather_heads)


def _remove_hooks(model: nn.Module) -> None:
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), SharedProjection):
                    del hooks[key]


def register() -> None:
    """Make `PeftType.ASYM_GQA` known to PEFT; a second call does nothing.

    PEFT has no plug-in point: `register_peft_method` wants the name to be a member of its enum. The member is made
    as `enum` makes its own, and entered where `PeftType("ASYM_GQA")`, `PeftType.ASYM_GQA` and iteration look.
    """
    name = "ASYM_GQA"
    if name in PeftType.__members__:
        return
    member = str.__new__(PeftType, name)
    member._name_, member._value_, member.__objclass__ = name, name, PeftType
    member._sort_order_ = len(PeftType.__members__)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    if hasattr(PeftType, "_hashable_values_"):  # some releases of Python 3.12 and 3.13 look here
        PeftType._hashable_values_.append(name)
    type.__setattr__(PeftType, name, member)
    register_peft_method(name="asym_gqa", config_cls=AsymGQAConfig, model_cls=AsymGQAModel, prefix="lora_")
