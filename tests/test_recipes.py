"""The recipes run: quickstart and a recovery on the bundled model, made small; every configuration parses."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from models import LLAMA3_ROPE
from peft import AutoPeftModelForCausalLM
from recovery_runs import ENVIRONMENT, LENGTH, RECIPES, TEXT, losses, run, save_base, save_text, small
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config
from trl import SFTConfig, TrlParser

from recipes import evaluate, merge_and_push, recover

LAUNCH = RECIPES / "configs" / "accelerate"  # see test_distributed.py
CONFIGS = sorted(path for path in (RECIPES / "configs").rglob("*.yaml") if LAUNCH not in path.parents)
HEADS_32 = {"num_attention_heads": 32, "num_key_value_heads": 32}
FAMILIES = {  # of the models that the configurations name, with their head counts and a head_dim of 4
    "recipes/tiny_model": ("llama", {"num_attention_heads": 16, "num_key_value_heads": 16}),
    "meta-llama/Llama-2-7b-hf": ("llama", HEADS_32),
    "meta-llama/Llama-3.1-8B": ("llama", HEADS_32 | {"num_key_value_heads": 8, "rope_parameters": LLAMA3_ROPE}),
    "HuggingFaceTB/SmolLM2-1.7B": ("llama", HEADS_32 | {"tie_word_embeddings": True}),
    "allenai/OLMo-2-1124-7B": ("olmo2", HEADS_32),
    "Qwen/Qwen1.5-7B": ("qwen2", HEADS_32),
    "Qwen/Qwen3-8B": ("qwen3", HEADS_32 | {"num_key_value_heads": 8}),
    "gemma-3-12b-text": ("gemma3_text", {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 4}),
}


def test_every_recipe_is_a_module_of_the_package():
    """Without the script's folder on the path: `python -m recipes.NAME` works too."""
    names = [f"recipes.{path.stem}" for path in RECIPES.glob("*.py")]
    names += [f"recipes.benchmarks.{path.stem}" for path in (RECIPES / "benchmarks").glob("*.py")]
    assert {"recipes.recover", "recipes.benchmarks.decode"} <= set(names)
    for name in names:
        assert import_module(name).__doc__, name


def test_quickstart_prints_four_measured_rows_twice_in_a_row(tmp_path):
    """And a line per stage, but nothing that a library warns of."""
    small = "--steps 1 --batch-size 2 --train-length 64 --calibration-blocks 33 --held-out-blocks 1"
    command = [sys.executable, "-m", "recipes.quickstart", "--output", str(tmp_path), *small.split()]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
        assert done.returncode == 0, done.stderr[-3000:]
        lines = done.stdout.splitlines()
        assert lines[-1] == f"The plain checkpoint lies in {tmp_path / 'plain'}"
    stages = [line for line in lines if re.match(r"\[ *\d+ s\] ", line)]
    assert len(stages) == 13 and "Nothing is downloaded" in stages[0] and "on 512 tokens" in stages[8]
    assert "warn" not in done.stderr.lower() and "fail" not in done.stderr.lower()
    rows = json.loads(lines[-2])["rows"]
    assert [row["KV heads"] for row in rows] == [16, 4, 4, 4]
    base, classic, classic_distilled, ours = rows
    assert ours["KV bytes/token"] * 4 == base["KV bytes/token"]
    assert classic["parameters"] == classic_distilled["parameters"] < ours["parameters"] < base["parameters"]
    before, after = "perplexity, no training", "perplexity, recovered"
    assert ours[before] < classic[before] / 10 and classic[before] == classic_distilled[before]
    assert classic[after] != classic_distilled[after]
    assert not list(tmp_path.glob("*.partial"))


