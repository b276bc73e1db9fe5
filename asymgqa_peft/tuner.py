"""The tuner: LoRA's, with K and V replaced by shared heads. Registers the method with PEFT."""

from __future__ import annotations

import sys
from dataclasses import replace

from peft import PeftType
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from peft.utils import register_peft_method
from torch import nn

from .config import AsymGQAConfig
from .export import export_plain_model, plan_export, shared_tensors
from .families import HeadShape
from .groups import HeadGroups, default_max_group_size
from .layers import SharedKey, SharedKeyNorm, SharedLayer, SharedProjection, SharedQKV, SharedValue
from .sites import AttentionSite, attention_sites


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
        site = attention_sites(self.model)[self._shared_layer_index[current_key]]
        layer = target if isinstance(target, SharedLayer) else _shared_layer(site, target_name, target)
        layer.update_layer(adapter_name, self.head_groups(adapter_name).layers[site.layer])
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)
        if adapter_name not in self.active_adapters:
            layer.set_requires_grad(adapter_name, False)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        """Inject an adapter as LoRA does, then (re-)install the hooks that fit queries to shared heads."""
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

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate one adapter.

        Raises:
            ValueError: for several, which attention with one set of K/V heads cannot combine.
        """
        if not isinstance(adapter_name, str) and len(adapter_name) > 1:
            raise ValueError(f"adapter_name={adapter_name!r}: attention has one set of K/V heads, activate one.")
        super().set_adapter(adapter_name, inference_mode=inference_mode)

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

    def _unload_and_optionally_merge(self, merge=True, progressbar=False, safe_merge=False, adapter_names=None):
        unload = super()._unload_and_optionally_merge
        if not merge:
            _remove_hooks(self.model)
            model = unload(merge=False, progressbar=progressbar)
            for site in attention_sites(model):
                site.restore_head_counts()
            return model
        name = self._adapter_to_merge(adapter_names)
        plan = plan_export(self.model, self.head_groups(name))  # may refuse: nothing has changed yet
        tensors = [shared_tensors(site, name) for site in attention_sites(self.model)]
        _remove_hooks(self.model)
        model = unload(merge=True, progressbar=progressbar, safe_merge=safe_merge, adapter_names=[name])
        return export_plain_model(model, plan, tensors)

    def _adapter_to_merge(self, adapter_names: list[str] | None) -> str:
        names = adapter_names or self.active_adapters
        if len(names) != 1:
            raise ValueError(f"adapter_names={names!r}: attention has one set of K/V heads, merge one adapter.")
        if names[0] not in self.peft_config:
            raise ValueError(f"adapter_names={names!r}: unknown, the model holds {list(self.peft_config)}.")
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


def _check_not_sharded(model: nn.Module) -> None:
    if (getattr(model, "_tp_size", None) or 1) > 1:
        raise ValueError(
            "The model is tensor-parallel (tp_plan): its heads are split over ranks, and groups would cross them. "
            "Load it without tp_plan; use FSDP or a device_map."
        )


def _shared_layer(site: AttentionSite, target_name: str, base_layer: nn.Module) -> SharedLayer:
    family = site.family
    classes = {
        family.fused_qkv: SharedQKV,
        family.key: SharedKey,
        family.value: SharedValue,
        family.key_norm: SharedKeyNorm,
    }
    return classes[target_name](base_layer, site.shape, family)


def _install_hooks(site: AttentionSite) -> None:
    # Bound methods, so that a deep copy's hooks belong to the copy.
    site.attention.register_forward_pre_hook(site.key.set_head_counts)
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
    if sys.version_info >= (3, 13):
        PeftType._hashable_values_.append(name)
    type.__setattr__(PeftType, name, member)
    register_peft_method(name="asym_gqa", config_cls=AsymGQAConfig, model_cls=AsymGQAModel, prefix="lora_")
