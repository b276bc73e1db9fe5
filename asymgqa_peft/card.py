"""The model card: what was done to which base, what it saves, how to use it. Nothing is claimed that is not known."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from transformers import PretrainedConfig

from .config import AsymGQAConfig
from .evaluate import kv_cache_bytes_per_token
from .families import find_family, head_shape
from .groups import HeadGroups, SlotLayout, slot_layout
from .heads import HeadShape

if TYPE_CHECKING:
    from .initialize import InitializationReport

TRANSPORT_ERRORS = HfHubHTTPError.__bases__
"""What a request to the Hub raises: OSError, and HTTPError of the httpx that this huggingface_hub uses."""


@dataclass(frozen=True)
class Conversion:
    """What became of a base model: the facts of a model card. Merging loses them, so take them before.

    Attributes:
        adapter: the adapter's configuration, with its groups.
        base: configuration of the base.
        base_source: repository or local folder that the base came from, or None.
        base_model: the base's repository on the Hub, or None for a local or unnamed one.
        base_revision: commit of that repository, where the local cache tells it; or the revision that the adapter
            names; or None.
        dtype: of the base's weights and of its KV cache.
    """

    adapter: AsymGQAConfig
    base: PretrainedConfig
    base_source: str | None
    base_model: str | None
    base_revision: str | None
    dtype: torch.dtype

    @classmethod
    def of(cls, model: PeftModel, base_model: str | None = None) -> Conversion:
        """The facts of a wrapped model's active adapter.

        Args:
            model: the wrapped model, not merged yet.
            base_model: the base's repository on the Hub, if the model was loaded from elsewhere.

        Raises:
            ValueError: if the model does not have an AsymGQA adapter, or `base_model` is not a repository id.
        """
        adapter = _active_config(model)
        base = model.get_base_model()
        config = copy.deepcopy(base.config)
        config.architectures = [type(base).__name__]  # unset in a model that was never saved
        return cls.from_configs(adapter, config, base.dtype, base_model)

    @classmethod
    def from_configs(
        cls,
        adapter: AsymGQAConfig,
        base: PretrainedConfig,
        dtype: torch.dtype | None = None,
        base_model: str | None = None,
    ) -> Conversion:
        """The facts without the weights; `dtype` defaults to the base's, `base_model` to what `adapter` names."""
        if base_model is not None:
            check_repo_id(base_model, "base_model")
        loaded_from = adapter.base_model_name_or_path or getattr(base, "_name_or_path", None) or None
        published = base_model or _hub_id(loaded_from)
        conversion = cls(
            adapter=copy.deepcopy(adapter),
            base=copy.deepcopy(base),
            base_source=base_model or loaded_from,
            base_model=published,
            base_revision=_cached_commit(published, adapter.revision) if published == loaded_from else None,
            dtype=dtype or base.dtype or torch.float32,
        )
        _ = conversion.groups  # validates them against the base
        return conversion

    @property
    def shape(self) -> HeadShape:
        """Head counts of the base."""
        return head_shape(self.base)

    @property
    def groups(self) -> HeadGroups:
        """The groups of all layers, validated against the base."""
        adapter, shape = self.adapter, self.shape
        return HeadGroups.from_lists(
            adapter.head_groups, self.base.num_hidden_layers, shape.base_kv_heads, adapter.num_key_value_heads
        )

    def adapter_slots(self) -> int:
        """Query slots of the adapter in its widest layer."""
        return max(layout.num_slots for layout in self._layouts())

    def adapter_cache_bytes(self) -> int:
        """Bytes of K and V that the cache holds per token with the adapter, over all layers."""
        kv_heads = sum(layout.kv_heads for layout in self._layouts())
        return 2 * kv_heads * self.shape.head_dim * self.dtype.itemsize

    def _layouts(self) -> list[SlotLayout]:
        slots_per_kv = None if find_family(self.base).grouped else 1
        return [slot_layout(partition, self.shape.queries_per_kv, slots_per_kv) for partition in self.groups.layers]


