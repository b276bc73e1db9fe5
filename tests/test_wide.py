"""Shared heads wider than the base's: caches, generation, backends, files, the plain checkpoint, refusals.

`test_families` and `test_export` run the wide cases of `models.CASES` through what every family is checked for.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from models import (
    CACHE,
    CASES,
    EQUAL_GROUPS,
    GROUPS,
    HALVES,
    MHA_GROUPS,
    adapted,
    adapter_config,
    config_of,
    left_padded,
    perturb,
    prompt,
    random_model,
    stock,
    tiny_llama,
    train,
    wrap,
)
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from reference import dense_reference, relative_error, rows_alone
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    BitsAndBytesConfig,
    DynamicCache,
    PreTrainedModel,
    StaticCache,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from asymgqa_peft import AsymGQAConfig, export_report, initialize_asymgqa_weights
from asymgqa_peft.evaluate import kv_cache_bytes_per_token
from asymgqa_peft.initialize import walk

TOLERANCE = 1e-5  # of the largest logit, in fp32
WIDE = [name for name, case in CASES.items() if case.head_dim is not None]
GENERATING = ["llama-wide", "mistral-wide", "gemma2-wide", "phi3-wide-gqa"]


@cache
def plain(name: str) -> PreTrainedModel:
    """The merged model of a case. Shared: do not change it."""
    return adapted(name).merge_and_unload()


def groups_of(model: PeftModel) -> list:
    return model.base_model.head_groups("default").to_lists()


def tensors_named(model: torch.nn.Module, ending: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if name.endswith(ending)}


@torch.no_grad()
def logits(model: torch.nn.Module, ids: torch.Tensor | None = None) -> torch.Tensor:
    return model(input_ids=prompt() if ids is None else ids).logits


# --- caches ---


def cache_shapes(held) -> list[tuple[int, ...]]:
    shapes = []
    for layer in held.layers:
        assert layer.keys.shape == layer.values.shape
        shapes.append(tuple(layer.keys.shape))
    return shapes


def kept_tokens(config, tokens: int, static: bool) -> list[int]:
    """How many of `tokens` the cache of each layer has room for."""
    kept = []
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    if config.model_type == "mistral" and config.sliding_window:
        types = ["sliding_attention"] * config.num_hidden_layers
    for layer_type in types:
        if layer_type == "full_attention":
            kept.append(tokens)
        else:
            kept.append(config.sliding_window if static else config.sliding_window - 1)
    return kept


@pytest.mark.parametrize("how", ["dynamic", "static at first use", "static ahead", "static ahead, plain"])
@pytest.mark.parametrize("name", ["llama-wide", "llama-wide-odd", "mistral-wide", "gemma2-wide", "qwen2-wide-gqa"])
@torch.no_grad()
def test_caches_hold_g_heads_of_w(name: str, how: str):
    case, model = CASES[name], adapted(name)
    batch, tokens, room = 2, 12, 16
    if how == "dynamic":
        held, room = DynamicCache(config=model.config), tokens
    else:
        source = plain(name).config if how.endswith("plain") else model.config
        held = StaticCache(source, max_cache_len=room)
        if how.endswith("plain"):
            held.early_initialization(batch, source.num_key_value_heads, source.head_dim, model.dtype, model.device)
        elif how.endswith("ahead"):
            held.early_initialization(batch, case.num_groups, case.head_dim, model.dtype, model.device)
    chunks = [model(chunk, **{CACHE: held}).logits for chunk in prompt(batch, tokens).split([5, 1, 6], dim=1)]
    kept = kept_tokens(model.config, room, static=how != "dynamic")
    assert cache_shapes(held) == [(batch, case.num_groups, length, case.head_dim) for length in kept]
    expected = logits(model, prompt(batch, tokens))
    assert (torch.cat(chunks, 1) - expected).abs().max() < TOLERANCE * expected.abs().max()
    layer_bytes = 2 * case.num_groups * case.head_dim * 4
    assert kv_cache_bytes_per_token(model, torch.float32) == layer_bytes * len(kept)


# --- generation ---

WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 50},
    "beams": {"do_sample": False, "num_beams": 4, "num_return_sequences": 2},
    "static": {"do_sample": False, "cache_implementation": "static"},
    "static, allocated before a prefill in chunks": {
        "do_sample": False,
        "cache_implementation": "static",
        "prefill_chunk_size": 5,
    },
    "offloaded": {"do_sample": False, "cache_implementation": "offloaded"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", GENERATING)
def test_tokens_are_the_plain_models(name: str, way: str):
    if way == "offloaded" and not torch.cuda.is_available():
        pytest.skip("transformers offloads a cache from a CUDA device only")
    drawn = []
    for model in (adapted(name), plain(name), stock(name)):
        torch.manual_seed(3)
        drawn.append(model.generate(**left_padded(), max_new_tokens=8, **WAYS[way]))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("name", ["llama-wide", "mistral-wide"])
def test_assisted_generation_by_the_base(name: str):
    """Which keeps a cache of its own heads beside the adapter's."""
    model, options = adapted(name), {"max_new_tokens": 12, "do_sample": False}
    tokens = model.generate(prompt(1), assistant_model=copy.deepcopy(stock(name)), **options)
    assert torch.equal(tokens, plain(name).generate(prompt(1), **options))
    assert torch.equal(tokens, plain(name).generate(prompt(1), assistant_model=copy.deepcopy(stock(name)), **options))


