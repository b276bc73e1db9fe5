"""PEFT's contract: an AsymGQA adapter behaves as a LoRA adapter does, or refuses with a reason."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import warnings
from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch
import transformers
from models import (
    BASES,
    CASES,
    GROUPS,
    LAYERS,
    OTHER_GROUPS,
    adapted,
    adapter_config,
    assert_equal,
    logits,
    perturb,
    prompt,
    stock,
    tensors,
    tiny_llama,
    wrap,
)
from packaging.version import Version
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import config as lora_config
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForTokenClassification,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
)
from transformers.integrations.peft import MIN_PEFT_VERSION

from asymgqa_peft.adapter import layer as layers
from asymgqa_peft.adapter import model as tuner
from asymgqa_peft.families import head_shape

MERGE_TOLERANCE = 1.5e-6  # of the largest logit, in fp32


def close(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal up to the rounding of folded weights."""
    return (left - right).abs().max() <= MERGE_TOLERANCE * right.abs().max()


def shared_layers(model) -> list:
    """All shared K/V layers of a wrapped model."""
    return [module for module in model.modules() if isinstance(module, layers.SharedLayer)]


def trainable(model) -> set[str]:
    """Names of the parameters that train."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def has_our_hooks(model) -> bool:
    """Whether a hook of a shared layer is left anywhere."""
    for module in model.modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if isinstance(getattr(hook, "__self__", None), layers.SharedLayer):
                return True
    return False


def kv_groups(model) -> list[int | None]:
    """How many query heads each module believes to share a KV head."""
    return [getattr(module, "num_key_value_groups", None) for module in model.modules()]


def train_step(model, lr: float = 0.1) -> float:
    """One step of SGD on fixed random tokens; returns the loss."""
    model.train()
    ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(3))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= lr * parameter.grad
                parameter.grad = None
    model.eval()
    return loss.item()


# --- switching an adapter off and on ---


def test_disabled_is_the_base_bit_for_bit_and_enabled_again_the_adapter(base, family):
    reference = logits(base)
    model = wrap(base, GROUPS[family])
    adapted = logits(model)
    assert (adapted - reference).abs().max() > 0.1
    with model.disable_adapter():
        assert torch.equal(logits(model), reference)
    assert torch.equal(logits(model), adapted)
    model.base_model.disable_adapter_layers()
    assert torch.equal(logits(model), reference)
    model.base_model.enable_adapter_layers()
    assert torch.equal(logits(model), adapted)


def test_disabling_survives_training_and_gradients_return(wrapped, base, family):
    reference = logits(BASES[family]())
    before = trainable(wrapped)
    train_step(wrapped)
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), reference)
        assert ".lora_" not in " ".join(trainable(wrapped))
    assert trainable(wrapped) == before and before


def test_deep_copy_is_independent(wrapped):
    reference = logits(wrapped)
    twin = copy.deepcopy(wrapped)
    assert torch.equal(logits(twin), reference)
    perturb(twin, seed=2)
    assert (logits(twin) - reference).abs().max() > 0.1
    assert torch.equal(logits(wrapped), reference)
    with twin.disable_adapter():  # the hooks of the copy look at the copy's switches
        assert torch.equal(logits(wrapped), reference)


def test_two_threads_compute_what_one_does(wrapped):
    """A server's threads share a model, with a cache and without, while the layout of its heads is the adapter's."""

    def calls(use_cache: bool) -> list[torch.Tensor]:
        return [logits(wrapped, use_cache=use_cache) for _ in range(150)]

    alone = logits(wrapped, use_cache=False), logits(wrapped, use_cache=True)
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(calls, (False, True)))
    for expected, results in zip(alone, together, strict=True):
        for found in results:
            assert torch.equal(found, expected)


# --- saving and loading ---


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_adapter_reloads_on_the_original_base(wrapped, family, tmp_path, low_cpu_mem_usage):
    wrapped.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists() and not list(tmp_path.glob("*.bin"))
    loaded = PeftModel.from_pretrained(BASES[family](), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded), logits(wrapped))
    assert not trainable(loaded)
    assert loaded.peft_config["default"].head_groups == GROUPS[family]


def test_saved_file_holds_the_adapter_and_nothing_of_the_base(wrapped, tmp_path):
    wrapped.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    groups, numbers = 0, 0
    for name, tensor in saved.items():
        assert ".lora_" in name
        if ".lora_groups." in name:
            groups += 1
        else:
            numbers += tensor.numel()
    assert groups == LAYERS  # beside the weights the groups, once a layer
    trained, _ = wrapped.get_nb_trainable_parameters()
    assert numbers == trained


def test_loaded_for_training_trains_what_the_original_did(wrapped, family, tmp_path):
    wrapped.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(BASES[family](), tmp_path, is_trainable=True)
    assert trainable(loaded) == trainable(wrapped)
    assert train_step(loaded) == pytest.approx(train_step(wrapped), abs=1e-6)


def test_auto_class_loads_base_and_adapter(family, tmp_path):
    BASES[family]().save_pretrained(tmp_path / "base")
    base = type(BASES[family]()).from_pretrained(tmp_path / "base")
    model = wrap(base, GROUPS[family])
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded.eval()), logits(model))


@pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"this transformers switches adapters off only with peft >= {MIN_PEFT_VERSION}",
)
def test_transformers_own_loading(wrapped, family, tmp_path):
    wrapped.save_pretrained(tmp_path)
    base = BASES[family]()
    reference = logits(base)
    base.load_adapter(str(tmp_path))
    assert torch.equal(logits(base), logits(wrapped)) and not torch.equal(logits(base), reference)
    base.disable_adapters()
    assert torch.equal(logits(base), reference)
    base.enable_adapters()
    assert torch.equal(logits(base), logits(wrapped))


def test_adapter_dtype_follows_pefts_switch(tmp_path):
    """fp32 over a bf16 base unless autocast is off; either way the base's output dtype."""
    wrap(tiny_llama().bfloat16(), GROUPS["llama"]).save_pretrained(tmp_path)
    for autocast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        made = get_peft_model(
            tiny_llama().bfloat16(), adapter_config(GROUPS["llama"]), autocast_adapter_dtype=autocast
        )
        loaded = PeftModel.from_pretrained(tiny_llama().bfloat16(), tmp_path, autocast_adapter_dtype=autocast)
        for model in (made, loaded):
            assert {p.dtype for name, p in model.named_parameters() if ".lora_" in name} == {dtype}
            assert model(input_ids=torch.zeros(1, 3, dtype=torch.long)).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_shared_heads_are_not_rounded_on_loading_over_a_bf16_base(tmp_path, low_cpu_mem_usage):
    model = wrap(tiny_llama().bfloat16(), GROUPS["llama"])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama().bfloat16(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    shared = tensors(model, "lora_kv")
    assert_equal(tensors(loaded, "lora_kv"), shared)
    for tensor in shared.values():
        assert not torch.equal(tensor, tensor.bfloat16().float())  # rounding would show


def test_missing_misshaped_and_unknown_tensors_are_reported_at_once(wrapped, family, tmp_path):
    wrapped.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    good = load_file(path)
    missing = next(name for name in good if "lora_kv.weight" in name)
    misshaped = next(name for name in good if "lora_query_gain" in name)
    bad = {**good, misshaped: torch.zeros(1), "base_model.x": good[missing].clone()}
    del bad[missing]
    save_file(bad, path)
    for options in ({}, {"low_cpu_mem_usage": True}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(ValueError, match="does not fit this model") as refusal:
            PeftModel.from_pretrained(BASES[family](), tmp_path, **options)
        text = str(refusal.value)
        assert f"missing: {missing.replace('.weight', '.default.weight')}" in text
        assert "unknown: base_model.x" in text
        assert misshaped.replace(".weight", ".default.weight") in text
    save_file(good, path)
    assert torch.equal(logits(PeftModel.from_pretrained(BASES[family](), tmp_path)), logits(wrapped))


def of_base(family, module: str = "model.layers.1.self_attn.q_proj") -> torch.Tensor:
    """A base weight of that name, other than it is."""
    return torch.full_like(BASES[family]().get_submodule(module).weight, 0.5)


SMUGGLED = "base_model.model.model.layers.1.self_attn.q_proj.base_layer.weight"
DAMAGES = {  # what is put under which name; ".lora_x" is the first tensor of that name
    "one of the base's": (lambda family, tensor: of_base(family), SMUGGLED, "a tensor of the base, which no adapter"),
    "a norm of the base's": (
        lambda family, tensor: of_base(family, "model.layers.1.input_layernorm"),
        "base_model.model.model.layers.1.input_layernorm.weight",
        "a tensor of the base",
    ),
    "unknown base_layer": (lambda family, tensor: torch.zeros(1), "base_model.model.x.base_layer.y", "unknown: "),
    "unknown at the top": (lambda family, tensor: torch.zeros(1), "junk", "unknown: junk"),
    "NaN": (lambda family, tensor: tensor.index_fill(0, torch.tensor(0), math.nan), ".lora_kv", "NaN or inf: "),
    "inf": (lambda family, tensor: tensor.index_fill(0, torch.tensor(0), math.inf), ".lora_A", "NaN or inf: "),
    "too large": (lambda family, tensor: tensor.double() * 1e300, ".lora_B", "NaN or inf: "),
    "int8": (lambda family, tensor: tensor.to(torch.int8), ".lora_kv", "dtype torch.int8 instead of torch.float32"),
    "complex": (lambda family, tensor: tensor.cfloat(), ".lora_B", "dtype torch.complex64 instead of torch.float32"),
    "bool": (lambda family, tensor: tensor > 0, ".lora_value_mix", "dtype torch.bool instead of torch.float32"),
    "cut": (lambda family, tensor: tensor[:-1].clone(), ".lora_query_gain", "shape "),
    "groups": (lambda family, tensor: torch.zeros_like(tensor), ".lora_groups", "leave a group empty"),
    "complex groups": (lambda family, tensor: tensor.cfloat(), ".lora_groups", "must be . integers"),
    "bool groups": (lambda family, tensor: tensor > 0, ".lora_groups", "must be . integers"),
}


def write(path, contents) -> None:
    """A safetensors file of views and copies."""
    save_file({name: tensor.contiguous() for name, tensor in contents.items()}, path)


@pytest.mark.parametrize("name", DAMAGES)
def test_every_tensor_of_a_file_is_known_well_shaped_floating_and_finite(wrapped, family, tmp_path, name):
    wrapped.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    contents = load_file(file)
    damage, at, message = DAMAGES[name]
    at = next((each for each in contents if at in each), at)
    write(file, contents | {at: damage(family, contents.get(at))})
    model = get_peft_model(BASES[family](), adapter_config(num_key_value_heads=2))
    before = tensors(model)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(BASES[family](), tmp_path)
    with pytest.raises(ValueError, match=message):
        model.load_adapter(tmp_path, "default")
    assert_equal(tensors(model), before)


def test_all_that_is_wrong_with_a_file_stands_in_one_message(wrapped, family, tmp_path):
    wrapped.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    contents = load_file(file)
    del contents[next(each for each in contents if "layers.1" in each and "lora_kv" in each)]
    expected = ["missing: "]
    for name in ("one of the base's", "unknown base_layer", "NaN", "bool", "cut", "groups"):
        damage, at, message = DAMAGES[name]
        at = next((each for each in contents if at in each and "layers.0" in each), at)
        contents[at] = damage(family, contents.get(at))
        expected.append(message)
    write(file, contents)
    with pytest.raises(ValueError, match="does not fit") as refusal:
        PeftModel.from_pretrained(BASES[family](), tmp_path)
    for message in expected:
        assert message in str(refusal.value)


def test_floats_of_any_width_load(wrapped, family, tmp_path):
    wrapped.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    contents = load_file(file)
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn):
        write(file, {n: t.to(dtype) if t.is_floating_point() else t for n, t in contents.items()})
        loaded = tensors(PeftModel.from_pretrained(BASES[family](), tmp_path))
        at = next(name for name in loaded if "lora_kv" in name)
        assert torch.equal(loaded[at], contents[at.replace(".default", "")].to(dtype).float())


def resized(folder, family, **options):
    """A base from a folder, with tokens added to its 101."""
    if not folder.exists():
        BASES[family]().save_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    base.resize_token_embeddings(110)
    return base


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resized_embeddings_are_saved_and_loaded(family, dtype, tmp_path):
    """As LoRA's: PEFT saves them with the adapter where the vocabulary was resized."""
    model = wrap(resized(tmp_path / "base", family), GROUPS[family])
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"embed_tokens.weight \(resize_token_embeddings\(110\) of the base first"):
        PeftModel.from_pretrained(BASES[family](), tmp_path / "adapter")
    torch.manual_seed(7)  # other rows for the added tokens
    base = resized(tmp_path / "base", family, dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*adapter file.*")
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    for layer in ("get_input_embeddings", "get_output_embeddings"):
        found, expected = getattr(loaded, layer)().weight, getattr(model, layer)().weight
        assert torch.equal(found, expected.to(dtype))
    if dtype == torch.float32:
        assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("row", [0, 100])
@pytest.mark.parametrize("layer", ["get_input_embeddings", "get_output_embeddings"])
def test_other_embeddings_of_the_bases_own_tokens_are_refused(family, layer, row, tmp_path):
    def changed(base):
        with torch.no_grad():
            getattr(base, layer)().weight[row] += 0.1
        return base

    model = wrap(changed(resized(tmp_path / "base", family)), GROUPS[family])
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="other embeddings of the base's own tokens.*weight.*a base that has them"):
        PeftModel.from_pretrained(resized(tmp_path / "base", family), tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(changed(resized(tmp_path / "base", family)), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_embeddings_of_a_base_of_unknown_origin_are_told(wrapped, family, tmp_path):
    wrapped.base_model.model.resize_token_embeddings(110)
    wrapped.save_pretrained(tmp_path, save_embedding_layers=True)
    base = BASES[family]()
    torch.manual_seed(7)
    base.resize_token_embeddings(110)
    with pytest.warns(UserWarning, match="The adapter file replaces the base's .*embed_tokens.weight"):
        loaded = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(loaded), logits(wrapped))


def test_added_tokens_that_are_trained_come_back(family, tmp_path):
    """What TRL makes of a chat template with new tokens: PEFT saves their trained head twice."""
    options = {"modules_to_save": ["lm_head"], "trainable_token_indices": {"embed_tokens": [101, 102]}}
    model = wrap(resized(tmp_path / "base", family), GROUPS[family], **options)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    model.save_pretrained(file.parent)
    loaded = PeftModel.from_pretrained(resized(tmp_path / "base", family), file.parent)
    assert torch.equal(logits(loaded), logits(model))
    content = load_file(file)
    content["base_model.model.lm_head.modules_to_save.weight"] += 1
    save_file(content, file)
    with pytest.raises(ValueError, match="unknown: base_model.model.lm_head.modules_to_save.weight"):
        PeftModel.from_pretrained(resized(tmp_path / "base", family), file.parent)


VARIANTS = {"velora_config": ("VeloraConfig", {"num_groups": 4}), "monteclora_config": ("MontecloraConfig", {})}


@pytest.mark.parametrize("field", VARIANTS)
def test_variants_with_state_of_their_own_reload(family, tmp_path, field):
    name, fields = VARIANTS[field]
    if not hasattr(lora_config, name):
        pytest.skip("this PEFT does not know it")
    variant = {field: getattr(lora_config, name)(**fields)}
    model = wrap(BASES[family](), GROUPS[family], target_modules=["q_proj"], **variant)
    train_step(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(BASES[family](), tmp_path)), logits(model))