def model_card(
    conversion: Conversion,
    merged_config: PretrainedConfig | None = None,
    *,
    name: str,
    licence: Mapping[str, str] | None = None,
    report: InitializationReport | None = None,
    evaluation: Sequence[Mapping[str, object]] | None = None,
    calibration_data: str | None = None,
    recovery_data: str | None = None,
) -> str:
    """The README.md of an adapter or merged model. What the caller does not state, the card says is not stated.

    Args:
        conversion: what was done to which base.
        merged_config: configuration of the merged model; None for an adapter.
        name: of the repository ("owner/name") or folder; stands in the loading example.
        licence: metadata of the base's licence, as from `base_licence`.
        report: of `initialize_asymgqa_weights`.
        evaluation: measurements as rows of a table, e.g. `{"model": "base", "perplexity": 38.3}`; the columns are
            the first row's keys.
        calibration_data: what the initialisation read, in words.
        recovery_data: what the model was trained on afterwards, in words.

    Raises:
        ValueError: if the report belongs to other groups, or the evaluation is not a list of rows.
    """
    if report is not None and report.head_groups != conversion.groups.to_lists():
        raise ValueError("report.head_groups are not the adapter's groups: pass the report of this adapter, or none.")
    if evaluation is not None and not (isinstance(evaluation, list | tuple) and all(map(_is_row, evaluation))):
        raise ValueError(f'evaluation={evaluation!r} must be rows, e.g. [{{"model": "base", "perplexity": 38.3}}].')
    sections = [
        _introduction(conversion, merged_config, name),
        "## Heads and KV cache\n\n" + _heads_table(conversion, merged_config),
        "## How it was made\n\n" + _making(conversion, report, calibration_data, recovery_data),
        "## Measured quality\n\n" + (_table(evaluation) if evaluation else "Not stated."),
        "## Use\n\n" + (_use_adapter(name) if merged_config is None else _use_merged(name)),
        "## Groups\n\n" + _groups_text(conversion.groups),
        "## Licence\n\n" + _licence_text(conversion, licence or {}),
    ]
    metadata = _metadata(conversion, merged_config is None, licence or {})
    return str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"))


def base_licence(base: str | None, revision: str | None = None, token: str | None = None) -> dict[str, str]:
    """`license`, `license_name` and `license_link` as the base's own card states them; empty where it does not.

    Args:
        base: repository or local folder of the base.
        revision: commit of the repository.
        token: of the Hub.
    """
    if base is None:
        return {}
    try:
        file = Path(base, "README.md")
        if not Path(base).exists():
            file = Path(hf_hub_download(base, "README.md", revision=revision, token=token))
        data = ModelCard.load(file, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, yaml.YAMLError, *TRANSPORT_ERRORS):  # no card, not readable, or no way to it: nothing is known
        return {}
    licence = {key: data[key] for key in ("license", "license_name", "license_link") if key in data}
    link = licence.get("license_link")
    if link is not None and not str(link).startswith("https://"):  # a file beside the base's card
        if _hub_id(base) is None:
            del licence["license_link"]
        else:
            licence["license_link"] = f"https://huggingface.co/{base}/blob/{revision or 'main'}/{link}"
    return licence


def check_repo_id(repo_id: str, field: str = "repo_id") -> None:
    """Raise ValueError unless `repo_id` is an "owner/name" that the Hub accepts."""
    try:
        validate_repo_id(repo_id)
        valid = "/" in repo_id
    except ValueError:
        valid = False
    if not valid:
        raise ValueError(f"{field}={repo_id!r} must be 'owner/name' of a repository, in letters, digits and - _ .")


def package_version() -> str:
    """Of asymgqa_peft itself."""
    return import_module(__package__).__version__


def _metadata(conversion: Conversion, is_adapter: bool, licence: Mapping[str, str]) -> ModelCardData:
    tags = ["asymgqa", "gqa", "kv-cache"] + (["peft", "lora"] if is_adapter else [])
    relation = {"base_model_relation": "adapter" if is_adapter else "finetune"} if conversion.base_model else {}
    return ModelCardData(
        base_model=conversion.base_model,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=tags,
        **licence,
        **relation,
    )


def _introduction(conversion: Conversion, merged_config: PretrainedConfig | None, name: str) -> str:
    before, after = _cache_bytes(conversion, merged_config)
    kind = "A PEFT adapter for it" if merged_config is None else "A plain checkpoint"
    cache = f"a KV cache of {after / before:.0%} of the base's" if after < before else "a KV cache as large as before"
    return (
        f"# {name}\n\n{_base_text(conversion)} with grouped-query attention: in every layer, "
        f"{conversion.groups.num_key_value_heads} shared K/V heads take the place of "
        f"{conversion.shape.base_kv_heads}, for {cache}. {kind}, made with `asymgqa_peft` {package_version()}."
    )


def _heads_table(conversion: Conversion, merged_config: PretrainedConfig | None) -> str:
    shape, groups = conversion.shape, conversion.groups
    before, after = _cache_bytes(conversion, merged_config)
    base_class = (conversion.base.architectures or [conversion.base.model_type])[0]
    slots = conversion.adapter_slots() if merged_config is None else merged_config.num_attention_heads
    cached = after // (before // shape.base_kv_heads)
    rows = [
        ("class", base_class, base_class if merged_config is None else merged_config.architectures[0]),
        ("layers", conversion.base.num_hidden_layers, conversion.base.num_hidden_layers),
        ("query heads", shape.num_attention_heads, shape.num_attention_heads),
        ("query slots, empty ones included", shape.num_attention_heads, slots),
        ("distinct K/V heads per layer", shape.base_kv_heads, groups.num_key_value_heads),
        ("K/V heads per layer in the cache", shape.base_kv_heads, cached),
        ("head dimension", shape.head_dim, shape.head_dim),
        (f"KV cache, bytes per token ({_dtype_name(conversion.dtype)})", before, after),
    ]
    return _table([{"": label, "base": base, "this model": this} for label, base, this in rows])