def test_a_model_that_was_unloaded_allocates_its_own_cache_again():
    base = adapted("llama-wide").unload()
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static", "prefill_chunk_size": 5}
    assert torch.equal(base.generate(prompt(), **options), stock("llama-wide").generate(prompt(), **options))
    assert "_get_static_cache_init_shape" not in vars(base)


# --- backends, compilation, training ---


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_backends_with_left_padding(attention: str):
    """Flex attention compiles, so that one model has to do; `test_families` has the others for all."""
    name = "mistral-wide"
    model = adapted(name)
    expected = rows_alone(dense_reference(stock(name), model, CASES[name].groups), left_padded())
    model.set_attn_implementation(attention)
    assert relative_error(model, left_padded(), expected) < TOLERANCE


@pytest.mark.parametrize(
    "name", ["llama-wide-odd", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama-wide", "phi3-wide"))]
)
@torch.no_grad()
def test_compiles_to_one_graph_on_and_off(name: str):
    torch._dynamo.reset()
    model = adapted(name)
    with model.disable_adapter():
        pass  # PEFT's flag becomes an attribute of each layer the first time, which costs one compilation
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(logits(compiled), logits(model))
    with model.disable_adapter():
        assert torch.equal(logits(compiled), logits(stock(name)))
    assert torch.equal(logits(compiled), logits(model))


@torch.no_grad()
def test_two_adapters_of_different_g_and_w(tmp_path):
    """Each computes, and caches, what it does alone; off, the model is the base to the last bit."""
    name, own = "llama-wide", {"three": (MHA_GROUPS, 16), "two": (HALVES, 32), "narrow": (EQUAL_GROUPS, None)}
    alone = {}
    for adapter, (groups, width) in own.items():
        model = wrap(copy.deepcopy(stock(name)), groups, head_dim=width)
        alone[adapter] = logits(model)
        model.save_pretrained(tmp_path / adapter)
    model = PeftModel.from_pretrained(copy.deepcopy(stock(name)), tmp_path / "three", adapter_name="three")
    model.load_adapter(tmp_path / "two", "two")
    model.load_adapter(tmp_path / "narrow", "narrow")
    for adapter in ("three", "two", "narrow", "three", "two"):
        model.set_adapter(adapter)
        groups, width = own[adapter]
        assert torch.equal(logits(model), alone[adapter])
        held = model(prompt(), use_cache=True).past_key_values
        assert cache_shapes(held) == [(2, len(groups[0]), 12, width or 8)] * 2
        with model.disable_adapter():
            assert torch.equal(logits(model), logits(stock(name)))
            assert cache_shapes(model(prompt(), use_cache=True).past_key_values) == [(2, 8, 12, 8)] * 2
    model.delete_adapter("two")
    model.set_adapter("three")
    assert torch.equal(logits(model), alone["three"])


def test_a_base_in_four_bits_trains_saves_and_reloads(tmp_path):
    """Nothing is evaluated before training: see `test_quantised`."""
    pytest.importorskip("bitsandbytes", reason="4-bit bases need bitsandbytes: install the test extra")
    tiny_llama(hidden_size=192, head_dim=32, intermediate_size=64).save_pretrained(tmp_path / "base")

    def quantised():
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config).eval()

    ids = prompt(2, 11) % 64
    base = prepare_model_for_kbit_training(quantised(), use_gradient_checkpointing=False)
    model = get_peft_model(base, adapter_config(GROUPS["llama"], head_dim=64))
    perturb(model)
    losses = train(model, ids)
    assert losses[-1] < losses[0]
    model.eval()
    expected = logits(model, ids)
    with torch.no_grad():
        assert cache_shapes(model(ids, use_cache=True).past_key_values) == [(2, 2, 11, 64)] * 2
        with model.disable_adapter():
            assert torch.equal(logits(model, ids), logits(quantised(), ids))
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(quantised(), tmp_path / "adapter"), ids), expected)