def test_an_empty_or_foreign_file_is_refused(wrapped, family, tmp_path):
    wrapped.save_pretrained(tmp_path)
    foreign = {"base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": torch.zeros(4, 4)}
    for content in ({}, foreign):
        save_file(content, tmp_path / "adapter_model.safetensors")
        with pytest.raises(ValueError, match="does not fit this model"):
            PeftModel.from_pretrained(BASES[family](), tmp_path)


def test_an_adapter_of_another_depth_is_refused_before_the_base_changes(wrapped, family, tmp_path):
    wrapped.save_pretrained(tmp_path)
    base = BASES[family](num_hidden_layers=3)
    before = dict(base.named_modules())
    with pytest.raises(ValueError, match="head_groups has 2 layers, the model has 3"):
        PeftModel.from_pretrained(base, tmp_path)
    assert dict(base.named_modules()) == before


def test_a_whole_models_state_dict_still_loads(wrapped):
    state = tensors(wrapped)
    twin = copy.deepcopy(wrapped)
    perturb(twin, seed=2)
    assert not torch.equal(logits(twin), logits(wrapped))
    twin.load_state_dict(state)
    assert torch.equal(logits(twin), logits(wrapped))


# --- several adapters ---


@pytest.fixture
def pair(family, tmp_path):
    """A model with adapters "default" and "other" of different G, and what each computes on its own."""
    alone = {}
    for name, groups in (("default", GROUPS[family]), ("other", OTHER_GROUPS[family])):
        single = get_peft_model(BASES[family](), adapter_config(groups))
        perturb(single, seed=len(name))
        single.eval().save_pretrained(tmp_path / name)
        alone[name] = logits(single)
    model = PeftModel.from_pretrained(BASES[family](), tmp_path / "default", is_trainable=True)
    model.load_adapter(tmp_path / "other", "other", is_trainable=True)
    return model.eval(), alone


