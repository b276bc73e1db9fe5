"""The evaluation recipe: an adapter and its merged model measure the same, and not what the base does."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from models import wrap
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, TrlParser

from recipes import evaluate as recipe
from recipes import recover

RECIPES = Path(recipe.__file__).parent
TINY, TASKS = RECIPES / "tiny_model", RECIPES / "tasks"
MMLU = RECIPES.parents[1] / "shared" / "data" / "mmlu" / "mmlu.zip"
GROUPS = [[list(range(6)), [6, 7, 8, 9], [10, 11, 12], [13, 14, 15]]] * 6
TEXT = "def add(a, b):\n    return a + b\n\n\nclass Counter(dict):\n    '''Counts what it is shown.'''\n" * 4
QUICK = ["--length", "64", "--decode-tokens", "2", "--decode-context", "8", "--decode-batch-size", "1"]
needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The bundled model, an adapter on it that says nothing sensible, and the merged model, in float32."""
    root = tmp_path_factory.mktemp("models")
    model = wrap(AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32), GROUPS)
    model.save_pretrained(root / "adapter")
    model.merge_and_unload().save_pretrained(root / "plain")
    (root / "text.txt").write_text(TEXT)
    return {"base": TINY, "adapter": root / "adapter", "plain": root / "plain", "text": root / "text.txt"}


def run(folders: dict[str, Path], capsys, *options: object) -> list[dict]:
    """Rows of base, adapter and merged model; the last line printed is the JSON that holds them."""
    models = [str(folders[name]) for name in ("base", "adapter", "plain")]
    recipe.main([*models, "--dtype", "float32", "--device", "cpu", *QUICK, *map(str, options)])
    table, line = capsys.readouterr().out.strip().rsplit("\n", 1)
    rows = json.loads(line)["rows"]
    assert [row["model"] for row in rows] == models and table.count("\n") == 4
    return rows


def test_perplexity_kl_cache_and_speed_side_by_side(folders, capsys, tmp_path):
    output = tmp_path / "evaluation.json"
    rows = run(folders, capsys, "--text", folders["text"], "--output", output)
    base, adapter, plain = rows
    assert json.loads(output.read_text())["rows"] == rows and list(tmp_path.iterdir()) == [output]
    assert adapter["perplexity"] == pytest.approx(plain["perplexity"], rel=1e-4)
    assert adapter["KL to the first"] == pytest.approx(plain["KL to the first"], rel=1e-4)
    assert base["KL to the first"] is None and plain["KL to the first"] > 1
    assert plain["perplexity"] > 2 * base["perplexity"]
    assert adapter["KV bytes/token"] == plain["KV bytes/token"] == base["KV bytes/token"] // 4
    assert [row["class"] for row in rows] == ["LlamaForCausalLM", "LlamaForCausalLM", "MistralForCausalLM"]
    assert plain["parameters"] < base["parameters"] < adapter["parameters"]
    assert all(row["decode tokens/s"] > 0 for row in rows)


def test_documents_are_files_or_lines(tmp_path):
    (tmp_path / "one.txt").write_text("a\nb\n")
    (tmp_path / "many.jsonl").write_text('{"text": "c\\nd"}\n\n{"text": "e"}\n')
    assert list(recipe.read_documents([tmp_path / "one.txt", tmp_path / "many.jsonl"])) == ["a\nb\n", "c\nd", "e"]


@needs_lm_eval
def test_lm_eval_sees_the_adapter_as_the_merged_model_and_agrees_with_our_perplexity(folders, capsys):
    options = ["--tasks", "local_text", "--task-folder", TASKS, "--task-metadata", f"text_file={folders['text']}"]
    rows = run(folders, capsys, "--text", folders["text"], "--length", 512, *options)
    tokens = len(AutoTokenizer.from_pretrained(TINY)(TEXT).input_ids)
    assert tokens < 512  # one window, so that both see the same context
    for row in rows:
        expected = row["perplexity"] ** (tokens / len(TEXT))
        assert row["local_text byte_perplexity"] == pytest.approx(expected, rel=1e-5)
    base, adapter, plain = (row["local_text byte_perplexity"] for row in rows)
    assert adapter == pytest.approx(plain, rel=1e-5) and plain > 1.1 * base


