"""An independent dense float64 model of what an adapter must compute.

It knows nothing of slots, hooks, tuner layers or export: it takes the stock model and the adapter's state dict, merges
LoRA by hand, copies each shared K/V head back to every base head of its group, and folds the query gains and mixes
into q_proj and the value mixes into o_proj, head by head. What comes out is the base's own class with K heads.
Of wide heads it makes every query head's own key and value instead: the same class, multi-head. Behind norms of
queries and keys every head is as wide as the shared ones, because the norms are.
"""

from __future__ import annotations

import copy
import itertools
from functools import partial

import torch
from torch import nn

NORM_OFFSET = {"qwen3": 0.0, "olmo2": 0.0, "gemma3_text": 1.0}
FUSED = {"phi3": "qkv_proj", "gpt_neox": "query_key_value"}
OUTPUT = {"phi": "dense", "gpt_neox": "dense", "opt": "out_proj"}


class RootMeanSquareNorm(nn.Module):
    """A norm over the last dimension, whatever it is."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows * (rows.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight


class GroupedKeyNorm(nn.Module):
    """OLMo-2's k_norm under shared keys: the mean square is over the G shared heads, not over their copies."""

    def __init__(self, weight: torch.Tensor, group_of: list[int], head_dim: int, eps: float) -> None:
        super().__init__()
        self.weight, self.group_of, self.head_dim, self.eps = weight, group_of, head_dim, eps

    def forward(self, keys: torch.Tensor) -> torch.Tensor:
        heads = keys.unflatten(-1, (-1, self.head_dim))
        firsts = [self.group_of.index(group) for group in sorted(set(self.group_of))]
        shared = heads[..., firsts, :].flatten(-2)
        shared = shared * (shared.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight
        shared = shared.unflatten(-1, (-1, self.head_dim))
        return shared[..., self.group_of, :].flatten(-2)


@torch.no_grad()
def dense_reference(base: nn.Module, adapter: nn.Module, groups, scaling: float = 2.0, name: str = "default"):
    """The stock class in float64 with eager attention that computes what `adapter` on `base` must compute."""
    model = copy.deepcopy(base).double().eval()
    model.set_attn_implementation("eager")
    state = _below(adapter.state_dict(), "base_model.model.")
    _merge_lora(model, state, scaling, name)
    attentions = [m for m in model.named_modules() if m[0].endswith((".self_attn", ".attention"))]
    for (path, attention), partition in zip(attentions, groups, strict=True):
        _expand(attention, model.config, _below(state, path + "."), partition, name)
    return model


def _below(state: dict, prefix: str) -> dict[str, torch.Tensor]:
    """What stands under a prefix, in float64 and without the prefix."""
    found = {}
    for key, value in state.items():
        if key.startswith(prefix):
            found[key.removeprefix(prefix)] = value.detach().double()
    return found


def _merge_lora(model: nn.Module, state: dict, scaling: float, name: str) -> None:
    merged = 0
    for path, module in model.named_modules():
        down, up = (state.get(f"{path}.{part}.{name}.weight") for part in ("lora_A", "lora_B"))
        if down is not None:
            module.weight += scaling * up @ down
            merged += 1
    assert merged, "the adapter has no LoRA"


def _expand(attention: nn.Module, config, state: dict, partition, name: str) -> None:
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", heads)
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    group_of = [0] * kv_heads
    for group, members in enumerate(partition):
        for kv_head in members:
            group_of[kv_head] = group
    fused = FUSED.get(config.model_type)
    shared_key, shared_value = _shared(state, fused, len(partition), name)
    rows = _rows(getattr(attention, fused or "q_proj"), dim)
    query = list(rows[: 3 * heads : 3] if config.model_type == "gpt_neox" else rows[:heads])
    if config.model_type in NORM_OFFSET:
        _expand_normed(attention, config, state, query, shared_key, shared_value, group_of, name)
        return
    if shared_key.shape[1] != dim:
        _expand_wide(attention, config, state, query, shared_key, shared_value, group_of, name)
        return
    query = [_query_matrix(state, h, dim, name) @ query[h] for h in range(heads)]
    key, value = [shared_key[g] for g in group_of], [shared_value[g] for g in group_of]
    if config.model_type == "gpt_neox":
        _write(attention.query_key_value, list(itertools.chain(*zip(query, key, value, strict=True))))
    elif fused:
        _write(attention.qkv_proj, query + key + value)
    else:
        for projection, matrices in (("q_proj", query), ("k_proj", key), ("v_proj", value)):
            _write(getattr(attention, projection), matrices)
    output = getattr(attention, OUTPUT.get(config.model_type, "o_proj"))
    if (mix := _one(state, f"lora_value_mix.{name}.weight")) is not None:
        for h in range(heads):
            columns = slice(h * dim, (h + 1) * dim)
            output.weight[:, columns] = output.weight[:, columns] @ (torch.eye(dim).double() + mix[h])


def _expand_normed(attention, config, state: dict, query, shared_key, shared_value, group_of: list[int], name: str):
    """H heads of W dimensions, each with a copy of its shared K and V; norms over W, or over what shares a divisor."""
    heads, dim, width = len(query), query[0].shape[0], shared_key.shape[1]
    group_of_query = [group_of[h // (heads // len(group_of))] for h in range(heads)]
    matrix = _query_matrix if width == dim else partial(_wide_query_matrix, width=width)
    scale = 1 + _one(state, f"lora_query_scale.{name}.weight")
    mix = torch.eye(dim, width).double() + _one(state, f"lora_value_mix.{name}.weight")
    fitted = [matrix(state, h, dim, name=name) @ (scale[h][:, None] * query[h]) for h in range(heads)]
    key, value = [shared_key[g] for g in group_of_query], [shared_value[g] for g in group_of_query]
    for projection, matrices in (("q_proj", fitted), ("k_proj", key), ("v_proj", value)):
        _resize(getattr(attention, projection), heads * width)
        _write(getattr(attention, projection), matrices)
    columns = attention.o_proj.weight.unflatten(1, (heads, dim))
    mixed = torch.cat([columns[:, h] @ mix[h] for h in range(heads)], dim=1)
    attention.o_proj.in_features = heads * width
    attention.o_proj.weight = nn.Parameter(mixed, requires_grad=False)
    attention.head_dim, attention.num_key_value_groups = width, 1
    offset, eps = NORM_OFFSET[config.model_type], config.rms_norm_eps
    query_norm = _one(state, f"q_norm.lora_norm.{name}.weight") + offset
    key_norm = _one(state, f"k_norm.lora_norm.{name}.weight") + offset
    attention.q_norm, attention.k_norm = RootMeanSquareNorm(query_norm, eps), RootMeanSquareNorm(key_norm, eps)
    if config.model_type == "olmo2":
        attention.k_norm = GroupedKeyNorm(key_norm, group_of_query, width, eps)
    if width != dim:
        attention.register_forward_pre_hook(
            partial(_widened_positions, _one(state, f"lora_groups.{name}.frequencies").long()), with_kwargs=True
        )


def _widened_positions(frequencies: torch.Tensor, _module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    cos, sin = kwargs["position_embeddings"]
    columns = torch.cat([frequencies, frequencies + cos.shape[-1] // 2])
    return args, {**kwargs, "position_embeddings": (cos[..., columns], sin[..., columns])}


def _expand_wide(attention, config, state: dict, query, shared_key, shared_value, group_of: list[int], name: str):
    heads, dim = len(query), query[0].shape[0]
    key, value = [], []
    for h in range(heads):
        group = group_of[h // (heads // len(group_of))]
        # (M q) . z = q . (M^T z)
        key.append(_wide_query_matrix(state, h, dim, width=shared_key.shape[1], name=name).T @ shared_key[group])
        mix = torch.eye(dim, shared_value.shape[1]).double() + _one(state, f"lora_value_mix.{name}.weight")[h]
        value.append(mix @ shared_value[group])
    if config.model_type == "gpt_neox":
        _write(attention.query_key_value, list(itertools.chain(*zip(query, key, value, strict=True))))
    elif config.model_type in FUSED:
        _resize(attention.qkv_proj, 3 * heads * dim)
        _write(attention.qkv_proj, query + key + value)
        attention.num_key_value_heads = heads
    else:
        for projection, matrices in (("k_proj", key), ("v_proj", value)):
            _resize(getattr(attention, projection), heads * dim)
            _write(getattr(attention, projection), matrices)
    attention.num_key_value_groups = 1


def _resize(linear: nn.Linear, rows: int) -> None:
    linear.out_features = rows
    linear.weight = nn.Parameter(linear.weight.new_zeros(rows, linear.in_features), requires_grad=False)
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.weight.new_zeros(rows), requires_grad=False)


def _wide_query_matrix(state: dict, head: int, dim: int, *, width: int, name: str) -> torch.Tensor:
    """W x D: what one query head's gains and mix make of its query. Pairs of one frequency are neighbours."""
    gain = _one(state, f"lora_query_gain.{name}.weight")[head]
    frequencies = _one(state, f"lora_groups.{name}.frequencies").long().tolist()
    mix = _one(state, f"lora_query_mix.{name}.weight")
    pairs, rest = len(frequencies), 0 if mix is None else mix.shape[2]
    base_pairs = (dim - rest) // 2
    matrix = torch.zeros(width, dim).double()
    for pair, frequency in enumerate(frequencies):
        is_first = frequency not in frequencies[:pair]
        a, b = gain[pair, 0] + float(is_first), gain[pair, 1]
        matrix[pair, frequency], matrix[pair, frequency + base_pairs] = a, -b
        matrix[pair + pairs, frequency], matrix[pair + pairs, frequency + base_pairs] = b, a
    if mix is not None:
        matrix[2 * pairs :, dim - rest :] = torch.eye(width - 2 * pairs, rest).double() + mix[head]
    return matrix


def _one(state: dict, ending: str) -> torch.Tensor | None:
    found = [value for key, value in state.items() if key.endswith(ending)]
    assert len(found) <= 1, ending
    return found[0] if found else None


def _rows(linear: nn.Linear, dim: int) -> torch.Tensor:
    """Weight and bias as one matrix, the bias its last column, cut into blocks of `dim` rows."""
    bias = torch.zeros(linear.out_features).double() if linear.bias is None else linear.bias
    return torch.cat([linear.weight, bias[:, None]], dim=1).reshape(-1, dim, linear.in_features + 1)


def _write(linear: nn.Linear, blocks: list[torch.Tensor]) -> None:
    rows = torch.cat(blocks)
    linear.weight.copy_(rows[:, :-1])
    if linear.bias is not None:
        linear.bias.copy_(rows[:, -1])


def _shared(state: dict, fused: str | None, groups: int, name: str) -> list[torch.Tensor]:
    """Shared keys and values, each (G, W, E + 1)."""
    shared = []
    for projection in [fused] if fused else ["k_proj", "v_proj"]:
        weight = state[f"{projection}.lora_kv.{name}.weight"]
        bias = state.get(f"{projection}.lora_kv.{name}.bias", torch.zeros(weight.shape[0]).double())
        shared.append(torch.cat([weight, bias[:, None]], dim=1))
    return list(torch.cat(shared).unflatten(0, (2, groups, -1)))


def _query_matrix(state: dict, head: int, dim: int, name: str) -> torch.Tensor:
    """D x D: what one query head's gain (a 2 x 2 rotation and scale per rotary pair) and mix do to its query."""
    matrix = torch.eye(dim).double()
    gain = _one(state, f"lora_query_gain.{name}.weight")
    rotary = 0 if gain is None else 2 * gain.shape[1]
    for pair in range(rotary // 2):
        a, b = 1 + gain[head, pair, 0], gain[head, pair, 1]
        first, second = pair, pair + rotary // 2
        matrix[first, first], matrix[first, second] = a, -b
        matrix[second, first], matrix[second, second] = b, a
    if (mix := _one(state, f"lora_query_mix.{name}.weight")) is not None:
        matrix[dim - mix.shape[1] :, dim - mix.shape[1] :] += mix[head]
    return matrix


@torch.no_grad()
def rows_alone(model: nn.Module, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Logits (T_row, V) of each row run by itself, without its padding: what any padded batch must reproduce."""
    return [model(ids).logits[0] for ids in _without_padding(inputs)]


def _without_padding(inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The real tokens (1, T_row) of each row."""
    masks = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    return [ids[mask][None] for ids, mask in zip(inputs["input_ids"], masks, strict=True)]


@torch.no_grad()
def relative_error(model: nn.Module, inputs: dict[str, torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Largest logit difference at real tokens, relative to the largest expected logit."""
    logits = model(**inputs).logits.double()
    masks = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    assert [len(row) for row in expected] == masks.sum(1).tolist()
    wanted = torch.cat(expected)
    return ((logits[masks] - wanted).abs().max() / wanted.abs().max()).item()


@torch.no_grad()
def greedy_alone(model: nn.Module, inputs: dict[str, torch.Tensor], tokens: int) -> torch.Tensor:
    """Greedy continuation (B, tokens) of each row by itself: the plainest loop, no cache, no `generate`."""
    continuations = []
    for sequence in _without_padding(inputs):
        for _ in range(tokens):
            logits = model(sequence, use_cache=False).logits[:, -1]
            sequence = torch.cat([sequence, logits.argmax(-1, keepdim=True)], dim=1)
        continuations.append(sequence[0, -tokens:])
    return torch.stack(continuations)