def adapter_names(names: set[str]) -> set[str]:
    """The adapters that parameters belong to."""
    parts = ".".join(names).split(".")
    return {"default", "other"}.intersection(parts)


def test_two_adapters_of_different_g_each_equal_their_single_model(pair, base):
    model, alone = pair
    assert not torch.equal(alone["default"], alone["other"])
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        assert torch.equal(logits(model), alone[name])
        assert trainable(model)
        for parameter in trainable(model):
            assert f".{name}." in parameter
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    assert torch.equal(logits(model), alone["default"])


def test_training_one_adapter_leaves_the_other(pair):
    model, alone = pair
    model.set_adapter("other")
    train_step(model)
    assert not torch.equal(logits(model), alone["other"])
    model.set_adapter("default")
    assert torch.equal(logits(model), alone["default"])


@pytest.mark.parametrize("deleted", ["default", "other"])
def test_deleting_an_adapter_leaves_the_other(pair, deleted):
    model, alone = pair
    kept = "other" if deleted == "default" else "default"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PEFT says which adapter is active now
        model.delete_adapter(deleted)
    assert list(model.peft_config) == [kept] and model.active_adapter == kept
    assert torch.equal(logits(model), alone[kept])
    assert not tensors(model, f".{deleted}")
    for layer in shared_layers(model):
        assert deleted not in layer.lora_groups


