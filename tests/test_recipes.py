"""The recipes run: quickstart and a recovery on the bundled model, made small; every configuration parses."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import recover
import yaml
from safetensors import safe_open
from transformers import AutoConfig
from trl import SFTConfig, TrlParser

RECIPES = Path(__file__).parent.parent / "recipes"
CONFIGS = sorted(RECIPES.rglob("*.yaml"))
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(RECIPES / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_quickstart_prints_three_measured_rows_twice_in_a_row(tmp_path):
    small = "--steps 1 --batch-size 2 --train-length 64 --block-size 128 --calibration-blocks 8 --held-out-blocks 4"
    for _ in range(2):
        lines = run("quickstart.py", "--output", str(tmp_path), *small.split()).splitlines()
        assert lines[-1] == f"The plain checkpoint lies in {tmp_path / 'plain'}"
    rows = json.loads(lines[-2])["rows"]
    assert [row["KV heads"] for row in rows] == [16, 4, 4]
    assert rows[2]["KV bytes/token"] * 4 == rows[0]["KV bytes/token"]
    assert rows[2]["parameters"] < rows[0]["parameters"]
    assert rows[2]["perplexity, no training"] < rows[1]["perplexity, no training"] / 10
    assert not list(tmp_path.glob("*.partial"))


def test_recovery_ends_in_an_adapter_and_a_plain_checkpoint(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(Path(json.__file__).read_text() * 4)
    options = {
        "dataset": text,
        "output_dir": tmp_path / "out",
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "max_length": 64,
        "calibration_tokens": 2048,
        "use_cpu": True,
    }
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    run("recover.py", "--config", str(RECIPES / "configs" / "tiny.yaml"), *flags)
    with safe_open(tmp_path / "out" / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert any("lora_kv" in name for name in file.keys())  # noqa: SIM118 (no dict)
    assert AutoConfig.from_pretrained(tmp_path / "out" / "plain").num_key_value_heads == 4
    assert [row["model"] for row in json.loads((tmp_path / "out" / "evaluation.json").read_text())] == [
        "base",
        "initialised",
        "recovered",
    ]
    assert json.loads((tmp_path / "out" / "initialization.json").read_text())["tokens"] == 2048


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
    assert {"tiny", "llama2_7b", "llama3_1_8b"} <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("script", sorted(RECIPES.glob("*.sh")), ids=lambda path: path.name)
def test_shell_recipes_parse(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_an_unwritable_output_is_told_before_anything_is_loaded(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="cannot be written"):
        recover.main(
            ["--config", str(RECIPES / "configs" / "tiny.yaml"), "--output_dir", str(tmp_path / "file" / "out")]
        )