def test_recovery_ends_in_an_adapter_and_a_plain_checkpoint(tmp_path):
    text, output = save_text(tmp_path / "text.txt", 12_000), tmp_path / "out"
    run("recover.py", *small(RECIPES / "tiny_model", text, output, max_length=64, calibration_tokens=2048))
    with safe_open(output / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert any("lora_kv" in name for name in file.keys())  # noqa: SIM118 (no dict)
    assert AutoConfig.from_pretrained(output / "plain").num_key_value_heads == 4
    rows = json.loads((output / "evaluation.json").read_text())
    assert [row["model"] for row in rows] == ["base", "initialised", "recovered"]
    assert json.loads((output / "initialization.json").read_text())["tokens"] == 2048
    assert not list((output / "adapter").glob("*.bin")) and not list(output.glob("*.partial"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_parses_and_comments_every_key(path):
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    assert all("  # " in line for line in lines)
    values = yaml.safe_load(path.read_text())
    own = {field.name for field in fields(recover.ConversionArguments)}
    assert own <= values.keys()
    options = ["--config", str(path), "--bf16", "false", "--use_cpu", "true"]
    args, training = TrlParser((recover.ConversionArguments, SFTConfig)).parse_args_and_config(options)
    assert (args.num_key_value_heads, training.max_steps) == (values["num_key_value_heads"], values["max_steps"])
    assert recover.adapter_config(args, training).r == values["lora_r"]


def test_configurations_were_found():
    assert {"tiny", "llama2_7b", "llama2_7b_4bit", "llama3_1_8b"} <= {path.stem for path in CONFIGS}
    assert FAMILIES.keys() == {yaml.safe_load(path.read_text())["model_name_or_path"] for path in CONFIGS}


def logits(model) -> torch.Tensor:
    """(2, T, V) in float32 on fixed random tokens."""
    ids = torch.randint(3, 100, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.float()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_every_configuration_runs_on_its_family(path, tmp_path):
    """Everything but sizes is the file's own: options, head counts, packing, bf16, accumulation, 4 bits.

    On a CPU a 4-bit model runs, but bitsandbytes 0.50 repacks its weights at the first inference and then computes
    wrong gradients: its recovery is not looked at here, test_quantised.py and the GPU tests do.
    """
    values = yaml.safe_load(path.read_text())
    if values["load_in_4bit"]:
        pytest.importorskip("bitsandbytes")
    model_type, heads = FAMILIES[values["model_name_or_path"]]
    save_base(tmp_path / "base", model_type, hidden_size=4 * heads["num_attention_heads"], **heads)
    rows = [json.dumps({"text": TEXT[start : start + 300]}) + "\n" for start in range(0, 9000, 300)]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    output = tmp_path / "out"
    options = {
        "model_name_or_path": tmp_path / "base",
        "dataset": tmp_path / "rows.jsonl",
        "held_out_fraction": 0.1,
        "output_dir": output,
        "max_steps": 2,
        "save_steps": 2,
        "logging_steps": 1,
        "warmup_steps": 0,
        "max_length": LENGTH,
        "calibration_tokens": 1024,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    if values.get("torch_compile"):
        # Traced as on a GPU, without a compiler's minutes.
        options["torch_compile_backend"] = "eager"
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    recover.main(["--config", str(path), *flags])
    assert len(losses(output / "checkpoint-2")) == 2
    groups, heads_shared = values["num_key_value_heads"], heads["num_key_value_heads"]
    report = json.loads((output / "initialization.json").read_text())
    assert [len(layer) for layer in report["head_groups"]] == [groups] * 2
    rows = json.loads((output / "evaluation.json").read_text())
    assert rows[0]["KV bytes/token"] * groups == rows[2]["KV bytes/token"] * heads_shared
    plain = AutoModelForCausalLM.from_pretrained(output / "plain", dtype=torch.float32)
    assert plain.config.num_key_value_heads == groups
    adapted = AutoPeftModelForCausalLM.from_pretrained(output / "adapter", dtype=torch.float32)
    expected = logits(adapted)
    with adapted.disable_adapter():
        assert (logits(adapted) - expected).abs().max() > 0.1
    assert (logits(plain) - expected).abs().max() < (0.1 if values["load_in_4bit"] else 1e-4)  # bf16 weights


@pytest.mark.parametrize("script", sorted(RECIPES.glob("*.sh")), ids=lambda path: path.name)
def test_shell_recipes_parse(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize(
    ("reaches", "says", "index"),
    [
        (0, "torch (0.2 GB)", " --extra-index-url https://download.pytorch.org/whl/cpu"),
        (1, "torch (with CUDA up to", ""),
    ],
)
def test_an_installation_says_how_much_before_it_downloads(reaches, says, index, tmp_path):
    """A Python that makes no environment but writes down what it is asked for, on a Linux without GPU."""
    python = tmp_path / "python"
    python.write_text(
        f"""#!/bin/bash
echo "$*" >> {tmp_path}/asked
case $1 in -c) [[ $2 != *urlopen* ]] || exit {reaches} ;; esac
if [[ $2 == venv ]]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; fi
"""
    )
    python.chmod(0o755)
    (tmp_path / "uname").write_text("#!/bin/sh\necho Linux\n")
    (tmp_path / "uname").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHON3": str(python), "ASYMGQA_VENV": str(tmp_path / "venv")}
    script = f"source {RECIPES}/environment.sh; make_environment plot"
    done = subprocess.run(
        ["bash", "-euc", script], env=environment, capture_output=True, text=True, cwd=RECIPES.parent
    )
    assert done.returncode == 0, done.stderr
    assert says in done.stdout and done.stdout.index(says) < done.stdout.index("transformers, peft, trl")
    asked = (tmp_path / "asked").read_text().splitlines()
    installs = [line for line in asked if "pip install" in line]
    assert installs == [
        f"-m pip install --quiet torch==2.13.0{index}",
        "-m pip install --quiet --editable .[plot]",
    ]


def test_an_unwritable_output_is_told_before_anything_is_loaded(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="cannot be written"):
        recover.main(
            ["--config", str(RECIPES / "configs" / "tiny.yaml"), "--output_dir", str(tmp_path / "file" / "out")]
        )


def test_an_adapter_that_nobody_could_load_is_told_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(recover, "check_push_target", lambda repo_id: None)
    save_base(tmp_path / "base")
    command = small(tmp_path / "base", tmp_path / "none.txt", tmp_path / "out", hub_adapter_id="me/adapter")
    with pytest.raises(SystemExit, match="'me/adapter'.*is a folder of yours"):
        recover.main(command)


@pytest.mark.parametrize(
    ("name", "message"), [("none.txt", "no such file"), ("none.jsonl", "no such file"), ("book.md", "read as .txt")]
)
def test_an_unreadable_file_is_told_before_anything_is_loaded(name, message, tmp_path, monkeypatch):
    (tmp_path / "book.md").write_text("Text.")
    monkeypatch.setattr(recover, "load_tokenizer", lambda name: pytest.fail(f"{name} was loaded"))
    with pytest.raises(SystemExit, match=f"dataset=.*{name}.*{message}"):
        recover.main(small(RECIPES / "tiny_model", tmp_path / name, tmp_path / "out"))


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        ("none", {}, "none is no folder here, and as a repository: "),
        ("base", {"num_key_value_heads": 9}, "num_key_value_heads=9 exceeds the base's 8 KV heads"),
        ("base", {"grouping": "assymetric"}, "grouping='assymetric' is unknown: use one of"),
        ("other", {}, "model_type='gpt2' is not supported.*Supported:.*llama"),
    ],
)
def test_a_base_that_the_options_do_not_fit_is_told_in_one_line(base, changes, message, tmp_path, monkeypatch):
    monkeypatch.setattr(recover, "load_base", lambda *args: pytest.fail("the base was loaded"))
    save_base(tmp_path / "base")
    GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=8).save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit, match=message):
        recover.main(small(tmp_path / base, save_text(tmp_path / "text.txt"), tmp_path / "out", **changes))


def test_a_wrong_configuration_file_is_told_in_one_line(tmp_path):
    wrong = tmp_path / "wrong.yaml"
    with pytest.raises(SystemExit, match="options: .*No such file.*wrong.yaml"):
        recover.main(["--config", str(wrong)])
    wrong.write_text((RECIPES / "configs" / "tiny.yaml").read_text() + "lora_rank: 8\n")
    with pytest.raises(SystemExit, match="options: .*lora_rank"):
        recover.main(["--config", str(wrong), "--output_dir", str(tmp_path / "out")])


def test_several_gpus_without_a_launcher_are_told_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(recover.SFTConfig, "n_gpu", 2)
    monkeypatch.setattr(recover, "load_base", None)
    with pytest.raises(SystemExit, match="2 GPUs are visible to one process: start with `accelerate launch`"):
        recover.main(small(RECIPES / "tiny_model", save_text(tmp_path / "text.txt"), tmp_path / "out"))


def test_a_missing_folder_is_told_in_one_line(tmp_path):
    message = "none is no folder here, and as a repository: "
    with pytest.raises(SystemExit, match=message):
        merge_and_push.main([str(tmp_path / "none"), "--output", str(tmp_path / "plain")])
    with pytest.raises(SystemExit, match=message):
        evaluate.main([str(tmp_path / "none")])
    assert not list(tmp_path.iterdir())


def test_what_was_trained_is_published_as_asked(tmp_path, monkeypatch):
    """What merge_and_push.py is asked for; what it makes of that is tested in test_hub.py."""
    calls = []
    monkeypatch.setattr(merge_and_push, "publish", calls.append)
    fields = {"model_name_or_path": "me/base", "dataset": "me/text", "num_key_value_heads": 4}
    for hub in (
        {"save_plain": False},
        {"save_plain": False, "hub_adapter_id": "me/adapter"},
        {"hub_merged_id": "me/m"},
        {"load_in_4bit": True},
    ):
        recover.publish(recover.ConversionArguments(**fields, **hub), tmp_path)
    adapter, merged, four_bits = calls
    assert (adapter.adapter_only, adapter.push, adapter.output) == (True, "me/adapter", tmp_path / "pushed_adapter")
    assert (merged.adapter_only, merged.push, merged.output) == (False, "me/m", tmp_path / "plain")
    assert (four_bits.push, four_bits.dtype, merged.dtype) == (None, "bfloat16", "auto")
    assert {call.adapter for call in calls} == {str(tmp_path / "adapter")} and not any(call.public for call in calls)


def test_options_that_are_not_given_keep_their_defaults(tmp_path):
    found = merge_and_push.parse_args(["me/adapter", "--output", str(tmp_path), "--overwrite"])
    assert found == merge_and_push.Options("me/adapter", tmp_path, overwrite=True)
    assert (
        merge_and_push.parse_args(["me/adapter", "--output", "out", "--max-shard-size", "1GB"]).max_shard_size == "1GB"
    )


def test_the_whole_path_for_llama2_uses_options_that_exist():
    script = (RECIPES / "llama2_7b.sh").read_text().replace("\\\n", " ")
    commands = [shlex.split(line)[2:] for line in script.splitlines() if line.startswith("python recipes/")]
    (_, config), publish = commands
    assert RECIPES.parent / config in CONFIGS
    args = merge_and_push.parse_args(publish)
    output = Path(yaml.safe_load((RECIPES.parent / config).read_text())["output_dir"])
    assert Path(args.adapter) == output / "adapter" and args.output == output / "plain"
    assert args.report == output / recover.INITIALIZATION and args.evaluation == output / recover.EVALUATION