def test_after_deleting_the_active_adapter_all_layers_agree_on_the_next():
    """Layers know only the adapters that target them: left alone, each would pick another."""
    model = wrap(tiny_llama(), GROUPS["llama"], target_modules=["q_proj", "down_proj"])
    for name, target in (("second", "o_proj"), ("first", "down_proj")):
        model.add_adapter(name, adapter_config(OTHER_GROUPS["llama"], target_modules=[target]))
        model.set_adapter(name)
        perturb(model, seed=len(name))
    model.set_adapter("default")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model.delete_adapter("default")
    after = logits(model)
    model.set_adapter(model.active_adapter)
    assert torch.equal(logits(model), after)


def test_a_new_adapter_stays_frozen_until_it_is_set(wrapped, family):
    before = trainable(wrapped)
    wrapped.add_adapter("other", adapter_config(OTHER_GROUPS[family]))
    assert trainable(wrapped) == before
    wrapped.set_adapter("other")
    assert adapter_names(trainable(wrapped)) == {"other"} and len(trainable(wrapped)) == len(before)


def test_several_active_adapters_are_refused(pair):
    model, alone = pair
    with pytest.raises(ValueError, match="one set of K/V heads, activate one"):
        model.base_model.set_adapter(["default", "other"])
    assert torch.equal(logits(model), alone["default"])
    for layer in shared_layers(model):  # transformers' own set_adapter goes by the layers
        layer.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="are active together.*set one"):
        logits(model)


