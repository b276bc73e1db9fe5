"""A run that is killed, cut off or short of space: resumed it ends as if nothing had happened, or never starts."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from recovery_runs import ENVIRONMENT, RECIPES, losses, save_base, save_text, small, weights
from safetensors.torch import load_file
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, TrlParser

from recipes import checkpoints, recover
from recipes.checkpoints import checkpoint_bytes, checkpoint_to_resume

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
STEPS = 24
OPTIONS = {
    "max_steps": STEPS,
    "save_steps": 4,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "constant",  # a step too many shows
    "save_plain": False,
}
LAST = f"checkpoint-{STEPS}"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[Path, Path]:
    """A base with dropout, so that the random state counts, and a text of less than one epoch."""
    folder = tmp_path_factory.mktemp("inputs")
    base = save_base(folder / "base", attention_dropout=0.2)
    return base, save_text(folder / "text.txt")


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory) -> Path:
    """A run that nothing disturbed."""
    output = tmp_path_factory.mktemp("whole") / "out"
    recover.main(small(*inputs, output, **OPTIONS))
    return output


@pytest.fixture
def stopped(whole, tmp_path) -> Path:
    """The same run, gone after its last checkpoint."""
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    shutil.rmtree(output / "adapter")
    return output


def assert_same(output: Path, whole: Path) -> None:
    """Weights to the last bit, losses, report."""
    expected, found = weights(whole / "adapter"), weights(output / "adapter")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert any("lora_query_gain" in name for name in found) and any("lora_value_mix" in name for name in found)
    assert losses(output / LAST) == losses(whole / LAST)
    assert json.loads((output / "evaluation.json").read_text()) == json.loads((whole / "evaluation.json").read_text())
    reports = [json.loads((folder / "initialization.json").read_text()) for folder in (whole, output)]
    assert reports[0]["head_groups"] == reports[1]["head_groups"] and reports[0]["costs"] == reports[1]["costs"]


def forbidden(*args, **kwargs):
    raise AssertionError("must not be reached")


def test_killed_at_a_random_step(inputs, whole, tmp_path):
    """Also before the first checkpoint: the resumed run then starts anew."""
    seed = int(os.environ.get("KILL_SEED", "1"))  # another seed: another step
    step = random.Random(seed).randint(1, STEPS - 4)
    print(f"seed {seed}: killed after step {step}")
    command = small(*inputs, tmp_path / "out", **OPTIONS)
    process = subprocess.Popen(
        [sys.executable, "-u", str(RECIPES / "recover.py"), *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=ENVIRONMENT,
    )
    seen = 0
    for line in process.stdout:
        seen += "'loss'" in line
        if seen == step:
            process.send_signal(signal.SIGKILL)
            break
    process.communicate()
    assert seen == step and process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out" / "adapter").exists()
    recover.main([*command, "--resume_from_checkpoint", "true"])
    assert_same(tmp_path / "out", whole)


def cut(file: Path) -> None:
    """What a full disk leaves of a file."""
    content = file.read_bytes()
    file.write_bytes(content[: len(content) * 9 // 10])


DAMAGES = [
    (action, name)
    for name in ("adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "rng_state.pth")
    for action in (cut, Path.unlink)
] + [(cut, "trainer_state.json"), (Path.unlink, "trainer_state.json"), (cut, "scheduler.pt")]


@pytest.mark.parametrize("action, name", DAMAGES, ids=lambda value: getattr(value, "__name__", value))
def test_a_half_written_checkpoint_is_passed_over(action, name, stopped):
    action(stopped / LAST / name)
    training = SFTConfig(output_dir=str(stopped), use_cpu=True, bf16=False, resume_from_checkpoint="true")
    assert Path(get_last_checkpoint(str(stopped))) == stopped / LAST  # what the Trainer would take
    with pytest.warns(UserWarning, match=f"{LAST} is not whole.*{name.split('.')[0].replace('_', '.')}"):
        found = checkpoint_to_resume(training)
    assert found == stopped / f"checkpoint-{STEPS - 4}"
    assert not (stopped / LAST).exists()  # nothing is ever written into what a dead process left
    assert (stopped / f"incomplete-{LAST}" / "README.md").exists()


@pytest.mark.parametrize("names, processes", [(["rng_state_0.pth", "rng_state_1.pth"], 1), (["rng_state.pth"], 2)])
def test_a_checkpoint_of_another_number_of_processes_is_left_alone(names, processes, stopped, monkeypatch):
    (stopped / LAST / "rng_state.pth").rename(stopped / LAST / "state")
    for name in names:
        shutil.copy(stopped / LAST / "state", stopped / LAST / name)
    monkeypatch.setattr(SFTConfig, "world_size", processes)
    training = SFTConfig(output_dir=str(stopped), use_cpu=True, bf16=False, resume_from_checkpoint="true")
    with pytest.raises(SystemExit, match=f"{LAST} was not written by {processes} processes"):
        checkpoint_to_resume(training)
    assert (stopped / LAST).exists()


def test_resuming_does_not_initialise_and_ends_in_the_same_weights(inputs, stopped, whole, monkeypatch):
    monkeypatch.setattr(recover, "initialize_asymgqa_weights", forbidden)
    (stopped / LAST / "trainer_state.json").unlink()
    last = weights(stopped / LAST)
    with pytest.warns(UserWarning, match="not whole"):
        recover.main([*small(*inputs, stopped, **OPTIONS), "--resume_from_checkpoint", "true"])
    assert_same(stopped, whole)
    before = weights(whole / f"checkpoint-{STEPS - 4}")
    assert any(not torch.equal(before[name], last[name]) for name in before)  # there was something to train


def test_killed_after_the_last_checkpoint(inputs, stopped, whole):
    """While saving, evaluating or merging: there is nothing left to train."""
    recover.main([*small(*inputs, stopped, **OPTIONS), "--resume_from_checkpoint", "true"])
    assert_same(stopped, whole)


def test_resuming_from_a_path(inputs, stopped, whole):
    shutil.rmtree(stopped / LAST)
    path = stopped / f"checkpoint-{STEPS - 4}"
    recover.main([*small(*inputs, stopped, **OPTIONS), "--resume_from_checkpoint", str(path)])
    assert_same(stopped, whole)


@pytest.mark.parametrize(
    "resume, changes, message",
    [
        (None, {}, "is of an earlier run"),
        (f"checkpoint-{STEPS - 4}", {}, f"{LAST} is of an earlier run"),
        ("checkpoint-7", {}, "checkpoint-7 is no whole checkpoint: adapter_config.json is missing"),
        (LAST, {"num_key_value_heads": 2}, "was made with num_key_value_heads=4, now it is 2"),
        (LAST, {"lora_r": 4}, "was made with r=8, now it is 4"),
    ],
)
def test_what_cannot_be_resumed_is_told_before_the_model_is_loaded(
    resume, changes, message, inputs, stopped, monkeypatch
):
    monkeypatch.setattr(recover, "load_base", forbidden)
    option = ["--resume_from_checkpoint", str(stopped / resume)] if resume else []
    before = sorted(stopped.rglob("*"))
    with pytest.raises(SystemExit, match=message):
        recover.main([*small(*inputs, stopped, **OPTIONS | changes), *option])
    assert sorted(stopped.rglob("*")) == before


@pytest.mark.parametrize(
    "missing, changes, message",
    [
        ("adapter_config.json", {}, "has no adapter_config.json: save it with model.save_pretrained"),
        ("initialization.json", {}, "has no initialization.json: .*report.save"),
        (None, {"lora_r": 4}, "was made with r=8, now it is 4"),
    ],
)
def test_an_adapter_that_cannot_be_trained_is_told_before_the_model_is_loaded(
    missing, changes, message, inputs, stopped, tmp_path, monkeypatch
):
    monkeypatch.setattr(recover, "load_base", forbidden)
    shutil.copy(stopped / "initialization.json", stopped / LAST)
    if missing:
        (stopped / LAST / missing).unlink()
    command = small(*inputs, tmp_path / "new", **OPTIONS | changes, adapter=stopped / LAST)
    with pytest.raises(SystemExit, match=message):
        recover.main(command)
    assert not (tmp_path / "new").exists() or not list((tmp_path / "new").iterdir())


def test_without_a_checkpoint_resuming_starts_at_the_beginning(tmp_path):
    for wanted in ("true", "True", None, "false"):
        training = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, resume_from_checkpoint=wanted)
        assert checkpoint_to_resume(training) is None


def test_a_full_disk_is_told_before_the_model_is_loaded(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(recover, "load_base", forbidden)
    monkeypatch.setattr(recover, "load_data", forbidden)
    command = small(*inputs, tmp_path / "out", **OPTIONS | {"save_plain": True})
    args, training = TrlParser((recover.ConversionArguments, SFTConfig)).parse_args_and_config(command)
    needed = recover.bytes_to_write(recover.empty_model(args, training), args, training)
    usage = shutil.disk_usage(tmp_path)
    for free, error, message in ((needed - 1, SystemExit, "GB free"), (needed, AssertionError, "not be reached")):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        with pytest.raises(error, match=message):
            recover.main(command)


def test_needed_space_by_formula(inputs, whole):
    changes = {"save_plain": True, "save_total_limit": 2}
    command = small(*inputs, whole, **OPTIONS | changes)
    args, training = TrlParser((recover.ConversionArguments, SFTConfig)).parse_args_and_config(command)
    saved = weights(whole / "adapter")
    trained = sum(saved[name].numel() for name in saved if ".lora_groups." not in name)
    base = sum(tensor.numel() for tensor in load_file(inputs[0] / "model.safetensors").values())
    needed = recover.bytes_to_write(recover.empty_model(args, training), args, training)
    assert needed == 4 * trained + 3 * 16 * trained + 4 * base
    checkpoint = whole / LAST
    written = sum((checkpoint / name).stat().st_size for name in ("adapter_model.safetensors", "optimizer.pt"))
    assert 12 * trained < written < 16 * trained


@pytest.mark.parametrize(
    "options, kept",
    [
        ({"save_strategy": "no"}, 0),
        ({"max_steps": 10, "save_steps": 4}, 3),
        ({"max_steps": 10, "save_steps": 0.5}, 2),
        ({"max_steps": 10, "save_steps": 4, "save_total_limit": 1}, 2),
        ({"max_steps": 10, "save_steps": 4, "save_total_limit": 5}, 3),
        ({"save_strategy": "epoch", "num_train_epochs": 2}, 2),
        ({"save_steps": 100}, 1),
    ],
)
def test_checkpoints_that_lie_on_disk_at_a_time(options, kept, tmp_path):
    training = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **options)
    assert checkpoint_bytes(training, 100) == kept * checkpoints.BYTES_PER_PARAMETER * 100