def _making(
    conversion: Conversion,
    report: InitializationReport | None,
    calibration_data: str | None,
    recovery_data: str | None,
) -> str:
    adapter = conversion.adapter
    options = ", ".join(
        f"{key}={getattr(adapter, key)!r}" for key in ("grouping", "criterion", "merge", "refit_output")
    )
    read = "" if report is None else f" ({report.tokens:,} tokens)"
    lines = [
        f"Base model: {_base_text(conversion)}",
        f"Base revision: {conversion.base_revision or 'not stated'}",
        f"Options asked for: {options}, LoRA rank {adapter.r}",
        f"Calibration data: {calibration_data or 'not stated'}{read}",
        *([] if report is None else _outcome(report)),
        f"Recovery training data: {recovery_data or 'not stated'}",
        "Method: AsymGQA (Chen et al., 2024, [arXiv:2406.14963](https://arxiv.org/abs/2406.14963)), as implemented by "
        "`asymgqa_peft`",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _outcome(report: InitializationReport) -> list[str]:
    """What the initialisation reached, and what it could not do."""
    cost, neighbours = sum(report.costs), sum(report.neighbour_costs)
    return [f"Cost of the groups: {cost:.4g} (of contiguous ones: {neighbours:.4g})", *report.notes]


def _use_adapter(name: str) -> str:
    return f"""\
The package `asymgqa_peft` must be installed and imported, or PEFT stops with `KeyError: 'ASYM_GQA'`.

```python
import asymgqa_peft  # registers the method with PEFT
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("{name}")
plain = model.merge_and_unload()  # optional: a stock model that needs neither PEFT nor asymgqa_peft
```"""


def _use_merged(name: str) -> str:
    return f"""\
Nothing but transformers is needed; there is no custom code.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}")
```"""


def _groups_text(groups: HeadGroups) -> str:
    """Base KV heads that share one K/V head, a layer a line, equal layers together."""
    lines = []
    for partition, run in groupby(enumerate(groups.layers), key=itemgetter(1)):
        layers = [layer for layer, _ in run]
        which = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]}-{layers[-1]}"
        lines.append(f"{which}: " + " ".join(f"[{' '.join(map(str, group))}]" for group in partition))
    text = "\n".join(lines)
    return f"KV heads of the base that share one K/V head, counted from 0:\n\n```text\n{text}\n```"


def _licence_text(conversion: Conversion, licence: Mapping[str, str]) -> str:
    if "license" not in licence:
        return f"The licence of the base applies; its card was not found or states none: {_base_text(conversion)}."
    called = licence.get("license_name", licence["license"])
    link = f" ({licence['license_link']})" if "license_link" in licence else ""
    return f"The licence of the base applies, which its card states as: {called}{link}."


def _base_text(conversion: Conversion) -> str:
    if conversion.base_model:
        return f"[{conversion.base_model}](https://huggingface.co/{conversion.base_model})"
    if conversion.base_source:
        return f"`{Path(conversion.base_source).name}` (a local folder)"
    return f"a {conversion.base.model_type} model without a name"


def _cache_bytes(conversion: Conversion, merged_config: PretrainedConfig | None) -> tuple[int, int]:
    before = kv_cache_bytes_per_token(conversion.base, conversion.dtype)
    if merged_config is None:
        return before, conversion.adapter_cache_bytes()
    return before, kv_cache_bytes_per_token(merged_config, conversion.dtype)


def _table(rows: Sequence[Mapping[str, object]]) -> str:
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns)] + [[_cell(row.get(column)) for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _is_row(value: object) -> bool:
    return isinstance(value, Mapping) and len(value) > 0


def _cell(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "-" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _active_config(model: object) -> AsymGQAConfig:
    config = model.peft_config.get(model.active_adapter) if isinstance(model, PeftModel) else None
    if not isinstance(config, AsymGQAConfig):
        what = type(model).__name__ if config is None else f"{type(model).__name__} with {type(config).__name__}"
        raise ValueError(
            f"The model must be a PeftModel whose active adapter is AsymGQA, got {what}: wrap the base with "
            "get_peft_model(base, AsymGQAConfig(...)), or activate the adapter with set_adapter."
        )
    return config


def _hub_id(name: str | None) -> str | None:
    """`name` where it is a repository id and no local path: paths mean nothing to others, and are not published."""
    if not name or Path(name).exists() or Path(name).is_absolute():
        return None
    try:
        validate_repo_id(name)
    except ValueError:
        return None
    return name


def _cached_commit(repo_id: str | None, revision: str | None) -> str | None:
    """Commit that a revision (None: main) had when it was downloaded; the revision itself where none is cached."""
    if repo_id is None:
        return None
    file = try_to_load_from_cache(repo_id, "config.json", revision=revision)
    return Path(file).parent.name if isinstance(file, str) else revision