def test_batches_that_mix_adapters_are_refused(pair):
    model, alone = pair
    with pytest.raises(ValueError, match="adapter_names= cannot mix adapters.*set_adapter"):
        model(input_ids=torch.zeros(2, 3, dtype=torch.long), adapter_names=["default", "other"])
    assert torch.equal(logits(model), alone["default"])


def test_adding_up_adapters_is_refused(pair):
    model, _ = pair
    with pytest.raises(ValueError, match="cannot combine AsymGQA adapters"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum")
    assert set(model.peft_config) == {"default", "other"}


def test_mixed_models_are_refused(base, family):
    with pytest.raises(ValueError, match="ASYM_GQA"):
        get_peft_model(base, adapter_config(GROUPS[family]), mixed=True)
    assert not shared_layers(base)


# --- merging and unloading ---


def test_merge_and_unmerge_in_place(base, family):
    reference = logits(base)
    model = wrap(base, GROUPS[family])
    adapted, before = logits(model), tensors(model)
    model.merge_adapter()
    assert {layer.merged for layer in shared_layers(model)} == {True}
    assert close(logits(model), adapted)
    served = BASES[family]()
    served.load_state_dict(served_weights(model))
    assert close(logits(served), adapted)
    assert not torch.equal(model.state_dict()[q_weight(model)], before[q_weight(model)])  # LoRA is folded
    model.unmerge_adapter()
    assert {layer.merged for layer in shared_layers(model)} == {False}
    assert close(logits(model), adapted)
    assert_equal(tensors(model), before)
    with model.disable_adapter():
        assert torch.equal(logits(model), reference)


def served_weights(model) -> dict[str, torch.Tensor]:
    """The base's weights as TRL sends them to vLLM: merged, without what belongs to adapters."""
    weights = {}
    for name, tensor in model.base_model.model.state_dict().items():
        if "lora_" not in name and "original_module" not in name:
            weights[name.replace(".base_layer", "").replace("modules_to_save.default.", "")] = tensor
    return weights


def q_weight(model) -> str:
    """Name of a base weight that LoRA is merged into."""
    return next(name for name in model.state_dict() if name.endswith("q_proj.base_layer.weight"))


def test_without_lora_unmerging_restores_the_base_bit_for_bit(base, family):
    reference = logits(base)
    model = wrap(base, GROUPS[family], target_modules=[])
    adapted = logits(model)
    model.merge_adapter()
    assert close(logits(model), adapted) and not close(adapted, reference)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), reference)


def test_merging_one_model_in_place_leaves_another(wrapped, family):
    other = wrap(BASES[family](), GROUPS[family], seed=2)
    before = logits(other)
    wrapped.merge_adapter()
    assert torch.equal(logits(other), before)


def test_disabling_a_merged_adapter_unmerges_all_of_it(pair, base):
    model, alone = pair
    model.merge_adapter(["other"])
    assert close(logits(model), alone["other"])  # as for LoRA: what is merged is in effect, not what is active
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    assert torch.equal(logits(model), alone["default"])  # and not the one's heads with the other's LoRA


def test_what_comes_while_an_adapter_is_merged(pair, family, tmp_path):
    """It is unmerged first, or refused: nothing reads merged weights as the base's."""
    model, alone = pair
    before = tensors(model)
    model.merge_adapter(["other"])
    with pytest.raises(ValueError, match=r"An adapter is merged: call unmerge_adapter\(\) first"):
        model.add_adapter("third", adapter_config(GROUPS[family]))
    with pytest.warns(UserWarning, match="'other' is merged already, nothing to do"):
        model.merge_adapter(["other"])
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(BASES[family](), tmp_path / "other")), alone["other"])
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("other")
    assert torch.equal(logits(model), alone["other"])
    model.merge_adapter()
    twin = copy.deepcopy(model)
    twin.unmerge_adapter()
    assert torch.equal(logits(twin), alone["other"]) and close(logits(model), alone["other"])
    model.delete_adapter("other")
    assert torch.equal(logits(model), alone["default"])
    for name, tensor in tensors(model).items():
        assert torch.equal(tensor, before[name]), name


def test_a_merge_in_place_that_is_stopped_leaves_the_model_as_it_was(wrapped, monkeypatch):
    before, adapted = tensors(wrapped), logits(wrapped)
    fold, folded = tuner.fold_into_base, []

    def stopped(site, heads):
        if folded:
            raise KeyboardInterrupt
        folded.append(site)
        fold(site, heads)

    monkeypatch.setattr(tuner, "fold_into_base", stopped)
    with pytest.raises(KeyboardInterrupt):
        wrapped.merge_adapter()
    assert folded and not any(layer.merged for layer in shared_layers(wrapped))
    assert_equal(tensors(wrapped), before)
    assert torch.equal(logits(wrapped), adapted)


