"""AsymGQAConfig: what it refuses, and that a refusal leaves the model as it was."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import GROUPS, adapter_config, assert_equal, logits, tensors, tiny_llama, tiny_phi, wrap
from peft import EvaConfig, LoftQConfig, PeftConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import CordaConfig, LoraGAConfig

from asymgqa_peft import AsymGQAConfig

BAD_FIELDS = [
    ({"num_key_value_heads": None}, "num_key_value_heads=None must be an int >= 1"),
    ({"num_key_value_heads": 0}, "num_key_value_heads=0 must be an int >= 1"),
    ({"num_key_value_heads": True}, "num_key_value_heads=True must be an int"),
    ({"num_key_value_heads": "8"}, "num_key_value_heads='8' must be an int"),
    ({"num_key_value_heads": 2.0}, "num_key_value_heads=2.0 must be an int"),
    ({"max_group_size": 0}, "max_group_size=0 must be an int >= 1, or None"),
    ({"max_group_size": True}, "max_group_size=True must be an int"),
    ({"max_group_size": "3"}, "max_group_size='3' must be an int"),
    ({"seed": None}, "seed=None must be an int"),
    ({"seed": 1.5}, "seed=1.5 must be an int"),
    ({"fit_steps": -1}, "fit_steps=-1 must be an int >= 0: gradient steps per layer, 0 for none"),
    ({"fit_steps": True}, "fit_steps=True must be an int >= 0"),
    ({"refit_output": "yes"}, "refit_output='yes' must be True or False"),
    ({"initialized": 0}, "initialized=0 must be True, False or None"),
    ({"initialized": "yes"}, "initialized='yes' must be True, False or None"),
    ({"grouping": "neighbor"}, "grouping='neighbor' is unknown: use one of 'neighbour', 'random'"),
    ({"criterion": "l2"}, "criterion='l2' is unknown: use one of 'cosine', 'residual'"),
    ({"merge": None}, "merge=None is unknown: use one of 'mean', 'aligned', 'principal'"),
    ({"merge": ["mean"]}, r"merge=\['mean'\] is unknown"),
    ({"bias": "all"}, "bias='all' is not supported.*use 'none'"),
    ({"bias": "lora_only"}, "bias='lora_only' is not supported.*use 'none'"),
    ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication=.*is not supported.*leave it unset"),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens=.*is not supported.*leave it unset"),
    ({"target_parameters": ["q_proj.weight"]}, "target_parameters=.*is not supported.*leave it unset"),
    ({"megatron_config": {"a": 1}}, "megatron_config=.*is not supported.*leave it unset"),
    ({"lora_alpha": 0}, "lora_alpha=0 must be a number > 0"),
    ({"lora_alpha": math.nan}, "lora_alpha=nan must be a number > 0"),
    ({"lora_alpha": True}, "lora_alpha=True must be a number > 0"),
    ({"lora_alpha": "8"}, "lora_alpha='8' must be a number > 0"),
    ({"alpha_pattern": {"q_proj": 0}}, "lora_alpha=0 must be a number > 0"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_FIELDS, ids=lambda value: str(value)[:40])
def test_bad_field_is_refused_with_its_value_and_the_remedy(fields, message):
    with pytest.raises(ValueError, match=message):
        AsymGQAConfig(**{"num_key_value_heads": 2} | fields)


# Every value that PEFT's LoraConfig documents, with what it needs beside it.
STARTS = {
    True: {},
    False: {},
    "gaussian": {},
    "orthogonal": {},
    "eva": {"eva_config": EvaConfig()},
    "mica": {},
    "olora": {},
    "OLoRA": {},
    "pissa": {},
    "pissa_niter_4": {},
    "corda": {"corda_config": CordaConfig()},
    "loftq": {"loftq_config": LoftQConfig()},
    "lora_ga": {"lora_ga_config": LoraGAConfig()},
    "unheard of": {},
}


@pytest.mark.parametrize("start", STARTS)
def test_no_start_of_lora_changes_the_base(start):
    """Or it is refused: the teacher and the calibration are what the base computes."""
    if start == "mica" and not hasattr(LoraLayer, "mica_init"):
        pytest.skip("this PEFT does not know it")
    base = tiny_llama()
    before, refused = tensors(base), start not in (True, False, "gaussian", "orthogonal", "eva", "mica")
    if refused:
        with pytest.raises(ValueError, match=f"init_lora_weights={start!r} is not supported.*use one of True, False"):
            adapter_config(init_lora_weights=start, **STARTS[start])
        return
    model = get_peft_model(base, adapter_config(init_lora_weights=start, **STARTS[start]))
    after = {name.replace(".base_layer", ""): tensor for name, tensor in tensors(model.base_model.model).items()}
    assert_equal({name: after[name] for name in before}, before)


def test_num_key_value_heads_is_required():
    with pytest.raises(ValueError, match="num_key_value_heads=None"):
        AsymGQAConfig()


@pytest.mark.parametrize("name", ["k_proj", "v_proj", "qkv_proj", "query_key_value", "layers.0.self_attn.k_proj"])
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "modules_to_save"])
def test_naming_a_shared_projection_is_refused(field, name):
    with pytest.raises(ValueError, match=f"{field} names {name!r}, but K and V are shared and trained whole"):
        AsymGQAConfig(num_key_value_heads=2, **{field: ["q_proj", name]})


def test_target_modules_default_to_all_linear():
    assert AsymGQAConfig(num_key_value_heads=2).target_modules == "all-linear"


HUGE = 10**5000  # more digits than Python prints
DEEP: list = []
for _ in range(100_000):
    DEEP = [DEEP]
HOSTILE = {
    "string": "01",
    "number": 3,
    "empty": [],
    "dict": {"0": [[0, 1], [2]]},
    "layer is a string": ["abc", "def"],
    "group is a number": [[0, 1], [2, 3]],
    "bool": [[[True, 0, 2, 3], [4, 5]]] * 2,
    "float": [[[0.0, 1, 2, 3], [4, 5]]] * 2,
    "string head": [[["0", 1, 2, 3], [4, 5]]] * 2,
    "None": [[[None, 1, 2, 3], [4, 5]]] * 2,
    "too deep": DEEP,
    "deep head": [[[0, 1, 2, DEEP], [4, 5]]] * 2,
    "gap": [[[0, 1, 2], [4, 5]]] * 2,
    "duplicate": [[[0, 1, 2, 3], [3, 4, 5]]] * 2,
    "out of range": [[[0, 1, 2, 3], [4, 6]]] * 2,
    "negative": [[[-1, 1, 2, 3], [4, 5]]] * 2,
    "huge int": [[[HUGE, 1, 2, 3], [4, 5]]] * 2,
    "huge list": [[[7] * 1_000_000, [4, 5]]] * 2,
    "one layer short": [[[0, 1, 2, 3], [4, 5]]],
    "one layer more": [[[0, 1, 2, 3], [4, 5]]] * 3,
    "empty group": [[[0, 1, 2, 3, 4, 5], []]] * 2,
    "three groups": [[[0, 1], [2, 3], [4, 5]]] * 2,
    "second layer wrong": [[[0, 1, 2, 3], [4, 5]], [[0, 1, 2, 3], [4, 4]]],
}


def wrap_with_groups(base, groups):
    """Wrap as a file would: its groups reach the config, then the model."""
    return get_peft_model(base, adapter_config(head_groups=groups))


@pytest.mark.parametrize("groups", HOSTILE.values(), ids=HOSTILE)
def test_hostile_head_groups_are_refused_and_the_model_is_untouched(groups):
    base = tiny_llama()
    before, reference = dict(base.named_modules()), logits(base)
    trainable = [p.requires_grad for p in base.parameters()]
    with pytest.raises(ValueError, match="head_groups") as refusal:
        wrap_with_groups(base, groups)
    assert len(str(refusal.value)) < 400
    assert dict(base.named_modules()) == before and not hasattr(base, "peft_config")
    assert [p.requires_grad for p in base.parameters()] == trainable
    assert torch.equal(logits(base), reference)
    wrap_with_groups(base, GROUPS["llama"])  # and it can still be wrapped
    assert not torch.equal(logits(base), reference)


def test_bad_groups_of_a_second_adapter_leave_the_first_as_it_was():
    model = wrap(tiny_llama(), GROUPS["llama"])
    before, names = logits(model), set(dict(model.named_modules()))
    with pytest.raises(ValueError, match="head_groups"):
        model.add_adapter("second", adapter_config(head_groups=HOSTILE["gap"]))
    assert set(model.peft_config) == {"default"} and set(dict(model.named_modules())) == names
    assert torch.equal(logits(model), before)


NESTED = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 7) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None, database=None)
@given(groups=NESTED.filter(lambda value: value is not None))
def test_anything_that_json_can_hold_gives_groups_or_one_value_error(groups):
    try:
        config = adapter_config(head_groups=groups)
    except ValueError as error:
        assert "head_groups" in str(error)
    else:
        assert all(len(partition) == 2 for partition in config.head_groups)


MODEL_REFUSALS = [
    ({"num_key_value_heads": 7}, "num_key_value_heads=7 exceeds the base's 6 KV heads"),
    ({"max_group_size": 2}, "max_group_size=2 is too small: 2 groups cannot hold 6 KV heads, use at least 3"),
    ({"target_modules": r".*\.(q_proj|v_proj)"}, "matches 'model.layers.0.self_attn.v_proj'"),
    ({"exclude_modules": r".*self_attn\..*"}, "exclude_modules=.* matches 'model.layers.0.self_attn.k_proj'"),
    ({"target_modules": ["q_prj"]}, "Target modules {'q_prj'} not found in the base model. Please check"),
    ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, r"not found.*exclude_modules={'q_proj'}"),
    ({"target_modules": ["q_proj"], "layers_to_transform": [7]}, r"not found.*layers_to_transform=\[7\]"),
    ({"max_group_size": 7}, "max_group_size=7 exceeds the base's 6 KV heads"),
    (
        {"num_key_value_heads": 4, "grouping": "symmetric"},
        "num_key_value_heads=4 does not divide the base's 6 KV heads.*grouping='asymmetric'",
    ),
    ({"modules_to_save": ["self_attn"]}, "modules_to_save names 'self_attn', which is or holds"),
    ({"modules_to_save": ["layers.0"]}, "modules_to_save names 'layers.0', which is or holds"),
    ({"modules_to_save": ["lm_head", "_proj"]}, "modules_to_save names '_proj', which is or holds"),
]


@pytest.mark.parametrize(("fields", "message"), MODEL_REFUSALS, ids=lambda value: str(value)[:40])
def test_what_only_the_model_shows_is_refused_before_it_changes(fields, message):
    base = tiny_llama()
    before, reference = dict(base.named_modules()), logits(base)
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, adapter_config(**fields))
    assert dict(base.named_modules()) == before and torch.equal(logits(base), reference)


def test_a_regex_for_the_fused_or_the_other_projections_is_accepted():
    model = get_peft_model(tiny_phi(), adapter_config(target_modules=r".*\.(q_proj|fc1)"))
    lora = {name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert lora == {"q_proj", "fc1"}


def test_all_linear_means_all_but_k_v_and_the_head(base):
    model = get_peft_model(base, adapter_config())
    lora = {name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "lora_A")}
    linear = {name.rpartition(".")[2] for name, m in base.named_modules() if type(m) is torch.nn.Linear}
    assert {"q_proj", "k_proj", "v_proj"}.isdisjoint(linear - lora - {"lm_head"})
    assert not lora & {"k_proj", "v_proj", "lm_head"} and len(lora) >= 4
    assert model.peft_config["default"].target_modules == lora


def test_config_survives_its_file(tmp_path):
    config = adapter_config(
        GROUPS["llama"], grouping="symmetric", criterion="cosine", merge="aligned", max_group_size=4,
        refit_output=False, fit_steps=5, seed=7, target_modules=["q_proj"], modules_to_save=["lm_head"],
        use_rslora=True, rank_pattern={"q_proj": 2}, lora_dropout=0.1,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    assert raw["peft_type"] == "ASYM_GQA" and raw["head_groups"] == GROUPS["llama"]
    for loaded in (AsymGQAConfig.from_pretrained(tmp_path), PeftConfig.from_pretrained(tmp_path)):
        assert type(loaded) is AsymGQAConfig
        assert loaded.to_dict() == config.to_dict()


def test_a_file_with_bad_values_is_refused(tmp_path):
    config = adapter_config(GROUPS["llama"])
    config.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    raw = json.loads(path.read_text())
    raw["head_groups"][1][0][0] = "0"
    path.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"head_groups\[1\]"):
        PeftConfig.from_pretrained(tmp_path)


def test_one_config_wraps_two_models_of_different_depth():
    config = adapter_config()
    shallow, deep = get_peft_model(tiny_llama(), config), get_peft_model(tiny_llama(num_hidden_layers=3), config)
    assert shallow.peft_config["default"] is deep.peft_config["default"] is config and config.head_groups is None
    assert len(shallow.base_model.head_groups("default").layers) == 2
    assert len(deep.base_model.head_groups("default").layers) == 3


def test_random_groups_follow_the_seed():
    def groups(**fields):
        model = get_peft_model(tiny_llama(), adapter_config(grouping="random", **fields))
        return model.base_model.head_groups("default")

    assert groups(seed=0) == groups(seed=0)
    assert groups(seed=0) != groups(seed=1)
