"""What contradicts itself is told at wrapping, in one ValueError, and the model is as it was."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from models import (
    CASES,
    EQUAL_GROUPS,
    GROUPS,
    adapter_config,
    config_of,
    logits,
    prompt,
    random_model,
    tiny_config,
    tiny_llama,
    tiny_phi,
    wrap,
)
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from asymgqa_peft import initialize_asymgqa_weights

# --- a model that carries adapters ---


def lora() -> LoraConfig:
    """Plain LoRA that changes what K and V are."""
    return LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)


def transformers_own(base):
    """The model with an adapter of transformers' own making."""
    try:
        base.add_adapter(lora(), "sft")
    except ValueError as error:
        # A transformers newer than its peft cannot make one.
        pytest.skip(str(error))
    return base


CARRIERS = {
    "a PeftModel": lambda base: get_peft_model(base, lora()),
    "its inner model": lambda base: get_peft_model(base, lora()).base_model.model,
    "its tuner": lambda base: get_peft_model(base, lora()).base_model,
    "transformers' add_adapter": transformers_own,
    "an AsymGQA model": lambda base: wrap(base, GROUPS["llama"]),
    "its inner model too": lambda base: wrap(base, GROUPS["llama"]).base_model.model,
}


@pytest.mark.parametrize("carrier", CARRIERS)
def test_a_model_that_carries_an_adapter_is_refused_before_it_changes(carrier):
    model = CARRIERS[carrier](tiny_llama()).eval()
    before, modules, adapters = logits(model), dict(model.named_modules()), dict(model.peft_config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of a second wrap
        with pytest.raises(ValueError, match="carries an adapter already.*merge first"):
            get_peft_model(model, adapter_config(GROUPS["llama"]), adapter_name="second")
    assert dict(model.named_modules()) == modules and model.peft_config == adapters
    assert torch.equal(logits(model), before)


def test_after_merging_it_is_taken():
    model = get_peft_model(tiny_llama(), lora()).eval()
    tuned = logits(model)
    singles = [[[head] for head in range(6)]] * 2
    again = get_peft_model(model.merge_and_unload(), adapter_config(singles)).eval()
    torch.testing.assert_close(logits(again), tuned, rtol=1e-4, atol=1e-5)


# --- modules that contradict the configuration ---


def other_kv_heads(model):
    """Fewer KV heads in the last layer."""
    for name in ("k_proj", "v_proj"):
        setattr(model.model.layers[1].self_attn, name, nn.Linear(48, 24, bias=False))


def replaced_weight(model):
    """The same, but the module still says its old size."""
    for name in ("k_proj", "v_proj"):
        getattr(model.model.layers[1].self_attn, name).weight = nn.Parameter(torch.randn(24, 48))


def shared_layer(model):
    """One layer run twice."""
    model.model.layers[1] = model.model.layers[0]


def sliced(model):
    """The first layer alone."""
    model.model.layers = model.model.layers[:1]


def sliced_and_said(model):
    """The last layer alone, and the configuration says one."""
    model.model.layers = model.model.layers[1:]
    model.config.num_hidden_layers = 1


def edited(**fields):
    """A change of the configuration after the model was made."""

    def edit(model):
        for name, value in fields.items():
            setattr(model.config, name, value)

    return edit


CONTRADICTIONS = {
    "other KV heads in one layer": (other_kv_heads, "layers.1.self_attn.k_proj.out_features is 24, not 48"),
    "a weight of another shape": (replaced_weight, r"layers.1.self_attn.k_proj.weight has the shape \(24, 48\)"),
    "half the heads, twice as wide": (
        edited(num_attention_heads=3, num_key_value_heads=3, head_dim=16),
        "self_attn.head_dim is 8, not 16",
    ),
    "another head count": (edited(num_attention_heads=12), "not"),
    "other KV heads": (edited(num_key_value_heads=3), "self_attn.num_key_value_groups is 1, not 2"),
    "KV heads that do not divide": (edited(num_key_value_heads=4), "k_proj.out_features is 48, not 32"),
    "a layer twice": (shared_layer, "1 different layers with attention, num_hidden_layers=2"),
    "layers left out": (sliced, "1 different layers with attention, num_hidden_layers=2"),
    "layers left out, and said": (sliced_and_said, "layers.0.self_attn.layer_idx is 1, not 0"),
    "another vocabulary": (edited(vocab_size=103), "embed_tokens.num_embeddings is 101, not 103"),
    "another hidden size": (edited(intermediate_size=40), "mlp.gate_proj.out_features is 48, not 40"),
    "another RoPE": (
        edited(rope_parameters={"rope_type": "default", "rope_theta": 77.0}),
        "inv_freq has other values",
    ),
    "another scale of scores": (
        lambda model: setattr(model.model.layers[1].self_attn, "scaling", 0.5),
        "layers.1.self_attn.scaling is 0.5, not 0.35",
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_modules_that_contradict_the_configuration_are_refused(name):
    change, message = CONTRADICTIONS[name]
    model = tiny_llama()
    change(model)
    modules, random_state = dict(model.named_modules()), torch.get_rng_state()
    with pytest.raises(ValueError, match=f"(?s)modules contradict its configuration.*{message}") as refusal:
        get_peft_model(model, adapter_config())
    assert len(str(refusal.value)) < 2000
    assert dict(model.named_modules()) == modules and not hasattr(model, "peft_config")
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("fields", [{"partial_rotary_factor": 0.4}, {"partial_rotary_factor": 0.05}, {"head_dim": 1}])
def test_rotary_dimensions_that_are_no_pairs_are_refused(fields):
    config = tiny_phi().config
    for name, value in fields.items():
        setattr(config, name, value)
    if "partial_rotary_factor" in fields:
        config.rope_parameters = config.rope_parameters | fields
    with pytest.raises(ValueError, match="of a head are rotary, which come in pairs"):
        get_peft_model(AutoModelForCausalLM.from_config(config), adapter_config())


@pytest.mark.parametrize("name", CASES)
def test_what_transformers_makes_contradicts_nothing(name):
    model = random_model(config_of(CASES[name]))
    model(prompt())  # may leave frequencies of another length behind
    get_peft_model(model.bfloat16(), adapter_config(CASES[name].groups))


def test_resized_embeddings_contradict_nothing():
    model = tiny_llama()
    model.resize_token_embeddings(110)
    get_peft_model(model, adapter_config())


# --- what would be found out much later ---


def test_lora_biases_without_a_place_in_the_base_are_refused():
    with pytest.raises(ValueError, match=r"lora_bias=True cannot be merged into 'model.layers.0.self_attn.q_proj'"):
        get_peft_model(tiny_llama(), adapter_config(lora_bias=True))


def longrope_phi3():
    """A Phi-3 whose configuration counts rotary frequencies by hidden size and heads; K = 8."""
    longrope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 500.0}
    longrope |= {"original_max_position_embeddings": 8}
    return random_model(tiny_config("phi3", hidden_size=64, head_dim=None, rope_parameters=longrope))


UNEQUAL = [[[0, 1, 2], [3], [4, 5], [6, 7]]] * 2
IN_PAIRS = [[[0, 1, 2, 3], [4, 5], [6, 7]]] * 2  # each head stored for two: 4 K/V heads of 8
NO_CHECKPOINT = {
    "searched": ({}, "may find groups of 3 KV heads.*grouping='symmetric'.*max_group_size=2"),
    "given": ({"head_groups": UNEQUAL}, "holds 4 groups of up to 3 query heads.*grouping='symmetric'"),
    "of random sizes": ({"num_key_value_heads": 3, "grouping": "random"}, "holds 3 groups of up to 3"),
}


@pytest.mark.parametrize("name", NO_CHECKPOINT)
def test_groups_that_no_plain_checkpoint_holds_are_refused_at_wrapping(name):
    fields, message = NO_CHECKPOINT[name]
    base = longrope_phi3()
    before, modules = logits(base), dict(base.named_modules())
    with pytest.raises(ValueError, match=f"(?s){message}"):
        get_peft_model(base, adapter_config(**{"num_key_value_heads": 4} | fields))
    assert dict(base.named_modules()) == modules and not hasattr(base, "peft_config")
    assert torch.equal(logits(base), before)


def test_a_quantised_base_is_asked_what_its_exact_twin_can_be_merged_to():
    base = longrope_phi3()
    base.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(quant_method="bitsandbytes"))
    with pytest.raises(ValueError, match="may find groups of 3 KV heads"):
        get_peft_model(base, adapter_config(num_key_value_heads=4))


@pytest.mark.parametrize(
    "fields",
    [{"grouping": "symmetric"}, {"max_group_size": 2}, {"grouping": "neighbour"}, {"head_groups": EQUAL_GROUPS}],
)
def test_what_the_refusal_names_instead_is_taken_and_merges(fields):
    model = get_peft_model(longrope_phi3(), adapter_config(**{"num_key_value_heads": 4} | fields)).eval()
    expected = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-5)


