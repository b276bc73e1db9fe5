"""The experiments on many runs: small ones from end to end, cells that survive an interrupt, honest tables."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from recipes import task_accuracy
from recipes.benchmarks import quality_per_byte, recovery
from recipes.experiments import ARMS, OURS, Cells, arm_config, distilled

RECIPES = Path(__file__).parent.parent / "recipes"
NEIGHBOUR = "neighbour mean, SFT"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A random MHA Llama with the bundled tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(RECIPES / "tiny_model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sst2(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sst2")
    for name, count in (("train", 60), ("dev", 8), ("test", 10)):
        rows = [f"{'a fine' if i % 2 else 'one dull'} film , {name} number {i} \t{i % 2}" for i in range(count)]
        (folder / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    return folder


@pytest.fixture
def few_set_aside(monkeypatch):
    monkeypatch.setattr(task_accuracy, "SET_ASIDE", 8)


def run_task(model: Path, sst2: Path, output: Path, *more: str) -> list[dict]:
    options = {"model": model, "data": sst2, "output": output, "device": "cpu", "seeds": 0, "ratios": 2}
    options |= {"batch-size": 8, "rank": 4, "epochs": 0.2}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return task_accuracy.main([*words, "--recover", "0", "16", *more])


def test_task_experiment_ends_in_a_table_and_goes_on_where_it_stopped(
    model, sst2, tmp_path, few_set_aside, monkeypatch
):
    rows = run_task(model, sst2, tmp_path, "--arms", NEIGHBOUR)
    assert [(row["ratio"], row["arm"]) for row in rows] == [("1:1", "MHA"), ("2:1", NEIGHBOUR)]
    assert set(rows[1]) == {"ratio", "arm", "0", "16", "seeds"}
    measured = []
    real = task_accuracy.Task.convert
    monkeypatch.setattr(task_accuracy.Task, "convert", lambda *args: measured.append(args[2]) or real(*args))
    monkeypatch.setattr(task_accuracy, "train", lambda *args, **kwargs: [])  # no second fine-tuning
    rows = run_task(model, sst2, tmp_path, "--arms", NEIGHBOUR, OURS)
    assert measured == [OURS, OURS]
    assert [row["arm"] for row in rows] == ["MHA", NEIGHBOUR, OURS]


def test_a_wrong_folder_of_the_task_is_told_before_anything_is_loaded(tmp_path, capsys):
    with pytest.raises(SystemExit):
        task_accuracy.main(["--model", str(tmp_path / "none"), "--data", str(tmp_path)])
    assert "holds no train.tsv" in capsys.readouterr().err


def test_training_and_calibration_never_see_what_is_measured(model, sst2, tmp_path, few_set_aside, monkeypatch):
    seen, measured = [], []
    monkeypatch.setattr(
        task_accuracy, "train", lambda _m, _t, rows, **kwargs: seen.extend(map(tuple, rows["input_ids"]))
    )
    monkeypatch.setattr(
        task_accuracy,
        "initialize_asymgqa_weights",
        lambda _m, batches, **kwargs: seen.extend(
            tuple(row.tolist()) for batch in batches for row in batch["input_ids"]
        ),
    )
    real = task_accuracy.accuracy
    monkeypatch.setattr(
        task_accuracy, "accuracy", lambda m, e, t: measured.extend(map(tuple, e.prompts)) or real(m, e, t)
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    training, development = (task_accuracy.tokenised(rows, tokenizer) for rows in task_accuracy.read_sst2(sst2))
    for choose in ([], ["--choose"]):
        seen.clear(), measured.clear()
        run_task(model, sst2, tmp_path / str(len(choose)), "--arms", NEIGHBOUR, *choose)
        expected = training.prompts[-8:] if choose else development.prompts
        assert set(measured) == set(map(tuple, expected))
        assert seen and not any(row[: len(prompt)] == prompt for row in seen for prompt in set(measured))


def test_accuracy_reads_the_logits_after_each_prompt():
    """A model that says "good" after an even token: padding and the prompts' lengths must not matter."""

    class Parity(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, attention_mask):
            logits = torch.zeros(*input_ids.shape, 10)
            logits[..., 7] = (input_ids % 2 == 0).float() - 0.5
            return type("Output", (), {"logits": logits})

    prompts = [[5, 2], [5, 5, 5, 4], [2, 2, 3], [9]]
    examples = task_accuracy.Examples(prompts, [1, 1, 0, 1], (3, 7))
    tokenizer = type("Tokenizer", (), {"pad_token_id": 2})
    assert task_accuracy.accuracy(Parity(), examples, tokenizer) == 75.0


