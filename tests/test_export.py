"""The plain checkpoint: stock class, stock configuration, the adapter's logits, fewer heads in the cache."""

from __future__ import annotations

import copy
import json
import random
import re
import subprocess
import sys
import warnings
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import peft
import pytest
import torch
import transformers
from accelerate.utils import check_device_map
from hypothesis import given
from hypothesis import strategies as st
from models import (
    CACHE,
    CASES,
    EQUAL_GROUPS,
    GROUPS,
    HEADS,
    MHA_GROUPS,
    adapted,
    config_of,
    left_padded,
    logits,
    prompt,
    random_model,
    stock,
    tiny_llama,
    wrap,
)
from peft import LoraConfig, get_peft_model
from reference import dense_reference, greedy_alone, relative_error, rows_alone
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
)

import asymgqa_peft
from asymgqa_peft import AsymGQAConfig, export_report
from asymgqa_peft.adapter import export
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
EQUAL_OF_6 = [[[0, 3], [1, 5], [2, 4]]] * 2


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
    read = type(it.plain.config).from_pretrained(it.folder)
    assert read.num_attention_heads == heads
    assert getattr(read, "num_key_value_heads", heads) == kv_heads
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
    old_names = {"rope_theta", "rope_scaling", "partial_rotary_factor"}
    assert changed <= {"num_key_value_heads", "query_heads_permuted"} | old_names
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
    tied = {name for name, it in exported.items() if it.facts["tied"]}
    assert tied == {"llama-equal", "opt-bare", "gpt_neox-equal"}
    plain = exported["llama-equal"].plain
    assert plain.lm_head.weight is plain.model.embed_tokens.weight


def test_the_plain_configuration_says_whether_heads_were_permuted(exported):
    """Adapters of the base would load onto equal groups without a word."""
    for name, it in exported.items():
        if it.plain is None:
            continue
        says = json.loads((it.folder / "config.json").read_text()).get("query_heads_permuted", False)
        slots = [layout.slot_of_head for layout in it.plain.export_plan.layouts]
        assert says == (set(slots) != {tuple(range(HEADS))}), name
    in_order = wrap(tiny_llama(), [[[0, 1], [2, 3], [4, 5]]] * 2).merge_and_unload()
    assert not hasattr(in_order.config, "query_heads_permuted")


DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0}


@pytest.mark.parametrize("rope", [DYNAMIC_ROPE, LONG_ROPE | {"original_max_position_embeddings": 16}])
@torch.no_grad()
def test_the_plain_model_starts_without_the_state_of_a_long_input(rope, tmp_path):
    """Frequencies that follow the length of the input are those of its own inputs."""
    base = tiny_llama(rope_parameters=rope, max_position_embeddings=16)
    model = wrap(base, EQUAL_OF_6)
    short, long = prompt(), prompt(2, 48)
    expected = [model(ids).logits for ids in (short, long)]
    model(long)
    plain = model.merge_and_unload()
    plain.save_pretrained(tmp_path)
    for each in (plain, AutoModelForCausalLM.from_pretrained(tmp_path)):
        for ids, wanted in zip((short, long, short), (*expected, expected[0]), strict=True):
            torch.testing.assert_close(each(ids).logits, wanted, rtol=1e-4, atol=1e-4)


def test_what_training_left_in_the_configuration_is_not_saved(tmp_path):
    model = wrap(tiny_llama(), EQUAL_OF_6)
    model.config.use_cache = model.generation_config.use_cache = False  # as the Trainer does
    model.merge_and_unload().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["use_cache"] is True
    assert json.loads((tmp_path / "generation_config.json").read_text()).get("use_cache", True) is True


INVALID = {  # generation flags that cannot be saved -> what is left of them and the others
    "ignored by greedy decoding": (
        {"do_sample": False, "temperature": 0.6, "top_p": 0.9},
        {"repetition_penalty": 1.5},
    ),
    "of beams": ({"num_return_sequences": 3, "early_stopping": True, "length_penalty": 2.0}, {"max_length": 30}),
    "no padding": ({"pad_token_id": -1}, {"do_sample": True, "temperature": 0.6}),
    "outright wrong": ({"max_new_tokens": -1}, {"repetition_penalty": 1.5}),
    "an argument of generate": ({"streamer": 1}, {}),
}


