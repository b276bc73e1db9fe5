"""What users get wrong in a recipe ends in one line that says what to do, before a model is loaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset
from models import adapter_config
from peft import get_peft_model
from recovery_runs import LENGTH, RECIPES, TEXT, run, save_base, save_text, small
from transformers import AutoModelForCausalLM

from asymgqa_peft import initialize_asymgqa_weights
from asymgqa_peft.mistakes import in_one_line
from recipes import convert_ctranslate2, evaluate, merge_and_push, recover

CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
PARTS = [TEXT[start : start + 300] for start in range(0, 9000, 300)]


@pytest.fixture
def base(tmp_path) -> Path:
    return save_base(tmp_path / "base")


@pytest.fixture(autouse=True)
def weights_stay_on_disk(monkeypatch):
    """A mistake is found before weights are read; a test that means otherwise undoes this."""

    def fail(*args, **kwargs):
        pytest.fail("weights were loaded")

    monkeypatch.setattr(recover, "load_base", fail)
    monkeypatch.setattr(evaluate, "load_model", fail)
    monkeypatch.setattr(merge_and_push.AutoModelForCausalLM, "from_pretrained", fail)


def told(call, *arguments) -> str:
    """The one line in which a recipe ends."""
    with pytest.raises(SystemExit) as end:
        call(*arguments)
    assert isinstance(end.value.code, str) and "\n" not in end.value.code
    return end.value.code


def without_tokenizer(folder: Path) -> Path:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    return folder


def save_rows(path: Path, **columns) -> Path:
    """A .jsonl file of as many rows as there are parts of the text; each column makes its value of a part."""
    lines = [json.dumps({name: make(part) for name, make in columns.items()}) for part in PARTS]
    path.write_text("\n".join(lines))
    return path


def messages(part: str) -> list[dict]:
    return [{"role": "user", "content": "Write."}, {"role": "assistant", "content": part}]


# ---- recover.py ----


def test_data_without_a_known_column(base, tmp_path):
    rows = save_rows(tmp_path / "rows.jsonl", body=str, title=len)
    line = told(recover.main, small(base, rows, tmp_path / "out"))
    assert "['body', 'title']" in line and "--dataset_text_field" in line and "prompt and completion" in line


@pytest.mark.parametrize("columns", [{"messages": messages}, {"prompt": messages, "completion": messages}])
def test_chats_without_a_chat_template(columns, base, tmp_path):
    rows = save_rows(tmp_path / "rows.jsonl", **columns)
    assert "no chat template" in told(recover.main, small(base, rows, tmp_path / "out"))


@pytest.mark.parametrize(
    ("columns", "options", "first"),
    [
        ({"body": str}, {"dataset_text_field": "body"}, PARTS[0]),
        ({"prompt": lambda part: "Write: ", "completion": str}, {}, "Write: " + PARTS[0]),
        ({"prompt": lambda part: messages(part)[:1], "completion": lambda part: messages(part)[1:]}, {}, None),
        ({"messages": messages}, {}, None),
    ],
)
def test_what_trl_reads_is_calibrated_and_trained_on(columns, options, first, base, tmp_path, monkeypatch):
    monkeypatch.undo()
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": CHAT_TEMPLATE}))
    rows = save_rows(tmp_path / "rows.jsonl", **columns)
    args, training = recover.parse_options(small(base, rows, tmp_path / "out", **options))
    tokenizer = recover.load_tokenizer(str(base))
    ids = next(iter(recover.tokens_of(recover.load_data(args, training, tokenizer).train, training, tokenizer)))
    expected = first or f"user: Write.\nassistant: {PARTS[0]}\n"
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == expected.replace(" ", "")
    run("recover.py", *small(base, rows, tmp_path / "out", num_key_value_heads=4, save_plain=False, **options))
    assert [row["model"] for row in json.loads((tmp_path / "out" / "evaluation.json").read_text())][-1] == "recovered"


def test_rows_that_are_no_json(base, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"\n')
    assert "rows.jsonl" in told(recover.main, small(base, tmp_path / "rows.jsonl", tmp_path / "out"))


def test_a_base_without_tokenizer(base, tmp_path):
    text = save_text(tmp_path / "text.txt")
    assert "no tokenizer" in told(recover.main, small(without_tokenizer(base), text, tmp_path / "out"))


def test_four_bits_without_bitsandbytes(base, tmp_path, monkeypatch):
    monkeypatch.setattr(recover, "find_spec", lambda name: None)
    command = small(base, save_text(tmp_path / "text.txt"), tmp_path / "out", load_in_4bit=True)
    assert told(recover.main, command) == "load_in_4bit needs bitsandbytes: pip install -e '.[quant]'"


def test_bf16_on_a_machine_without_it(base, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)
    command = small(base, save_text(tmp_path / "text.txt"), tmp_path / "out", bf16=True, use_cpu=False)
    assert "--bf16 false --use_cpu true" in told(recover.main, command)


@pytest.mark.parametrize(
    ("max_length", "characters", "message"),
    [(64, 60, "60 tokens are less than one sequence of max_length=64"), (64, 100, "too few to hold one out")],
)
def test_little_data_for_the_length(max_length, characters, message, base, tmp_path):
    text = save_text(tmp_path / "text.txt", characters)
    line = told(recover.main, small(base, text, tmp_path / "out", max_length=max_length))
    assert message in line and "lower --max_length" in line


def test_sequences_longer_than_the_base_takes(base, tmp_path):
    text = save_text(tmp_path / "text.txt")
    line = told(recover.main, small(base, text, tmp_path / "out", max_length=65))
    assert "max_length=65" in line and "64 tokens" in line


def test_too_few_tokens_to_calibrate_on(base, tmp_path, monkeypatch):
    monkeypatch.undo()
    command = small(base, save_text(tmp_path / "text.txt"), tmp_path / "out", calibration_tokens=LENGTH)
    command += ["--num_key_value_heads", "1"]
    assert "batches hold 32 tokens" in told(recover.main, command)


# ---- evaluate.py ----


def test_a_second_model_is_looked_at_before_the_first_is_measured(base, tmp_path):
    text = save_text(tmp_path / "text.txt")
    other = save_base(tmp_path / "other", vocab_size=150)
    (tmp_path / "run" / "plain").mkdir(parents=True)
    no_weights = tmp_path / "empty"
    shutil.copytree(base, no_weights, ignore=shutil.ignore_patterns("*.safetensors"))
    for second, message in (
        (tmp_path / "none", "none is no folder here"),
        (tmp_path / "run", f"the folder of a run, take {tmp_path / 'run' / 'plain'}"),
        (no_weights, "no weights"),
        (other, "a vocabulary of 150"),
    ):
        assert message in told(evaluate.main, [str(base), str(second), "--text", str(text)])


def test_a_model_to_evaluate_without_tokenizer(base):
    assert "no tokenizer" in told(evaluate.main, [str(without_tokenizer(base))])


def test_lines_without_text(base, tmp_path):
    rows = save_rows(tmp_path / "rows.jsonl", body=str)
    assert "['body']" in told(evaluate.main, [str(base), "--text", str(rows)])


def test_max_tokens_caps_a_text(base, tmp_path, monkeypatch, capsys):
    monkeypatch.undo()
    text = save_text(tmp_path / "text.txt", 6000)
    (tmp_path / "short.txt").write_text(TEXT[:100])
    options = [str(base), "--decode-tokens", "0", "--device", "cpu", "--length", "64"]
    printed = []
    for more in ([str(text), "--max-tokens", "101"], [str(tmp_path / "short.txt")]):
        evaluate.main([*options, "--text", *more])
        printed.append(json.loads(capsys.readouterr().out.splitlines()[-1])["rows"])
    # One of the tokens is the start token.
    assert printed[0] == printed[1]


# ---- merging, serving, converting ----


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 3}, {"hidden_size": 128, "head_dim": 8}])
def test_a_wrong_base(changes, base, tmp_path, monkeypatch):
    monkeypatch.undo()
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), adapter_config(merge="mean", grouping="neighbour")
    )
    model.save_pretrained(tmp_path / "adapter")
    other = save_base(tmp_path / "other", **changes)
    monkeypatch.setattr(merge_and_push.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("loaded"))
    for only in ([], ["--adapter-only"]):
        command = [str(tmp_path / "adapter"), "--output", str(tmp_path / "plain"), "--base", str(other), *only]
        line = told(merge_and_push.main, command)
        assert "is not the base of" in line and "--base" in line
    assert "none is no folder here" in told(merge_and_push.main, [*command[:-2], str(tmp_path / "none")])
    assert not (tmp_path / "plain").exists()


def test_a_runs_folder_instead_of_its_adapter(tmp_path):
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    line = told(merge_and_push.main, [str(tmp_path / "run"), "--output", str(tmp_path / "plain")])
    assert f"take {tmp_path / 'run' / 'adapter'}" in line


@pytest.mark.parametrize("option", ["--report", "--evaluation"])
def test_a_report_that_is_not_there(option, tmp_path):
    command = [str(tmp_path), "--output", str(tmp_path / "plain"), option, str(tmp_path / "none.json")]
    assert "none.json" in told(merge_and_push.main, command)


def test_nobody_is_logged_in(tmp_path, monkeypatch):
    monkeypatch.setattr("asymgqa_peft.hub.get_token", lambda: None)
    command = [str(tmp_path), "--output", str(tmp_path / "plain"), "--push", "me/model"]
    assert "hf auth login" in told(merge_and_push.main, command)


@pytest.mark.parametrize(("status", "helps"), [(401, True), (403, True), (404, False)])
def test_a_repository_that_wants_a_login(status, helps):
    def fetch():
        refusal = RuntimeError("refused")
        refusal.response = SimpleNamespace(status_code=status)
        with in_one_line("me/gated"):
            raise OSError("You are trying to access\na gated repo.") from refusal

    line = told(fetch)
    assert line.startswith("me/gated: You are trying to access a gated repo.") and ("hf auth login" in line) == helps


def test_a_runs_folder_instead_of_its_plain_checkpoint(tmp_path):
    (tmp_path / "run" / "plain").mkdir(parents=True)
    command = [sys.executable, str(RECIPES / "serve_plain.py"), str(tmp_path / "run"), "--blocks", "none"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "plain/" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert "take" in told(convert_ctranslate2.main, [str(tmp_path / "run"), str(tmp_path / "out")])


# ---- calibration ----


@pytest.mark.parametrize("batches", [[TEXT[:500]], TEXT[:500], Dataset.from_dict({"body": [TEXT[:500]]})])
def test_text_instead_of_tokens(batches, base, monkeypatch):
    monkeypatch.undo()
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), adapter_config())
    with pytest.raises(ValueError, match=r"batches\[0\] is a (str|dict) of text: tokenise it, e.g. \[tokenizer\(text"):
        initialize_asymgqa_weights(model, batches)
