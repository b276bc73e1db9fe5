"""A 4-bit base (bitsandbytes, on the CPU): the adapter trains, saves and reloads in fp32; merging needs another."""

from __future__ import annotations

import pytest
import torch
from models import GROUPS, adapter_config, assert_equal, logits, perturb, tensors, tiny_llama, tiny_phi, train
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.utils.integrations import dequantize_module_weight
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from asymgqa_peft.adapter.site import attention_sites

bitsandbytes = pytest.importorskip("bitsandbytes", reason="4-bit bases need bitsandbytes: install the test extra")

SIZES = {"hidden_size": 192, "head_dim": 32, "intermediate_size": 64}  # multiples of the 64-element blocks of nf4


def quantised(folder, **options):
    """The saved base in 4 bits."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **options).eval()


@pytest.fixture(params=["llama", "phi"])
def kind(request) -> str:
    """Without and with biases."""
    return request.param


@pytest.fixture
def folder(kind, tmp_path):
    """A base on disk."""
    base = {"llama": tiny_llama, "phi": tiny_phi}[kind](**SIZES)
    base.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_trains_saves_and_reloads(kind, folder, tmp_path):
    """Nothing is evaluated before training: bitsandbytes 0.50 repacks weights on inference on a CPU, and its backward
    pass then misreads them (for LoRA too)."""
    reference = logits(quantised(folder))
    base = prepare_model_for_kbit_training(quantised(folder), use_gradient_checkpointing=False)
    model = get_peft_model(base, adapter_config(GROUPS[kind]))
    assert isinstance(base.model.layers[0].self_attn.k_proj.base_layer, bitsandbytes.nn.Linear4bit)
    before = tensors(model, "lora_kv")
    for tensor in before.values():
        assert tensor.dtype == torch.float32

    ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(3))
    losses = train(model, ids)
    model.eval()
    assert losses[-1] < losses[0]
    trained = tensors(model, "lora_kv")
    for name, tensor in trained.items():
        assert (tensor != before[name]).float().mean() > 0.9, name  # bf16 would move 3 %
    adapted = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), reference)

    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(quantised(folder), tmp_path / "adapter")
    assert torch.equal(logits(loaded), adapted) and not torch.equal(adapted, reference)
    assert_equal(tensors(loaded, "lora_kv"), trained)  # in float32 too


@pytest.mark.parametrize("used_before", [False, True])
def test_heads_start_as_the_mean_of_the_dequantised_ones(kind, folder, used_before):
    """Also after inference, for which bitsandbytes repacks weights on a CPU."""
    base = quantised(folder)
    if used_before:
        logits(base)
    model = get_peft_model(base, adapter_config(GROUPS[kind]))
    layer = model.base_model.model.model.layers[0].self_attn.v_proj
    site = attention_sites(model)[0]
    weight = site.weights().value.unflatten(0, (-1, site.shape.head_dim))
    expected = torch.cat([weight[group].mean(0) for group in GROUPS[kind][0]])
    assert torch.allclose(layer.lora_kv["default"].weight, expected, atol=1e-6)
    fresh = dequantize_module_weight(quantised(folder).model.layers[0].self_attn.v_proj).view_as(weight)
    assert torch.allclose(weight, fresh, atol=5e-3 if used_before else 0)  # inference rounds to bf16
    exact = AutoModelForCausalLM.from_pretrained(folder).model.layers[0].self_attn.v_proj.weight
    assert 1e-4 < (weight.flatten(0, 1) - exact).abs().mean() < 0.03  # it is the quantised weight, of std 0.2


def test_merging_is_refused_and_works_on_the_unquantised_base(kind, folder, tmp_path):
    model = get_peft_model(quantised(folder), adapter_config(GROUPS[kind])).eval()
    perturb(model)
    adapted, modules = logits(model), dict(model.named_modules())
    with pytest.raises(ValueError, match="quantised.*load the base in bf16, load the adapter onto it, and merge"):
        model.merge_and_unload()
    assert dict(model.named_modules()) == modules and torch.equal(logits(model), adapted)

    model.save_pretrained(tmp_path / "adapter")
    exact = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder).eval(), tmp_path / "adapter")
    before = logits(exact)
    plain = exact.merge_and_unload()
    assert torch.allclose(logits(plain), before, atol=1e-5)
    assert type(plain).__module__.startswith("transformers.")


def test_unloading_returns_the_quantised_base(kind, folder):
    reference = logits(quantised(folder))
    model = get_peft_model(quantised(folder), adapter_config(GROUPS[kind])).eval()
    assert not torch.equal(logits(model), reference)
    assert torch.equal(logits(model.unload()), reference)
