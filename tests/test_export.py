"""The plain checkpoint: stock class, stock configuration, the adapter's logits, fewer heads in the cache."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import (
    CACHE,
    CASES,
    EQUAL_GROUPS,
    HEADS,
    MHA_GROUPS,
    adapted,
    config_of,
    left_padded,
    prompt,
    random_model,
    stock,
    wrap,
)
from peft import LoraConfig, get_peft_model
from reference import dense_reference, greedy_alone, relative_error, rows_alone
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSequenceClassification, DynamicCache, LlamaConfig, LlamaForCausalLM

from asymgqa_peft import export_report
from asymgqa_peft.evaluate import kv_cache_bytes_per_token
from asymgqa_peft.groups import default_max_group_size, slot_layout

TOLERANCE = 1e-5  # of the largest logit, in fp32; measured 3e-7 to 9e-7
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
}
MORE_CASES = {
    "llama-equal-own-head-dim": replace(CASES["llama-equal"], overrides={}, plain_class="MistralForCausalLM"),
    "mistral-linear-rope": replace(CASES["mistral"], overrides={"rope_parameters": LINEAR_ROPE}),
    "qwen2-yarn": replace(CASES["qwen2"], overrides={"rope_parameters": YARN_ROPE}),
    "phi3-long-equal": replace(
        CASES["phi3-equal"],
        overrides={"rope_parameters": LONG_ROPE, "hidden_size": 64, "original_max_position_embeddings": 32},
    ),
}


@dataclass(frozen=True)
class Exported:
    """One merged model: in this process, and what a clean process saw of it."""

    folder: Path
    base: torch.nn.Module
    plain: torch.nn.Module
    reference: torch.nn.Module
    warned: list[str]
    facts: dict
    tensors: dict


def _merge(model) -> tuple[torch.nn.Module, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plain = model.merge_and_unload()
    ours = [str(w.message) for w in caught if "KV heads" in str(w.message)]
    assert all(w.filename == __file__ for w in caught if str(w.message) in ours)  # it points at the caller
    return plain, ours


def _bf16(name: str):
    return wrap(copy.deepcopy(stock(name)).bfloat16(), CASES[name].groups)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> dict[str, Exported]:
    """Every case merged and saved here, and loaded in one process that never imports us."""
    root = tmp_path_factory.mktemp("plain")
    bases = {name: stock(name) for name in CASES} | {n: random_model(config_of(c)) for n, c in MORE_CASES.items()}
    models = {name: adapted(name) for name in CASES}
    models |= {
        name: wrap(copy.deepcopy(bases[name]), case.groups, head_dim=case.head_dim)
        for name, case in MORE_CASES.items()
    }
    plain, warned, references = {}, {}, {}
    for name, model in models.items():
        groups = (CASES | MORE_CASES)[name].groups
        references[name] = dense_reference(bases[name], model, groups)
        model.generation_config.do_sample, model.generation_config.top_p = True, 0.75
        plain[name], warned[name] = _merge(model)
        plain[name].save_pretrained(root / name)
    for name in ("llama", "gemma2"):
        _merge(_bf16(name))[0].save_pretrained(root / f"{name}-bf16")
    torch.save(left_padded(), root / "inputs.pt")
    script = Path(__file__).with_name("plain_process.py")
    done = subprocess.run([sys.executable, "-I", str(script), str(root)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    facts, tensors = json.loads((root / "facts.json").read_text()), torch.load(root / "tensors.pt")
    result = {
        name: Exported(
            root / name, bases[name], plain[name], references[name], warned[name], facts[name], tensors[name]
        )
        for name in models
    }
    for name in ("llama-bf16", "gemma2-bf16"):
        result[name] = Exported(root / name, None, None, None, [], facts[name], tensors[name])
    return result


ALL_CASES = CASES | MORE_CASES


@pytest.mark.parametrize("name", ALL_CASES)
def test_a_clean_process_computes_the_same_logits_and_tokens(exported, name: str):
    inputs, it = left_padded(), exported[name]
    expected = rows_alone(it.reference, inputs)
    scale = max(row.abs().max() for row in expected)
    masks = inputs["attention_mask"].bool()
    rows = list(zip(it.tensors["logits"].double(), masks, expected, strict=True))
    assert max((row[mask] - e).abs().max() for row, mask, e in rows) < TOLERANCE * scale
    assert torch.equal(it.tensors["tokens"], greedy_alone(it.reference, inputs, tokens=6))
    before = [row.double() for row in it.base(**inputs).logits]
    assert max((row[m] - e).abs().max() for row, m, e in zip(before, masks, expected, strict=True)) > 0.1 * scale


@pytest.mark.parametrize("name", ALL_CASES)
def test_class_head_counts_and_cache(exported, name: str):
    it, case = exported[name], ALL_CASES[name]
    assert it.facts["problems"] == []
    assert it.facts["class"] == type(it.plain).__name__ == (case.plain_class or type(it.base).__name__)
    config = json.loads((it.folder / "config.json").read_text())
    heads, kv_heads = case.plain_counts
    assert config["num_attention_heads"] == heads
    assert config.get("num_key_value_heads", heads) == kv_heads
    assert it.facts["heads"] == [kv_heads] * 2
    assert "auto_map" not in config and "quantization_config" not in config
    assert not list(it.folder.glob("*.py")) and not list(it.folder.glob("adapter*"))


@pytest.mark.parametrize(
    "name", [name for name, case in ALL_CASES.items() if case.groups is EQUAL_GROUPS and case.plain_class is None]
)
def test_equal_groups_are_ordinary_gqa_of_the_same_class(exported, name: str):
    it = exported[name]
    assert type(it.plain) is type(it.base)
    assert it.plain.config.num_attention_heads == HEADS
    base, plain = it.base.config.to_dict(), it.plain.config.to_dict()
    changed = {key for key in plain if base.get(key) != plain[key]} - {"architectures", "dtype"}
    assert changed <= {"num_key_value_heads", "rope_theta", "rope_scaling", "partial_rotary_factor"}
    assert it.facts["parameters"] < sum(parameter.numel() for parameter in it.base.parameters())


@pytest.mark.parametrize("name", ALL_CASES)
def test_only_checkpoints_that_store_more_heads_than_the_adapter_warn(exported, name: str):
    it, case = exported[name], ALL_CASES[name]
    kv_heads = case.plain_counts[1]
    assert len(it.warned) == (kv_heads > case.num_groups)
    if it.warned:
        shrinks = "shrinks less than the adapter's" if kv_heads < case.kv_heads else "does not shrink"
        assert f"stores {kv_heads} KV heads, not {case.num_groups}, so its cache {shrinks}" in it.warned[0]


@pytest.mark.parametrize("name", ["llama-bf16", "gemma2-bf16"])
def test_bf16_stays_bf16(exported, name: str):
    assert exported[name].facts["dtype"] == "torch.bfloat16"
    assert json.loads((exported[name].folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_tied_embeddings_stay_tied_and_others_untied(exported):
    assert {name: it.facts["tied"] for name, it in exported.items()} == {n: n == "llama-equal" for n in exported}
    plain = exported["llama-equal"].plain
    assert plain.lm_head.weight is plain.model.embed_tokens.weight


def test_generation_config_is_kept(exported):
    assert all(exported[name].facts["top_p"] == 0.75 for name in ALL_CASES)


# OPT has no RoPE; Gemma-3 has two, whose old names have the values of all its checkpoints as defaults.
@pytest.mark.parametrize("name", [n for n, c in ALL_CASES.items() if c.model_type not in ("opt", "gemma3_text")])
def test_rope_is_written_for_engines_of_transformers_4_too(exported, name: str):
    """A reader that knows only the old top-level fields finds the same RoPE as one that knows rope_parameters."""
    it, case = exported[name], ALL_CASES[name]
    saved = json.loads((it.folder / "config.json").read_text())
    base = it.base.config.rope_parameters
    if case.head_dim is not None:  # a wide head's frequencies are written out; the logits prove them
        base = it.plain.config.rope_parameters
        assert base["rope_type"] == "longrope"
        assert len(base["short_factor"]) == len(base["long_factor"]) >= len(it.base.config.rope_parameters)
    assert it.facts["rope_parameters"] == base
    assert saved["rotary_emb_base" if case.model_type == "gpt_neox" else "rope_theta"] == base["rope_theta"]
    assert ("rope_scaling" in saved) == (base["rope_type"] != "default")
    del saved["rope_parameters"]
    assert type(it.plain.config).from_dict(saved).rope_parameters == base


def test_the_merged_model_can_be_wrapped_and_merged_again(exported):
    plain = copy.deepcopy(exported["llama"].plain)
    assert plain.config.rope_parameters["rope_type"] == "llama3"
    again = wrap(plain, [[[0, 2], [1]]] * 2)
    before = again(prompt()).logits
    merged, _ = _merge(again)
    assert merged.config.num_key_value_heads == 2
    assert merged.config.rope_parameters == exported["llama"].plain.config.rope_parameters
    assert (merged(prompt()).logits - before).abs().max() < TOLERANCE * before.abs().max()


def test_a_classifier_becomes_the_padded_class_of_its_kind():
    config = config_of(CASES["llama"])
    config.num_labels = 3
    base = AutoModelForSequenceClassification.from_config(config)
    model = wrap(base, MHA_GROUPS, task_type="SEQ_CLS")
    before = model(prompt()).logits
    plain, _ = _merge(model)
    assert type(plain).__name__ == "MistralForSequenceClassification" and plain.config.num_labels == 3
    torch.testing.assert_close(plain(prompt()).logits, before, rtol=1e-4, atol=1e-5)


REFUSED = {  # why: hidden_size 64 is no multiple of 3 p, Mistral has no biases; longrope's factors count head dims
    "llama": ({"attention_bias": True, "hidden_size": 64}, "No LlamaConfig holds 3 groups of up to 5 .*multiple"),
    "gemma2": ({"hidden_size": 64}, "No Gemma2Config holds 3 groups of up to 5 .*multiple"),
    "phi3": (MORE_CASES["phi3-long-equal"].overrides, "No Phi3Config holds 3 groups of up to 5 .*factor"),
}


@pytest.mark.parametrize("name", REFUSED)
@torch.no_grad()
def test_where_no_class_holds_the_groups_nothing_changes(name: str):
    overrides, message = REFUSED[name]
    case = CASES[name]
    base = random_model(config_of(replace(case, overrides=case.overrides | overrides)))
    untouched = copy.deepcopy(base)
    model = wrap(base, case.groups)
    before = model(prompt()).logits
    with pytest.raises(ValueError, match=f"(?s){message}.*grouping='symmetric'"):
        model.merge_and_unload()
    assert torch.equal(model(prompt()).logits, before)
    with model.disable_adapter():
        assert torch.equal(model(prompt()).logits, untouched(prompt()).logits)
    assert torch.equal(model.unload()(prompt()).logits, untouched(prompt()).logits)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_unload_gives_the_base_back(name: str):
    plain = adapted(name).unload()
    assert type(plain) is type(stock(name))
    assert plain.config.to_dict() == stock(name).config.to_dict()
    assert plain.state_dict().keys() == stock(name).state_dict().keys()
    assert torch.equal(plain(prompt()).logits, stock(name)(prompt()).logits)


@given(
    st.integers(1, 48).flatmap(
        lambda kv: st.tuples(st.just(kv), st.integers(1, 8), st.integers(1, kv), st.randoms(use_true_random=False))
    )
)
def test_default_cap_never_costs_parameters(drawn):
    """q/o of G p slots and K/V of G heads, in units of D E, against the base's 2 H + 2 K.

    The one exception: where even the evenest partition needs ceil(K / G) and that alone is too much,
    G r ceil(K / G) + G > H + K. For an MHA base this needs more than half of its heads.
    """
    base_kv_heads, queries_per_kv, groups, random = drawn
    heads = base_kv_heads * queries_per_kv
    cap = default_max_group_size(heads, base_kv_heads, groups)
    least = -(-base_kv_heads // groups)
    assert least <= cap <= max(least, -(-3 * base_kv_heads // (2 * groups)))
    members = list(range(base_kv_heads))
    random.shuffle(members)
    partition = [members[:cap]]
    for left in range(groups - 1, 0, -1):  # as unequal as the cap allows
        rest = members[sum(map(len, partition)) :]
        partition.append(rest[: min(cap, len(rest) - (left - 1))])
    layout = slot_layout(tuple(tuple(group) for group in partition), queries_per_kv)
    plain, base = 2 * layout.num_slots + 2 * layout.kv_heads, 2 * heads + 2 * base_kv_heads
    unavoidable = groups * queries_per_kv * least + groups > heads + base_kv_heads
    if unavoidable:
        assert cap == least
        assert queries_per_kv > 1 or 2 * groups > base_kv_heads
    else:
        assert plain <= base


def test_at_the_default_cap_real_modules_are_not_larger():
    groups = [[[0, 1, 2, 3], [4, 5], [6, 7]], [[4, 5, 6, 7], [0], [1, 2, 3]]]
    assert max(map(len, groups[0])) == default_max_group_size(HEADS, HEADS, 3)
    for name in ("llama", "mistral", "qwen2", "qwen3", "phi", "olmo", "olmo2"):
        plain, _ = _merge(wrap(copy.deepcopy(stock(name)), groups))
        assert _attention_weights(plain) <= _attention_weights(stock(name)), name


def _attention_weights(model) -> int:
    """Weights of the projections; biases and norms, a share of 1 / E, are not counted."""
    return sum(p.numel() for name, p in model.named_parameters() if ".self_attn." in name and p.dim() == 2)


# Sizes 5, 2, 1 and 3, 3, 2: with three slots per K/V head the first layer stores four heads, the second needs three.
LOPSIDED = [[[6, 1, 3, 0, 7], [5, 2], [4]], [[2, 7, 0], [5, 3, 6], [1, 4]]]
DUPLICATED = {  # case: its groups, and slots and K/V heads for no cached token
    "llama": (LOPSIDED, (10, 5)),
    "llama-gqa": ([[[3, 0, 1], [2]], [[1], [3, 0, 2]]], (9, 3)),  # of two query heads each
    "llama-bias": (LOPSIDED, (12, 4)),  # as ten slots do not divide its hidden size of 96
    "qwen2": (LOPSIDED, (10, 5)),
    "qwen2-full-gqa": ([[[3, 0, 1], [2]], [[1], [3, 0, 2]]], (9, 3)),  # as Qwen2: Llama refuses nine slots
    "gemma2": (LOPSIDED, (12, 4)),
    "phi": (LOPSIDED, (10, 5)),
    "phi3": (LOPSIDED, (10, 5)),
}


def _duplicated(name: str, cached_tokens: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    """(reference, plain model with duplicates where they are cheaper)."""
    model = wrap(copy.deepcopy(stock(name)), DUPLICATED[name][0])
    reference = dense_reference(stock(name), model, DUPLICATED[name][0])
    return reference, model.merge_and_unload(duplicate_kv_heads=True, cached_tokens=cached_tokens)


@pytest.mark.parametrize("name", DUPLICATED)
def test_heads_stored_twice_compute_the_same(name: str):
    reference, plain = _duplicated(name, cached_tokens=0)
    config, groups = plain.config, DUPLICATED[name][0]
    assert (config.num_attention_heads, config.num_key_value_heads) == DUPLICATED[name][1]
    assert config.num_key_value_heads > len(groups[0])
    inputs = left_padded()
    assert relative_error(plain, inputs, rows_alone(reference, inputs)) < TOLERANCE
    cache = plain(**inputs, use_cache=True).past_key_values
    assert {layer.keys.shape[1] for layer in cache.layers} == {config.num_key_value_heads}


@pytest.mark.parametrize(("cached_tokens", "heads"), [(0, (10, 5)), (150, (12, 4)), (300, (15, 3)), (None, (10, 5))])
def test_the_choice_is_the_cheapest_in_bytes(cached_tokens: int | None, heads: tuple[int, int]):
    """By hand, in units of D: 2 E (slots + heads) + 2 heads tokens, E = 96, of 10/5, 12/4 and 15/3 slots/heads."""
    reference, plain = _duplicated("llama", cached_tokens)
    assert (plain.config.num_attention_heads, plain.config.num_key_value_heads) == heads
    assert relative_error(plain, left_padded(), rows_alone(reference, left_padded())) < TOLERANCE
    assert plain.config.max_position_embeddings < 90  # None stands for one sequence; from 96 tokens on 12/4 is cheaper


def test_a_norm_over_all_stored_heads_forbids_duplicates():
    model = wrap(copy.deepcopy(stock("olmo2")), LOPSIDED)
    plain = model.merge_and_unload(duplicate_kv_heads=True, cached_tokens=0)
    assert plain.config.num_key_value_heads == 3 and export_report(plain).other is None


def test_duplicates_fit_where_padding_does_not():
    overrides = {"attention_bias": True, "hidden_size": 80}  # 80 has no multiple of 3 up to 30, but 10 = 5 x 2
    model = wrap(random_model(config_of(replace(CASES["llama"], overrides=overrides))), LOPSIDED)
    before = model(prompt()).logits
    plain = model.merge_and_unload(duplicate_kv_heads=True)
    assert plain.config.num_key_value_heads == 5 and export_report(plain).other is None
    assert (plain(prompt()).logits - before).abs().max() < TOLERANCE * before.abs().max()


@pytest.mark.parametrize("duplicate", [False, True])
def test_report_counts_what_the_models_hold_and_shows_both_choices(duplicate: bool):
    plain = wrap(copy.deepcopy(stock("llama")), LOPSIDED).merge_and_unload(
        duplicate_kv_heads=duplicate, cached_tokens=0
    )
    unchosen = wrap(copy.deepcopy(stock("llama")), LOPSIDED).merge_and_unload(
        duplicate_kv_heads=not duplicate, cached_tokens=0
    )
    report = export_report(plain)
    for counted, model in ((report.base, stock("llama")), (report.plain, plain), (report.other, unchosen)):
        assert counted.parameters == model.num_parameters()
        assert counted.parameter_bytes == sum(parameter.nbytes for parameter in model.parameters())
        assert counted.model_class == type(model).__name__
        assert counted.kv_bytes_per_token == kv_cache_bytes_per_token(model, torch.float32)
        heads = (model.config.num_attention_heads, model.config.num_key_value_heads, 8)
        assert (counted.query_slots, counted.kv_heads, counted.head_dim) == heads
    assert report.plain != report.other
    later = export_report(plain, cached_tokens=1000)
    assert later.plain.total_bytes(1000) - later.plain.parameter_bytes == 1000 * later.plain.kv_bytes_per_token
    rows = [line.split() for line in str(report).splitlines()]
    assert ["kv_heads", "8", str(report.plain.kv_heads), str(report.other.kv_heads)] in rows
    assert json.loads(json.dumps(report.to_dict()))["plain"]["parameters"] == plain.num_parameters()


def test_report_of_tied_bf16_and_equal_groups(exported):
    plain = exported["llama-equal"].plain
    report = export_report(plain)
    assert report.other is None
    assert report.plain.parameters == plain.num_parameters() == exported["llama-equal"].facts["parameters"]
    assert report.base.parameters == stock("llama-equal").num_parameters()
    half = export_report(copy.deepcopy(plain).bfloat16())
    assert 2 * half.plain.parameter_bytes == report.plain.parameter_bytes
    assert 2 * half.base.kv_bytes_per_token == report.base.kv_bytes_per_token


def test_report_and_options_refuse_what_they_cannot_tell():
    with pytest.raises(ValueError, match="merge_and_unload"):
        export_report(stock("llama"))
    model = adapted("llama")
    with pytest.raises(ValueError, match="cached_tokens=-1"):
        model.merge_and_unload(duplicate_kv_heads=True, cached_tokens=-1)
    with pytest.raises(ValueError, match="cached_tokens=-1"):
        export_report(model, cached_tokens=-1)
    with pytest.raises(ValueError, match="prompt_tokens=0"):
        export_report(model, prompt_tokens=0)
    with pytest.raises(ValueError, match="is LoraModel, not AsymGQA"):
        export_report(get_peft_model(copy.deepcopy(stock("llama")), LoraConfig(task_type="CAUSAL_LM")))
    with pytest.raises(ValueError, match="duplicate_kv_heads=True comes too late"):
        export_report(adapted("llama").merge_and_unload(), duplicate_kv_heads=True)
    assert model.merge_and_unload().config.num_key_value_heads == 3  # nothing had changed


@pytest.mark.filterwarnings("ignore:.*cannot express these groups", "ignore:Input and output embeddings are no")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("duplicate", [False, True])
@pytest.mark.parametrize("tokens", [None, 0, 1000])
@pytest.mark.parametrize("name", ["llama", "llama-equal", "llama-gqa", "phi3", "olmo2", "opt", "a trained head"])
def test_the_report_is_the_same_before_merging(name: str, tokens: int | None, duplicate: bool):
    if name == "a trained head":
        model = wrap(copy.deepcopy(stock("llama-equal")), EQUAL_GROUPS, modules_to_save=["lm_head"])
    else:
        model = adapted(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    report = export_report(model, tokens, duplicate_kv_heads=duplicate)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    plain = model.merge_and_unload(duplicate_kv_heads=duplicate, cached_tokens=tokens)
    assert report == export_report(plain)
    assert report.plain.parameters == plain.num_parameters()


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("name", ["llama", "llama-equal", "llama-wide", "phi3-gqa", "gpt_neox"])
@pytest.mark.filterwarnings("ignore:.*cannot express these groups")
def test_prefill_operations_are_those_that_torch_counts(name: str, tokens: int):
    """Token by token, so that no operation is spent on a token that the causal mask hides."""
    plain = adapted(name).merge_and_unload()
    report = export_report(plain, prompt_tokens=tokens)
    for counted, model in ((report.base, stock(name)), (report.plain, plain)):
        cache = DynamicCache(config=model.config)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            for token in prompt(1, tokens).split(1, dim=1):
                model.base_model(token, **{CACHE: cache})
        operations = counter.get_flop_counts()
        rotary = [sum(count.values()) for module, count in operations.items() if module.endswith("rotary_emb")]
        assert counted.prefill_flops_per_token * tokens == counter.get_total_flops() - sum(rotary)
    if report.plain.query_slots > report.base.query_slots:  # empty slots cost
        long = export_report(plain, prompt_tokens=10**6)
        assert long.plain.prefill_flops_per_token > long.base.prefill_flops_per_token


def test_shards_and_tied_weights_in_the_files(exported, tmp_path):
    plain = exported["llama-equal"].plain
    plain.save_pretrained(tmp_path, max_shard_size="40KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) == len(list(tmp_path.glob("*.safetensors"))) > 1
    assert "model.embed_tokens.weight" in index and "lm_head.weight" not in index
    again = type(plain).from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in plain.state_dict().items())


class Storages(TorchDispatchMode):
    """Bytes of all tensor storages that are alive, and the most there were."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.add([*model.parameters(), *model.buffers()])
        self.start = self.peak = self.bytes()

    def add(self, tensors) -> None:
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                self.alive.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))

    def bytes(self) -> int:
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        return sum(size for _, size in self.alive.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.add(tree_leaves(result))
        self.peak = max(self.peak, self.bytes())
        return result


def test_merging_holds_the_model_and_at_most_one_layer():
    sizes = {"hidden_size": 256, "num_attention_heads": 16, "num_key_value_heads": 16, "intermediate_size": 688}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=512, num_hidden_layers=6, **sizes)).bfloat16()
    layer = sum(parameter.nbytes for parameter in base.model.layers[0].parameters())
    model = wrap(base, [[[0, 1, 2, 3, 4, 5], [6, 7, 8, 9], [10, 11, 12], [13, 14, 15]]] * 6)
    with Storages(model) as storages:
        plain = model.merge_and_unload()
        merged = storages.bytes()
    assert storages.peak - storages.start <= layer
    held = sum(tensor.nbytes for tensor in [*plain.parameters(), *plain.buffers()])
    assert merged < held + layer < storages.start  # the adapter and the base's K/V are gone
    with Storages(plain) as storages:
        _ = copy.deepcopy(plain)
    assert storages.peak - storages.start > 5 * layer  # so much would have been seen