FOLDED = [name for name, case in CASES.items() if case.head_dim is None and not name.startswith("olmo2")]


@pytest.mark.parametrize("name", [*FOLDED, "olmo2-equal", "olmo2-single"])
def test_merged_base_weights_hold_the_adapter_in_every_family(name):
    model = adapted(name)
    expected = logits(model)
    before = tensors(model)
    model.merge_adapter()
    served = copy.deepcopy(stock(name))
    served.load_state_dict(served_weights(model))
    torch.testing.assert_close(logits(served), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(stock(name)), expected, rtol=1e-2)
    tokens = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(prompt(), **tokens), served.generate(prompt(), **tokens))
    model.unmerge_adapter()
    assert_equal(tensors(model), before)


UNFOLDABLE = {"llama-wide": "its heads have 16 dimensions, the base's 8", "olmo2": "a norm spans all keys"}


@pytest.mark.parametrize("name", UNFOLDABLE)
def test_what_the_base_weights_cannot_hold_is_refused(name):
    model = adapted(name)
    before, expected = tensors(model), logits(model)
    with pytest.raises(ValueError, match=f"merge_adapter cannot write.*{UNFOLDABLE[name]}.*Use merge_and_unload"):
        model.merge_adapter()
    assert_equal(tensors(model), before)
    assert torch.equal(logits(model), expected)


def test_merging_two_adapters_is_refused(pair):
    model, alone = pair
    with pytest.raises(ValueError, match="merge one adapter"):
        model.merge_adapter(["default", "other"])
    with pytest.raises(ValueError, match="merge one adapter"):
        model.merge_and_unload(adapter_names=["default", "other"])
    with pytest.raises(ValueError, match="unknown, the model holds"):
        model.merge_and_unload(adapter_names=["third"])
    assert torch.equal(logits(model), alone["default"])
    model.merge_adapter(["other"])
    with pytest.raises(ValueError, match=r"\['other'\] is merged already, call unmerge_adapter"):
        model.merge_and_unload(adapter_names=["default"])
    assert close(logits(model), alone["other"])


@pytest.mark.parametrize("name", ["default", "other"])
def test_merge_and_unload_one_of_two(pair, name):
    model, alone = pair
    plain = model.merge_and_unload(adapter_names=[name])
    assert type(plain).__module__.startswith("transformers.") and not shared_layers(plain)
    assert not has_our_hooks(plain) and not tensors(plain, ".lora_")
    assert close(logits(plain), alone[name])


def test_merge_and_unload_after_merge_adapter(wrapped):
    adapted = logits(wrapped)
    wrapped.merge_adapter()
    assert close(logits(wrapped.merge_and_unload()), adapted)
    with pytest.raises(ValueError, match="merged or unloaded already"):
        wrapped.merge_and_unload()


@pytest.mark.parametrize("part", ["lora_kv", "lora_value_mix", "lora_B"])
def test_safe_merge_of_a_broken_adapter_changes_nothing(wrapped, part):
    healthy = logits(wrapped)
    broken = [p for name, p in wrapped.named_parameters() if part in name][-1]
    value = broken.detach().clone()
    broken.data.view(-1)[0] = math.nan
    modules, before = dict(wrapped.named_modules()), tensors(wrapped)
    for merge in (wrapped.merge_and_unload, wrapped.merge_adapter):
        with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
            merge(safe_merge=True)
        assert dict(wrapped.named_modules()) == modules
        assert_equal(tensors(wrapped), before)
    broken.data.copy_(value)
    assert torch.equal(logits(wrapped), healthy)
    assert close(logits(wrapped.merge_and_unload(safe_merge=True)), healthy)


def test_unload_returns_the_exact_base(base, family):
    original, reference, names = type(base), logits(base), list(dict(base.named_modules()))
    groups = kv_groups(base)
    model = wrap(base, GROUPS[family])
    logits(model)  # leaves the adapter's head counts behind
    assert kv_groups(base) != groups
    plain = model.unload()
    assert plain is base and type(plain) is original and not hasattr(plain, "peft_config")
    assert list(dict(plain.named_modules())) == names and not has_our_hooks(plain)
    assert kv_groups(plain) == groups
    assert torch.equal(logits(plain), reference)


def test_an_unloaded_base_can_be_wrapped_again(wrapped, family):
    adapted = logits(wrapped)
    again = wrap(wrapped.unload(), GROUPS[family])
    assert torch.equal(logits(again), adapted)


# --- what is trained ---


def expected_parameters(base, num_groups: int, rank: int) -> int:
    """A closed formula for the trainable parameters, from the shapes of the base alone."""
    s = head_shape(base.config)
    bias = base.model.layers[0].self_attn.k_proj.bias is not None
    per_layer = 2 * num_groups * s.head_dim * (s.hidden_size + bias)  # shared K and V
    per_layer += s.num_attention_heads * s.rotary_dim  # complex gains, R/2 of two numbers
    per_layer += s.num_attention_heads * (s.head_dim - s.rotary_dim) ** 2  # query mixes
    per_layer += s.num_attention_heads * s.head_dim**2  # value mixes
    lora = 0
    for name, module in base.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.endswith(("k_proj", "v_proj", "lm_head")):
            lora += rank * (module.in_features + module.out_features)
    return base.config.num_hidden_layers * per_layer + lora


