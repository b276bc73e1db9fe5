"""The plan of a conversion: what it says is what converting gives, what it estimates is near what was measured."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import serving
from models import CASES, config_of, random_model, stock, tiny_config
from peft import get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig
from trl import SFTConfig, TrlParser

from asymgqa_peft import AsymGQAConfig
from asymgqa_peft.__main__ import main
from asymgqa_peft.engines import ENGINES, WIDE_CLASSES
from asymgqa_peft.estimates import (
    CARDS,
    TOLERANCE,
    Sizes,
    estimate,
    evaluation_need,
    initialization_need,
    recovery_need,
)
from asymgqa_peft.evaluate import kv_cache_bytes_per_token
from asymgqa_peft.families import FAMILIES
from asymgqa_peft.heads import HeadShape
from asymgqa_peft.planner import candidates, plan
from recipes import recover
from recipes.benchmarks import shapes

ROOT = Path(__file__).parents[1]
OF_EACH_FAMILY = {CASES[name].model_type: name for name in reversed(CASES) if CASES[name].kv_heads == 8}
LLAMA_2_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
    "dtype": "bfloat16",
}


def saved(config, folder: Path) -> str:
    """A folder with a configuration and no weights."""
    config.save_pretrained(folder)
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    return str(folder)


def meta_model(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def adapter_of(command: str):
    """The adapter's configuration that recover.py makes of a command of the plan."""
    script, _, config, *options = shlex.split(command)[1:]
    assert (ROOT / script).is_file()
    parser = TrlParser((recover.ConversionArguments, SFTConfig))
    on_cpu = ["--bf16", "false", "--use_cpu", "true"]
    args, training = parser.parse_args_and_config(["--config", str(ROOT / config), *options, *on_cpu])
    return args, training, recover.adapter_config(args, training)


def test_every_family_is_planned_or_refused():
    assert OF_EACH_FAMILY.keys() == FAMILIES.keys()


@pytest.mark.parametrize("name", [*sorted(OF_EACH_FAMILY.values()), "llama-gqa", "qwen2-gqa", "phi3-gqa"])
def test_a_choice_is_what_its_command_makes_of_the_model(name, tmp_path):
    folder = saved(config_of(CASES[name]), tmp_path)
    try:
        found = plan(folder, context=32, batch=3)
    except ValueError as error:
        assert not FAMILIES[CASES[name].model_type].grouped and "cache does not shrink" in str(error)
        return
    base = stock(name)
    assert found.base.parameters == base.num_parameters()
    assert found.base.kv_bytes_per_token == kv_cache_bytes_per_token(base.config, torch.float32)
    equal = [choice for choice in found.choices if choice.candidate.grouping == "symmetric"]
    assert equal and found.choices[-1].share < 0.3
    for choice in found.choices:
        args, _, adapter = adapter_of(choice.command)
        assert args.model_name_or_path == folder
        wanted = choice.candidate
        assert (adapter.num_key_value_heads, adapter.grouping) == (wanted.num_key_value_heads, wanted.grouping)
        assert choice.share == choice.plain.kv_bytes_per_token / found.base.kv_bytes_per_token < 1
        if wanted.grouping == "symmetric":
            # Neighbours, which an uninitialised adapter has, are equal groups too.
            adapter.initialized = True
            plain = get_peft_model(random_model(config_of(CASES[name])), adapter).merge_and_unload()
            assert type(plain).__name__ == choice.plain.model_class
            assert plain.num_parameters() == choice.plain.parameters
            assert kv_cache_bytes_per_token(plain.config, plain.dtype) == choice.plain.kv_bytes_per_token


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "expected"),
    [
        (32, 32, 128, "21x128a2 10x256a5 16x128s2 16x128a3 8x256s4 8x128s4 8x128a6 4x256s8 4x128s8 4x128a12 2x256s16"),
        (32, 8, 128, "3x224a3 5x128a2 4x128s2 2x256s4 2x128s4 1x256s8 1x128s8"),
        (9, 3, 64, "2x64a2 1x128s3 1x96s3 1x64s3"),
        (8, 1, 256, ""),
    ],
)
def test_what_makes_sense_for_a_shape(heads, kv_heads, head_dim, expected):
    found = candidates(HeadShape(4096, heads, kv_heads, head_dim, head_dim))
    words = [f"{c.num_key_value_heads}x{c.head_dim}{c.grouping[0]}{c.largest_group}" for c in found]
    assert words == expected.split()


def test_unequal_groups_are_counted_with_the_most_slots_they_may_need(tmp_path):
    """G 2 of K 8: the cap of 6 heads gives 12 slots, equal groups 8."""
    found = plan(saved(tiny_config("mistral"), tmp_path))
    (unequal,) = [c for c in found.choices if (c.candidate.num_key_value_heads, c.candidate.largest_group) == (2, 6)]
    assert unequal.plain.query_slots == 12