@needs_lm_eval
@pytest.mark.skipif(not MMLU.exists(), reason="no MMLU files")
def test_mmlu_files_give_adapter_and_merged_model_the_same_answers(folders, capsys):
    metadata = [f"mmlu_zip={MMLU}", "subjects=virology,world_religions", "shots=1"]
    options = ["--tasks", "mmlu_csv", "--task-folder", TASKS, "--task-metadata", *metadata, "--limit", 40]
    base, adapter, plain = (row["mmlu_csv acc"] for row in run(folders, capsys, *options))
    assert 0 < plain < 0.6 and adapter == plain  # chance is 0.25; no model of this size knows more
    assert base != plain


@pytest.fixture
def arc_folder(tmp_path) -> Path:
    """ARC's files as they are: with three choices, without any, and with an answer that has no column."""
    rows = {
        "easy_validation": ["Q1,a,b,c,d,B", '"Q2, twice?",yes,no,,,B', "Q3,,,,,2", "Q4,a,b,c,d,E"],
        "easy_train": ["Q5,,b,,d,D"],
        "challenge_validation": ["Q6,a,b,c,d,A"],
    }
    for name, lines in rows.items():
        (tmp_path / f"arc_{name}.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_arc_questions_keep_the_choices_that_there_are(arc_folder):
    module = load_task_module()
    rows = module.load_arc("easy", str(arc_folder), version=1.0)["test"].to_list()
    assert rows == [
        {"question": "Q1", "choices": ["a", "b", "c", "d"], "answer": 1},
        {"question": "Q2, twice?", "choices": ["yes", "no"], "answer": 1},
    ]
    both = module.load_arc("easy", str(arc_folder), splits="train,validation")["test"].to_list()
    assert both == [{"question": "Q5", "choices": ["b", "d"], "answer": 1}, *rows]
    with pytest.raises(ValueError, match="splits='test'.*train, validation"):
        module.load_arc("easy", str(arc_folder), splits="test")


@needs_lm_eval
def test_arc_is_the_likelier_choice_as_we_compute_it(folders, capsys, arc_folder):
    """The likelihoods are taken from the model directly here."""
    options = ["--tasks", "arc_easy_csv,arc_challenge_csv", "--task-folder", TASKS]
    rows = run(folders, capsys, *options, "--task-metadata", f"arc_folder={arc_folder}", "splits=validation")
    tokenizer, model = AutoTokenizer.from_pretrained(TINY), AutoModelForCausalLM.from_pretrained(TINY)
    model.float()
    for subset in ("easy", "challenge"):
        right = []
        for row in load_task_module().load_arc(subset, str(arc_folder))["test"]:
            context = tokenizer(f"Question: {row['question']}\nAnswer:").input_ids
            likelihoods = []
            for choice in row["choices"]:
                ids = torch.tensor([tokenizer(f"Question: {row['question']}\nAnswer: {choice}").input_ids])
                with torch.no_grad():
                    found = model(ids).logits[0, :-1].double().log_softmax(-1).gather(-1, ids[0, 1:, None])
                likelihoods.append(found[len(context) - 1 :].sum().item())
            right.append(likelihoods.index(max(likelihoods)) == row["answer"])
        assert rows[0][f"arc_{subset}_csv acc"] == sum(right) / len(right)
    assert rows[1]["arc_easy_csv acc"] == rows[2]["arc_easy_csv acc"]


def test_missing_lm_eval_is_told_before_anything_is_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(SystemExit, match="pip install .lm-eval"):
        recipe.main(["no/model", "--tasks", "mmlu"])


@needs_lm_eval
def test_tasks_are_looked_for_before_anything_is_loaded():
    with pytest.raises(SystemExit, match="--tasks no_such_task: neither"):
        recipe.main(["no/model", "--tasks", "mmlu,local_text,no_such_task", "--task-folder", str(TASKS)])


def load_task_module():
    """recipes/tasks/datasets_from_files.py, which lm-eval loads by its path too."""
    spec = importlib.util.spec_from_file_location("datasets_from_files", TASKS / "datasets_from_files.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def mmlu_zip(tmp_path) -> Path:
    """A zip file like MMLU's, with one question and two examples on each of two subjects."""
    with zipfile.ZipFile(tmp_path / "mmlu.zip", "w") as archive:
        for subject in ("high_school_sums", "zoology"):
            for split, count in (("dev", 2), ("test", 1)):
                text = io.StringIO()
                rows = ([f" {split} {i},\n{subject}? ", 1, "2, 3", 4, 5, "BD"[i]] for i in range(count))
                csv.writer(text).writerows(rows)
                archive.writestr(f"data/{split}/{subject}_{split}.csv", text.getvalue())
    return tmp_path / "mmlu.zip"


def test_mmlu_prompts_are_written_as_usual(mmlu_zip):
    module = load_task_module()
    rows = module.load_mmlu(str(mmlu_zip), subjects="high_school_sums", version=1.0)["test"]
    choices = "\nA. 1\nB. 2, 3\nC. 4\nD. 5\nAnswer:"
    assert rows["prompt"] == [
        "The following are multiple choice questions (with answers) about high school sums.\n\n"
        f"dev 0,\nhigh_school_sums?{choices} B\n\n"
        f"dev 1,\nhigh_school_sums?{choices} D\n\n"
        f"test 0,\nhigh_school_sums?{choices}"
    ]
    assert rows["answer"] == [1]
    assert module.load_mmlu(str(mmlu_zip))["test"]["subject"] == ["high_school_sums", "zoology"]
    (without, _) = module.load_mmlu(str(mmlu_zip), shots="0")["test"]["prompt"]
    assert "dev" not in without and "test 0" in without
    with pytest.raises(ValueError, match="subjects='magic'.*zoology"):
        module.load_mmlu(str(mmlu_zip), subjects="magic")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--length", "8", "--stride", "8"], "--stride 8 must be"),
        (["--text", "nowhere.txt"], "--text nowhere.txt"),
        (["--task-metadata", "text_file"], "--task-metadata text_file"),
    ],
)
def test_wrong_options_are_told_before_anything_is_loaded(options, says, capsys):
    with pytest.raises(SystemExit):
        recipe.main(["no/model", *options])
    assert says in capsys.readouterr().err