def test_rows_train_on_the_answer_or_on_the_whole_sequence():
    examples = task_accuracy.Examples([[1, 2], [4]], [0, 1], (8, 9))
    assert examples.rows(whole=False)["labels"] == [[-100, -100, 8], [-100, 9]]
    assert examples.rows(whole=True)["labels"] == examples.rows(whole=False)["input_ids"] == [[1, 2, 8], [4, 9]]


def test_table_gives_mean_and_largest_deviation_over_seeds():
    cells = [
        {"ratio": "4:1", "arm": OURS, "examples": 0, "seed": seed, "accuracy": value}
        for seed, value in enumerate((80.0, 81.0, 85.0))
    ]
    (row,) = task_accuracy.summary(cells)
    assert row == {"ratio": "4:1", "arm": OURS, "0": "82.0 +- 3.0", "seeds": 3}


def test_cells_are_measured_once_and_shared(tmp_path):
    calls = []
    for _ in range(2):
        cell = Cells(tmp_path).get({"ratio": "4:1", "arm": "a, b"}, lambda: calls.append(1) or {"value": 0.5})
        assert cell == {"ratio": "4:1", "arm": "a, b", "value": 0.5}
    assert calls == [1]
    with pytest.raises(KeyboardInterrupt):
        Cells(tmp_path).get({"ratio": "2:1"}, _interrupted)
    assert [path.name for path in tmp_path.iterdir()] == ["4to1-a_b.json"]
    assert Cells(tmp_path).all() == [json.loads((tmp_path / "4to1-a_b.json").read_text())]


def _interrupted() -> dict:
    raise KeyboardInterrupt


def test_only_the_principal_merge_refits_and_published_arms_train_on_text():
    assert {arm for arm in ARMS if arm_config(arm)["refit_output"]} == {arm for arm in ARMS if "principal" in arm}
    assert not any(distilled(arm) for arm in ARMS if "SFT" in arm) and distilled(OURS)


def test_recovery_benchmark_trains_every_arm_and_its_control(model, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text((RECIPES / "recover.py").read_text())
    options = {"model": model, "text": text, "output": tmp_path, "tokens": 256, "ratios": 2, "rank": 4}
    options |= {"device": "cpu", "block-size": 64, "batch-size": 2, "calibration-blocks": 4, "held-out-blocks": 2}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    rows = recovery.main([*words, "--arms", NEIGHBOUR, OURS, "--bits", "4"])
    assert [row["arm"] for row in rows] == ["base", recovery.CONTROL, NEIGHBOUR, OURS]
    base, control, neighbour, ours = rows
    assert neighbour["KV bytes/token"] * 2 == ours["KV bytes/token"] * 2 == base["KV bytes/token"]
    assert ours["x base"] == pytest.approx(ours["recovered"] / base["no training"])
    assert control["no training"] is None and control["recovered"] != base["no training"]
    printed = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(printed)["rows"] == rows
    text.with_suffix(".jsonl").write_text(printed)
    points = {point["arm"]: point for point in quality_per_byte.read_results(text.with_suffix(".jsonl"))}
    assert points[OURS]["perplexity"] == ours["recovered"] != points[f"{OURS}, 4 bits"]["perplexity"]
    assert points[f"{OURS}, 4 bits"]["kv_bytes_per_token"] == ours["KV bytes/token"] * 5 / 16

    rows = recovery.main([*words, "--sweep", "--rates", "1e-3", "1e-2"])
    assert [row["rate"] for row in rows] == [None, 0.001, 0.01]
    assert rows[1]["recovered"] != rows[2]["recovered"]