def test_a_sliding_window_bounds_the_cache(tmp_path):
    windowed = plan(saved(tiny_config("mistral", sliding_window=6), tmp_path / "windowed"), context=32, batch=3)
    whole = plan(saved(tiny_config("mistral", sliding_window=None), tmp_path / "whole"), context=32, batch=3)
    assert windowed.base_cache_bytes == 3 * 6 * windowed.base.kv_bytes_per_token
    assert whole.base_cache_bytes == 3 * 32 * whole.base.kv_bytes_per_token
    assert windowed.choices[0].cache_bytes < whole.choices[0].cache_bytes


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=8),
            "model_type='gpt2' is not supported.*Supported:.*llama",
        ),
        (tiny_config("llama", num_key_value_heads=1), "one KV head a layer"),
        (tiny_config("llama", quantization_config={"quant_method": "gptq", "bits": 4}), "is quantised.*take the"),
        (tiny_config("phi", qk_layernorm=True), "qk_layernorm=True.*Use a Phi without"),
    ],
)
def test_a_refusal_says_why_in_one_line(config, message, tmp_path):
    with pytest.raises(SystemExit) as refusal:
        main(["plan", saved(config, tmp_path)])
    assert re.search(message, str(refusal.value)) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "is no folder here, and as a repository: "),
        (lambda folder: (folder / "plain").mkdir(parents=True), "the folder of a run, take .*plain: "),
        (lambda folder: (folder.mkdir(), (folder / "config.json").write_text("{")), "valid JSON"),
        (lambda folder: (folder.mkdir(), (folder / "config.json").write_text("{}")), "model_type"),
    ],
)
def test_what_holds_no_configuration_is_told_in_one_line(make, message, tmp_path):
    make(tmp_path / "base")
    with pytest.raises(SystemExit) as refusal:
        main(["plan", str(tmp_path / "base")])
    assert re.search(message, str(refusal.value)) and "\n" not in str(refusal.value)


def test_code_of_a_repository_is_not_run(tmp_path):
    values = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "own.py").write_text("raise SystemError")
    with pytest.raises(SystemExit, match="trust_remote_code"):
        main(["plan", str(tmp_path)])