def test_groups_that_are_held_with_some_heads_twice_are_taken():
    model = get_peft_model(longrope_phi3(), adapter_config(IN_PAIRS)).eval()
    expected = logits(model)
    with pytest.raises(ValueError, match="duplicate_kv_heads=True"):
        model.merge_and_unload()
    plain = model.merge_and_unload(duplicate_kv_heads=True)
    assert plain.config.num_key_value_heads == 4
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-5)


def test_a_search_for_them_is_refused_before_it_begins():
    model = get_peft_model(longrope_phi3(), adapter_config(EQUAL_GROUPS))
    with pytest.raises(ValueError, match="grouping='asymmetric' may find groups of 3 KV heads"):
        initialize_asymgqa_weights(model, [prompt(4, 12)])


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_an_adapter_of_such_groups_that_is_there_still_loads():
    base = longrope_phi3()
    with pytest.warns(UserWarning, match="merge_and_unload will refuse this adapter.*holds 4 groups of up to 3"):
        get_peft_model(base, adapter_config(UNEQUAL, initialized=True))


def test_continuous_batching_is_refused_at_the_call():
    model = wrap(tiny_llama(), GROUPS["llama"])
    for call in (model.generate_batch, model.base_model.model.generate_batch):
        with pytest.raises(ValueError, match="continuous batching.*merge_and_unload"):
            call([prompt()[0].tolist()])
    plain = model.merge_and_unload()
    assert "init_continuous_batching" not in vars(plain)
    assert "init_continuous_batching" not in vars(wrap(tiny_llama(), GROUPS["llama"]).unload())


def test_a_base_that_was_unpacked_from_gguf_merges():
    base = tiny_llama()
    # What from_pretrained(gguf_file=...) leaves of an architecture that it unpacks.
    base.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(quant_method="gguf"))
    base.config.quantization_config = {"quant_method": "gguf"}
    base.is_quantized = True
    model = wrap(base, GROUPS["llama"])
    before = logits(model)
    plain = model.merge_and_unload()
    torch.testing.assert_close(logits(plain), before, rtol=1e-4, atol=1e-5)
    assert not hasattr(plain.config, "quantization_config")
