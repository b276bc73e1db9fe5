"""What the plain checkpoint of an adapter will be, decided before any module is touched."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

from ..config import AsymGQAConfig
from ..families import Family, StandIn, find_family, head_shape
from ..groups import HeadGroups, SlotLayout, slot_layout
from ..heads import HeadShape, SharedShape
from .rope import rope_of, wide_config


@dataclass(frozen=True)
class StockModel:
    """A model as stock transformers knows it: class and configuration, no weights."""

    model_class: type[PreTrainedModel]
    config: PretrainedConfig


Choice = tuple[StockModel, tuple[SlotLayout, ...]]
Candidate = tuple[type[PreTrainedModel], type[PretrainedConfig], int, dict]


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
    where the base's head dimension is not hidden size / heads, which more engines honour there. Where neither
    configuration nor class knows a number of KV heads or a head dimension, K/V heads are stored more than once.

    Args:
        model: the base, wrapped or not.
        adapter: configuration of the adapter.
        groups: of the base's KV heads.
        heads: shape of the shared heads.
        duplicate_kv_heads: store the K/V head of a large group more than once where fewer slots per K/V head then
            save more bytes of parameters than the further K/V heads add to parameters and cache.
        cached_tokens: tokens in the cache, over all sequences, for that comparison; default is one sequence of the
            configuration's `max_position_embeddings`.

    Raises:
        ValueError: for a quantised base, or where no stock class can hold the groups; with the remedy.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            f"The base is quantised ({type(model.hf_quantizer).__name__}) and cannot hold new K/V heads: load the "
            "base in bf16, load the adapter onto it, and merge there."
        )
    if cached_tokens is None:
        cached_tokens = model.config.max_position_embeddings
    if cached_tokens < 0:
        raise ValueError(f"cached_tokens={cached_tokens} must not be negative: give the tokens that the cache holds.")
    base = StockModel(type(model), copy.deepcopy(model.config))
    if heads.head_dim == heads.base.head_dim:
        (plain, layouts), other = _choose(base, groups, duplicate_kv_heads, cached_tokens)
        wide = {}
    else:
        (plain, layouts), wide = _choose_wide(base, groups, heads)
        other = None
    if not _has_tied_head(model):
        for stock in (plain, other):
            if stock is not None:
                stock.config.tie_word_embeddings = False
    adapter = copy.deepcopy(adapter)
    adapter.head_groups = groups.to_lists()
    return ExportPlan(adapter, groups, plain, base, other, layouts, cached_tokens, **wide)


def _has_tied_head(model: PreTrainedModel) -> bool:
    """Whether the head will still be the embeddings: one that is trained on its own (modules_to_save) will not."""
    head = getattr(model.get_output_embeddings(), "weight", None)
    embeddings = getattr(model.get_input_embeddings(), "weight", None)
    if head is None or embeddings is None:
        return True  # no head to untie
    return head.data_ptr() == embeddings.data_ptr()  # PEFT's rule, by which it writes the merged configuration


def _choose(
    base: StockModel, groups: HeadGroups, duplicate_kv_heads: bool, cached_tokens: int
) -> tuple[Choice, StockModel | None]:
    """The layout to write, and the other one of unequal groups where there is one."""
    family, shape = find_family(base.config), head_shape(base.config)
    if not family.grouped or not family.explicit_head_dim:
        return _plan_fixed_slots(base, groups, family, shape), None
    duplicated = _plan_duplicated(base, groups, family, shape, cached_tokens)
    try:
        once = _first_accepted(_stored_once(base, groups, family, shape), base, groups, shape)
    except ValueError:
        if not (duplicate_kv_heads and duplicated):
            raise
        return duplicated, None
    taken, other = once, duplicated
    if duplicate_kv_heads and duplicated:
        taken, other = sorted((once, duplicated), key=lambda choice: _bytes(choice[1], shape, cached_tokens))
    if other is None:
        return taken, None
    return taken, other[0]


def _choose_wide(base: StockModel, groups: HeadGroups, heads: SharedShape) -> tuple[Choice, dict[str, object]]:
    """The layout of heads wider than the base's, in a class that says a head_dim, and what else `ExportPlan` needs."""
    family = find_family(base.config)
    rope = rope_of(base.config, heads)
    widened = replace(base, config=wide_config(base.config, heads, rope, family))
    shape = replace(heads.base, head_dim=heads.head_dim, rotary_dim=heads.rotary_dim)
    stand_in = family.wide_as or family.padded_as
    classes = None
    if stand_in is not None and stand_in.can_replace(base.config):
        classes = _classes_of(widened, stand_in)
    if classes is None:
        stand_in = None
        candidates = _stored_once(widened, groups, family, shape)
    else:
        candidates = [(*classes, groups.max_group_size * shape.queries_per_kv, stand_in.sets)]
    choice = _first_accepted(candidates, widened, groups, shape)
    if stand_in is not None and rope.short_factor != rope.long_factor:
        warnings.warn(
            f"{base.model_class.__name__} recomputes its cache when generation passes "
            f"{rope.original_max_position_embeddings} tokens, where its rotary frequencies change; "
            f"{choice[0].model_class.__name__} does not. Let no sequence pass that limit on a cache begun below it, "
            "or leave head_dim unset.",
            stacklevel=6,  # who called merge_and_unload
        )
    query_scale = 1.0
    if not family.scale_in_config:
        # The stock class divides scores by sqrt(W), the base by sqrt(D).
        query_scale = math.sqrt(heads.head_dim / heads.base.head_dim)
    return choice, {"query_scale": query_scale, "rotary_scale": rope.scores_scale, "stand_in": stand_in}