def test_only_the_configuration_is_fetched_and_json_holds_the_plan(tmp_path):
    config = tiny_config("qwen2")
    folder = tmp_path / "base"
    saved(config, folder)
    with serving() as hub:
        hub.add("me/base", folder)
        hub.repos["me/base"].files["model.safetensors"] = b"not to be read"
        environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
        environment |= {"HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "asymgqa_peft", "plan", "me/base", "--gpu", "rtx4090", "--json"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    fetched = {request.rpartition("/")[2] for request in hub.requests if "/resolve/" in request}
    assert "config.json" in fetched and "model.safetensors" not in fetched
    printed, expected = json.loads(done.stdout), plan(str(folder), gpu="rtx4090").to_dict()
    assert printed["base"] == expected["base"] and len(printed["choices"]) == len(expected["choices"]) > 2
    for one, other in zip(printed["choices"], expected["choices"], strict=True):
        assert one.pop("command").replace("me/base", str(folder)) == other.pop("command")
        assert one == other


def test_the_table_has_a_line_and_a_command_for_each_choice(tmp_path, capsys):
    folder = saved(tiny_config("llama"), tmp_path / "base")
    main(["plan", folder, "--context", "48", "--batch", "5"])
    printed = capsys.readouterr().out
    expected = plan(folder, 48, 5)
    assert "5 x 48 tokens" in printed and "estimates for one H100" in printed
    for number, choice in enumerate(expected.choices, 1):
        assert f"\n{number}: {choice.command}" in printed
        assert re.search(rf"^{number} .* {choice.plain.kv_bytes_per_token:,} ", printed, flags=re.MULTILINE)


def test_estimates_are_near_what_was_measured_on_one_h200():
    """Of recipes/benchmarks/README.md: "Distillation's cost", "Recovery's speed" and "Conversion"."""
    sizes = {"vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    small = meta_model(LlamaConfig(**sizes, num_attention_heads=32, tie_word_embeddings=True, dtype="bfloat16"))
    trained = 43_450_000
    recovery = recovery_need(Sizes.of(small), trained, 8192, True, True, accumulates=False, on_gpu=True)
    held = 2 * small.num_parameters() + 4 * trained
    assert held + recovery.device == pytest.approx(4.992 * 2**30, rel=TOLERANCE)
    llama = meta_model(LlamaConfig(**LLAMA_2_7B))
    initialization = initialization_need(Sizes.of(llama), trained, 262_144, 8192, refits=True, gpu_free=int(120e9))
    assert initialization.device == pytest.approx(7.90e9, rel=TOLERANCE)
    trained_7b = 411_697_152
    recovery = recovery_need(Sizes.of(llama), trained_7b, 8192, True, True, accumulates=False, on_gpu=True)
    assert 2 * llama.num_parameters() + 4 * trained_7b + recovery.device == pytest.approx(
        22_990_000_000, rel=TOLERANCE
    )
    process = 1.05e9  # with PyTorch and CUDA started, and no kernel loaded yet
    assert process + recovery.main == pytest.approx(1.99e9, rel=TOLERANCE)
    found = estimate(llama, trained, (32, 8, 128), CARDS["h200"])
    assert found.initialization_hours * 3600 == pytest.approx(32.5, rel=0.01)
    assert found.recovery_hours * 3600 == pytest.approx(98_304_000 / 9302, rel=0.01)
    wide = estimate(llama, trained, (32, 4, 256), CARDS["h200"])
    assert wide.initialization_hours / found.initialization_hours == pytest.approx(63.5 / 54.1, rel=0.01)
    assert wide.recovery_hours == pytest.approx(1.05 * found.recovery_hours)


def test_what_every_gpu_holds_during_an_initialisation_is_what_the_recipes_say():
    bases = {
        "SmolLM2-1.7B": LLAMA_2_7B
        | {"vocab_size": 49152, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24}
        | {"tie_word_embeddings": True},
        "Llama-2-7B": LLAMA_2_7B,
        "Llama-2-13B": LLAMA_2_7B
        | {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
        "Llama-2-70B": LLAMA_2_7B | shapes.SHAPES["llama-2-70b"],
    }
    text = (ROOT / "recipes" / "README.md").read_text()
    for name, options in bases.items():
        base = meta_model(LlamaConfig(**options))
        heads = base.config.num_key_value_heads
        config = AsymGQAConfig(num_key_value_heads=heads // (4 if heads > 8 else 2), r=64, lora_alpha=64)
        with torch.device("meta"):
            trained, _ = get_peft_model(base, config, low_cpu_mem_usage=True).get_nb_trainable_parameters()
        sizes = Sizes.of(base)
        row = [sizes.weights]
        for ranks in (1, 4, 8):
            need = initialization_need(sizes, trained, 262_144 // ranks, 8192, refits=True, gpu_free=int(100e9))
            beyond = max(need.device, evaluation_need(sizes, 8192).device)
            row.append(sizes.weights + 4 * trained + beyond)
        if min(row) > CARDS["h200"].usable:
            row = [row[0], "offloaded"]
        numbers = " | ".join(number if isinstance(number, str) else f"{number / 1e9:.1f}" for number in row)
        assert f"| {name} | {numbers} |" in text


def test_a_smaller_card_takes_smaller_batches_then_four_bits_then_nothing():
    llama, trained, plain = meta_model(LlamaConfig(**LLAMA_2_7B)), 300_000_000, (32, 8, 128)
    large, small = (estimate(llama, trained, plain, CARDS[name]) for name in ("a100", "rtx4090"))
    assert (large.batch_size, small.batch_size) == (4, 2) and not small.load_in_4bit
    assert small.recovery_hours == pytest.approx(large.recovery_hours * 312 / 165)
    four_bits = estimate(llama, 600_000_000, plain, CARDS["rtx4090"])
    assert four_bits.load_in_4bit and four_bits.recovery_hours is None
    assert estimate(llama, 2_000_000_000, plain, CARDS["rtx4090"]) is None


def table_after(text: str, heading: str) -> list[list[str]]:
    """Cells of the first table's rows behind a line that starts so."""
    lines = text[text.index(heading) :].splitlines()
    rows = [line for line in itertools.takewhile(bool, itertools.dropwhile(lambda line: line[:1] != "|", lines))]
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]


def test_engines_are_those_of_the_document():
    """One line per engine and version; and of other classes the engines that gave a number, and no wrong one."""
    text = (ROOT / "recipes" / "ENGINES.md").read_text(encoding="utf-8")
    documented = {}
    for name, *_, needs, _ in table_after(text, "# Merged checkpoints")[2:]:
        recipe = re.search(r"`(recipes/\S+)`", needs)
        documented[name] = recipe and recipe[1]
    assert documented == ENGINES
    names = {
        "Llama with biases (of Qwen2)": "Llama",
        "Gemma": "Gemma",
        "Gemma 2": "Gemma2",
        "Phi": "Phi",
        "OLMo": "Olmo",
    }
    header, _, *rows = table_after(text, "## Wide heads")
    found = {}
    for name, *cells in rows:
        if name in names:
            runs = [engine for engine, cell in zip(header[1:], cells, strict=True) if re.match(r"\d", cell)]
            found[f"{names[name]}ForCausalLM"] = tuple(runs)
    assert found == WIDE_CLASSES
