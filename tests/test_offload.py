"""Bases larger than the GPU, which accelerate keeps in main memory or on disk: all works as on the base held whole."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections import Counter
from itertools import count
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import AlignDevicesHook
from accelerate.utils import OffloadedWeightsLoader
from models import (
    CASES,
    GROUPS,
    adapted,
    adapter_config,
    assert_equal,
    config_of,
    logits,
    prompt,
    random_model,
    tensors,
    tiny_config,
    tiny_llama,
    wrap,
)
from peft import PeftConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from asymgqa_peft import AsymGQATrainer, initialize_asymgqa_weights
from asymgqa_peft.adapter.export import MergedWeights
from asymgqa_peft.adapter.offload import in_place, is_offloaded
from asymgqa_peft.adapter.site import attention_sites
from asymgqa_peft.evaluate import kl_to_reference, perplexity
from asymgqa_peft.hub import save_merged
from asymgqa_peft.method.statistics import LayerStatistics

IDS = prompt(16, 24)
CPU = torch.device("cpu")


def dispatched(base, folder):
    """As transformers loads it: the first layer on disk, the rest in memory."""
    base.save_pretrained(folder / "base")
    first, places = attention_sites(base)[0].layer_name, {}
    for name, module in base.named_modules():
        if [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            places[name] = "disk" if name.startswith(f"{first}.") else "cpu"
    return AutoModelForCausalLM.from_pretrained(
        folder / "base", device_map=places, offload_folder=str(folder / "offload"), attn_implementation="eager"
    )


KINDS = {
    "device_map": dispatched,
    "cpu_offload": lambda base, folder: cpu_offload(base, execution_device=CPU),
    "disk_offload": lambda base, folder: disk_offload(base, folder / "offload", execution_device=CPU),
}


def initialised(base, **choices):
    torch.manual_seed(0)
    model = get_peft_model(base, adapter_config(**{"num_key_value_heads": 3, "r": 8} | choices)).eval()
    return model, initialize_asymgqa_weights(model, IDS.split(8), progress=False)


def base_of(name):
    return random_model(config_of(CASES[name]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "olmo2", "phi3", "gpt_neox-wide-odd"])
def test_an_offloaded_base_gives_the_adapter_of_the_whole_one(name, kind, tmp_path):
    choices = {"head_dim": CASES[name].head_dim}
    whole, expected = initialised(base_of(name), **choices)
    base = KINDS[kind](base_of(name), tmp_path)
    assert is_offloaded(base)
    model, found = initialised(base, **choices)
    assert is_offloaded(model)
    assert (found.head_groups, found.costs, found.notes) == (expected.head_groups, expected.costs, expected.notes)
    assert_equal(tensors(model, "lora_"), tensors(whole, "lora_"))
    assert torch.equal(logits(model), logits(whole))
    assert perplexity(model, [prompt()]) == perplexity(whole, [prompt()])
    assert kl_to_reference(model, model, [prompt()]) == kl_to_reference(whole, whole, [prompt()])
    options = {"input_ids": prompt(), "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**options), whole.generate(**options))


def test_an_adapter_on_an_offloaded_base_is_saved_and_loaded(tmp_path):
    model, _ = initialised(dispatched(tiny_llama(), tmp_path))
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager"), tmp_path / "adapter"
    )
    assert torch.equal(logits(loaded), logits(model))
    base = dispatched(tiny_llama(), tmp_path)
    again = get_peft_model(base, PeftConfig.from_pretrained(tmp_path / "adapter")).eval()
    set_peft_model_state_dict(again, load_peft_weights(tmp_path / "adapter"))
    assert torch.equal(logits(again), logits(model))


def test_from_pretrained_of_peft_offloads_the_base_and_not_the_adapter(tmp_path):
    expected = wrap(tiny_llama(), GROUPS["llama"])
    expected.save_pretrained(tmp_path / "adapter")
    base, prefix = tiny_llama(), "base_model.model."
    places = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    # What PEFT goes by.
    base.hf_device_map = dict.fromkeys((*places, "model.layers.1"), "cpu")
    device_map = {prefix + place: "cpu" for place in places} | {f"{prefix}model.layers.1": "disk"}
    model = PeftModel.from_pretrained(
        base, tmp_path / "adapter", device_map=device_map, offload_dir=str(tmp_path / "offload")
    )
    assert {name for name, each in model.named_parameters() if each.is_meta} == {
        name for name, _ in model.named_parameters() if ".layers.1." in name and "lora_" not in name
    }
    assert_equal(tensors(model, "lora_"), tensors(expected, "lora_"))
    assert torch.equal(logits(model), logits(expected))
    initialised_here = initialize_asymgqa_weights(model, IDS.split(8), progress=False)
    assert initialised_here.costs == initialize_asymgqa_weights(expected, IDS.split(8), progress=False).costs
    assert torch.equal(logits(model), logits(expected))


def test_a_layer_is_loaded_for_its_whole_turn_and_no_other_with_it(tmp_path, monkeypatch):
    base = tiny_llama(num_hidden_layers=4)
    model = get_peft_model(cpu_offload(base, execution_device=CPU), adapter_config(num_key_value_heads=3)).eval()
    loads, present, load, update = Counter(), [], AlignDevicesHook.pre_forward, LayerStatistics.update

    def counted(hook, module, *args, **kwargs):
        if hook.offload and list(module.parameters(recurse=False)):
            loads[module] += 1
        return load(hook, module, *args, **kwargs)

    def watched(*args, **kwargs):
        layers = model.base_model.model.model.layers
        present.append([i for i, layer in enumerate(layers) if not layer.mlp.up_proj.base_layer.weight.is_meta])
        return update(*args, **kwargs)

    monkeypatch.setattr(AlignDevicesHook, "pre_forward", counted)
    monkeypatch.setattr(LayerStatistics, "update", watched)
    initialize_asymgqa_weights(model, IDS.split(1), progress=False)
    # 16 batches of one row, and two that hold starts of rows.
    assert len(IDS.split(1)) == 16 and sorted(present) == [[layer] for layer in range(4) for _ in range(18)]
    # Once to see what layers return, and once in a layer's own turn, which the converted stream ends.
    assert max(loads.values()) == 2
    assert all(each.is_meta for name, each in model.named_parameters() if "lora_" not in name)


def test_in_place_puts_everything_back_after_an_error():
    base = cpu_offload(tiny_llama(), execution_device=CPU)
    with pytest.raises(RuntimeError, match="inside"), in_place(base.model.layers[0].modules()):
        assert not any(each.is_meta for each in base.model.layers[0].parameters())
        raise RuntimeError("inside")
    assert all(each.is_meta for each in base.parameters())
    assert torch.equal(logits(base), logits(tiny_llama()))


# --- merging ---


def adapted_on(base, name):
    return wrap(base, CASES[name].groups, head_dim=CASES[name].head_dim)


def saved(model, folder, **options):
    """What a folder holds after `save_merged`: all tensors, and the rest of its files."""
    save_merged(model, None, folder, **options)
    weights, files = {}, {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            weights |= load_file(path)
        elif path.name != "model.safetensors.index.json":
            files[path.name] = path.read_text()
    return weights, files


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "llama-equal", "olmo2", "phi3-wide", "gpt_neox", "opt-single", "gemma3"])
def test_saving_merges_as_merging_and_saving_does(name, kind, tmp_path):
    model = adapted_on(KINDS[kind](base_of(name), tmp_path), name)
    before = tensors(model, "lora_")
    found = saved(model, tmp_path / "streamed", max_shard_size="20KB", name="plain")
    assert len(list((tmp_path / "streamed").glob("*.safetensors"))) > 3
    whole = base_of(name)
    # The card names where it came from.
    whole.name_or_path = whole.config._name_or_path = model.name_or_path
    expected = saved(adapted_on(whole, name).merge_and_unload(), tmp_path / "whole", name="plain")
    assert_equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    for file in ("config.json", "generation_config.json", "README.md"):
        assert found[1][file] == expected[1][file]
    # Nothing of the model has changed.
    assert_equal(tensors(model, "lora_"), before)
    assert torch.equal(logits(model), logits(adapted_on(base_of(name), name)))


def test_a_base_in_memory_is_merged_as_it_is_saved_too(tmp_path):
    found = saved(adapted("llama"), tmp_path / "streamed", name="plain")
    assert_equal(found[0], saved(adapted("llama").merge_and_unload(), tmp_path / "whole", name="plain")[0])


def test_layouts_are_chosen_where_a_model_is_merged(tmp_path):
    layout = {"duplicate_kv_heads": True, "cached_tokens": 0}
    plain = adapted("llama").merge_and_unload(**layout)
    assert plain.config.num_key_value_heads > CASES["llama"].num_groups
    found = saved(adapted("llama"), tmp_path / "streamed", **layout)
    assert_equal(found[0], tensors(plain))
    with pytest.raises(ValueError, match="duplicate_kv_heads and cached_tokens come too late"):
        save_merged(plain, None, tmp_path / "again", cached_tokens=0)


def test_a_base_in_main_memory_merges_into_a_plain_model_there(tmp_path):
    model = adapted_on(cpu_offload(base_of("olmo2"), execution_device=CPU), "olmo2")
    before = logits(model)
    plain = model.merge_and_unload()
    assert not any(each.is_meta for each in plain.parameters()) and not is_offloaded(plain)
    assert_equal(tensors(plain), tensors(adapted("olmo2").merge_and_unload()))
    torch.testing.assert_close(logits(plain), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_adapter_and_unloading_leave_the_base_where_it_is(kind, tmp_path, monkeypatch):
    base = KINDS[kind](base_of("llama"), tmp_path)
    maps = {name: module._hf_hook.weights_map for name, module in base.named_modules() if hasattr(module, "_hf_hook")}
    model = adapted_on(base, "llama")
    model.add_adapter("second", adapter_config(num_key_value_heads=2))
    model.set_adapter("second")
    whole = adapted("llama")
    whole.add_adapter("second", adapter_config(num_key_value_heads=2))
    whole.set_adapter("second")
    assert torch.equal(logits(model), logits(whole))
    # Nothing loads more than it unwraps.
    monkeypatch.setattr(OffloadedWeightsLoader, "__iter__", lambda self: pytest.fail("all weights were loaded"))
    assert model.unload() is base and torch.equal(logits(base), logits(base_of("llama")))
    assert is_offloaded(base)
    for name, weights in maps.items():
        assert base.get_submodule(name)._hf_hook.weights_map is weights


def test_a_save_that_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    model = adapted_on(dispatched(base_of("llama"), tmp_path), "llama")
    before, reads = set(tmp_path.iterdir()), count()

    def fails(*args):
        if next(reads) == 1:
            raise OSError("disk broken")
        return read(*args)

    read = MergedWeights.merged
    monkeypatch.setattr(MergedWeights, "merged", fails)
    with pytest.raises(OSError, match="disk broken"):
        save_merged(model, None, tmp_path / "plain")
    assert set(tmp_path.iterdir()) == before
    assert torch.equal(logits(model), logits(adapted("llama")))
    save_merged(model, None, tmp_path / "plain")


MERGED = r"""
import re, sys, torch
from pathlib import Path
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from asymgqa_peft import AsymGQAConfig
from asymgqa_peft.hub import save_merged

