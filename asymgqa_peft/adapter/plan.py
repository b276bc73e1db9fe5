"""What the plain checkpoint of an adapter will be, decided before any module is touched."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..config import AsymGQAConfig
from ..families import FAMILIES, Family, StandIn, find_family
from ..groups import HeadGroups, SlotLayout, slot_layout
from ..heads import HeadShape, SharedShape
from .rope import wide_config


@dataclass(frozen=True)
class StockModel:
    """A model as stock transformers knows it: class and configuration, no weights."""

    model_class: type[PreTrainedModel]
    config: PretrainedConfig


@dataclass(frozen=True)
class ExportPlan:
    """What the plain checkpoint will be, decided before any module is touched; and what it comes from.

    Reports and model cards are read from it. The plain model carries it as `export_plan`, for want of another place
    that survives the merge; it is never saved.

    Attributes:
        adapter: configuration of the adapter, a copy.
        groups: its groups of base KV heads.
        plain: class and configuration of the plain model.
        base: of the base; its configuration is a copy.
        other: where groups are unequal, the layout that was not chosen: K/V heads stored more than once if `plain`
            stores each once, and the other way round; None where there is no other.
        layouts: slots of every layer; all store the same number of K/V heads.
        cached_tokens: tokens in the cache that the layouts were compared at.
        query_scale: factor of the queries that makes up for what the plain class divides scores by.
        rotary_scale: factor of the queries' rotary part that takes over the base's scaled cosines and sines.
        stand_in: how the plain class differs from the base's; None where it is the same.
    """

    adapter: AsymGQAConfig
    groups: HeadGroups
    plain: StockModel
    base: StockModel
    other: StockModel | None
    layouts: tuple[SlotLayout, ...]
    cached_tokens: int
    query_scale: float = 1.0
    rotary_scale: float = 1.0
    stand_in: StandIn | None = None

    @classmethod
    def of(cls, plain: nn.Module) -> ExportPlan:
        """The plan of a model that `merge_and_unload` returned.

        Raises:
            ValueError: for any other model: a checkpoint does not tell what its base was.
        """
        plan = getattr(plain, "export_plan", None)
        if not isinstance(plan, cls):
            raise ValueError(
                f"{type(plain).__name__} does not come from merge_and_unload(): a checkpoint does not tell what its "
                "base was. Pass what merge_and_unload() returned."
            )
        return plan


def plan_export(
    model: PreTrainedModel,
    adapter: AsymGQAConfig,
    groups: HeadGroups,
    heads: SharedShape,
    duplicate_kv_heads: bool = False,
    cached_tokens: int | None = None,
) -> ExportPlan:
    """Decide class, configuration and slots of the plain checkpoint.

    Equal groups are ordinary GQA in the base's class. Unequal groups are padded to slots: in the family's padded
    class, or in the base's own with as many slots as its configuration accepts. Equal ones take the padded class too
    where the base's head dimension is not hidden size / heads, which more engines honour there, or where the base's
    own knows no number of KV heads. Where no configuration knows a number of KV heads or a head dimension, K/V heads
    are stored more than once.

    ``model`` is the base, wrapped or not; ``duplicate_kv_heads`` and ``cached_tokens`` are as for `merge_and_unload`.

    Raises:
        ValueError: where no stock class can hold the groups; with the remedy.
    """
    if cached_tokens is None:
        cached_tokens = model.config.max_position_embeddings
    if cached_tokens < 0:
        raise ValueError(f"cached_tokens={cached_tokens} must not be negative: give the tokens that the cache holds.")
    base = StockModel(type(model), copy.deepcopy(model.config))
    family, other, scales = find_family(base.config), None, {}
    is_wide = heads.head_dim != heads.base.head_dim
    stand_in, refusal = family.padded_as, None
    if is_wide and family.wide_as:
        stand_in = family.wide_as
    if stand_in:
        refusal = stand_in.refusal(base.model_class, base.config, groups.num_key_value_heads)
    if refusal:
        stand_in = None
    if is_wide:
        config, rotary_scale = wide_config(base.config, heads, family)
        shape = replace(heads.base, head_dim=heads.head_dim, rotary_dim=heads.rotary_dim)
        planner = _Planner(replace(base, config=config), groups, family, shape, stand_in, refusal, is_wide=True)
        chosen = planner.stored_once()
        scales = {"rotary_scale": rotary_scale}
        rope = chosen.plain.config.rope_parameters
        if chosen.stand_in and chosen.stand_in.loses_recomputing and rope["short_factor"] != rope["long_factor"]:
            warnings.warn(
                f"{base.model_class.__name__} recomputes its cache when generation passes "
                f"{rope['original_max_position_embeddings']} tokens, where its rotary frequencies change; "
                f"{chosen.plain.model_class.__name__} does not. Let no sequence pass that limit on a cache begun "
                "below it, or leave head_dim unset.",
                stacklevel=5,  # who called merge_and_unload
            )
        if not family.scale_in_config:
            # The stock class divides scores by sqrt(W), the base by sqrt(D).
            scales["query_scale"] = math.sqrt(heads.head_dim / heads.base.head_dim)
    else:
        planner = _Planner(base, groups, family, heads.base, stand_in, refusal)
        chosen, other = planner.choose(duplicate_kv_heads, cached_tokens)
    if chosen.stand_in and chosen.stand_in.caution:
        # who called merge_and_unload
        warnings.warn(f"{chosen.plain.model_class.__name__} {chosen.stand_in.caution}", stacklevel=5)
    if not _has_tied_head(model):
        for stock in (chosen.plain, other):
            if stock is not None:
                stock.config.tie_word_embeddings = False
    in_order = tuple(range(heads.base.num_attention_heads))
    if any(layout.slot_of_head != in_order for layout in chosen.layouts):
        # For whoever has adapters of the base: they load where shapes are the same, and change other heads.
        chosen.plain.config.query_heads_permuted = True
    adapter = copy.deepcopy(adapter)
    adapter.head_groups = groups.to_lists()
    return ExportPlan(
        adapter=adapter,
        groups=groups,
        plain=chosen.plain,
        base=base,
        other=other,
        layouts=chosen.layouts,
        cached_tokens=cached_tokens,
        stand_in=chosen.stand_in,
        **scales,
    )


def is_quantised(model: nn.Module) -> bool:
    """Whether some of the base's weights are packed."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or quantizer.quantization_config.quant_method != "gguf":
        return quantizer is not None
    # transformers unpacks GGUF files of most architectures while loading them, and keeps the quantizer.
    return any("gguf" in type(module).__module__ for module in model.modules())


