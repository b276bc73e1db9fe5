"""On a CUDA device: flash, sdpa and flex kernels, bf16 and fp32, compiled and generated. Run with -m gpu."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace
from functools import cache

import pytest
import torch
from accelerate import dispatch_model
from models import CASES, adapter_config, config_of, left_padded, prompt, random_model, wrap
from peft import PeftModel, get_peft_model
from reference import dense_reference, greedy_alone, relative_error, rows_alone
from test_statistics import SHAPES, assert_same, random_activations, random_output
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.utils import is_flash_attn_2_available

from asymgqa_peft import initialize_asymgqa_weights
from asymgqa_peft.adapter.offload import is_offloaded
from asymgqa_peft.attention import grouped_sdpa
from asymgqa_peft.initialize import streams
from asymgqa_peft.method.statistics import LayerStatistics

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = "cuda"
NAMES = ["llama", "mistral", "qwen2-gqa", "phi3", "olmo2"]
FP32 = {"eager": 2e-5, "sdpa": 2e-5, "flex_attention": 2e-4}  # of the largest logit; flex may round products to TF32


def case_of(name: str):
    """A case of the table with heads that the kernels take (D = 64)."""
    return replace(CASES[name], overrides=CASES[name].overrides | {"head_dim": 64, "hidden_size": 192})


@cache
def base_of(name: str):
    return random_model(config_of(case_of(name)))


def adapter_on(base, name: str, attention: str):
    model = wrap(copy.deepcopy(base), CASES[name].groups).to(DEVICE)
    model.set_attn_implementation(attention)
    return model


@cache
def reference(name: str):
    base = base_of(name)
    return dense_reference(base, wrap(copy.deepcopy(base), CASES[name].groups), CASES[name].groups)


@cache
def expected_tokens(name: str) -> torch.Tensor:
    return greedy_alone(reference(name), left_padded(batch=4, length=40), tokens=12)


def on_device(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.to(DEVICE) for key, value in inputs.items()}


def error_on_device(model, inputs, expected) -> float:
    return relative_error(model, on_device(inputs), [row.to(DEVICE) for row in expected])


@pytest.mark.parametrize("attention", FP32)
@pytest.mark.parametrize("name", NAMES)
def test_fp32_logits_equal_the_float64_reference(name: str, attention: str):
    inputs = left_padded(batch=4, length=40)
    expected = rows_alone(reference(name), inputs)
    assert error_on_device(copy.deepcopy(base_of(name)).to(DEVICE), inputs, expected) > 0.1
    model = adapter_on(base_of(name), name, attention)
    assert error_on_device(model, inputs, expected) < FP32[attention]


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("name", NAMES)
def test_greedy_generation_equals_the_reference(name: str, options: dict):
    """A static cache also compiles the decoding step here."""
    inputs = left_padded(batch=4, length=40)
    model = adapter_on(base_of(name), name, "sdpa")
    tokens = model.generate(**on_device(inputs), max_new_tokens=12, do_sample=False, **options)
    assert torch.equal(tokens[:, -12:].cpu(), expected_tokens(name))


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_beam_search_and_sampling_equal_the_merged_model(name: str):
    model = adapter_on(base_of(name), name, "sdpa")
    plain = copy.deepcopy(model).merge_and_unload()
    ids = prompt(batch=4, length=40).to(DEVICE)
    for options in ({"num_beams": 4, "do_sample": False}, {"do_sample": True, "top_k": 50}):
        drawn = []
        for it in (model, plain):
            torch.manual_seed(0)
            drawn.append(it.generate(input_ids=ids, max_new_tokens=12, **options))
        assert torch.equal(*drawn)


KERNELS = {
    "flash kernel of sdpa": ("sdpa", lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION)),
    "sdpa": ("sdpa", contextlib.nullcontext),
    "flex_attention": ("flex_attention", contextlib.nullcontext),
    "flash_attention_2": ("flash_attention_2", contextlib.nullcontext),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["llama", "qwen2-gqa", "olmo2"])
@torch.no_grad()
def test_bf16_is_as_close_to_the_truth_as_the_merged_model(name: str, kernel: str):
    attention, using = KERNELS[kernel]
    if attention == "flash_attention_2" and not is_flash_attn_2_available():
        pytest.skip("flash-attn is not installed")
    case = case_of(name)
    window_off = {"use_sliding_window": False} if "use_sliding_window" in case.overrides else {}  # a mask: no flash
    base = random_model(config_of(replace(case, overrides=case.overrides | window_off))).bfloat16()
    model = adapter_on(base, name, attention)
    ids = prompt(batch=8, length=64)
    truth = rows_alone(dense_reference(base, copy.deepcopy(model).cpu(), case.groups), {"input_ids": ids})
    truth = torch.stack(truth).to(DEVICE)

    def error(it) -> float:
        with using():
            logits = it(ids.to(DEVICE)).logits
        assert logits.dtype == torch.bfloat16
        return (logits.double() - truth).square().mean().sqrt().item()

    adapter = error(model)
    plain = model.merge_and_unload()
    plain.set_attn_implementation(attention)
    assert 0 < adapter < 1.5 * error(plain)


@pytest.mark.parametrize("name", ["llama", "phi3"])
@torch.no_grad()
def test_compiled_logits_with_and_without_the_adapter(name: str):
    torch._dynamo.reset()
    model = adapter_on(base_of(name), name, "sdpa")
    base = copy.deepcopy(base_of(name)).to(DEVICE)
    compiled = torch.compile(model, fullgraph=True)
    inputs = {"input_ids": prompt(batch=4, length=40)}
    assert error_on_device(compiled, inputs, rows_alone(reference(name), inputs)) < 2e-5
    with model.disable_adapter():
        expected = [row.double() for row in base(**on_device(inputs)).logits]
        assert error_on_device(compiled, inputs, expected) < 2e-5


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
@torch.no_grad()
def test_disabling_is_bitwise_the_base(attention: str):
    model = adapter_on(base_of("llama"), "llama", attention)
    base = copy.deepcopy(base_of("llama")).to(DEVICE)
    base.set_attn_implementation(attention)
    inputs = on_device(left_padded(batch=4, length=40))
    before = model(**inputs).logits
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, base(**inputs).logits)
    assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_a_bf16_training_step_with_checkpointing_moves_everything(attention: str):
    model = adapter_on(copy.deepcopy(base_of("llama")).bfloat16(), "llama", attention).train()
    model.enable_input_require_grads()
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    ids = prompt(batch=4, length=40).to(DEVICE)
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.AdamW(trained.values(), lr=1e-4).step()
    assert all(p.dtype == torch.float32 for p in trained.values())
    assert [name for name, p in trained.items() if torch.equal(p, before[name])] == []


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_packed_rows_equal_float64_by_document(head_dim: int, window: int | None):
    starts = torch.tensor([0, 300, 301, 777, 1000], dtype=torch.int32, device=DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    heads = torch.randn(3, 1, 4, 1000, head_dim, generator=generator, device=DEVICE, dtype=torch.bfloat16)
    heads.requires_grad_()
    packed = {"cu_seq_lens_q": starts, "max_length_q": 476, "sliding_window": window}
    found, _ = grouped_sdpa(None, *heads, None, scaling=0.1, **packed)
    # What each position may see: earlier ones of its document, within the window.
    place = torch.arange(1000, device=DEVICE)
    document, distance = torch.bucketize(place, starts[1:], right=True), place[:, None] - place
    seen = (document[:, None] == document) & (distance >= 0) & (distance < (window or 1000))
    exact = heads.detach().double().requires_grad_()
    expected = torch.nn.functional.scaled_dot_product_attention(*exact, seen, scale=0.1).transpose(1, 2)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-2 * expected.abs().max().item())
    for rows in (found, expected):
        rows.square().sum().backward()
    largest = exact.grad.abs().max().item()
    torch.testing.assert_close(heads.grad.double(), exact.grad, rtol=0, atol=1e-2 * largest)


@torch.no_grad()
def test_the_cache_takes_the_memory_of_the_shared_heads():
    model = adapter_on(base_of("llama"), "llama", "sdpa")
    ids = prompt(batch=4, length=40).to(DEVICE)

    def cache_bytes() -> int:
        layers = model(ids, use_cache=True).past_key_values.layers
        return sum(t.untyped_storage().nbytes() for layer in layers for t in (layer.keys, layer.values))

    shared = cache_bytes()
    with model.disable_adapter():
        assert shared * 8 == cache_bytes() * 3


# ------------------------------------------------------------------------------------------------ initialisation


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", SHAPES)
def test_statistics_equal_those_of_float64(name: str, dtype: torch.dtype):
    """16-bit activations are multiplied as they are: only sums are rounded, to float32."""
    shape, output = SHAPES[name], random_output(SHAPES[name])
    on_gpu, exact = LayerStatistics(shape, DEVICE), LayerStatistics(shape)
    for seed in range(3):
        data = random_activations(shape, 3, 40, seed, dtype)
        on_gpu.update(**on_device(data))
        exact.update(**{part: x.double() for part, x in data.items()})
    found, expected = on_gpu.moments(output.to(DEVICE)).to("cpu"), exact.moments(output)
    assert_same(found, expected, tolerance=1e-10 if dtype == torch.float32 else 1e-4)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt_neox", "olmo2-gqa"])
def test_an_initialisation_finds_what_the_cpu_finds(name: str):
    """Where the search runs beside the streams: the same groups, and logits that were not the same before."""
    reports, logits = {}, {}
    for device in ("cpu", DEVICE):
        torch.manual_seed(0)
        config = adapter_config(num_key_value_heads=3, r=8)
        model = get_peft_model(random_model(config_of(CASES[name])), config).eval().to(device)
        with torch.no_grad():
            before = model(prompt(4, 20, seed=9).to(device)).logits.cpu()
            reports[device] = initialize_asymgqa_weights(model, prompt(16, 24).split(8), progress=False)
            logits[device] = model(prompt(4, 20, seed=9).to(device)).logits.cpu()
    assert reports[DEVICE].head_groups == reports["cpu"].head_groups
    torch.testing.assert_close(logits[DEVICE], logits["cpu"], rtol=1e-3, atol=1e-3 * before.abs().max().item())
    assert (before - logits[DEVICE]).abs().max() > 0.01 * before.abs().max()


PLACES = {"model.embed_tokens": 0, "model.layers.0": 0, "model.rotary_emb": 0}
PLACES |= {"model.layers.1": "cpu", "model.norm": "cpu", "lm_head": "cpu"}


def half_in_main_memory():
    """One layer on the GPU, one in main memory."""
    return dispatch_model(copy.deepcopy(base_of("llama")), PLACES)


def test_a_base_in_main_memory_is_initialised_and_merged_as_on_the_gpu(tmp_path):
    batches, config = prompt(16, 24).split(4), adapter_config(num_key_value_heads=3)
    models, reports = [], []
    for base in (copy.deepcopy(base_of("llama")).to(DEVICE), half_in_main_memory()):
        torch.manual_seed(0)
        models.append(get_peft_model(base, copy.deepcopy(config)).eval())
        reports.append(initialize_asymgqa_weights(models[-1], batches, progress=False))
    whole, model = models
    assert is_offloaded(model) and reports[0].head_groups == reports[1].head_groups
    for (name, expected), found in zip(whole.state_dict().items(), model.state_dict().values(), strict=True):
        if "lora_" in name:
            assert found.is_cuda
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    inputs = on_device(left_padded(batch=4, length=40))
    with torch.no_grad():
        wanted = model(**inputs).logits
        model.save_pretrained(tmp_path)
        places = {f"base_model.model.{name}": place for name, place in PLACES.items()}
        loaded = PeftModel.from_pretrained(half_in_main_memory(), tmp_path, device_map=places).eval()
        torch.testing.assert_close(loaded(**inputs).logits, wanted, rtol=1e-4, atol=1e-4)
        plain = model.merge_and_unload()
        assert is_offloaded(plain) and plain.model.layers[1].mlp.up_proj.weight.is_meta
        torch.testing.assert_close(plain(**inputs).logits, wanted, rtol=1e-3, atol=1e-3)
    options = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(plain.generate(**inputs, **options), whole.generate(**inputs, **options))


def test_streams_in_main_memory_change_nothing(monkeypatch):
    reports = []
    for place in (DEVICE, "cpu"):
        monkeypatch.setattr(streams, "_storage_of_streams", lambda *_, place=place: torch.device(place))
        torch.manual_seed(0)
        model = get_peft_model(copy.deepcopy(base_of("llama")).to(DEVICE), adapter_config(num_key_value_heads=3))
        reports.append(initialize_asymgqa_weights(model, prompt(16, 24).split(4), progress=False))
    assert reports[0].head_groups == reports[1].head_groups
    assert reports[0].costs == pytest.approx(reports[1].costs, rel=1e-4)
