"""What a run needs is near what it takes, allocation by allocation; what cannot fit is refused, and nothing else."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext

import pytest
import torch
from datasets import Dataset
from models import CASES, config_of, random_model, tensors, tiny_llama, wrap
from peft import get_peft_model
from recovery_runs import save_base, save_text, small
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM
from trl import SFTConfig

from asymgqa_peft import AsymGQAConfig, AsymGQATrainer, estimates, initialize_asymgqa_weights
from asymgqa_peft.estimates import (
    SINGLE,
    TOLERANCE,
    Need,
    Sizes,
    evaluation_need,
    free_memory,
    initialization_need,
    kept_per_token,
    lack_of_memory,
    merge_bytes,
    recovery_need,
)
from asymgqa_peft.evaluate import perplexity
from recipes import recover
from recipes.benchmarks import shapes
from recipes.benchmarks.recovery_speed import placeholder_tokenizer

SHAPE = {"hidden_size": 256, "intermediate_size": 688, "vocab_size": 512}
DTYPES = {"float32": (torch.float32, nullcontext()), "bfloat16": (torch.bfloat16, torch.autocast("cpu"))}


def peak_allocated(call) -> int:
    """Most bytes allocated at a time while something runs, beyond what there was: PyTorch's own account of the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        call()
    changes = []
    for event in watched.profiler.kineto_results.events():
        if event.name() == "[memory]":
            changes.append((event.start_ns(), event.nbytes()))
    total = peak = 0
    for _, change in sorted(changes):
        total += change
        peak = max(peak, total)
    return peak


def model_of(dtype: torch.dtype = torch.float32, layers: int = 2, head_dim: int | None = None, **changes):
    """A Llama of `SHAPE` with 8 heads of 32 under an adapter of two shared heads, and its sizes."""
    config = shapes.shape_config("tiny", layers, **SHAPE | changes)
    base = shapes.random_llama(config, "cpu", dtype)
    adapter = AsymGQAConfig(num_key_value_heads=2, head_dim=head_dim, r=16, task_type="CAUSAL_LM")
    model = get_peft_model(base, adapter)
    return model, Sizes.of(model.get_base_model(), head_dim), model.get_nb_trainable_parameters()[0]


