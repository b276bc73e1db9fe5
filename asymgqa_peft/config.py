"""Configuration of the AsymGQA adapter."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any, get_args

from peft import LoraConfig, PeftType

from .choices import Criterion, Grouping, Merge
from .families import SHARED_PROJECTION_NAMES
from .groups import validate_nesting

_NOT_SUPPORTED = {
    "layer_replication": "it duplicates layers that share one set of weights",
    "alora_invocation_tokens": "it switches adapters inside a sequence, but the KV cache has one number of heads",
    "megatron_config": "its projections are sharded over heads",
    "target_parameters": "it wraps tensors, not projections",
}
_STARTS = (True, False, "gaussian", "orthogonal", "eva", "mica")
"""`init_lora_weights` that leave the base's weights alone."""


def _option(default: object, text: str) -> Any:
    """A field with its description, where PEFT's own configurations have theirs."""
    return field(default=default, metadata={"help": text})


@dataclass
class AsymGQAConfig(LoraConfig):
    """Grouped-query attention with activation-informed, possibly unequal groups, and LoRA on everything else.

    K and V projections are replaced by G shared heads that are trained whole; `target_modules` (default: all linear
    layers but K, V and the head) get LoRA, with every option of `LoraConfig`.

    Raises:
        ValueError: for a bad field, with its value and the remedy.
    """

    num_key_value_heads: int | None = _option(
        None, "G: shared K/V heads per layer after conversion. Required; at most the base's KV heads."
    )
    grouping: Grouping = _option(
        "asymmetric",
        "How KV heads are grouped. 'neighbour' and 'random' need no data; 'symmetric' (equal sizes) and 'asymmetric' "
        "are searched by initialize_asymgqa_weights, until then the groups are neighbours.",
    )
    criterion: Criterion = _option(
        "residual",
        "What the search minimises: 'residual', what the chosen merge loses, or 'cosine', the published dissimilarity "
        "of K and V activations.",
    )
    merge: Merge = _option(
        "principal",
        "How a group's K/V become one: 'mean' of the weights, 'aligned' (Procrustes, then mean) or 'principal' (best "
        "common subspace). All but 'mean' need initialize_asymgqa_weights.",
    )
    max_group_size: int | None = _option(
        None,
        "Largest group in base KV heads. None: ceil(1.5 K / G), or less where padded slots would make the plain "
        "checkpoint larger than the base.",
    )
    refit_output: bool = _option(
        True,
        "Start o_proj's LoRA from a least-squares fit of the original attention output. Without training much better "
        "on most models (measure it: worse on Qwen2.5-Coder-1.5B); a recovery ends better from False.",
    )
    fit_steps: int = _option(
        0,
        "Gradient steps, each on one calibration batch, that fit a layer's shared heads and q_proj's LoRA to the "
        "original attention output, before o_proj is refitted; 0 for closed forms alone. A hundred are worth most "
        "where queries and keys are normed.",
    )
    head_dim: int | None = _option(
        None,
        "W: dimensions of a shared head; None for the base's. The cache holds num_key_value_heads * head_dim numbers "
        "for K and for V: fewer, wider heads keep more in the same bytes, at the price of wider q_proj and o_proj. "
        "Needs merge='principal'.",
    )
    head_groups: list[list[list[int]]] | None = _option(
        None,
        "Groups of base KV heads, per layer, to wrap with; None for neighbours or random ones. "
        "initialize_asymgqa_weights keeps them if grouping is 'neighbour' or 'random'; else it writes its own. They "
        "are saved with the weights, and loading an adapter brings its groups along.",
    )
    initialized: bool | None = _option(
        None,
        "Whether initialize_asymgqa_weights has chosen the groups and heads; False while they are the means that a "
        "wrap starts with. Written by the adapter, None where it cannot know.",
    )
    r: int = _option(64, "LoRA rank; a higher one keeps more of the output refit.")
    lora_alpha: int = _option(64, "LoRA alpha.")
    seed: int = _option(0, "Seed of random groups and of the search's restarts.")

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.ASYM_GQA
        self._has_warned = False
        if self.target_modules is None:
            self.target_modules = "all-linear"
        self._check_counts()
        self._check_choices()
        self._check_lora()
        if self.head_groups is not None:
            validate_nesting(self.head_groups, self.num_key_value_heads)
            self.head_groups = [list(map(list, partition)) for partition in self.head_groups]

    @property
    def promises_initialization(self) -> bool:
        """Whether grouping or merge ask for what only `initialize_asymgqa_weights` can do."""
        return self.grouping in ("symmetric", "asymmetric") or self.merge != "mean"

    def warn_if_uninitialized(self) -> None:
        """Warn, once, if the heads are still the start without data, though the configuration asks for more."""
        if self.initialized is not False or not self.promises_initialization or self._has_warned:
            return
        self._has_warned = True
        warnings.warn(
            f"The adapter's heads are means of neighbours or of the given groups: grouping={self.grouping!r} and "
            f"merge={self.merge!r} need initialize_asymgqa_weights(model, batches), which has not run. Run it first, "
            'or ask for what there is: grouping="neighbour", merge="mean".',
            stacklevel=3,
        )

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Save the configuration as PEFT does; `initialized` says whether its promises were kept."""
        self.warn_if_uninitialized()
        super().save_pretrained(save_directory, **kwargs)

    def _check_counts(self) -> None:
        remedies = {
            "num_key_value_heads": ": the number of shared K/V heads per layer, e.g. a quarter of the base's",
            "max_group_size": ", or None for the default",
            "head_dim": ", or None for the base's",
        }
        for name, remedy in remedies.items():
            value = getattr(self, name)
            left_open = value is None and name != "num_key_value_heads"
            if not left_open and (not _is_int(value) or value < 1):
                raise ValueError(f"{name}={value!r} must be an int >= 1{remedy}.")
        if not _is_int(self.seed):
            raise ValueError(f"seed={self.seed!r} must be an int.")
        if self.initialized is not None and not isinstance(self.initialized, bool):
            raise ValueError(f"initialized={self.initialized!r} must be True, False or None; leave it to the adapter.")
        if not _is_int(self.fit_steps) or self.fit_steps < 0:
            raise ValueError(
                f"fit_steps={self.fit_steps!r} must be an int >= 0: gradient steps per layer, 0 for none."
            )
        if not isinstance(self.refit_output, bool):
            raise ValueError(f"refit_output={self.refit_output!r} must be True or False.")

    def _check_choices(self) -> None:
        for name, choices in (("grouping", Grouping), ("criterion", Criterion), ("merge", Merge)):
            value = getattr(self, name)
            if value not in get_args(choices):
                raise ValueError(f"{name}={value!r} is unknown: use one of {', '.join(map(repr, get_args(choices)))}.")

    def _check_lora(self) -> None:
        start = self.init_lora_weights
        if (start.lower() if isinstance(start, str) else start) not in _STARTS:
            raise ValueError(
                f"init_lora_weights={start!r} is not supported, it rewrites the base's weights, which calibration and "
                f"distillation read: use one of {', '.join(map(repr, _STARTS))}."
            )
        for alpha in (self.lora_alpha, *(self.alpha_pattern or {}).values()):
            if not (_is_int(alpha) or isinstance(alpha, float)) or not 0 < alpha < math.inf:
                raise ValueError(f"lora_alpha={alpha!r} must be a number > 0: at 0 LoRA can learn nothing.")
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, name)
            modules = value if isinstance(value, list | set | tuple) else [value]
            for module in modules:
                if isinstance(module, str) and module.rpartition(".")[2] in SHARED_PROJECTION_NAMES:
                    raise ValueError(
                        f"{name} names {module!r}, but K and V are shared and trained whole: leave it out "
                        '(target_modules="all-linear" means all other linear layers).'
                    )
        if self.bias != "none":
            raise ValueError(
                f"bias={self.bias!r} is not supported, K/V biases belong to the shared heads: use 'none'."
            )
        for name, reason in _NOT_SUPPORTED.items():
            if getattr(self, name, None):
                raise ValueError(f"{name}={getattr(self, name)!r} is not supported, {reason}: leave it unset.")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