def _has_tied_head(model: PreTrainedModel) -> bool:
    """Whether the head will still be the embeddings: one that is trained on its own (modules_to_save) will not."""
    head = getattr(model.get_output_embeddings(), "weight", None)
    embeddings = getattr(model.get_input_embeddings(), "weight", None)
    if head is None or embeddings is None:
        return True  # no head to untie
    return head.data_ptr() == embeddings.data_ptr()  # PEFT's rule, by which it writes the merged configuration


class _Choice(NamedTuple):
    """A stock model that holds the groups, and how."""

    plain: StockModel
    layouts: tuple[SlotLayout, ...]
    stand_in: StandIn | None = None


@dataclass(frozen=True)
class _Planner:
    """Lays groups of the base's KV heads out in stock classes: its own, or the stand-in if there is one.

    Wide heads stand in the configuration of `base` and in `shape`, and a stand-in holds them rather than the base.
    `refusal` is why there is no stand-in although the family names one.
    """

    base: StockModel
    groups: HeadGroups
    family: Family
    shape: HeadShape
    stand_in: StandIn | None
    refusal: str | None
    is_wide: bool = False

    @property
    def largest(self) -> int:
        """Query heads of the largest group."""
        return self.groups.max_group_size * self.shape.queries_per_kv

    @property
    def are_equal(self) -> bool:
        """Whether all groups of all layers are of one size."""
        heads = self.groups.max_group_size * self.groups.num_key_value_heads
        return heads == self.shape.base_kv_heads

    def choose(self, duplicate_kv_heads: bool, cached_tokens: int) -> tuple[_Choice, StockModel | None]:
        """The layout to write, and the other one of unequal groups where there is one."""
        is_held = self.family.grouped or self.stand_in is not None
        if not is_held or not self.family.explicit_head_dim:
            return self.fixed_slots(), None
        duplicated = self.duplicated(cached_tokens)
        try:
            once = self.stored_once()
        except ValueError as error:
            if duplicated is None:
                raise
            if not duplicate_kv_heads:
                raise ValueError(f"{error} Or store K/V heads more than once: duplicate_kv_heads=True.") from error
            return duplicated, None
        if duplicated is None:
            return once, None
        saved = self.bytes(once.layouts, cached_tokens) - self.bytes(duplicated.layouts, cached_tokens)
        if duplicate_kv_heads and saved > 0:
            return duplicated, once.plain
        return once, duplicated.plain

    def stored_once(self) -> _Choice:
        """No K/V head twice: in the stand-in where it is of use, or else in the base's own class."""
        shape, candidates = self.shape, []
        # CTranslate2 reads an explicit head dimension in the padded class only.
        is_explicit = shape.head_dim * shape.num_attention_heads != shape.hidden_size
        if self.stand_in and (self.is_wide or is_explicit or not self.are_equal or not self.family.grouped):
            candidates.append((self.stand_in, self.largest))
        if self.family.grouped:
            for slots in range(self.largest, 2 * self.largest + 1):
                # Over-padded, because some classes want hidden_size % slots == 0.
                candidates.append((None, slots))
        return self.first_accepted(candidates)

    def duplicated(self, cached_tokens: int) -> _Choice | None:
        """The layout of fewest bytes among those with less slots per K/V head than the largest group has query heads.

        None for equal groups, which have no padding to save; where all have as many K/V heads as the base; and where
        the keys' norm spans all stored heads: a head stored twice would count twice in it.
        """
        if self.are_equal or self.family.norm_span == "layer":
            return None
        candidates = []
        for slots in range(1, self.largest):
            layouts = self.layouts(slots)
            kv_heads, stand_in = layouts[0].kv_heads, None
            if layouts[0].num_slots != self.shape.num_attention_heads or not self.family.grouped:
                stand_in = self.stand_in
            if kv_heads < self.shape.base_kv_heads:
                # Of layouts of equal bytes that with the smaller cache.
                candidates.append((self.bytes(layouts, cached_tokens), kv_heads, slots, stand_in))
        candidates.sort(key=lambda candidate: candidate[:3])
        classes = []
        for *_, slots, stand_in in candidates:
            # The base's own class may accept a number of slots that the stand-in refuses.
            classes += [(stand_in, slots), (None, slots)]
        try:
            return self.first_accepted(classes)
        except ValueError:  # `stored_once` tells of the refusal of whole groups
            return None

    def fixed_slots(self) -> _Choice:
        """Exactly H slots: as many per K/V head as divide every group, large groups stored more than once."""
        base, shape, slots_per_kv = self.base, self.shape, 1
        if self.family.grouped:
            sizes = set()
            for layer in range(len(self.groups.layers)):
                sizes.update(self.groups.sizes(layer))
            slots_per_kv = math.gcd(*sizes) * shape.queries_per_kv
        kv_heads, wanted = shape.num_attention_heads // slots_per_kv, self.groups.num_key_value_heads
        if kv_heads > wanted:
            shrinks = "does not shrink"
            if kv_heads < shape.base_kv_heads:
                shrinks = "shrinks less than the adapter's"
            reason = f" ({self.refusal})" if self.refusal else ""
            warnings.warn(
                f"{type(base.config).__name__} cannot express these groups: the plain checkpoint stores {kv_heads} KV "
                f"heads, not {wanted}, so its cache {shrinks}{reason}. Its logits are the adapter's.",
                stacklevel=7,  # who called merge_and_unload
            )
        config = copy.deepcopy(base.config)
        if self.family.grouped:
            config.num_key_value_heads = kv_heads
        return _Choice(_stock(base.model_class, config), self.layouts(slots_per_kv))

    def bytes(self, layouts: Sequence[SlotLayout], cached_tokens: int) -> int:
        """Projection weights and cached K and V of all layers, in units of head_dim elements."""
        total = 0
        for layout in layouts:
            total += 2 * self.shape.hidden_size * (layout.num_slots + layout.kv_heads)
            total += 2 * cached_tokens * layout.kv_heads
        return total

    def layouts(self, slots_per_kv: int) -> tuple[SlotLayout, ...]:
        """All layers with as many stored K/V heads as the layer that needs most: a stock model has one number."""
        layouts = [slot_layout(groups, self.shape.queries_per_kv, slots_per_kv) for groups in self.groups.layers]
        kv_heads = max(layout.kv_heads for layout in layouts)
        filled = []
        for layout in layouts:
            # Further copies of the first group's K/V head, whose slots stay empty.
            missing = kv_heads - layout.kv_heads
            kv_source = layout.kv_source + (0,) * missing
            head_of_slot = layout.head_of_slot + (-1,) * (missing * slots_per_kv)
            filled.append(replace(layout, kv_source=kv_source, head_of_slot=head_of_slot))
        return tuple(filled)

    def first_accepted(self, candidates: Iterable[tuple[StandIn | None, int]]) -> _Choice:
        """The first (stand-in or None for the base's class, slots per K/V head) that its configuration accepts."""
        refusal = None
        for stand_in, slots in candidates:
            model_class, config_class = self.base.model_class, type(self.base.config)
            if stand_in is not None:
                model_class, config_class = stand_in.classes(model_class, self.base.config)
            layouts = self.layouts(slots)
            try:
                config = _plain_config(config_class, self.base.config, layouts[0], self.shape, stand_in)
            except Exception as error:  # each version of transformers wraps a configuration's refusal in another class
                refusal = error
                continue
            return _Choice(_stock(model_class, config), layouts, stand_in)
        reason = str(refusal).strip().splitlines()[-1].strip()
        raise ValueError(
            f"No {type(self.base.config).__name__} holds {self.groups.num_key_value_heads} groups of up to "
            f"{self.largest} query heads each. The last one tried says: {reason} "
            "Take equal groups (grouping='symmetric') or another num_key_value_heads."
        ) from refusal


