"""The tuner: LoRA's, with K and V replaced by shared heads. Registers the method with PEFT."""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch
from peft import PeftType, TaskType
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, _ExcludedModule, _maybe_include_all_linear_layers
from peft.utils import register_peft_method
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..config import AsymGQAConfig
from ..estimates import Sizes, lack_of_memory, merge_bytes
from ..families import head_shape
from ..groups import HeadGroups
from .checks import (
    check_exportable,
    check_foldable,
    check_modules,
    check_modules_to_save,
    check_not_sharded,
    check_on_devices,
    check_unadapted,
    initial_groups,
    is_sharded,
    own_tokens,
    shared_shape,
    tensor_problems,
)
from .export import MergedWeights, fold_into_base, plain_model, plain_model_to_save
from .layer import SharedLayer, SharedProjection
from .offload import bring_adapter_home, in_place, is_on_disk, unnoticed
from .plan import ExportPlan, is_quantised, plan_export
from .site import attention_sites, base_layer
from .slots import HeadLayout


class AsymGQAModel(LoraModel):
    """Grouped attention with shared, trainable K/V heads, and LoRA on the other projections.

    Args:
        model: a supported transformers model (see `asymgqa_peft.families.FAMILIES`).
        config: an `AsymGQAConfig`.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: create the adapter's weights on the meta device, to be filled from a file.
    """

    tuner_layer_cls = (LoraLayer, SharedLayer)
    # The base's parameters and copies of what was in them before merge_adapter.
    _before_merge: Sequence[tuple[nn.Parameter, Tensor]] = ()

    def __init__(self, model: PreTrainedModel, *args, **kwargs) -> None:
        check_unadapted(model)  # before PEFT enters the new adapter beside those that the model has
        super().__init__(model, *args, **kwargs)
        self.register_load_state_dict_post_hook(AsymGQAModel._record_loaded)

    def _prepare_adapter_config(self, peft_config: AsymGQAConfig, model_config: dict) -> AsymGQAConfig:
        # PEFT calls this before it changes anything: every check of config against model belongs here.
        if self._before_merge:
            raise ValueError("An adapter is merged: call unmerge_adapter() first, a new one starts from the base.")
        check_on_devices(self.model, peft_config)
        if not hasattr(self, "sites"):
            sites = attention_sites(self.model)
            check_not_sharded(self.model)
            check_modules(self.model, sites)
            self.sites, self._newly_wrapped = sites, set()
        self._site_of = {}
        for each in self.sites:
            self._site_of |= dict.fromkeys(each.shared_names, each)
        site = self.sites[0]
        self._groups = initial_groups(peft_config, site.shape, len(self.sites))
        self._shape = shared_shape(peft_config, self._groups, site.shape, site.family, self.model)
        check_modules_to_save(peft_config, self._site_of)
        self._resolve_targets(peft_config)
        check_exportable(self.model, peft_config, self._groups, self._shape)
        return peft_config

    def _resolve_targets(self, peft_config: AsymGQAConfig) -> None:
        targets = peft_config.target_modules
        if isinstance(targets, str) and targets.lower() == "all-linear":
            resolved = copy.copy(peft_config)  # not replace(), which refuses layers_to_transform beside a str
            _maybe_include_all_linear_layers(resolved, self.model)
            targets = set(resolved.target_modules) - self._site_of.keys()
            if peft_config.task_type in (TaskType.TOKEN_CLS, TaskType.QUESTION_ANS):
                # PEFT trains the heads of these tasks whole, and fails on a head that LoRA wraps.
                decoder = set(self.model.base_model.modules())
                targets = {name for name in targets if self.model.get_submodule(name) in decoder}
            targets = peft_config.target_modules = _short_names(targets, self.model)
        matched = []
        for name, module in self.model.named_modules():
            if ".lora_" in name or name.endswith(".base_layer"):
                continue  # inside an earlier adapter
            found = super()._check_target_module_exists(peft_config, name)
            field = "target_modules" if found else "exclude_modules"
            if name in self._site_of and (found or isinstance(found, _ExcludedModule)):
                raise ValueError(
                    f"{field}={getattr(peft_config, field)!r} matches {name!r}, but K and V are shared and trained "
                    "whole: leave them out."
                )
            if found:
                matched.append(name)
                if peft_config.lora_bias and getattr(base_layer(module), "bias", None) is None:
                    raise ValueError(
                        f"lora_bias=True cannot be merged into {name!r}, which has no bias: leave it out of "
                        "target_modules, or lora_bias unset."
                    )
        if targets and not matched:
            # As PEFT says it, to which K and V always match.
            raise ValueError(
                f"Target modules {targets} not found in the base model. Please check the target modules, "
                f"exclude_modules={peft_config.exclude_modules!r} and "
                f"layers_to_transform={peft_config.layers_to_transform!r} and try again."
            )

    def _check_target_module_exists(self, peft_config: AsymGQAConfig, key: str):
        # Shared projections are replaced whatever the LoRA filters (layers_to_transform, exclude_modules) say:
        # a model has one number of KV heads.
        return key in self._site_of or super()._check_target_module_exists(peft_config, key)

    def _create_and_replace(self, lora_config, adapter_name, target, target_name, parent, current_key, **kwargs):
        # An adapter goes where the base's weights are: of offloaded ones, where they are used.
        with in_place(target.modules()):
            if current_key in self._site_of:
                self._share(lora_config, adapter_name, target, target_name, parent, current_key)
            else:
                super()._create_and_replace(
                    lora_config, adapter_name, target, target_name, parent, current_key=current_key, **kwargs
                )

    def _share(self, lora_config, adapter_name, target, target_name, parent, current_key) -> None:
        """Add shared heads, or a norm of them, in place of one of a site's modules."""
        site = self._site_of[current_key]
        layer = target if isinstance(target, SharedLayer) else site.wrapped(target_name)
        declared = lora_config.head_groups is not None
        layer.update_layer(adapter_name, self._groups.layers[site.layer], self._shape, declared)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        """Inject an adapter as LoRA does, then write its first shared heads and (re-)install the hooks."""
        if kwargs.get("state_dict") is not None:
            _check_names_all_shared(model, kwargs["state_dict"])
        with unnoticed(model):
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        # Again for every adapter: a later one may have wrapped q_proj or o_proj, and the hooks belong outside.
        self._install_hooks()
        for site in self.sites:
            site.start(adapter_name)
        config = self.peft_config[adapter_name]
        if config.initialized is None:
            # Until a file that is loaded, or an initialisation, says otherwise.
            config.initialized = False
            self._newly_wrapped.add(adapter_name)

    def _install_hooks(self) -> None:
        _remove_hooks(self.model)
        for site in self.sites:
            site.install_hooks()
        # generate() may allocate a static cache before the first forward, and would ask the base's configuration.
        self.model._get_static_cache_init_shape = _unknown_cache_shape
        self.model.init_continuous_batching = _no_continuous_batching

    def forward(self, *args, **kwargs):
        """The model's forward; training heads that wait for their initialisation is told once."""
        if self.training:
            self._warn_if_uninitialized(self.active_adapters)
        return super().forward(*args, **kwargs)

    def _warn_if_uninitialized(self, adapter_names: list[str]) -> None:
        for name in adapter_names:
            if name in self.peft_config:
                self.peft_config[name].warn_if_uninitialized()

    @property
    def decoder_layers(self) -> list[nn.Module]:
        """The layers that hold the attention modules, in order."""
        return [self.model.get_submodule(site.layer_name) for site in self.sites]

    def head_groups(self, adapter_name: str) -> HeadGroups:
        """The groups of an adapter in all layers."""
        layers = tuple(site.layout(adapter_name).partition for site in self.sites)
        return HeadGroups(layers, self.sites[0].shape.base_kv_heads)

    def record_head_groups(self, adapter_name: str) -> None:
        """Write the groups that the layers have into the adapter's configuration: the one place that does."""
        config = self.peft_config[adapter_name]
        config.head_groups = self.head_groups(adapter_name).to_lists()
        for site in self.sites:
            site.layout(adapter_name).declared = False

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # The first that PEFT calls after its from_pretrained has dispatched an offloaded base anew.
        bring_adapter_home(self.model)
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
        if autocast_adapter_dtype:
            return
        for module in self.model.modules():
            if isinstance(module, SharedLayer) and adapter_name in module.adapters():
                module.cast_to_base(adapter_name)

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *args) -> None:
        # Every way of loading a PeftModel passes here before a tensor is written. PEFT's own only warns about missing
        # tensors and says nothing about unknown ones.
        problems = []
        if not is_sharded(self):
            # What the PeftModel around it did not know; it holds nothing else.
            *_, unexpected_keys, _error_messages = args
            root = prefix.removesuffix("base_model.")
            problems += [f"unknown: {key}" for key in unexpected_keys if key.startswith(root)]
            given = {key: tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
            own = self.state_dict(prefix=prefix, keep_vars=True)
            embeddings, tokens = self._embeddings(prefix), own_tokens(self.model.config)
            problems += tensor_problems(given, own, self._declared_adapters(), embeddings, tokens)
        turns = defaultdict(set)
        for at, layout in self._layouts(prefix):
            frequencies = state_dict.get(at + "frequencies")
            try:
                _, shape = layout.checked(state_dict.get(at + "index"), frequencies)
            except ValueError as error:
                problems.append(f"{at}: {error}")
                continue
            if frequencies is not None:
                turns[at.split(".")[-2]].add(shape.frequencies)
        for found in turns.values():
            if len(found) > 1:
                problems.append(
                    f"rotary frequencies in the weights differ between layers, {sorted(found)}, where a stock model "
                    "has one rotary embedding. The file is damaged: take it anew from where it was saved."
                )
        if problems:
            lines = "\n  ".join(sorted(problems))
            raise ValueError(f"The adapter file does not fit this model and its adapter_config.json:\n  {lines}")
        self._loading = set()
        for adapter_name in self.peft_config:
            if any(f".{adapter_name}." in key for key in state_dict):
                self._loading.add(adapter_name)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _record_loaded(self, _incompatible: object) -> None:
        """Load-state-dict post-hook: the layers have the file's groups, the configuration follows."""
        for adapter_name in self._loading:
            self.record_head_groups(adapter_name)
            if adapter_name in self._newly_wrapped:
                # The heads come from a file now, whose own configuration nobody has read.
                self.peft_config[adapter_name].initialized = None
                self._newly_wrapped.remove(adapter_name)

    def _embeddings(self, prefix: str) -> list[str]:
        """Names of the embeddings in a state dict, the head included: what PEFT saves where they were resized."""
        embeddings = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        names = []
        for name, module in self.named_modules():
            if module in embeddings:
                names += [f"{prefix}{name}.{tensor}" for tensor in module.state_dict()]
        return names

    def _layouts(self, prefix: str) -> Iterator[tuple[str, HeadLayout]]:
        """The groups of all layers and adapters, with their names in a state dict."""
        for site in self.sites:
            for adapter_name, layout in site.key.lora_groups.items():
                yield f"{prefix}model.{site.shared_names[0]}.lora_groups.{adapter_name}.", layout

    def _declared_adapters(self) -> list[str]:
        """Adapters whose groups stand in their configuration, no file having been loaded yet."""
        layouts = self.sites[0].key.lora_groups
        return [name for name in self.peft_config if name in layouts and layouts[name].declared]

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate one adapter.

        Raises:
            ValueError: for several, which attention with one set of K/V heads cannot combine.
        """
        if not isinstance(adapter_name, str) and len(adapter_name) > 1:
            raise ValueError(f"adapter_name={adapter_name!r}: attention has one set of K/V heads, activate one.")
        if self._before_merge:
            # As PEFT says it, whose layers would subtract what they added.
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=2)
        self.unmerge_adapter()
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; if it was the active one, one of the others becomes active in every layer."""
        self.unmerge_adapter()
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

        It is built beside the wrapped model, which needs memory for the merged projections, and takes its place in
        one step at the end: after any error or an interrupt the model is as it was before. What accelerate offloads
        is merged layer by layer where it is used, and stays offloaded, in main memory.

        Args:
            progressbar, safe_merge, adapter_names: as for LoRA.
            duplicate_kv_heads: store the K/V head of a large group more than once where that takes fewer bytes of
                parameters and cache together than padding all groups to its size. The plain model then has more
                KV heads than `num_key_value_heads`; `export_report` shows both choices.
            cached_tokens: tokens in the cache, over all sequences, for that comparison; default is one sequence of
                the configuration's `max_position_embeddings`.

        Raises:
            ValueError: for several adapters, a quantised base, one that is offloaded to disk, groups that no stock
                class holds, or memory that certainly does not hold it; nothing has changed then.
        """
        layout = {"duplicate_kv_heads": duplicate_kv_heads, "cached_tokens": cached_tokens}
        return self._unload_and_optionally_merge(True, progressbar, safe_merge, adapter_names, **layout)

    def plan_export(
        self, adapter_name: str, *, duplicate_kv_heads: bool = False, cached_tokens: int | None = None
    ) -> ExportPlan:
        """What `merge_and_unload` would make of an adapter; arguments and errors are the same, nothing is changed."""
        if is_quantised(self.model):
            raise ValueError(
                f"The base is quantised ({type(self.model.hf_quantizer).__name__}) and cannot hold new K/V heads: "
                "load the base in bf16, load the adapter onto it, and merge there."
            )
        config, groups = self.peft_config[adapter_name], self.head_groups(adapter_name)
        heads = self.sites[0].layout(adapter_name).shape
        return plan_export(self.model, config, groups, heads, duplicate_kv_heads, cached_tokens)

    def _unload_and_optionally_merge(
        self, merge=True, progressbar=False, safe_merge=False, adapter_names=None, **layout: bool | int | None
    ):
        if not merge:
            return self._unload(progressbar)
        name = self._adapter_to_merge(adapter_names)
        self._warn_if_uninitialized([name])
        if safe_merge:
            self._check_finite(name)
        if is_on_disk(self.model):
            raise ValueError(
                "The base is offloaded to disk, and the plain model would need a place of its own: write it file by "
                "file with asymgqa_peft.hub.save_merged(model, tokenizer, folder), which merges as it writes."
            )
        plan = self.plan_export(name, **layout)  # may refuse: nothing has changed yet
        self._check_memory_to_merge(plan)
        _warn_of_hooks(self.model)
        plain = plain_model(self._merged_weights(name, plan, safe_merge), progressbar)
        # One step, before which nothing has changed. As after PEFT's merge, whoever holds the base has the merged one.
        vars(self.model).update(_modules=plain._modules, config=plain.config)
        # What held the old layers lets go of them.
        self.sites, self._site_of = [], {}
        return plain

    def _check_memory_to_merge(self, plan: ExportPlan) -> None:
        devices = {parameter.device for parameter in self.parameters()}
        if len(devices) > 1 or "meta" in {device.type for device in devices}:
            # Spread or offloaded: no one place has to hold it.
            return
        copied = 0
        for module in self.model.modules():
            if isinstance(module, BaseTunerLayer) and not isinstance(module, SharedLayer):
                copied += sum(parameter.numel() for parameter in module.get_base_layer().parameters())
        shape = head_shape(plan.plain.config)
        plain = shape.num_attention_heads, shape.base_kv_heads, shape.head_dim
        needed = merge_bytes(Sizes.of(self.model), *plain, copied=copied)
        remedies = (
            "merge in main memory (move the model there with .to('cpu')), or write the plain model as it is merged, "
            "with asymgqa_peft.hub.save_merged(model, tokenizer, folder)"
        )
        if reason := lack_of_memory("The merge", needed, *devices, remedies):
            raise ValueError(reason)

    def _unload(self, progressbar: bool) -> PreTrainedModel:
        """The base without the adapter; after an error or an interrupt, the model as it was."""
        self.unmerge_adapter()
        children = [(module, dict(module._modules)) for module in self.model.modules()]
        try:
            # PEFT puts the base's modules back one by one.
            with unnoticed(self.model):
                super()._unload_and_optionally_merge(merge=False, progressbar=progressbar)
            _remove_hooks(self.model)
            for site in self.sites:
                site.restore_geometry()
            return self.model
        except BaseException:
            for module, wrapped in children:
                module._modules.update(wrapped)
            self.model.peft_config = self.peft_config
            self._install_hooks()
            raise

    def plain_model_to_save(self, adapter_name: str, **layout: bool | int | None) -> PreTrainedModel:
        """What `merge_and_unload` would return, without weights: its `save_pretrained` merges as it writes.

        A decoder layer at a time, so that the plain model is never held whole, and nothing of this one changes.
        Arguments and errors are those of `plan_export`.
        """
        name = self._adapter_to_merge([adapter_name])
        self._warn_if_uninitialized([name])
        plan = self.plan_export(name, **layout)
        _warn_of_hooks(self.model)
        return plain_model_to_save(self._merged_weights(name, plan, safe_merge=False))

    def _merged_weights(self, adapter_name: str, plan: ExportPlan, safe_merge: bool) -> MergedWeights:
        self.unmerge_adapter()

        def unloaded(part: nn.Module) -> nn.Module:
            # PEFT's own merge, which works on whatever a tuner holds.
            twin = copy.copy(self)
            twin._modules = {"model": part}
            _remove_hooks(part)
            return LoraModel._unload_and_optionally_merge(twin, True, False, safe_merge, [adapter_name])

        readers = [site.reader(adapter_name) for site in self.sites]
        return MergedWeights(self.model, self.sites, plan, readers, unloaded)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge one adapter into the base's weights, in the base's own shape; `unmerge_adapter` takes it back.

        Whoever reads the base's weights then, as TRL does for vLLM, has the adapter in them; but the cache is as large
        as the base's. What the weights were is kept in main memory.

        Raises:
            ValueError: for several adapters, one with NaNs under `safe_merge`, or one that the base's weights cannot
                hold; nothing is merged then.
        """
        name = self._adapter_to_merge(adapter_names)
        self._warn_if_uninitialized([name])
        if safe_merge:
            self._check_finite(name)
        if self._before_merge:
            warnings.warn(f"The adapter {name!r} is merged already, nothing to do.", stacklevel=2)
            return
        check_foldable(self.model, self.sites, name)
        parameters = [parameter for site in self.sites for parameter in site.base_parameters()]
        for module in self.model.modules():
            if isinstance(module, BaseTunerLayer):
                parameters += module.get_base_layer().parameters()
        self._before_merge = [(each, each.detach().to("cpu", copy=True)) for each in dict.fromkeys(parameters)]
        try:
            super().merge_adapter([name], safe_merge=safe_merge)
            for site in self.sites:
                fold_into_base(site, site.reader(name)())
        except BaseException:
            self.unmerge_adapter()
            raise

    @torch.no_grad()
    def unmerge_adapter(self) -> None:
        """Restore the base's weights, to the last bit, if an adapter is merged into them."""
        if not self._before_merge:
            return
        super().unmerge_adapter()
        for parameter, before in self._before_merge:
            parameter.copy_(before)
        self._before_merge = ()

    def disable_adapter_layers(self) -> None:
        """Switch the adapter off; one that is merged is unmerged first, as LoRA layers do it one by one."""
        self.unmerge_adapter()
        super().disable_adapter_layers()

    def _check_finite(self, adapter_name: str) -> None:
        # Of all tensors beforehand: PEFT looks layer by layer, and leaves a half-merged model where it stops.
        broken = []
        for name, parameter in self.model.named_parameters():
            if adapter_name in name.split(".") and not parameter.isfinite().all():
                broken.append(name)
        if broken:
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken: {broken}."
            )

    def _adapter_to_merge(self, adapter_names: list[str] | None) -> str:
        names = adapter_names or self.active_adapters
        if len(names) != 1:
            raise ValueError(f"adapter_names={names!r}: attention has one set of K/V heads, merge one adapter.")
        if names[0] not in self.peft_config:
            raise ValueError(f"adapter_names={names!r}: unknown, the model holds {list(self.peft_config)}.")
        merged, layers = set(), [module for module in self.model.modules() if isinstance(module, SharedLayer)]
        if not layers:
            raise ValueError("The model is merged or unloaded already: use what merge_and_unload or unload returned.")
        for layer in layers:
            merged.update(layer.merged_adapters)
        if others := merged - {names[0]}:
            raise ValueError(f"adapter_names={names!r}: {sorted(others)} is merged already, call unmerge_adapter().")
        return names[0]


