"""Two gloo processes under `accelerate launch`: the groups, losses and adapter of one process with the whole batch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import cpu_offload
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from peft import AutoPeftModelForCausalLM
from recovery_runs import ENVIRONMENT, LENGTH, RECIPES, losses, save_base, save_text, small, tokenizer, weights
from transformers import AutoModelForCausalLM, set_seed

from recipes import recover

LAUNCH = {path.stem: path for path in sorted((RECIPES / "configs" / "accelerate").rglob("*.yaml"))}
STEPS = 4
OPTIONS = {"max_steps": STEPS, "save_steps": 2, "learning_rate": 2e-3, "lora_alpha": 8, "calibration_batch_size": 4}
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[Path, Path]:
    """A base and a text."""
    folder = tmp_path_factory.mktemp("inputs")
    return save_base(folder / "base"), save_text(folder / "text.txt")


@pytest.fixture(scope="module")
def alone(inputs, tmp_path_factory) -> Path:
    """What one process leaves behind."""
    output = tmp_path_factory.mktemp("alone") / "out"
    recover.main(small(*inputs, output, per_device_train_batch_size=4, **OPTIONS))
    return output


def launch(name: str, folder: Path, *command: str) -> str:
    """Run recover.py in two processes; their output."""
    sharded = name != "ddp"
    settings = {"num_processes": 2, "use_cpu": not sharded, "mixed_precision": "no"}
    (folder / "launch.yaml").write_text(yaml.safe_dump(yaml.safe_load(LAUNCH[name].read_text()) | settings))
    start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "launch.yaml")]
    script = ["tests/launch_on_cpu.py"] if sharded else []
    done = subprocess.run(
        [*start, "--main_process_port", "0", *script, "recipes/recover.py", *command, "--use_cpu", str(not sharded)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT | {"DS_ACCELERATOR": "cpu"},
        cwd=RECIPES.parent,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout + done.stderr


def needs_deepspeed(name: str) -> None:
    if name == "deepspeed_zero3":
        pytest.importorskip("deepspeed", reason="ZeRO-3 needs `pip install deepspeed`")


def logits(model: torch.nn.Module) -> torch.Tensor:
    """(2, T, V) on fixed random tokens."""
    ids = torch.randint(3, 100, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def assert_same(output: Path, alone: Path) -> None:
    """Groups, losses, adapter, evaluation and plain checkpoint."""
    reports = [json.loads((folder / "initialization.json").read_text()) for folder in (alone, output)]
    for key in ("head_groups", "tokens"):
        assert reports[0][key] == reports[1][key]
    assert reports[0]["costs"] == pytest.approx(reports[1]["costs"], rel=1e-6)
    checkpoints = [folder / f"checkpoint-{STEPS}" for folder in (alone, output)]
    assert len(losses(checkpoints[0])) == STEPS
    assert losses(checkpoints[1]) == pytest.approx(losses(checkpoints[0]), abs=1e-4)
    assert max(losses(checkpoints[0])) - min(losses(checkpoints[0])) > 1e-3  # one batch is not as good as another
    expected, found = weights(alone / "adapter"), weights(output / "adapter")
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-4)
    adapters = [AutoPeftModelForCausalLM.from_pretrained(folder / "adapter") for folder in (alone, output)]
    whole = logits(adapters[0])
    assert torch.allclose(logits(adapters[1]), whole, atol=1e-4)
    with adapters[0].disable_adapter():
        assert not torch.allclose(logits(adapters[0]), whole, atol=1e-2)
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(output / "plain")), whole, atol=1e-4)
    rows = [json.loads((folder / "evaluation.json").read_text()) for folder in (alone, output)]
    assert [row["model"] for row in rows[1]] == ["base", "initialised", "recovered"]
    for name in ("held-out perplexity", "KV bytes/token"):
        assert [row[name] for row in rows[1]] == pytest.approx([row[name] for row in rows[0]], rel=1e-5)
    assert not list(output.glob("*.partial"))


@pytest.mark.parametrize("name", ["ddp", "fsdp2", pytest.param("deepspeed_zero3", marks=pytest.mark.slow)])
def test_two_processes_do_what_one_does(name, inputs, alone, tmp_path):
    needs_deepspeed(name)
    output = tmp_path / "out"
    printed = launch(name, tmp_path, *small(*inputs, output, per_device_train_batch_size=2, **OPTIONS))
    assert_same(output, alone)
    assert printed.count("| recovered") == 1 and printed.count("Saved in") == 1
    files = {path.name for path in (output / f"checkpoint-{STEPS}").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= files  # there were two
    states = {"ddp": "optimizer.pt", "fsdp2": "pytorch_model_fsdp.bin", "deepspeed_zero3": f"global_step{STEPS}"}
    assert states[name] in files and len(files & set(states.values())) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp2", "deepspeed_zero3"])
def test_two_processes_resume(name, inputs, alone, tmp_path):
    """From the checkpoint before the last, which lacks what the second process had to write."""
    needs_deepspeed(name)
    output = tmp_path / "out"
    command = small(*inputs, output, per_device_train_batch_size=2, **OPTIONS)
    launch(name, tmp_path, *command)
    (output / f"checkpoint-{STEPS}" / "rng_state_1.pth").unlink()
    (output / "adapter" / "adapter_model.safetensors").unlink()
    printed = launch(name, tmp_path, *command, "--resume_from_checkpoint", "true")
    assert f"checkpoint-{STEPS} is not whole" in printed and "initialising layers" not in printed
    assert_same(output, alone)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_two_processes_train_what_one_has_initialised_offloaded(name, inputs, alone, tmp_path, monkeypatch):
    """As with a base that no GPU holds: its adapter is made apart, and its groups travel with the weights."""
    command = small(*inputs, tmp_path / "out", per_device_train_batch_size=2, **OPTIONS)
    args, training = recover.parse_options(command)
    data = recover.load_data(args, training, tokenizer())
    base = AutoModelForCausalLM.from_pretrained(inputs[0])
    monkeypatch.setattr(recover, "load_base", lambda *_: cpu_offload(base, execution_device=torch.device("cpu")))
    set_seed(training.seed)
    model, report, _ = recover.initialise(args, training, data)
    model.save_pretrained(tmp_path / "initialised")
    report.save(tmp_path / "initialised" / "initialization.json")
    printed = launch(name, tmp_path, *command, "--adapter", str(tmp_path / "initialised"))
    assert "initialising layers" not in printed
    (row,) = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    recovered = json.loads((alone / "evaluation.json").read_text())[-1]
    assert row == recovered | {"held-out perplexity": pytest.approx(recovered["held-out perplexity"], rel=1e-5)}
    checkpoints = [folder / f"checkpoint-{STEPS}" for folder in (alone, tmp_path / "out")]
    assert losses(checkpoints[1]) == pytest.approx(losses(checkpoints[0]), abs=1e-4)
    expected, found = weights(alone / "adapter"), weights(tmp_path / "out" / "adapter")
    assert expected.keys() == found.keys()
    for tensor in expected:
        torch.testing.assert_close(found[tensor], expected[tensor], atol=1e-5, rtol=1e-4)
    assert (tmp_path / "out" / "plain" / "config.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_compiled_layers_train_alike(name, checkpointing, inputs, alone, tmp_path):
    output = tmp_path / "out"
    options = OPTIONS | {"torch_compile_backend": "aot_eager", "gradient_checkpointing": checkpointing}
    launch(name, tmp_path, *small(*inputs, output, per_device_train_batch_size=2, **options))
    assert_same(output, alone)


@pytest.mark.slow
def test_a_bfloat16_base_with_gradient_checkpointing_is_sharded(inputs, tmp_path):
    """What a large model needs: the base in bf16, what is trained in float32, activations recomputed."""
    base = AutoModelForCausalLM.from_pretrained(inputs[0], dtype=torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    options = OPTIONS | {"gradient_checkpointing": True}
    runs = {}
    for name in ("ddp", "fsdp2"):
        output = tmp_path / name
        launch(name, tmp_path, *small(tmp_path / "base", inputs[1], output, **options))
        runs[name] = losses(output / f"checkpoint-{STEPS}")
        assert {tensor.dtype for tensor in weights(output / "adapter").values()} == {torch.float32}
    assert runs["fsdp2"] == pytest.approx(runs["ddp"], rel=1e-3)


@pytest.mark.parametrize("path", LAUNCH.values(), ids=list(LAUNCH))
def test_every_launch_configuration_is_accelerates_and_comments_every_key(path):
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    assert all("  # " in line for line in lines)
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig) and config.num_processes == 8
    known = {option for action in launch_command_parser()._actions for option in action.option_strings}
    for section in (config.fsdp_config, config.deepspeed_config):
        assert {f"--{name}" for name in section or {}} <= known


def test_launch_configurations_were_found():
    assert set(LAUNCH) == {"ddp", "fsdp2", "deepspeed_zero3"}