@pytest.mark.parametrize("name", ["llama-wide", "gemma2-wide"])
@torch.no_grad()
def test_bf16_stays_within_its_rounding(name: str):
    """Of the truth in float64: the base's own distance, and no more than half as much again as the merged model's."""
    case = CASES[name]
    base = copy.deepcopy(stock(name)).bfloat16()
    model = wrap(copy.deepcopy(base), case.groups, head_dim=case.head_dim)
    inputs = {"input_ids": prompt(batch=8, length=24)}

    def error(found: PreTrainedModel | PeftModel, truth: torch.nn.Module) -> float:
        wanted = torch.stack(rows_alone(truth, inputs))
        output = found(**inputs).logits
        assert output.dtype == torch.bfloat16
        return ((output.double() - wanted).norm() / wanted.norm()).item()

    truth = dense_reference(base, model, case.groups)
    own = error(base, copy.deepcopy(base).double())
    adapter, merged = error(model, truth), error(model.merge_and_unload(), truth)
    assert 0 < adapter < 1.5 * merged
    assert merged < 3 * own


# --- without data ---


@pytest.mark.filterwarnings("ignore:num_key_value_heads=.*nothing is saved")
@pytest.mark.parametrize(
    ("name", "num_groups", "width"),
    [
        ("llama-square", 2, 32),
        ("llama-square", 1, 64),
        ("llama-bias", 3, 24),  # groups of 2, 3 and 3
        ("llama-gqa", 2, 16),
        ("qwen2", 4, 16),
        ("gemma", 2, 48),
        ("gemma2-gqa", 2, 24),
        ("phi", 2, 32),
        ("phi3", 4, 16),
    ],
)
@torch.no_grad()
def test_a_wrap_without_data_that_covers_its_groups_is_the_base(name: str, num_groups: int, width: int):
    base = random_model(config_of(CASES["llama-widest"])) if name == "llama-square" else copy.deepcopy(stock(name))
    expected = logits(base)
    model = get_peft_model(base, AsymGQAConfig(num_key_value_heads=num_groups, head_dim=width, task_type="CAUSAL_LM"))
    assert (logits(model.eval()) - expected).abs().max() < 1e-4 * expected.abs().max()
    held = model(prompt(), use_cache=True).past_key_values
    assert {(shape[1], shape[3]) for shape in cache_shapes(held)} == {(num_groups, width)}


# --- initialisation ---

ENERGETIC = (0, 1)  # frequencies; the start gives what is left over to the slowest, 2 and 3


def planted(seed: int = 0) -> PreTrainedModel:
    """A Llama whose keys have nearly all of their energy at the fastest frequencies."""
    model = random_model(config_of(CASES["llama-wide-odd"]), seed)
    with torch.no_grad():
        for layer in model.model.layers:
            heads = layer.self_attn.k_proj.weight.unflatten(0, (8, 2, 4))
            heads[:, :, [f for f in range(4) if f not in ENERGETIC]] *= 0.05
    return model


def initialised(base: PreTrainedModel, num_groups: int, width: int | None, **choices):
    config = AsymGQAConfig(num_key_value_heads=num_groups, head_dim=width, r=8, task_type="CAUSAL_LM", **choices)
    torch.manual_seed(0)
    model = get_peft_model(base, config).eval()
    return model, initialize_asymgqa_weights(model, prompt(16, 24).split(8), progress=False)


