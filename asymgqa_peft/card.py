"""The model card: what was done to which base, what it saves, how to use it. Nothing is claimed that is not known.

Its text is the template `model_card.md`; the functions here find out what stands in the braces.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedModel

from . import __version__
from .adapter.plan import ExportPlan
from .config import AsymGQAConfig
from .evaluate import kv_cache_bytes_per_token
from .families import find_family, head_shape
from .groups import HeadGroups
from .heads import HeadShape
from .tables import markdown_table

if TYPE_CHECKING:
    from .initialize import InitializationReport

TRANSPORT_ERRORS = HfHubHTTPError.__bases__
"""What a request to the Hub raises: OSError, and HTTPError of the httpx that this huggingface_hub uses."""


@dataclass(frozen=True)
class Conversion:
    """What became of a base model: the facts of a model card.

    Attributes:
        adapter: the adapter's configuration, with its groups.
        base: configuration of the base.
        plain: configuration of the merged model; None for an adapter.
        base_source: repository or local folder that the base came from, or None.
        base_model: the base's repository on the Hub, or None for a local or unnamed one.
        base_revision: its commit, where the local cache tells it; or the revision that the adapter names; or None.
        dtype: of the base's weights and of its KV cache.
    """

    adapter: AsymGQAConfig
    base: PretrainedConfig
    plain: PretrainedConfig | None
    base_source: str | None
    base_model: str | None
    base_revision: str | None
    dtype: torch.dtype

    @classmethod
    def of(cls, model: PeftModel | PreTrainedModel, base_model: str | None = None) -> Conversion:
        """The facts of a wrapped model's active adapter, or of the model that `merge_and_unload` made of it.

        `base_model` is the base's repository on the Hub, if the model was loaded from elsewhere.

        Raises:
            ValueError: if the model is neither, or `base_model` is not a repository id.
        """
        plain = None
        if isinstance(model, PeftModel) or not hasattr(model, "export_plan"):
            wrapped = _adapted_base(model)
            base, base_class = wrapped.config, type(wrapped)
            adapter = copy.copy(model.peft_config[model.active_adapter])
            # The layers know them; the configuration of a fresh wrap does not.
            adapter.head_groups = model.base_model.head_groups(model.active_adapter).to_lists()
        else:
            plan, plain = ExportPlan.of(model), model.config
            adapter, base, base_class = plan.adapter, plan.base.config, plan.base.model_class
        base = copy.copy(base)
        base.architectures = [base_class.__name__]  # unset in a model that was never saved
        return cls.from_configs(adapter, base, model.dtype, base_model, plain)

    @classmethod
    def from_configs(
        cls,
        adapter: AsymGQAConfig,
        base: PretrainedConfig,
        dtype: torch.dtype | None = None,
        base_model: str | None = None,
        plain: PretrainedConfig | None = None,
    ) -> Conversion:
        """The facts without the weights; `dtype` defaults to the base's, `base_model` to what `adapter` names."""
        if base_model is not None:
            check_repo_id(base_model, "base_model")
        source = adapter.base_model_name_or_path or getattr(base, "_name_or_path", None) or None
        published, revision = base_model or _hub_id(source), None
        if published is not None and published == source:
            # The commit that the revision (None: main) had when it was downloaded, where the local cache tells it.
            cached = try_to_load_from_cache(source, "config.json", revision=adapter.revision)
            revision = adapter.revision
            if isinstance(cached, str):
                revision = Path(cached).parent.name
        conversion = cls(
            adapter=copy.deepcopy(adapter),
            base=copy.deepcopy(base),
            plain=copy.deepcopy(plain),
            base_source=base_model or source,
            base_model=published,
            base_revision=revision,
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
        layers, base_heads = self.base.num_hidden_layers, self.shape.base_kv_heads
        return HeadGroups.from_lists(self.adapter.head_groups, layers, base_heads, self.adapter.num_key_value_heads)

    @property
    def converted_shape(self) -> HeadShape:
        """Slots, stored K/V heads and their dimension: of the merged model, or of the adapter's widest layer."""
        if self.plain is not None:
            return head_shape(self.plain)
        shape, kv_heads = self.shape, self.adapter.num_key_value_heads
        if not find_family(self.base).grouped:  # the shared heads are repeated to as many as the base has
            return replace(shape, base_kv_heads=shape.num_attention_heads)
        slots = kv_heads * self.groups.max_group_size * shape.queries_per_kv
        width = self.adapter.head_dim or shape.head_dim
        return replace(shape, num_attention_heads=slots, base_kv_heads=kv_heads, head_dim=width)


def model_card(
    conversion: Conversion,
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
        name: of the repository ("owner/name") or folder; stands in the loading example.
        licence: metadata of the base's licence, as from `base_licence`.
        report: of `initialize_asymgqa_weights`.
        evaluation: measurements as rows of a table, e.g. `{"model": "base", "perplexity": 38.3}`; the columns are
            the first row's keys.
        calibration_data, recovery_data: what the initialisation and the training afterwards read, in words.

    Raises:
        ValueError: if the report belongs to other groups, or the evaluation is not a list of rows.
    """
    if report is not None and report.head_groups != conversion.groups.to_lists():
        raise ValueError("report.head_groups are not the adapter's groups: pass the report of this adapter, or none.")
    are_rows = isinstance(evaluation, list | tuple) and all(isinstance(row, Mapping) and row for row in evaluation)
    if evaluation is not None and not are_rows:
        raise ValueError(f'evaluation={evaluation!r} must be rows, e.g. [{{"model": "base", "perplexity": 38.3}}].')
    base, shape, converted = conversion.base, conversion.shape, conversion.converted_shape
    before = kv_cache_bytes_per_token(base, conversion.dtype)
    card = ModelCard.from_template(
        _metadata(conversion, licence or {}),
        template_path=str(Path(__file__).with_name("model_card.md")),
        conversion=conversion,
        shape=shape,
        converted=converted,
        base_class=(base.architectures or [base.model_type])[0],
        bytes_before=before,
        bytes_after=before * converted.base_kv_heads * converted.head_dim // (shape.base_kv_heads * shape.head_dim),
        base=_base_text(conversion),
        groups=_groups_text(conversion.groups),
        name=name,
        report=report,
        evaluation=markdown_table(evaluation) if evaluation else None,
        calibration_data=calibration_data,
        recovery_data=recovery_data,
        caution=_caution(conversion),
        version=__version__,
    )
    return f"{card}\n"  # the one at the end of the template is not rendered


def base_licence(base: str | None, revision: str | None = None, token: str | None = None) -> dict[str, str]:
    """`license`, `license_name` and `license_link` as the base's own card states them; empty where it does not.

    `base` is a repository on the Hub, at a `revision`, or a local folder.
    """
    if base is None:
        return {}
    try:
        file = Path(base, "README.md")
        if not Path(base).exists():
            file = hf_hub_download(base, "README.md", revision=revision, token=token)
        data = ModelCard.load(file, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, yaml.YAMLError, *TRANSPORT_ERRORS):  # no card, not readable, or no way to it: nothing is known
        return {}
    licence = {key: data[key] for key in ("license", "license_name", "license_link") if key in data}
    link = licence.get("license_link")
    if link is not None and not str(link).startswith("https://"):  # a file beside the base's card
        del licence["license_link"]
        if _hub_id(base):
            licence["license_link"] = f"https://huggingface.co/{base}/blob/{revision or 'main'}/{link}"
    return licence


def check_repo_id(repo_id: str, field: str = "repo_id") -> None:
    """Raise ValueError unless `repo_id` is an "owner/name" that the Hub accepts."""
    if "/" not in repo_id or not _is_repo_id(repo_id):
        raise ValueError(f"{field}={repo_id!r} must be 'owner/name' of a repository, in letters, digits and - _ .")


def _metadata(conversion: Conversion, licence: Mapping[str, str]) -> ModelCardData:
    """What the Hub reads of the card."""
    library, relation, tags = "transformers", "finetune", ["asymgqa", "gqa", "kv-cache"]
    if conversion.plain is None:
        library, relation, tags = "peft", "adapter", [*tags, "peft", "lora"]
    metadata = ModelCardData(library_name=library, pipeline_tag="text-generation", tags=tags, **licence)
    if conversion.base_model:
        metadata.base_model, metadata.base_model_relation = conversion.base_model, relation
    return metadata


def _groups_text(groups: HeadGroups) -> str:
    """The groups, a layer a line, neighbouring layers of equal groups together."""
    lines, first = [], 0
    for partition, run in groupby(groups.layers):
        last = first + len(list(run)) - 1
        which = f"layer {first}" if first == last else f"layers {first}-{last}"
        written = ["[" + " ".join(map(str, group)) + "]" for group in partition]
        lines.append(f"{which}: {' '.join(written)}")
        first = last + 1
    return "\n".join(lines)


def _base_text(conversion: Conversion) -> str:
    if conversion.base_model:
        return f"[{conversion.base_model}](https://huggingface.co/{conversion.base_model})"
    if conversion.base_source:
        return f"`{Path(conversion.base_source).name}` (a local folder)"
    return f"a {conversion.base.model_type} model without a name"


def _caution(conversion: Conversion) -> str | None:
    """What who uses the merged model's class must know, where it is not the base's."""
    stand_in = find_family(conversion.base).padded_as
    if conversion.plain is None or stand_in is None or conversion.plain.model_type != stand_in.model_type:
        return None
    return stand_in.caution


def _adapted_base(model: object) -> PreTrainedModel:
    """The base of a model whose active adapter is AsymGQA."""
    found = type(model).__name__
    if isinstance(model, PeftModel):
        config = model.peft_config.get(model.active_adapter)
        if isinstance(config, AsymGQAConfig):
            return model.get_base_model()
        found += f" with {type(config).__name__}"
    raise ValueError(
        f"The model must be a PeftModel whose active adapter is AsymGQA, got {found}: wrap the base with "
        "get_peft_model(base, AsymGQAConfig(...)), or activate the adapter with set_adapter. A merged model that was "
        "loaded from a file does not tell what its base was: pass conversion=Conversion.from_configs(...)."
    )


def _hub_id(name: str | None) -> str | None:
    """`name` where it is a repository id and no local path: paths mean nothing to others, and are not published."""
    if not name or Path(name).exists() or not _is_repo_id(name):
        return None
    return name


def _is_repo_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except ValueError:
        return False
    return True