def merge(base, way, output):
    places = {}
    if way == "streamed":
        places = {"device_map": {"": "disk"}, "offload_folder": base + "-offload"}
    torch.manual_seed(0)
    config = AsymGQAConfig(num_key_value_heads=2, grouping="neighbour", merge="mean", r=2, init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, **places), config)
    if way == "whole":
        model = model.merge_and_unload()
    save_merged(model, None, output, max_shard_size="10MB")

def peak():
    # Not ru_maxrss, which begins with what the parent had.
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

folder, way = sys.argv[1:]
merge(folder + "/small", way, folder + "/small-" + way)  # whatever is imported only now
before = peak()
merge(folder + "/base", way, folder + "/" + way)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from /proc")
def test_a_merge_from_disk_to_disk_holds_a_layer_and_a_file(tmp_path):
    """Main memory of a process of its own, beyond what it had before the base was loaded."""
    for name, layers in (("small", 2), ("base", 60)):
        sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": layers, "head_dim": 32}
        base = LlamaForCausalLM(tiny_config("llama", **sizes))
        base.save_pretrained(tmp_path / name, max_shard_size="10MB")
    total = sum(parameter.nbytes for parameter in base.parameters())
    assert total > 200e6
    grown = {}
    for way in ("streamed", "whole"):
        command = [sys.executable, "-c", MERGED, str(tmp_path), way]
        # What is freed goes back at once, small tensors too.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        grown[way] = int(done.stdout.split()[-1])
    assert grown["streamed"] < total / 3 < 1.5 * total < grown["whole"], grown
    shards = sorted((tmp_path / "whole").glob("*.safetensors"))
    assert len(shards) > 10
    for shard in shards:
        assert (tmp_path / "streamed" / shard.name).read_bytes() == shard.read_bytes()