@pytest.mark.parametrize("why", INVALID)
def test_an_invalid_generation_configuration_does_not_stop_saving(why, tmp_path):
    wrong, right = INVALID[why]
    model = wrap(tiny_llama(), EQUAL_OF_6)
    for name, value in (wrong | right).items():
        setattr(model.generation_config, name, value)
    with pytest.raises(ValueError, match="Fix these issues"):
        model.generation_config.save_pretrained(tmp_path / "as it is")
    with pytest.warns(UserWarning, match="generation configuration cannot be saved as it is.*were dropped") as caught:
        plain = model.merge_and_unload()
    assert [warning.filename for warning in caught if "were dropped" in str(warning.message)] == [__file__]
    plain.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert {name: saved.get(name) for name in right} == right
    assert all(getattr(model.generation_config, name) == value for name, value in wrong.items())  # the base's own


def test_code_of_the_base_is_not_named_in_a_stock_checkpoint(tmp_path):
    base = tiny_llama()
    base.config.auto_map = {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    base.config.custom_pipelines = {"x": {"impl": "x.X"}}
    for groups in (EQUAL_OF_6, GROUPS["llama"]):
        model = wrap(copy.deepcopy(base), groups)
        expected = model(prompt()).logits
        model.merge_and_unload().save_pretrained(tmp_path)
        assert {"auto_map", "custom_pipelines"}.isdisjoint(json.loads((tmp_path / "config.json").read_text()))
        again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
        torch.testing.assert_close(again(prompt()).logits, expected, rtol=1e-4, atol=1e-4)


def test_hooks_that_stay_behind_are_told():
    base = tiny_llama()
    for layer, name in ((0, "k_proj"), (1, "o_proj")):
        getattr(base.model.layers[layer].self_attn, name).register_forward_hook(lambda *_: None)
    base.enable_input_require_grads()  # a hook of transformers' own
    model = wrap(base, GROUPS["llama"])
    hooked = "model.layers.0.self_attn.k_proj, model.layers.1.self_attn.o_proj"
    with pytest.warns(UserWarning, match=f"Forward hooks on {hooked} do not come along") as caught:
        model.merge_and_unload()
    assert [warning.filename for warning in caught if "Forward hooks" in str(warning.message)] == [__file__]


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
        pairs = it.plain.base_model.rotary_emb.inv_freq.numel()
        assert len(base["short_factor"]) == len(base["long_factor"]) == pairs
    assert it.facts["rope_parameters"] == base
    assert saved["rotary_emb_base" if it.plain.config.model_type == "gpt_neox" else "rope_theta"] == base["rope_theta"]
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


TASKS = {
    "gpt_neox": {"SequenceClassification": "Phi", "TokenClassification": "Phi", "QuestionAnswering": "GPTNeoX"},
    "opt-single": {"SequenceClassification": "GPTBigCode", "QuestionAnswering": "OPT"},
}


@pytest.mark.parametrize(("name", "task"), [(name, task) for name, tasks in TASKS.items() for task in tasks])
@torch.no_grad()
def test_other_tasks_become_the_stand_in_where_it_has_them(name: str, task: str):
    config = config_of(CASES[name])
    base = getattr(transformers, f"AutoModelFor{task}").from_config(config)
    model = wrap(base, CASES[name].groups, task_type=None)
    before = model(prompt())[0]
    plain, warned = _merge(model)
    assert type(plain).__name__ == f"{TASKS[name][task]}For{task}"
    assert [f"which has no For{task}" in text for text in warned] == [True] * (task == "QuestionAnswering")
    torch.testing.assert_close(plain(prompt())[0], before, rtol=1e-4, atol=1e-5)


STAY_MULTI_HEAD = {
    "gpt_neox-serial": (MHA_GROUPS, "no stock class holds them but phi, .*use_parallel_residual=True"),
    "opt": (MHA_GROUPS, "gpt_bigcode would hold num_key_value_heads=1"),
    "opt-350m": (CASES["opt-single"].groups, "gpt_bigcode, .*do_layer_norm_before=True.*word_embed_proj_dim=64"),
}
OPT_350M = replace(CASES["opt-single"], overrides={**CASES["opt"].overrides, "word_embed_proj_dim": 32})


@pytest.mark.parametrize("name", STAY_MULTI_HEAD)
def test_a_checkpoint_that_stays_multi_head_says_why(name: str):
    groups, reason = STAY_MULTI_HEAD[name]
    base = random_model(config_of(OPT_350M)) if name == "opt-350m" else copy.deepcopy(stock(name))
    model = wrap(base, groups)
    before = model(prompt()).logits
    plain, warned = _merge(model)
    assert len(warned) == 1 and re.search(reason, warned[0])
    assert type(plain) is type(base)
    assert (plain(prompt()).logits - before).abs().max() < TOLERANCE * before.abs().max()


def _with_large_norms(name: str):
    """A case's base whose norms scale by about -3 to 3 and shift by as much."""
    base, generator = copy.deepcopy(stock(name)), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, parameter in base.named_parameters():
            if "norm" in key:
                parameter.copy_(1.5 * torch.randn(parameter.shape, generator=generator))
    return base


LINEAR = ["dense", "dense_h_to_4h", "dense_4h_to_h"]
TRAINED_WHOLE = ["input_layernorm", "post_attention_layernorm", "final_layer_norm", "lm_head"]


@pytest.mark.parametrize("fields", [{}, {"target_modules": LINEAR}, {"modules_to_save": TRAINED_WHOLE}])
@pytest.mark.parametrize("name", ["gpt_neox", "gpt_neox-equal", "gpt_neox-wide"])
@torch.no_grad()
def test_norms_are_folded_whatever_their_scale_and_whatever_is_trained(name: str, fields: dict):
    case = CASES[name]
    model = wrap(_with_large_norms(name), case.groups, head_dim=case.head_dim, **fields)
    inputs = left_padded()
    expected = model(**inputs).logits
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    plain, _ = _merge(model)
    assert type(plain).__name__ == "PhiForCausalLM"
    for layer in plain.model.layers:
        assert (layer.input_layernorm.weight == 1).all() and not layer.input_layernorm.bias.any()
    assert not plain.lm_head.bias.any()
    found = plain(**inputs, use_cache=True)
    mask = inputs["attention_mask"].bool()
    assert (found.logits - expected)[mask].abs().max() < TOLERANCE * expected[mask].abs().max()
    assert torch.equal(plain.generate(**inputs, max_new_tokens=6, do_sample=False), tokens)
    heads = {layer.keys.shape[1:4:2] for layer in found.past_key_values.layers}
    assert heads == {(case.num_groups, case.head_dim or 8)}


@pytest.mark.parametrize("name", ["gpt_neox", "gpt_neox-equal"])
@torch.no_grad()
def test_with_all_of_its_heads_gpt_neox_is_a_phi(name: str):
    base = _with_large_norms(name)
    config = AsymGQAConfig(num_key_value_heads=HEADS, grouping="neighbour", merge="mean", task_type="CAUSAL_LM")
    plain, warned = _merge(get_peft_model(copy.deepcopy(base), config))
    assert type(plain).__name__ == "PhiForCausalLM" and plain.config.num_key_value_heads == HEADS and not warned
    expected = base(prompt()).logits
    assert (plain(prompt()).logits - expected).abs().max() < TOLERANCE * expected.abs().max()


@torch.no_grad()
def test_a_head_trained_in_fp32_over_a_bf16_base():
    model = wrap(copy.deepcopy(stock("gpt_neox")).bfloat16(), MHA_GROUPS, modules_to_save=["lm_head"])
    model.base_model.model.lm_head.float()
    plain, _ = _merge(model)
    assert {plain.lm_head.weight.dtype, plain.lm_head.bias.dtype} == {torch.float32}
    assert plain.model.layers[0].self_attn.dense.bias.dtype == torch.bfloat16


@torch.no_grad()
def test_folding_in_bf16_costs_no_more_than_bf16_does():
    base = _with_large_norms("gpt_neox").bfloat16()
    model = wrap(base, MHA_GROUPS)
    exact = copy.deepcopy(model).double()(prompt()).logits
    own = (model(prompt()).logits - exact).abs().max()
    plain, _ = _merge(model)
    assert plain.dtype == torch.bfloat16 and {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    assert (plain(prompt()).logits - exact).abs().max() < 2 * own < 0.1 * exact.abs().max()


def test_a_model_on_several_devices_stays_there_under_its_new_names(monkeypatch):
    base, maps = copy.deepcopy(stock("gpt_neox")), []
    places = ["embed_in", "emb_dropout", "layers.0", "layers.1", "final_layer_norm", "rotary_emb"]
    base.hf_device_map = {f"gpt_neox.{place}": 0 for place in places} | {"lm_head": 0, "gpt_neox.layers.1": 1}
    monkeypatch.setattr(export, "dispatch_model", lambda plain, device_map: maps.append(device_map) or plain)
    plain, _ = _merge(wrap(base, MHA_GROUPS))
    (device_map,) = maps
    assert [name for name, device in device_map.items() if device == 1] == ["model.layers.1"]
    check_device_map(plain, device_map)  # raises where a parameter has no place
    for name in device_map:
        plain.get_submodule(name)


def test_a_map_to_one_device_does_not_move_a_model_that_has_moved_since(monkeypatch):
    base = copy.deepcopy(stock("llama"))
    base.hf_device_map = {"": 0}
    monkeypatch.setattr(export, "dispatch_model", lambda plain, device_map: plain.to("meta"))
    plain, _ = _merge(wrap(base, MHA_GROUPS))
    assert plain.device == torch.device("cpu")


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_buffers_without_a_place_in_the_files_are_where_the_model_is(name: str):
    plain, _ = _merge(adapted(name).to("meta"))
    unsaved = {key for key, _ in plain.named_buffers()} - set(plain.state_dict())
    assert {key.rpartition(".")[2] for key in unsaved} == {"inv_freq", "original_inv_freq"}
    assert all(buffer.is_meta for buffer in plain.buffers())


def test_positions_that_padding_counts_for_are_warned_about():
    """GPTBigCode's forward counts positions from the first column, OPT's from the first real token."""
    inputs, model = left_padded(), adapted("opt-single")
    with torch.no_grad():
        expected = model(**inputs).logits
        tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        with pytest.warns(
            UserWarning, match="GPTBigCodeForCausalLM counts positions .* give its forward position_ids"
        ):
            plain = model.merge_and_unload()
        mask = inputs["attention_mask"].bool()
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
        given, counted = plain(**inputs, position_ids=positions).logits, plain(**inputs).logits
    bound = TOLERANCE * expected[mask].abs().max()
    assert (given - expected)[mask].abs().max() < bound < (counted - expected)[mask].abs().max()
    assert torch.equal(plain.generate(**inputs, max_new_tokens=6, do_sample=False), tokens)


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
    model = wrap(base, case.groups, initialized=True)  # as from a file, a new one is refused
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
    "gpt_neox": (LOPSIDED, (10, 5)),
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


@torch.no_grad()
def test_epsilon_has_the_same_share_in_a_norm_over_empty_slots():
    """Of queries that are no larger than the root of it."""
    base = random_model(config_of(replace(CASES["olmo2"], overrides=CASES["olmo2"].overrides | {"rms_norm_eps": 0.5})))
    model = wrap(base, LOPSIDED)
    expected = model(prompt()).logits
    plain = model.merge_and_unload()
    assert plain.config.num_attention_heads > HEADS
    assert (plain(prompt()).logits - expected).abs().max() < TOLERANCE * expected.abs().max()


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
@pytest.mark.parametrize(
    "name",
    ["llama", "llama-equal", "llama-gqa", "phi3", "olmo2", "opt", "opt-single", "gpt_neox", "a trained head"],
)
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
@pytest.mark.parametrize("name", ["llama", "llama-equal", "llama-wide", "phi3-gqa", "gpt_neox", "opt-single"])
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


def test_merging_holds_the_merged_layers_beside_the_model_and_drops_the_old_ones():
    """Both are there until the plain model is whole."""
    sizes = {"hidden_size": 256, "num_attention_heads": 16, "num_key_value_heads": 16, "intermediate_size": 688}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=512, num_hidden_layers=6, **sizes)).bfloat16()
    layer = sum(parameter.nbytes for parameter in base.model.layers[0].parameters())
    model = wrap(base, [[[0, 1, 2, 3, 4, 5], [6, 7, 8, 9], [10, 11, 12], [13, 14, 15]]] * 6)
    with Storages(model) as storages:
        plain = model.merge_and_unload()
        merged = storages.bytes()
    built = sum(parameter.nbytes for parameter in plain.model.layers.parameters())
    assert storages.peak - storages.start <= built + layer
    held = sum(tensor.nbytes for tensor in [*plain.parameters(), *plain.buffers()])
    assert merged < held + layer < storages.start  # the adapter and the base's K/V are gone, whoever holds the base
    with Storages(plain) as storages:
        _ = copy.deepcopy(plain)
    assert storages.peak - storages.start > 5 * layer  # so much would have been seen