@pytest.mark.parametrize("width", [12, 16, 32])
def test_initialising_records_groups_and_lowers_the_error(width: int):
    base = random_model(config_of(CASES["llama-wide-odd"]))
    expected = logits(base, prompt(4, 20, seed=9))
    config = AsymGQAConfig(num_key_value_heads=2, head_dim=width, r=8, task_type="CAUSAL_LM")
    start = get_peft_model(copy.deepcopy(base), config).eval()
    model, report = initialised(base, 2, width)
    assert report.head_groups == model.peft_config["default"].head_groups == groups_of(model)
    assert model.peft_config["default"].initialized and report.notes == []
    errors = [(logits(each, prompt(4, 20, seed=9)) - expected).norm() for each in (start, model)]
    if 2 * width >= 8 * 8:  # as many dimensions as the base
        assert max(errors) < TOLERANCE * expected.norm()
    else:
        assert errors[1] < 0.9 * errors[0]
    merged = copy.deepcopy(model).merge_and_unload()
    assert (logits(merged) - logits(model)).abs().max() < TOLERANCE * logits(model).abs().max()
    assert merged.config.head_dim == width


def test_dimensions_left_over_go_where_the_energy_is():
    model, report = initialised(planted(), 3, 12)
    found = tensors_named(model, "lora_groups.default.frequencies")
    assert len(found) == 2
    for frequencies in found.values():
        assert frequencies.tolist() == [0, 0, 1, 1, 2, 3]
    start = get_peft_model(planted(), AsymGQAConfig(num_key_value_heads=3, head_dim=12, task_type="CAUSAL_LM"))
    for frequencies in tensors_named(start, "lora_groups.default.frequencies").values():
        assert frequencies.tolist() == [0, 1, 2, 2, 3, 3]
    again = initialize_asymgqa_weights(model, prompt(16, 24).split(8), progress=False)
    assert again.costs == pytest.approx(report.costs, rel=1e-9) and again.head_groups == report.head_groups


def test_the_reported_loss_falls_with_the_width_at_equal_bytes():
    totals = []
    for num_groups, width in ((4, None), (2, 16), (1, 32)):
        _, report = initialised(random_model(config_of(CASES["llama-wide-odd"])), num_groups, width)
        totals.append(sum(report.costs))
    assert totals[0] > totals[1] + 1e-3 and totals[1] > totals[2] + 1e-3 and totals[2] > 1e-3


def test_interrupted_the_frequencies_are_as_before(monkeypatch):
    """In the second layer, when the first is already written."""
    model = get_peft_model(planted(), AsymGQAConfig(num_key_value_heads=3, head_dim=12, task_type="CAUSAL_LM")).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected, calls, original = logits(model), [], walk.merge_layer

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(walk, "merge_layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        initialize_asymgqa_weights(model, prompt(16, 24).split(8), progress=False)
    after = model.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    assert torch.equal(logits(model), expected)


# --- saving and loading, with frequencies that no wrap would choose ---


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """An initialised adapter on disk, and the model."""
    model, _ = initialised(planted(), 3, 12)
    folder = tmp_path_factory.mktemp("wide") / "adapter"
    model.save_pretrained(folder)
    return folder, model


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_peft_loads_what_it_saved(saved, low_cpu_mem_usage: bool):
    folder, model = saved
    loaded = PeftModel.from_pretrained(planted(), folder, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded), logits(model)) and groups_of(loaded) == groups_of(model)
    assert loaded.peft_config["default"].head_dim == 12
    merged, expected = loaded.merge_and_unload(), logits(model)
    assert (logits(merged) - expected).abs().max() < TOLERANCE * expected.abs().max()


def test_transformers_own_load_adapter(saved):
    folder, model = saved
    base = planted()
    base.load_adapter(str(folder))
    assert torch.equal(logits(base), logits(model))
    with torch.no_grad():
        assert cache_shapes(base(prompt(), use_cache=True).past_key_values) == [(2, 3, 12, 12)] * 2


def test_a_deep_copy_is_independent(saved):
    _, model = saved
    twin, expected = copy.deepcopy(model), logits(model)
    assert torch.equal(logits(twin), expected)
    initialize_asymgqa_weights(twin, prompt(16, 24, seed=5).split(8), progress=False)
    assert not torch.equal(logits(twin), expected)
    assert torch.equal(logits(model), expected)


def test_frequencies_that_differ_between_layers_are_refused(saved, tmp_path):
    """All layers of a stock model turn alike; a file that says otherwise is damaged."""
    _, model = saved
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    name = next(name for name in state if name.endswith("lora_groups.frequencies"))
    state[name] = torch.tensor([0, 1, 2, 2, 3, 3])
    save_file(state, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"rotary frequencies in the weights differ between layers.*damaged"):
        PeftModel.from_pretrained(planted(), tmp_path)