@pytest.mark.parametrize(("num_groups", "rank"), [(2, 4), (3, 1)])
def test_trainable_parameters_follow_the_formula(base, num_groups, rank, capsys):
    total = base.num_parameters()
    expected = expected_parameters(base, num_groups, rank)
    model = get_peft_model(base, adapter_config(num_key_value_heads=num_groups, r=rank))
    assert model.get_nb_trainable_parameters() == (expected, total + expected)
    model.print_trainable_parameters()
    assert f"trainable params: {expected:,} || all params: {total + expected:,}" in capsys.readouterr().out


def test_gradients_reach_every_part_of_the_adapter_and_nothing_else(wrapped):
    ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(3))
    wrapped.train()
    wrapped(input_ids=ids, labels=ids).loss.backward()
    reached = set()
    for name, parameter in wrapped.named_parameters():
        if parameter.grad is not None and parameter.grad.abs().max() > 0:
            reached.add(name)
    assert reached == trainable(wrapped)
    names = " ".join(reached)
    for part in ("lora_kv", "lora_query_gain", "lora_value_mix", "lora_A", "lora_B"):
        assert part in names
    assert ("lora_query_mix" in names) == (head_shape(wrapped.config).pass_dim > 0)


def test_these_moved_and_those_did_not(base, family):
    """Only K and V: no LoRA, gains and mixes frozen by hand."""
    model = wrap(base, GROUPS[family], target_modules=[])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_kv" in name)
    before = tensors(model)
    first = train_step(model, lr=0.05)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == ("lora_kv" not in name), name
    assert train_step(model) < first


def test_training_lowers_the_loss(wrapped):
    losses = [train_step(wrapped, lr=1.0) for _ in range(20)]
    assert losses[-1] < 0.9 * losses[0] and all(map(math.isfinite, losses))


@pytest.mark.parametrize("reentrant", [False, True])
def test_kbit_preparation_and_checkpointing_give_the_same_gradients(family, reentrant):
    gradients = []
    for prepare in (False, True):
        base = BASES[family]()
        if prepare:
            with quiet_future_warnings():
                base = prepare_model_for_kbit_training(
                    base, gradient_checkpointing_kwargs={"use_reentrant": reentrant}
                )
        model = wrap(base, GROUPS[family]).train()
        ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(3))
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)


@contextlib.contextmanager
def quiet_future_warnings():
    """PEFT's own call into transformers, which transformers is about to rename."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


# --- LoRA's options ---


def test_modules_to_save_train_save_reload_and_merge(family, tmp_path):
    model = wrap(BASES[family](), GROUPS[family], modules_to_save=["lm_head", "embed_tokens"])
    reference = logits(model)
    assert sum("modules_to_save" in name for name in trainable(model)) >= 2
    train_step(model)
    adapted = logits(model)
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(BASES[family](), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(loaded), adapted) and not torch.equal(adapted, reference)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(BASES[family]()))
    assert close(logits(model.merge_and_unload()), adapted)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="the own loading of transformers 5.17 ignores modules_to_save, for LoRA too",
)
def test_transformers_own_loading_of_modules_to_save(family, tmp_path):
    model = wrap(BASES[family](), GROUPS[family], modules_to_save=["lm_head"])
    train_step(model)
    model.save_pretrained(tmp_path)
    base = BASES[family]()
    base.load_adapter(str(tmp_path))
    assert torch.equal(logits(base), logits(model))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Input and output embeddings are no")
def test_a_trained_head_is_untied_in_the_plain_model():
    model = wrap(tiny_llama(tie_word_embeddings=True), GROUPS["llama"], modules_to_save=["lm_head"])
    tied = logits(model)
    train_step(model, lr=0.5)
    adapted = logits(model)
    assert not close(adapted, tied)
    plain = model.merge_and_unload()
    assert close(logits(plain), adapted) and plain.config.tie_word_embeddings is False


OPTIONS = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 16}},
    "exclude": {"exclude_modules": ["down_proj", "fc2"]},
    "layers": {"target_modules": ["q_proj", "up_proj", "fc1"], "layers_to_transform": [1]},
    "layers of all": {"layers_to_transform": [1]},
    "no lora": {"target_modules": []},
    "regex": {"target_modules": r".*layers\.1\..*q_proj"},
    "tokens": {"trainable_token_indices": [1, 5]},
    "lora bias": {"lora_bias": True, "target_modules": ["up_proj", "fc1"]},
    "dropout": {"lora_dropout": 0.5},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_loras_options_save_reload_and_merge(option, family, tmp_path):
    """K and V are shared in every layer whatever LoRA's filters say: a model has one number of KV heads."""
    if option == "lora bias" and family != "phi":
        pytest.skip("lora_bias needs a base with biases")
    plain_lora = wrap(BASES[family](), GROUPS[family])
    model = wrap(BASES[family](), GROUPS[family], **OPTIONS[option])
    assert len(shared_layers(model)) == 2 * LAYERS
    if option != "dropout":  # the others do something at once, or count differently
        same_size = model.get_nb_trainable_parameters() == plain_lora.get_nb_trainable_parameters()
        assert not same_size or not torch.equal(logits(model), logits(plain_lora))
    train_step(model, lr=0.05)
    adapted, before = logits(model), tensors(model)
    model.merge_adapter()
    assert close(logits(model), adapted)
    model.unmerge_adapter()
    assert_equal(tensors(model), before)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(BASES[family](), tmp_path)), adapted)
    assert close(logits(model.merge_and_unload()), adapted)