# --- what stays refused ---


@pytest.mark.parametrize(
    "field", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3]}]
)
def test_what_reads_or_changes_offloaded_weights_is_refused(field):
    base = cpu_offload(tiny_llama(), execution_device=CPU)
    before = logits(base)
    with pytest.raises(ValueError, match=f"The base is offloaded.*{next(iter(field))}.*Leave that unset"):
        get_peft_model(base, adapter_config(**field))
    assert torch.equal(logits(base), before)
    model = get_peft_model(base, adapter_config())
    with pytest.raises(ValueError, match=next(iter(field))):
        model.add_adapter("second", adapter_config(**field))


def test_weights_on_disk_that_peft_has_lost_are_refused_with_the_remedy(tmp_path):
    wrap(tiny_llama(), GROUPS["llama"]).save_pretrained(tmp_path / "adapter")
    base = dispatched(tiny_llama(), tmp_path)
    with pytest.raises(ValueError, match=r"9 weights.*PeftModel.from_pretrained.*set_peft_model_state_dict"):
        PeftModel.from_pretrained(base, tmp_path / "adapter")


def test_a_base_on_disk_has_no_merged_model_in_memory(tmp_path):
    model = adapted_on(dispatched(base_of("llama"), tmp_path), "llama")
    with pytest.raises(ValueError, match=r"offloaded to disk.*save_merged\(model, tokenizer, folder\)"):
        model.merge_and_unload()
    assert torch.equal(logits(model), logits(adapted("llama")))


def test_training_and_merging_into_an_offloaded_base_are_refused():
    model = wrap(cpu_offload(tiny_llama(), execution_device=CPU), GROUPS["llama"])
    with pytest.raises(ValueError, match="offloaded base.*backward"):
        AsymGQATrainer(model=model)
    with pytest.raises(ValueError, match="merge_adapter.*they are offloaded"):
        model.merge_adapter()


def test_a_copy_of_an_offloaded_norm_is_its_own(tmp_path):
    base = disk_offload(base_of("qwen3"), tmp_path / "offload", execution_device=CPU)
    model = wrap(base, CASES["qwen3"].groups)
    expected = wrap(base_of("qwen3"), CASES["qwen3"].groups)
    assert torch.equal(logits(model), logits(expected))
    assert torch.equal(logits(copy.deepcopy(model)), logits(expected))