PROJECT = str(Path(asymgqa_peft.__file__).parent)
PEFT = str(Path(peft.__file__).parent)


def stopped_at(line: int | None, call) -> int:
    """Call, with an interrupt at the n-th line of this project's or PEFT's code; how many lines ran."""
    lines = 0

    def count(frame, event, _):
        nonlocal lines
        lines += event == "line"
        if lines == line:
            sys.settrace(None)
            raise KeyboardInterrupt
        return count

    sys.settrace(lambda frame, *_: count if frame.f_code.co_filename.startswith((PROJECT, PEFT)) else None)
    try:
        call()
    finally:
        sys.settrace(None)
    return lines


@pytest.mark.filterwarnings("ignore:The adapter's heads are means")
@pytest.mark.parametrize("name", ["llama-equal", "olmo2", "phi3-wide"])
def test_stopped_anywhere_a_merge_has_not_begun_or_is_done(name):
    model, outcomes = adapted(name), []
    reference, state = logits(model), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    lines = stopped_at(None, copy.deepcopy(model).merge_and_unload)
    points = random.Random(0).sample(range(1, lines), 12)
    for line in [*points, *range(lines - 5, lines + 1)]:
        with suppress(KeyboardInterrupt):
            stopped_at(line, model.merge_and_unload)
        found = logits(model)
        outcomes.append("lora_" in "".join(model.state_dict()))
        if outcomes[-1]:
            assert torch.equal(found, reference), f"line {line}"
            assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
        else:
            torch.testing.assert_close(found, reference, atol=1e-4, rtol=0, msg=f"line {line}")
            model = adapted(name)
    assert outcomes.count(True) > 10 and not all(outcomes)


@pytest.mark.parametrize("name", ["llama", "olmo2", "phi3-wide"])
def test_stopped_anywhere_the_adapter_is_still_there_or_gone(name):
    base, outcomes = logits(stock(name)), []
    model = adapted(name)
    reference, state = logits(model), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    lines = stopped_at(None, copy.deepcopy(model).unload)
    for line in [*random.Random(0).sample(range(1, lines), 20), *range(lines - 5, lines + 2)]:
        with suppress(KeyboardInterrupt):
            stopped_at(line, model.unload)
        outcomes.append(hasattr(model.base_model.model, "peft_config"))
        found = logits(model.base_model.model)
        if outcomes[-1]:
            assert torch.equal(found, reference), f"line {line}"
            assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
        else:
            assert torch.equal(found, base), f"line {line}"
            model = adapted(name)
    assert outcomes.count(True) > 10 and not all(outcomes)