# --- the plain checkpoint ---

CHECKPOINTS = [
    "llama-wide",  # llama3
    "llama-wide-odd",  # another theta
    "llama-widest",
    "llama-wide-gqa",  # linear
    "mistral-wide",  # yarn
    "phi-wide",  # partial rotary
    "phi3-wide",  # fused
    "gpt_neox-wide",  # partial rotary, fused
    "phi3-wide-long",  # longrope, with a limit of 8
]
LENGTHS = {"short": 6, "long": 80}  # the models were made for 64 positions


@pytest.fixture(scope="module")
def plain_logits(tmp_path_factory) -> dict[str, dict[str, torch.Tensor]]:
    """By length and case: what one process that never imports us computes."""
    root = tmp_path_factory.mktemp("plain")
    for name in CHECKPOINTS:
        plain(name).save_pretrained(root / "short" / name)
    for length, tokens in LENGTHS.items():
        (root / length).mkdir(exist_ok=True)
        torch.save({"input_ids": prompt(length=tokens)}, root / length / "inputs.pt")
    for name in CHECKPOINTS:
        (root / "long" / name).symlink_to(root / "short" / name)
    script = Path(__file__).with_name("plain_process.py")
    command = [sys.executable, "-I", str(script), str(root / "short"), str(root / "long")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = {}
    for length in LENGTHS:
        tensors = torch.load(root / length / "tensors.pt")
        loaded[length] = {name: tensors[name]["logits"] for name in CHECKPOINTS}
    loaded["folder"] = root / "short"
    return loaded


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_clean_process_computes_the_same_at_any_length(plain_logits, name: str, length: str):
    inputs = {"input_ids": prompt(length=LENGTHS[length])}
    expected = torch.stack(rows_alone(dense_reference(stock(name), adapted(name), CASES[name].groups), inputs))
    found = plain_logits[length][name].double()
    assert (found - expected).abs().max() < TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_configuration_says_width_and_frequencies_in_stock_terms(plain_logits, name: str):
    config = json.loads((plain_logits["folder"] / name / "config.json").read_text())
    case, base = CASES[name], stock(name).config
    assert config["head_dim"] == case.head_dim and config["num_key_value_heads"] == case.num_groups
    pairs = case.head_dim // 4 if case.model_type in ("phi", "gpt_neox") else case.head_dim // 2
    for said in (config["rope_parameters"], config["rope_scaling"]):
        assert said["rope_type"] == "longrope"
        assert len(said["short_factor"]) == len(said["long_factor"]) == pairs
    limit = 8 if name == "phi3-wide-long" else base.max_position_embeddings
    assert config["rope_parameters"]["original_max_position_embeddings"] == limit
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == base.rope_parameters["rope_theta"]


@pytest.mark.parametrize("name", [name for name in CHECKPOINTS if name != "phi3-wide-long"])
def test_the_frequencies_are_the_bases_to_the_last_bits(name: str):
    """An error of one part in a million would be seen thousands of positions on."""
    config = stock(name).config
    rope_type = config.rope_parameters.get("rope_type", "default")
    rotary = stock(name).base_model.rotary_emb.inv_freq
    if rope_type != "default":
        torch.testing.assert_close(rotary, ROPE_INIT_FUNCTIONS[rope_type](config, "cpu")[0], rtol=0, atol=0)
    (frequencies, *_) = tensors_named(adapted(name), "lora_groups.default.frequencies").values()
    torch.testing.assert_close(plain(name).model.rotary_emb.inv_freq, rotary[frequencies], rtol=1.2e-7, atol=0)


@torch.no_grad()
def test_a_longrope_model_goes_back_and_forth_over_its_limit():
    name = "phi3-wide-long"
    short, long = prompt(length=6), prompt(length=20)
    for model in (adapted(name), plain(name)):
        before = logits(model, short), logits(model, long)
        assert torch.equal(logits(model, short), before[0]) and torch.equal(logits(model, long), before[1])
        assert not torch.allclose(before[0], before[1][:, :6], rtol=1e-3)


def test_generating_over_the_limit_of_longrope_is_warned_about():
    """There Phi-3 computes its cache anew, and Mistral keeps keys turned by the frequencies from below the limit."""
    name, options = "phi3-wide-long", {"max_new_tokens": 6, "do_sample": False}
    with pytest.warns(UserWarning, match="Phi3ForCausalLM recomputes its cache .* passes 8 tokens.*Mistral") as caught:
        merged = adapted(name).merge_and_unload()
    assert [warning.filename for warning in caught if "recomputes" in str(warning.message)] == [__file__]
    below, over, beyond = prompt(length=2), prompt(length=6), prompt(length=9)
    for ids in (below, beyond):
        assert torch.equal(merged.generate(ids, **options), adapted(name).generate(ids, **options))
    assert not torch.equal(merged.generate(over, **options), adapted(name).generate(over, **options))


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma", "phi", "phi3", "olmo"])
def test_equal_groups_need_no_padding(name: str):
    width = 2 * (getattr(stock(name).config, "head_dim", None) or 8)
    model = wrap(copy.deepcopy(stock(name)), EQUAL_GROUPS, head_dim=width)
    before = logits(model)
    merged = model.merge_and_unload()
    config = merged.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (8, 4, width)
    assert (logits(merged) - before).abs().max() < TOLERANCE * before.abs().max()


def assert_merges(model: PeftModel, width: int) -> None:
    """At positions beyond those the base was made for, too."""
    ids = prompt(length=80)
    expected = logits(model, ids)
    merged = model.merge_and_unload()
    assert merged.config.head_dim == width
    assert (logits(merged, ids) - expected).abs().max() < TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("width", [None, 24, 32])
@pytest.mark.parametrize("name", ["llama-wide", "phi3-wide-long"])
def test_a_wide_plain_model_can_be_wrapped_and_merged_again(name: str, width: int | None):
    groups = [[[1, 0]], [[0, 1]]] if name == "phi3-wide-long" else [[[0, 2], [1]]] * 2
    assert_merges(wrap(copy.deepcopy(plain(name)), groups, head_dim=width), width or 16)


def test_a_rotary_fraction_that_the_base_rounds_down():
    """int(0.6 * 8) = 4 of 8 dimensions are 8 of 16, and int(0.6 * 16) = 9."""
    base = random_model(config_of(replace(CASES["phi"], overrides={"partial_rotary_factor": 0.6})))
    assert_merges(wrap(base, MHA_GROUPS, head_dim=16), 16)


@pytest.mark.parametrize("name", ["llama-wide", "llama-widest", "phi3-wide", "phi-wide-gqa", "gpt_neox-wide"])
def test_the_report_shows_width_parameters_cache_and_prefill(name: str):
    case, base, merged = CASES[name], stock(name), plain(name)
    report = export_report(adapted(name), prompt_tokens=10)
    assert report == export_report(merged, prompt_tokens=10) and report.other is None
    assert (report.base.head_dim, report.plain.head_dim) == (8, case.head_dim)
    assert report.base.parameters == base.num_parameters() and report.plain.parameters == merged.num_parameters()
    assert report.plain.kv_bytes_per_token == 2 * 2 * case.num_groups * case.head_dim * 4
    assert report.base.kv_bytes_per_token == 2 * 2 * case.kv_heads * 8 * 4
    for counted, model, dimensions in ((report.base, base, 64), (report.plain, merged, case.slots * case.head_dim)):
        linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
        weights = sum(module.weight.numel() for module in linear if module is not model.get_output_embeddings())
        assert counted.prefill_flops_per_token == 2 * weights + 2 * 2 * dimensions * 11
    assert report.plain.prefill_flops_per_token > report.base.prefill_flops_per_token
    assert f"{case.head_dim}" in next(line for line in str(report).splitlines() if "head_dim" in line)


# --- refusals ---

DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0}}
REFUSED = {
    "odd rotary part": ("llama", {"head_dim": 9}, "head_dim=9 makes 9 rotary .* multiple of 2"),
    "odd rotary part of a partial one": ("phi", {"head_dim": 10}, "head_dim=10 makes 5 rotary .* multiple of 4"),
    "narrower": ("llama", {"head_dim": 4}, "head_dim=4 is less than the base's 8.*lower num_key_value_heads"),
    "wider than a searched group": ("llama", {"head_dim": 40}, "head_dim=40 exceeds the 32 .*use 32 or less"),
    "wider than the neighbours": ("llama", {"head_dim": 32, "grouping": "neighbour"}, "head_dim=32 exceeds the 24 "),
    "wider than given groups": (
        "llama",
        {"head_dim": 48, "grouping": "random", "head_groups": MHA_GROUPS},
        "head_dim=48 exceeds the 40 .*use 40 or less",
    ),
    "mean": ("llama", {"merge": "mean"}, "head_dim=16 does not go with merge='mean'.*use merge=\"principal\", or "),
    "aligned": ("llama", {"merge": "aligned"}, "head_dim=16 does not go with merge='aligned'.*averages.*principal"),
    "gemma3": (
        "gemma3",
        {"head_dim": 24},
        "head_dim=24 .* gemma3_text model: .*rotary embeddings of different types.* Leave head_dim unset",
    ),
    "olmo-clipped": ("olmo-clipped", {"head_dim": 24}, "head_dim=24 .* olmo model: .*clamp.* Leave head_dim unset"),
    "stablelm": ("stablelm", {}, "head_dim=16 .* stablelm model: .*no width of heads.* Leave head_dim unset"),
    "opt": ("opt", {}, "head_dim=16 .* opt model: .*no width of heads.* Leave head_dim unset"),
    "serial gpt_neox": (
        "gpt_neox-serial",
        {},
        "head_dim=16 .* gpt_neox model: no .* but phi, .* only for use_parallel_residual=True. Leave head_dim unset",
    ),
    "partial phi3": ("phi3-gqa", {"head_dim": 12}, "head_dim=12 .* phi3 .*partial_rotary_factor=1.0.* Leave head_dim"),
    "dynamic RoPE": ("dynamic", {}, "head_dim=16 .* llama model: .*type 'dynamic'.* Leave head_dim unset"),
}


