"""The scripts that take a real model from fetching to a chat: their commands parse and belong together."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from trl import SFTConfig, TrlParser

from recipes import evaluate, instructions, needles, recover

RECIPES = Path(recover.__file__).parent


def commands_of(script: str, names: list[str], tmp_path: Path, cuda: bool, **options: object) -> list[list[str]]:
    """The arguments of each of the recipes `names`, which `script` must run in this order.

    The script runs with an environment whose `python` writes its arguments down.
    """
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *cuda.is_available*) exit {int(not cuda)};; esac\necho "$*" >> {tmp_path}/commands\n'
    )
    python.chmod(0o755)
    (tmp_path / "installed-eval").touch()
    options |= {"OUT": tmp_path / "out", "ASYMGQA_VENV": tmp_path}
    environment = os.environ | {name: str(value) for name, value in options.items()}
    subprocess.run(["bash", str(RECIPES / script)], check=True, env=environment)
    lines = (tmp_path / "commands").read_text().splitlines()
    commands = [line.split() for line in lines if line.startswith("recipes/")]
    assert [command.pop(0) for command in commands] == [f"recipes/{name}" for name in names]
    return commands


def recovery_of(command: list[str], config: str) -> tuple[recover.ConversionArguments, SFTConfig]:
    """What recover.py reads from a command with this YAML file, on this machine's own device."""
    at = command.index("--config") + 1
    assert command[at] == f"recipes/configs/{config}"
    command = [*command[:at], str(RECIPES / "configs" / config), *command[at + 1 :]]
    device = ["--bf16", "false", "--use_cpu", "true"]
    return TrlParser((recover.ConversionArguments, SFTConfig)).parse_args_and_config([*command, *device])


def measured_by(command: list[str], monkeypatch: pytest.MonkeyPatch):
    """What evaluate.py reads from a command whose files are all there."""
    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_file", lambda path: True)
        return evaluate.parse_args(command)


@pytest.mark.parametrize("cuda", [True, False])
def test_commands_of_smollm2(cuda, tmp_path, monkeypatch):
    names = ["smollm2.py", "recover.py", "evaluate.py", "needles.py", "instructions.py"]
    options = {"WIDTH": 96, "TOKENS": 8192, "TRAIN": "train.txt", "TEXT": "held_out.txt", "ARC": "arc"}
    commands = commands_of("smollm2_135m.sh", names, tmp_path, cuda, **options)
    fetch, convert, measure, find, obey = commands
    out = tmp_path / "out"
    assert fetch == [f"{out}/base"]
    args, training = recovery_of(convert, "tiny.yaml")
    assert (args.num_key_value_heads, args.head_dim, args.dataset, training.max_steps) == (1, 96, "train.txt", 4)
    assert (training.per_device_train_batch_size, training.max_length) == ((1, 2048) if cuda else (4, 512))
    assert ("--bf16 true" in " ".join(convert)) == cuda
    assert args.refit_output != cuda  # a trial on a CPU starts from it
    assert args.model_name_or_path == f"{out}/base" and training.output_dir == str(out)
    both = [f"{out}/base", f"{out}/plain"]
    measured = measured_by(measure, monkeypatch)
    assert (measured.text, measured.tasks) == (["held_out.txt"], ["arc_easy_csv", "arc_challenge_csv"])
    assert measured.max_tokens == (None if cuda else 8192)
    for recipe, command in ((needles, find), (instructions, obey)):
        assert recipe.parse_args(command).models == both == measured.models
    assert max(needles.parse_args(find).contexts) == (8192 if cuda else 1024)


@pytest.mark.parametrize("cuda", [True, False])
def test_commands_of_qwen2_5_coder(cuda, tmp_path, monkeypatch):
    names = ["qwen2_5_coder.py", "recover.py", "evaluate.py", "needles.py", "instructions.py"]
    options = {"TOKENS": 16384, "RATE": 1e-4, "TRAIN": "train.txt", "TEXT": "held_out.txt"}
    options |= {"MMLU": "mmlu.zip", "GGUF": "m.gguf"}
    commands = commands_of("qwen2_5_coder.sh", names, tmp_path, cuda, **options)
    fetch, convert, measure, find, obey = commands
    out = tmp_path / "out"
    size, dtype = ("1.5b", "bfloat16") if cuda else ("0.5b", "float32")
    assert fetch == [f"{out}/base", "--size", size, "--dtype", dtype, "--gguf", "m.gguf"]
    args, training = recovery_of(convert, "qwen1_5_7b.yaml")
    # Half of the 2 KV heads at their own width.
    assert (args.num_key_value_heads, args.head_dim, args.dataset) == (1, None, "train.txt")
    in_a_step = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.max_length
    assert training.max_steps * in_a_step == 16384 and (in_a_step == 8192) == cuda
    assert training.learning_rate == 1e-4
    assert ("--bf16 true" in " ".join(convert)) == cuda == training.torch_compile
    assert args.refit_output != cuda  # a trial on a CPU starts from it
    assert args.model_name_or_path == f"{out}/base" and training.output_dir == str(out)
    both = [f"{out}/base", f"{out}/plain"]
    measured = measured_by(measure, monkeypatch)
    assert (measured.text, measured.tasks) == (["held_out.txt"], ["mmlu_csv"])
    assert dict(measured.task_metadata) == {"mmlu_zip": "mmlu.zip", "shots": "0"}
    for recipe, command in ((needles, find), (instructions, obey)):
        assert recipe.parse_args(command).models == both == measured.models
    assert max(needles.parse_args(find).contexts) == (8192 if cuda else 512)


def test_a_model_that_is_there_is_neither_fetched_nor_converted_again(tmp_path):
    for name in ("base", "plain"):
        (tmp_path / "out" / name).mkdir(parents=True)
    commands_of("qwen2_5_coder.sh", ["evaluate.py", "needles.py", "instructions.py"], tmp_path, cuda=False)