def _stock(model_class: type, config: PretrainedConfig) -> StockModel:
    """The class and its configuration, which gets the names that engines read and loses what is not the model's."""
    config.architectures = [model_class.__name__]
    if getattr(config, "use_cache", None) is False:
        # What the Trainer leaves behind, and what would slow everyone down who generates.
        config.use_cache = True
    # Code of the base that the plain checkpoint does not come with, and how weights were packed that are not any more.
    lost = ["quantization_config"]
    if model_class.__module__.startswith("transformers."):
        lost += ["auto_map", "custom_pipelines"]
    for name in lost:
        vars(config).pop(name, None)
    parameters = getattr(config, "rope_parameters", None)
    if isinstance(parameters, dict) and "rope_theta" in parameters:
        # Engines written for transformers 4 read RoPE fields at the top level; transformers 5 takes both.
        family = FAMILIES[config.model_type]
        for entry, name in family.rope_fields.items():
            if entry in parameters:
                setattr(config, name, parameters[entry])
        if parameters.get("rope_type", "default") != "default":
            scaling = {entry: value for entry, value in parameters.items() if entry not in family.rope_fields}
            # Past the property of this name, which stands for rope_parameters and warns on assignment.
            vars(config)["rope_scaling"] = scaling
    return StockModel(model_class, config)


def _plain_config(
    config_class, config, layout: SlotLayout, shape: HeadShape, stand_in: StandIn | None
) -> PretrainedConfig:
    """The plain configuration; raises whatever its class raises where it refuses the number of slots."""
    values = config.to_dict()
    values.pop("model_type", None)
    # What a merge wrote for older engines goes before rope_parameters, and would stand for the base's.
    values.pop("rope_scaling", None)
    if stand_in is not None:
        own = config_class().to_dict()
        values = {name: value for name, value in values.items() if name in own}
        values |= {name: getattr(config, source) for name, source in stand_in.fields.items()} | stand_in.sets
    values |= {"num_attention_heads": layout.num_slots, "num_key_value_heads": layout.kv_heads}
    if layout.num_slots * shape.head_dim != shape.hidden_size or values.get("head_dim") is not None:
        values["head_dim"] = shape.head_dim
    plain = config_class.from_dict(values)
    plain._attn_implementation = config._attn_implementation
    return plain