def _stored_once(base: StockModel, groups: HeadGroups, family: Family, shape: HeadShape) -> Iterator[Candidate]:
    """(model class, configuration class, slots per K/V head, values to set), best first; no K/V head twice."""
    largest = groups.max_group_size * shape.queries_per_kv
    # CTranslate2 reads an explicit head dimension in the padded class only.
    explicit = shape.head_dim * shape.num_attention_heads != shape.hidden_size
    if (explicit or not _are_equal(groups)) and (padded := _padded_class(base, family)):
        yield *padded, largest, family.padded_as.sets
    for slots in range(largest, 2 * largest + 1):  # over-padded: some classes want hidden_size % slots == 0
        yield base.model_class, type(base.config), slots, {}


def _plan_duplicated(
    base: StockModel, groups: HeadGroups, family: Family, shape: HeadShape, cached_tokens: int
) -> Choice | None:
    """The layout of fewest bytes among those with less slots per K/V head than the largest group has query heads.

    None for equal groups, which have no padding to save; where all have as many K/V heads as the base; and where the
    keys' norm spans all stored heads: a head stored twice would count twice in it.
    """
    if _are_equal(groups) or family.key_norm:
        return None
    laid = {slots: _layouts(groups, shape, slots) for slots in range(1, groups.max_group_size * shape.queries_per_kv)}
    smaller = [slots for slots, layouts in laid.items() if layouts[0].kv_heads < shape.base_kv_heads]
    # Of equal ones that with the smaller cache.
    cheapest = sorted(smaller, key=lambda slots: (_bytes(laid[slots], shape, cached_tokens), laid[slots][0].kv_heads))
    own, padded = (base.model_class, type(base.config)), _padded_class(base, family)
    needs_padded = {slots: padded and laid[slots][0].num_slots != shape.num_attention_heads for slots in cheapest}
    candidates = (
        (*padded, slots, family.padded_as.sets) if needs_padded[slots] else (*own, slots, {}) for slots in cheapest
    )
    try:
        return _first_accepted(candidates, base, groups, shape)
    except ValueError:  # the caller tells of the refusal of whole groups
        return None


def _are_equal(groups: HeadGroups) -> bool:
    return {size for layer in range(len(groups.layers)) for size in groups.sizes(layer)} == {groups.max_group_size}


def _bytes(layouts: Sequence[SlotLayout], shape: HeadShape, cached_tokens: int) -> int:
    """Projection weights and cached K and V of all layers, in units of head_dim elements."""
    weights = sum(2 * shape.hidden_size * (layout.num_slots + layout.kv_heads) for layout in layouts)
    return weights + sum(2 * cached_tokens * layout.kv_heads for layout in layouts)


def _first_accepted(candidates: Iterable[Candidate], base: StockModel, groups: HeadGroups, shape: HeadShape) -> Choice:
    """The first candidate that its configuration class accepts, with its layouts."""
    refusal = None
    for model_class, config_class, slots, sets in candidates:
        layouts = _layouts(groups, shape, slots)
        try:
            config = _plain_config(config_class, base.config, layouts[0], shape, sets)
        except Exception as error:  # each version of transformers wraps a configuration's refusal in another class
            refusal = error
            continue
        return _stock(model_class, config, find_family(base.config)), layouts
    raise ValueError(
        f"No {type(base.config).__name__} holds {groups.num_key_value_heads} groups of up to "
        f"{groups.max_group_size * shape.queries_per_kv} query heads each. The last one tried says: "
        f"{_last_line(refusal)} The adapter is unchanged and stays usable; for a plain checkpoint train one with "
        "equal groups (grouping='symmetric') or another num_key_value_heads."
    ) from refusal


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].strip()