def test_an_unwritable_output_is_told_before_anything_is_loaded(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="cannot be written"):
        recipe.main(["no/model", "--output", str(tmp_path / "file" / "evaluation.json")])


def test_commands_of_the_headline_parse_and_differ_in_the_method_only(tmp_path):
    """The script runs with a `python` that writes its arguments down."""
    (tmp_path / "python").write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/commands\n')
    (tmp_path / "python").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", str(RECIPES / "llama2_7b_mmlu.sh")], check=True, env=environment)
    *recoveries, evaluation = (line.split() for line in (tmp_path / "commands").read_text().splitlines())
    parsed = []
    for script, *options in recoveries:
        assert script == "recipes/recover.py"
        options[options.index("--config") + 1] = str(RECIPES.parent / options[options.index("--config") + 1])
        parser = TrlParser((recover.ConversionArguments, SFTConfig))
        parsed.append(parser.parse_args_and_config([*options, "--bf16", "false", "--use_cpu", "true"]))
    arms = [(args.grouping, args.criterion, args.merge, args.distillation_weight) for args, _ in parsed]
    assert arms[0][::2] == ("neighbour", "mean") and arms[-1] == ("asymmetric", "residual", "principal", 1.0)
    assert {(args.num_key_value_heads, args.dataset, training.max_steps) for args, training in parsed} == {
        (8, parsed[0][0].dataset, parsed[0][1].max_steps)
    }
    args = recipe.parse_args(evaluation[1:])
    assert (args.tasks, args.num_fewshot) == (["mmlu"], 5)
    assert args.models[1:] == [f"{training.output_dir}/plain" for _, training in parsed]