def refusable(name: str) -> PreTrainedModel:
    if name == "dynamic":
        return random_model(config_of(replace(CASES["llama"], overrides=DYNAMIC)))
    return copy.deepcopy(stock(name))


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_is_refused_before_anything_changes(why: str):
    name, fields, message = REFUSED[why]
    base = refusable(name)
    before, modules = logits(base), dict(base.named_modules())
    config = AsymGQAConfig(**{"num_key_value_heads": 3, "head_dim": 16, "task_type": "CAUSAL_LM"} | fields)
    with pytest.raises(ValueError, match=message) as refusal:
        get_peft_model(base, config)
    assert str(refusal.value).count("\n") == 0
    assert dict(base.named_modules()) == modules and torch.equal(logits(base), before)
    assert not hasattr(base, "peft_config")


def test_a_task_that_the_stand_in_has_not_is_refused():
    base = AutoModelForQuestionAnswering.from_config(config_of(CASES["gpt_neox-wide"]))
    modules = dict(base.named_modules())
    with pytest.raises(ValueError, match="head_dim=16 .* but phi, which has no ForQuestionAnswering. Leave head_dim"):
        get_peft_model(base, AsymGQAConfig(num_key_value_heads=3, head_dim=16))
    assert dict(base.named_modules()) == modules


