"""Groups travel with the weights: whatever the route, an adapter computes with the groups it was saved with."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from models import BASES, GROUPS, LAYERS, adapter_config, logits, perturb, tiny_llama, wrap
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from asymgqa_peft import AsymGQAConfig, initialize_asymgqa_weights

WIDTHS = {None: "narrow", 16: "wide"}


@pytest.fixture(params=WIDTHS, ids=WIDTHS.values())
def saved(request, family, tmp_path):
    """A saved adapter in groups that no wrap would choose, and its logits."""
    groups = GROUPS[family]
    model = wrap(BASES[family](), groups, head_dim=request.param)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", logits(model)


def fresh(family: str, folder, **changes) -> PeftModel:
    """Another adapter of the same counts, in neighbouring groups, with other weights."""
    config = json.loads((folder / "adapter_config.json").read_text())
    model = get_peft_model(BASES[family](), adapter_config(head_dim=config["head_dim"], **changes)).eval()
    perturb(model, seed=7)
    return model


def by_load_adapter(model, folder):
    model.load_adapter(str(folder), "default")


def by_peft_state_dict(model, folder):
    set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))


def by_assigning(model, folder):
    set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"), low_cpu_mem_usage=True)


@pytest.mark.parametrize("load", [by_load_adapter, by_peft_state_dict, by_assigning])
def test_loading_into_an_existing_adapter_brings_the_groups_along(saved, family, load):
    folder, expected = saved
    model = fresh(family, folder)
    before = model.base_model.head_groups("default").to_lists()
    assert before != GROUPS[family]
    assert not torch.allclose(logits(model), expected)
    load(model, folder)
    assert torch.equal(logits(model), expected)
    assert model.peft_config["default"].head_groups == GROUPS[family]


def test_a_strict_load_of_a_whole_state_dict_brings_the_groups_along(saved, family):
    folder, expected = saved
    source = PeftModel.from_pretrained(BASES[family](), folder).eval()
    model = fresh(family, folder)
    model.load_state_dict(source.state_dict(), strict=True)
    assert torch.equal(logits(model), expected)


def test_from_pretrained_with_the_callers_own_config(saved, family):
    folder, expected = saved
    width = json.loads((folder / "adapter_config.json").read_text())["head_dim"]
    config = adapter_config(head_dim=width)
    model = PeftModel.from_pretrained(BASES[family](), folder, config=config).eval()
    assert model.peft_config["default"] is config
    assert torch.equal(logits(model), expected)
    assert config.head_groups == GROUPS[family]


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_file_without_head_groups_in_its_configuration(saved, family, low_cpu_mem_usage):
    folder, expected = saved
    edit(folder, head_groups=None)
    model = PeftModel.from_pretrained(BASES[family](), folder, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(logits(model), expected)


def test_transformers_own_load_adapter(saved, family):
    folder, expected = saved
    for head_groups in (GROUPS[family], None):
        edit(folder, head_groups=head_groups)
        base = BASES[family]()
        base.load_adapter(str(folder))
        assert torch.equal(logits(base.eval()), expected)


def test_an_initialised_adapter_takes_the_groups_of_what_is_loaded(saved, family):
    folder, expected = saved
    model = fresh(family, folder)
    ids = torch.randint(0, 64, (16, 32), generator=torch.Generator().manual_seed(0))
    initialize_asymgqa_weights(model, ids.split(8), progress=False)
    assert not torch.allclose(logits(model), expected)
    model.load_adapter(str(folder), "default")
    assert torch.equal(logits(model), expected)


def test_distributed_wrappers_and_the_meta_device():
    script = Path(__file__).with_name("distributed_loads.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    routes = [(name, width) for width in (None, 16) for name in ("under_ddp", "under_fsdp2", "on_meta")]
    assert found == [[name, width, True, True] for name, width in routes]


def test_the_next_save_says_the_groups_that_were_loaded(saved, family, tmp_path):
    folder, expected = saved
    model = fresh(family, folder)
    model.load_adapter(str(folder), "default")
    model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(BASES[family](), tmp_path / "again").eval()
    assert torch.equal(logits(again), expected)
    assert json.loads((tmp_path / "again/adapter_config.json").read_text())["head_groups"] == GROUPS[family]


def test_a_configuration_and_weights_that_contradict_each_other_are_refused(saved, family):
    folder, _ = saved
    num_heads = BASES[family]().config.num_key_value_heads
    edit(folder, head_groups=[[[0], list(range(1, num_heads))]] * LAYERS)
    with pytest.raises(ValueError, match="configuration and of the weights contradict each other"):
        PeftModel.from_pretrained(BASES[family](), folder)
    base = BASES[family]()
    with pytest.raises(ValueError, match="configuration and of the weights contradict each other"):
        base.load_adapter(str(folder))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda index: index.float(), "must be 6 integers"),
        (lambda index: index[:-1].clone(), r"must be 6 integers|shape \(5,\) instead of \(6,\)"),
        (lambda index: index + 1, "name group 2, num_key_value_heads is 2"),
        (lambda index: index - 1, "name group -1"),
        (lambda index: torch.zeros_like(index), "leave a group empty"),
    ],
)
def test_damaged_groups_are_refused_before_anything_changes(tmp_path, damage, message):
    wrap(tiny_llama(), GROUPS["llama"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in reversed(sorted(tensors)) if ".lora_groups." in name)  # of the last layer
    tensors[name] = damage(tensors[name])
    save_file(tensors, file)
    model = wrap(tiny_llama())
    before, state = logits(model), {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        model.load_adapter(str(tmp_path), "default")
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(logits(model), before)


# ---- adapters of version 0.1 hold their groups in adapter_config.json alone ----


@pytest.fixture
def old_file(tmp_path):
    """An adapter as version 0.1 saved it, and its logits."""
    model = wrap(tiny_llama(), GROUPS["llama"])
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if ".lora_groups." not in name},
        tmp_path / "adapter_model.safetensors",
    )
    return tmp_path, logits(model)


def test_old_files_load_through_their_configuration(old_file):
    folder, expected = old_file
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), folder).eval()), expected)
    model = get_peft_model(tiny_llama(), adapter_config()).eval()
    model.load_adapter(str(folder), "old")
    model.set_adapter("old")
    assert torch.equal(logits(model), expected)


def test_old_files_are_refused_where_their_configuration_is_not_read(old_file):
    folder, _ = old_file
    model = get_peft_model(tiny_llama(), adapter_config()).eval()
    before = logits(model)
    with pytest.raises(ValueError, match="groups of its heads.*PeftModel.from_pretrained"):
        model.load_adapter(str(folder), "default")
    with pytest.raises(ValueError, match="groups of its heads"):
        set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    edit(folder, head_groups=None)
    with pytest.raises(ValueError, match="groups of its heads"):
        PeftModel.from_pretrained(tiny_llama(), folder)
    assert torch.equal(logits(model), before)


# ---- what was promised and never done ----

PROMISE = "need initialize_asymgqa_weights"


@contextmanager
def told():
    """Messages about a promise that was not kept, as they come."""
    messages = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    messages += [str(warning.message) for warning in caught if PROMISE in str(warning.message)]


def test_an_adapter_that_was_never_initialised_says_so_once_when_it_is_trained():
    model = get_peft_model(tiny_llama(), adapter_config())
    inputs = torch.randint(0, 64, (2, 9))
    with told() as messages:
        model.eval()(inputs)
    assert not messages  # looking at it is no fault
    model.train()
    with told() as messages:
        model(inputs)
        model(inputs)
    assert len(messages) == 1


@pytest.mark.parametrize("method", ["merge_and_unload", "merge_adapter"])
def test_an_adapter_that_was_never_initialised_says_so_when_it_is_merged(method):
    with told() as messages:
        getattr(get_peft_model(tiny_llama(), adapter_config()), method)()
    assert len(messages) == 1


def test_the_saved_configuration_tells_that_nothing_was_initialised(tmp_path):
    model = get_peft_model(tiny_llama(), adapter_config())
    with told() as messages:
        model.save_pretrained(tmp_path)
    assert len(messages) == 1
    assert AsymGQAConfig.from_pretrained(tmp_path).initialized is False
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    with told() as messages:
        loaded.train()(torch.randint(0, 64, (2, 9)))
    assert len(messages) == 1


@pytest.mark.parametrize("kept", ["initialised", "loaded", "asked for"])
def test_no_warning_where_the_promise_is_kept(tmp_path, kept):
    changes = {"grouping": "neighbour", "merge": "mean"} if kept == "asked for" else {}
    model = get_peft_model(tiny_llama(), adapter_config(**changes))
    if kept == "initialised":
        ids = torch.randint(0, 64, (16, 32), generator=torch.Generator().manual_seed(0))
        initialize_asymgqa_weights(model, ids.split(8), progress=False)
    if kept == "loaded":
        set_peft_model_state_dict(model, get_peft_model_state_dict(wrap(tiny_llama())))
    with told() as messages:
        model.train()(torch.randint(0, 64, (2, 9)))
        model.save_pretrained(tmp_path)
        model.merge_and_unload()
    assert not messages
    says = {"initialised": True, "loaded": None, "asked for": False}
    assert AsymGQAConfig.from_pretrained(tmp_path).initialized is says[kept]


def edit(folder, **changes) -> None:
    """Change fields of a saved configuration."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