def _check_names_all_shared(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless a state dict, which PEFT then takes the wrapped modules from, has all shared ones."""
    wrapped = {name.removeprefix("_orig_mod.").rsplit(".lora_", 1)[0] for name in state_dict}
    missing = []
    for site in attention_sites(model):
        missing += [name for name in site.shared_names if name not in wrapped]
    if missing:
        raise ValueError(
            f"state_dict holds nothing for {missing}: K and V of every layer are shared. Pass that of a whole "
            "adapter, without the prefix of a PeftModel."
        )


def _short_names(targets: set[str], model: nn.Module) -> set[str]:
    """Last components of the names where they mean the same modules: what a person would have written."""
    short = {name.rpartition(".")[2] for name in targets}
    others = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} - targets
    return targets if any(name.rpartition(".")[2] in short for name in others) else short


def _warn_of_hooks(model: nn.Module) -> None:
    """Warn of hooks that somebody put on the base's modules: the plain model has modules of its own."""
    hooked = []
    for name, module in model.named_modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            library = getattr(hook, "__module__", "").partition(".")[0]
            if library not in ("accelerate", "asymgqa_peft", "peft", "transformers"):
                hooked.append(name.removesuffix(".base_layer"))
    if hooked:
        warnings.warn(
            f"Forward hooks on {', '.join(sorted(set(hooked)))} do not come along: register them on the plain model.",
            stacklevel=4,  # who called merge_and_unload
        )


def _unknown_cache_shape() -> None:
    """What transformers takes to allocate a static cache at its first use, from the keys that it gets."""


def _no_continuous_batching(*args, **kwargs) -> None:
    """What generate_batch begins with: its paged cache goes by the base's configuration, and fails in a thread."""
    raise ValueError(
        "continuous batching (generate_batch) cannot cache the shared heads of an adapter: call it on what "
        "merge_and_unload() returns, or use generate."
    )


def _remove_hooks(model: nn.Module) -> None:
    for name in ("_get_static_cache_init_shape", "init_continuous_batching"):
        vars(model).pop(name, None)
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