def test_a_second_adapter_that_is_refused_leaves_the_first():
    model = adapted("llama-wide")
    before = logits(model)
    with pytest.raises(ValueError, match="head_dim=9"):
        model.add_adapter("second", AsymGQAConfig(num_key_value_heads=3, head_dim=9, task_type="CAUSAL_LM"))
    assert list(model.peft_config) == ["default"] and torch.equal(logits(model), before)


@pytest.mark.parametrize(("num_groups", "width", "warned"), [(4, 16, True), (3, 24, True), (3, 16, False)])
def test_a_width_that_saves_nothing_is_warned_about(num_groups: int, width: int, warned: bool):
    config = AsymGQAConfig(num_key_value_heads=num_groups, head_dim=width, task_type="CAUSAL_LM")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        get_peft_model(copy.deepcopy(stock("llama")), config)
    told = [str(warning.message) for warning in caught if "nothing is saved" in str(warning.message)]
    assert len(told) == warned
    if warned:
        assert f"num_key_value_heads={num_groups} of head_dim={width} take as much cache" in told[0]


def test_a_group_of_the_base_width_is_the_base_width():
    """head_dim=D says what None says, to the last bit."""
    plain_d, said = (wrap(copy.deepcopy(stock("llama")), MHA_GROUPS, head_dim=width) for width in (None, 8))
    assert torch.equal(logits(plain_d), logits(said)) and plain_d.state_dict().keys() == said.state_dict().keys()