# ----------------------------------------------------------------------------------- what is needed, against the run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama", "llama-wide", "qwen2-gqa", "qwen3", "olmo2", "phi3", "gemma", "stablelm"])
def test_what_a_layer_keeps_for_its_gradients(name, dtype):
    """The estimate reads linear layers and norms, whatever the family; the reference is what autograd saves."""
    case, (number, autocast) = CASES[name], DTYPES[dtype]
    saved, casts = [], []
    for layers in (1, 2):
        sizes = {"hidden_size": 256, "intermediate_size": 688, "head_dim": 32, "num_hidden_layers": layers}
        config = config_of(dataclasses.replace(case, overrides=case.overrides | sizes))
        base = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=number)
        width = case.head_dim and 4 * case.head_dim
        found = Sizes.of(base, width)
        adapter = AsymGQAConfig(num_key_value_heads=2, head_dim=width, r=4, task_type="CAUSAL_LM")
        model = get_peft_model(base, adapter).train()
        parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        # Storages by address, the tensors themselves so that no address is taken again.
        storages, kept = {}, []

        def keep(tensor, parameters=parameters, storages=storages, kept=kept):
            kept.append(tensor)
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
            model.get_base_model().base_model(torch.randint(100, (2, 64)), use_cache=False)
        saved.append(sum(storages.values()))
        casts.append(2 * model.get_nb_trainable_parameters()[0] if dtype == "bfloat16" else 0)
    measured = (saved[1] - saved[0] - casts[1] + casts[0]) / 128
    assert kept_per_token(found, number.itemsize) == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("tokens", "length", "batch", "changes"),
    [
        (1024, 128, 1, {}),  # the refit's solve
        (8192, 256, 1, {}),  # the streams
        (2048, 256, 8, {}),  # one batch in one layer
        (1024, 128, 1, {"head_dim": 64}),
        (2048, 128, 4, {"dtype": torch.bfloat16}),
    ],
)
def test_an_initialisation_takes_what_it_needs(tokens, length, batch, changes):
    model, sizes, trained = model_of(**changes)
    batches = torch.randint(3, 512, (tokens // length, length)).split(batch)
    need = initialization_need(sizes, trained, tokens, batch * length, refits=True)
    peak = peak_allocated(lambda: initialize_asymgqa_weights(model, batches, progress=False))
    assert need.device + need.main == pytest.approx(peak, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("checkpointing", "bf16", "micro_batches", "changes"),
    [
        (True, False, 1, {}),
        (False, False, 2, {}),
        (True, True, 2, {"dtype": torch.bfloat16}),
        (False, True, 1, {"dtype": torch.bfloat16}),
        (True, False, 1, {"vocab_size": 8192}),  # the loss
    ],
)
def test_a_recovery_takes_what_it_needs(checkpointing, bf16, micro_batches, changes, tmp_path):
    model, sizes, trained = model_of(**changes)
    tokens = torch.randint(3, sizes.vocabulary, (4 * micro_batches, 256))
    trainer = AsymGQATrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=micro_batches,
            max_steps=2,
            max_length=256,
            gradient_checkpointing=checkpointing,
            bf16=bf16,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"input_ids": tokens.tolist()}),
        processing_class=placeholder_tokenizer(),
    )
    need = recovery_need(sizes, trained, 512, checkpointing, bf16, micro_batches > 1, on_gpu=False)
    assert need.device == pytest.approx(peak_allocated(trainer.train), rel=TOLERANCE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_evaluation_takes_what_it_needs(dtype):
    model, sizes, _ = model_of(DTYPES[dtype][0], vocab_size=8192)
    tokens = torch.randint(3, 512, (2, 128))
    peak = peak_allocated(lambda: perplexity(model.eval(), [tokens]))
    assert evaluation_need(sizes, 256).device == pytest.approx(peak, rel=TOLERANCE)


@pytest.mark.parametrize("partition", [[[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 1, 2, 3, 4, 5], [6, 7]]])
def test_a_merge_takes_what_it_needs(partition):
    base = random_model(shapes.shape_config("tiny", 4, **SHAPE))
    model = wrap(base, [partition] * 4)
    needed = merge_bytes(Sizes.of(base), slots=2 * len(partition[0]), kv_heads=2, head_dim=32)
    assert needed == pytest.approx(peak_allocated(model.merge_and_unload), rel=TOLERANCE)


def test_a_merge_of_few_lora_layers_needs_less(free):
    """What would fit is not refused: layers without LoRA are not copied."""
    model = wrap(tiny_llama(), target_modules=["q_proj"])
    free(merge_bytes(Sizes.of(model.get_base_model()), slots=6, kv_heads=2, head_dim=8) / 2)
    assert type(model.merge_and_unload()).__name__ == "LlamaForCausalLM"


def test_bytes_of_a_4_bit_base():
    """As bitsandbytes stores it and `prepare_model_for_kbit_training` casts what is left."""
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.nn import Linear4bit

    model, sizes, _ = model_of()
    _, expected = sizes.in_4bit()
    stored = 0
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, torch.nn.Linear) and ".lora_" not in name and name != "lm_head":
            size = module.in_features, module.out_features
            packed = Linear4bit(*size, bias=False, compress_statistics=False, quant_type="nf4").to("cpu").weight
            stored += packed.nbytes + packed.quant_state.absmax.nbytes
    stored += SINGLE * (sizes.parameters - sizes.linear)
    assert stored == pytest.approx(expected, rel=1e-3)


def test_streams_that_do_not_fit_the_gpu_are_counted_in_main_memory():
    _, sizes, trained = model_of()
    streams = 3 * 65536 * sizes.hidden * SINGLE
    there = initialization_need(sizes, trained, 65536, 512, True, gpu_free=2 * streams)
    here = initialization_need(sizes, trained, 65536, 512, True, gpu_free=2 * streams - 1)
    assert here.main - there.main == streams
    assert 2 / 3 * streams <= there.device - here.device <= streams


# --------------------------------------------------------------------------------------------- both sides of the line


@pytest.fixture
def free(monkeypatch):
    """Sets how many bytes are free anywhere."""

    def set_free(size: float) -> None:
        monkeypatch.setattr(estimates, "free_memory", lambda device: int(size))

    return set_free