def test_filters_restrict_lora_only(family):
    model = wrap(BASES[family](), GROUPS[family], target_modules=["q_proj"], layers_to_transform=[1])
    lora = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    assert lora == ["base_model.model.model.layers.1.self_attn.q_proj"]
    assert len(shared_layers(model)) == 2 * LAYERS


def test_rank_pattern_counts(base, family):
    model = wrap(base, GROUPS[family], rank_pattern={"q_proj": 1})
    ranks = {"q": set(), "others": set()}
    for name, parameter in tensors(model, "lora_A").items():
        ranks["q" if "q_proj" in name else "others"].add(parameter.shape[0])
    assert ranks == {"q": {1}, "others": {4}}


def test_sequence_classification(tmp_path):
    config = tiny_llama(num_labels=3, pad_token_id=0).config
    torch.manual_seed(0)
    model = wrap(LlamaForSequenceClassification(config).eval(), GROUPS["llama"], task_type="SEQ_CLS")
    assert "score.modules_to_save" in " ".join(trainable(model))
    adapted = logits(model)
    assert close(logits(model.merge_and_unload()), adapted)


@pytest.mark.parametrize(
    ("task_type", "head", "auto_class"),
    [
        ("TOKEN_CLS", "score", AutoModelForTokenClassification),
        ("QUESTION_ANS", "qa_outputs", AutoModelForQuestionAnswering),
    ],
)
def test_other_tasks_train_their_head_and_keep_the_callers_config(task_type, head, auto_class, tmp_path):
    """PEFT writes the names of the head into the config that it is given."""
    base = auto_class.from_config(tiny_llama().config).eval()
    config = adapter_config(GROUPS["llama"], task_type=task_type)
    model = get_peft_model(copy.deepcopy(base), config)
    assert model.peft_config["default"] is config
    assert head in config.modules_to_save
    assert f"{head}.modules_to_save" in " ".join(trainable(model))
    perturb(model)
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base, tmp_path)
    ids = prompt()
    for found, expected in zip(again(ids).to_tuple(), model(ids).to_tuple(), strict=True):
        assert torch.equal(found, expected)


# --- what is refused ---


def test_tensor_parallel_models_are_refused(base, family):
    base._tp_size = 2
    with pytest.raises(ValueError, match="tensor-parallel.*Load it without tp_plan"):
        get_peft_model(base, adapter_config(GROUPS[family]))
    assert not shared_layers(base)


UNSUPPORTED = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_head=2, n_layer=1, vocab_size=60000)),
    "bloom": lambda: BloomForCausalLM(BloomConfig(hidden_size=16, n_head=2, n_layer=1, vocab_size=64)),
    "None": lambda: torch.nn.Sequential(torch.nn.Linear(2, 2)),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_architectures_are_refused_with_the_list(name):
    model = UNSUPPORTED[name]()
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=f"model_type='?{name}'? is not supported.*gemma, .*llama, .*stablelm"):
        get_peft_model(model, adapter_config())
    assert dict(model.named_modules()) == before


def test_the_config_in_the_file_is_json_of_plain_values(wrapped, tmp_path):
    wrapped.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    assert raw["peft_type"] == "ASYM_GQA" and raw["inference_mode"] is True
    assert raw["head_groups"] == wrapped.base_model.head_groups("default").to_lists()


def test_injecting_by_a_state_dict_wraps_what_it_names(wrapped, family):
    expected = logits(wrapped)
    tensors = {
        name.removeprefix("base_model.model."): tensor for name, tensor in get_peft_model_state_dict(wrapped).items()
    }
    model = inject_adapter_in_model(adapter_config(GROUPS[family]), BASES[family](), state_dict=tensors).eval()
    set_peft_model_state_dict(model, tensors)
    assert torch.equal(logits(model), expected)
    base = BASES[family]()
    some = {name: tensor for name, tensor in tensors.items() if "layers.1.self_attn.v_proj" not in name}
    with pytest.raises(ValueError, match="holds nothing for .*layers.1.self_attn.v_proj.*whole adapter"):
        inject_adapter_in_model(adapter_config(GROUPS[family]), base, state_dict=some)
    assert not shared_layers(base)


def test_casting_of_inputs_can_be_disabled(wrapped):
    """There is none: weights are cast to the inputs' dtype."""
    expected = logits(wrapped)
    with disable_input_dtype_casting(wrapped):
        assert torch.equal(logits(wrapped), expected)
    assert torch.equal(logits(wrapped), expected)