def _layouts(groups: HeadGroups, shape: HeadShape, slots_per_kv: int) -> tuple[SlotLayout, ...]:
    """All layers with as many stored K/V heads as the layer that needs most: a stock model has one number."""
    layouts = [slot_layout(partition, shape.queries_per_kv, slots_per_kv) for partition in groups.layers]
    kv_heads = max(layout.kv_heads for layout in layouts)
    return tuple(_widened(layout, kv_heads) for layout in layouts)


def _widened(layout: SlotLayout, kv_heads: int) -> SlotLayout:
    """The layout with further copies of the first group's K/V head, whose slots stay empty."""
    missing = kv_heads - layout.kv_heads
    return replace(
        layout,
        kv_source=layout.kv_source + (0,) * missing,
        head_of_slot=layout.head_of_slot + (-1,) * (missing * layout.slots_per_kv),
    )


def _stock(model_class, config: PretrainedConfig, family: Family) -> StockModel:
    config.architectures = [model_class.__name__]
    _write_rope_fields(config, family)
    return StockModel(model_class, config)


def _plan_fixed_slots(base: StockModel, groups: HeadGroups, family: Family, shape: HeadShape) -> Choice:
    """Exactly H slots: as many per K/V head as divide every group, large groups stored more than once."""
    sizes = [len(group) * shape.queries_per_kv for partition in groups.layers for group in partition]
    slots_per_kv = math.gcd(*sizes) if family.grouped else 1
    kv_heads = shape.num_attention_heads // slots_per_kv
    if kv_heads > groups.num_key_value_heads:
        shrinks = "shrinks less than the adapter's" if kv_heads < shape.base_kv_heads else "does not shrink"
        warnings.warn(
            f"{type(base.config).__name__} cannot express these groups: the plain checkpoint stores {kv_heads} KV "
            f"heads, not {groups.num_key_value_heads}, so its cache {shrinks}. Its logits are the adapter's.",
            stacklevel=7,  # who called merge_and_unload
        )
    config = copy.deepcopy(base.config)
    if family.grouped:
        config.num_key_value_heads = kv_heads
    return _stock(base.model_class, config, family), _layouts(groups, shape, slots_per_kv)


def _padded_class(base: StockModel, family: Family) -> tuple[type, type] | None:
    """Model and configuration class that stand in for padded slots, if the base qualifies."""
    if family.padded_as is None or not family.padded_as.can_replace(base.config):
        return None
    return _classes_of(base, family.padded_as)


def _classes_of(base: StockModel, stand_in: StandIn) -> tuple[type, type] | None:
    """Its model class for the base's task, and its configuration class; None where it has no such model."""
    config_class = CONFIG_MAPPING[stand_in.model_type]
    own = type(base.config).__name__.removesuffix("Config")
    model_name = base.model_class.__name__.replace(own, config_class.__name__.removesuffix("Config"), 1)
    model_class = getattr(transformers, model_name, None)
    if model_class is None:
        return None
    return model_class, config_class


def _plain_config(config_class, config, layout: SlotLayout, shape: HeadShape, sets: dict) -> PretrainedConfig:
    """The plain configuration; raises whatever its class raises where it refuses the number of slots."""
    values = config.to_dict()
    values.pop("model_type", None)
    # What a merge wrote for older engines goes before rope_parameters, and would stand for the base's.
    values.pop("rope_scaling", None)
    if config_class is not type(config):
        own = config_class().to_dict()
        values = {name: value for name, value in values.items() if name in own}
    values |= {"num_attention_heads": layout.num_slots, "num_key_value_heads": layout.kv_heads} | sets
    if layout.num_slots != shape.num_attention_heads or values.get("head_dim") is not None:
        values["head_dim"] = shape.head_dim
    plain = config_class.from_dict(values)
    plain._attn_implementation = config._attn_implementation
    return plain


def _write_rope_fields(config: PretrainedConfig, family: Family) -> None:
    """Write the top-level RoPE fields that engines written for transformers 4 read; transformers 5 takes both."""
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict) or "rope_theta" not in parameters:
        return
    for entry, name in family.rope_fields.items():
        if entry in parameters:
            setattr(config, name, parameters[entry])
    if parameters.get("rope_type", "default") != "default":
        scaling = {entry: value for entry, value in parameters.items() if entry not in family.rope_fields}
        # Past the property of this name, which stands for rope_parameters and warns on assignment.
        vars(config)["rope_scaling"] = scaling