@pytest.mark.filterwarnings("error")
def test_less_than_the_estimate_may_be_off_is_no_reason(free):
    free(1e9)
    assert lack_of_memory("It", 1e9 / (1 + TOLERANCE) - 1, "cpu", "take less") is None
    with pytest.warns(
        UserWarning, match="may not fit.*It needs about 1.14 GB in main memory, 1 GB are free: take less"
    ):
        assert lack_of_memory("It", 1.14e9, "cpu", "take less") is None
    assert "It needs about 1.16 GB" in lack_of_memory("It", 1.16e9, "cpu", "take less")


def test_what_is_free_is_less_than_there_is_and_goes_by_the_container(tmp_path, monkeypatch):
    assert 0 < free_memory("cpu") <= estimates.psutil.virtual_memory().total + estimates.psutil.swap_memory().total
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(estimates, "_CGROUPS", (str(limit),))
    limit.write_text("max\n")
    unlimited = free_memory("cpu")
    own = estimates.psutil.Process().memory_info()
    limit.write_text(f"{own.rss - own.shared + 12_345_678}\n")
    assert unlimited > free_memory("cpu") == pytest.approx(12_345_678, abs=4e6)


def test_either_kind_of_memory_may_lack(free):
    free(100)
    assert Need(90, 90).lack("It", "cpu", "take less") and not Need(40, 40).lack("It", "cpu", "take less")


def test_an_initialisation_is_refused_where_it_cannot_fit_and_nowhere_else(free):
    """One that is just let through ends as one with plenty of memory."""
    batches, models = torch.randint(101, (8, 24), generator=torch.Generator().manual_seed(0)).split(4), []
    for _ in range(2):
        models.append(wrap(tiny_llama()))
    sizes, trained = Sizes.of(models[0].get_base_model()), models[0].get_nb_trainable_parameters()[0]
    starts = 2 * 8  # a token of each row, and the one that texts begin with
    need = initialization_need(sizes, trained, 192 + starts, 96, refits=True)
    before = {name: tensor.clone() for name, tensor in tensors(models[0]).items()}
    free((need.device + need.main) / (1 + TOLERANCE) - 2)
    with pytest.raises(ValueError, match="The initialisation needs about .* pass fewer than 192 tokens"):
        initialize_asymgqa_weights(models[0], batches, progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(models[0]).items())
    free((need.device + need.main) / (1 + TOLERANCE) + 2)
    with pytest.warns(UserWarning, match="It may not fit"):
        found = initialize_asymgqa_weights(models[0], batches, progress=False)
    free(1e12)
    assert found.head_groups == initialize_asymgqa_weights(models[1], batches, progress=False).head_groups


def test_a_merge_is_refused_where_it_cannot_fit_and_nowhere_else(free):
    model = wrap(tiny_llama())
    needed = merge_bytes(Sizes.of(model.get_base_model()), slots=6, kv_heads=2, head_dim=8)
    free(needed / (1 + TOLERANCE) - 2)
    with pytest.raises(ValueError, match="The merge needs about .* in main memory"):
        model.merge_and_unload()
    free(needed / (1 + TOLERANCE) + 2)
    with pytest.warns(UserWarning, match="It may not fit"):
        assert type(model.merge_and_unload()).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("share", "message"),
    [
        ("initialisation", "The initialisation needs .*lower --calibration_tokens"),
        ("recovery", "The recovery needs .*set --gradient_checkpointing true.*--per_device_train_batch_size"),
    ],
)
def test_a_recovery_that_cannot_fit_is_told_before_anything_is_loaded(share, message, tmp_path, free, monkeypatch):
    monkeypatch.setattr(recover, "load_base", lambda *args: pytest.fail("the base was loaded"))
    save_base(tmp_path / "base")
    large = {"initialisation": {"calibration_tokens": 10**9}, "recovery": {"per_device_train_batch_size": 10**6}}
    options = small(tmp_path / "base", save_text(tmp_path / "text.txt"), tmp_path / "out", **large[share])
    free(1e9)
    with pytest.raises(SystemExit, match=message):
        recover.main(options)


def test_what_fsdp_shards_is_not_estimated(tmp_path, free, monkeypatch):
    text = save_text(tmp_path / "text.txt")
    options = small(save_base(tmp_path / "base"), text, tmp_path / "out", per_device_train_batch_size=10**6)
    args, training = recover.parse_options(options)
    model = recover.empty_model(args, training)
    free(1e9)
    with pytest.raises(ValueError, match="The recovery needs"):
        recover.check_memory(model, args, training, initialises=False)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    recover.check_memory(model, args, training, initialises=False)
