"""What tests/engines.sh judges engines by, on engines made up here; the engines themselves it runs, not pytest."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS / "engines"))

import compare  # noqa: E402
import table  # noqa: E402

IDS = [[3, 1, 4], [1, 5]]
PROMPTS = ["one text", "another"]
GREEDY = [9, 2, 6]


class Engine:
    """Answers with the reference that it was made from, off by `error`."""

    version = "1.0"
    error, last_error, kv_heads_seen, read, writes = 0.0, 0.0, 4, IDS, False

    def __init__(self, checkpoint: Path, scratch: Path):
        self.reference = compare.load_reference(checkpoint)[0]
        assert scratch.is_dir()
        if self.writes:
            (checkpoint / "added.json").write_text("{}")

    def logits(self, ids):
        case = IDS.index(ids)
        return self.reference[f"logits.{case}"] + np.float32(self.last_error if case else self.error)

    def greedy(self, ids, count):
        return self.reference[f"greedy.{IDS.index(ids)}"].tolist()[:count]

    def kv_heads(self):
        return self.kv_heads_seen

    def tokenize(self, text):
        if self.read is None:
            raise ValueError("no such tokenizer class")
        return self.read[PROMPTS.index(text)]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(**attributes of an Engine) -> the row that compare.py writes for the checkpoint "ours"."""
    generator = np.random.default_rng(0)
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"architectures": ["MistralForCausalLM"]}))
        tensors = {}
        for case, ids in enumerate(IDS):
            logits = generator.standard_normal((len(ids), 11)).astype(np.float32)
            tensors |= {f"ids.{case}": np.array(ids), f"logits.{case}": logits, f"greedy.{case}": np.array(GREEDY)}
        facts = {"prompts": json.dumps(PROMPTS), "kv_heads": "4"}
        save_file(tensors, tmp_path / f"{name}.reference.safetensors", metadata=facts)

    def run_engine(**attributes) -> dict:
        runner = SimpleNamespace(Engine=type("MadeUp", (Engine,), attributes))
        monkeypatch.setitem(sys.modules, "made_up", runner)
        right = compare.main("made-up", "made_up", tmp_path / "ours", tmp_path / "results")
        row = json.loads((tmp_path / "results" / "made-up.ours.json").read_text())
        assert right == (row["result"] == "OK")
        return row

    return run_engine


def test_an_engine_that_computes_the_reference_passes(run):
    row = run()
    assert row["result"] == "OK"
    assert row["largest logit difference"] == 0 and row["to another model"] > compare.APART
    assert (row["class"], row["KV heads"], row["tokenizer"]) == ("MistralForCausalLM", 4, "same ids")
    assert run(error=compare.TOLERANCE / 2)["result"] == "OK"


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"error": 2 * compare.TOLERANCE}, "logits differ"),
        ({"error": float("nan")}, "logits differ"),
        ({"last_error": float("nan")}, "logits differ"),
        ({"logits": lambda self, ids: self.reference["logits.0"][:1]}, "shape"),
        ({"greedy": lambda self, ids, count: GREEDY[::-1]}, "other tokens"),
        ({"kv_heads_seen": 16}, "not 4 KV heads"),
        ({"writes": True}, "the checkpoint was changed"),
        ({"logits": lambda self, ids: [][0]}, "IndexError"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_engine_that_does_not_fails_with_the_reason(run, attributes, reason):
    result = run(**attributes)["result"]
    assert result.startswith("FAIL") and reason in result


def test_references_that_cannot_tell_models_apart_fail(run, tmp_path):
    theirs, ours = (tmp_path / f"{name}.reference.safetensors" for name in ("theirs", "ours"))
    theirs.write_bytes(ours.read_bytes())
    assert "no further" in run()["result"]


def test_a_tokenizer_is_reported_and_does_not_fail_an_engine(run):
    assert run(read=[IDS[0], IDS[0]])["tokenizer"] == "other ids"
    row = run(read=None)
    assert (row["tokenizer"], row["result"]) == ("not loaded (ValueError)", "OK")


def test_the_table_fails_for_an_engine_without_result_but_not_for_the_control(tmp_path, capsys):
    for checkpoint in table.CHECKPOINTS:
        result = "FAIL: logits differ" if checkpoint == table.CONTROL else "OK"
        (tmp_path / f"mlx-lm.{checkpoint}.json").write_text(json.dumps({"engine": "mlx-lm", "result": result}))
    assert table.main(tmp_path, ["mlx-lm"])
    assert not table.main(tmp_path, ["mlx-lm", "vllm"])
    assert "FAIL: no result" in capsys.readouterr().out


def test_the_converter_believes_the_user_only_where_it_knows_nothing(tmp_path):
    (tmp_path / "conversion").mkdir()
    (tmp_path / "conversion" / "base.py").write_text(
        "class TextModel:\n"
        "    def get_vocab_base_pre(self, tokenizer):\n"
        "        if tokenizer == 'unheard of':\n"
        "            raise NotImplementedError\n"
        "        return tokenizer\n"
    )
    (tmp_path / "convert_hf_to_gguf.py").write_text(
        "import sys\n"
        "from conversion.base import TextModel\n"
        "def main():\n"
        "    print(sys.argv[1:], [TextModel().get_vocab_base_pre(name) for name in ('qwen2', 'unheard of')])\n"
    )
    converter = TESTS.parent / "recipes" / "convert_gguf.py"
    command = [sys.executable, str(converter), str(tmp_path), "gpt-2", "folder", "--outtype", "f32"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed == "['folder', '--outtype', 'f32'] ['qwen2', 'gpt-2']\n"
    command[2] = str(tmp_path / "conversion")
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2 and f"LLAMA_CPP={command[2]} lacks convert_hf_to_gguf.py" in refused.stderr


def test_every_engine_has_its_runner():
    script = TESTS / "engines.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    listed = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=True).stdout.split()
    assert {"llama.cpp", "mlx-lm", "ctranslate2", "vllm"} <= set(listed)
    named = {word for word in script.read_text().split() if word.startswith("serve_")}
    assert {f"{name}.py" for name in named} == {path.name for path in (TESTS / "engines").glob("serve_*.py")}
    unknown = subprocess.run(["bash", str(script), "unknown"], capture_output=True, text=True)
    assert unknown.returncode == 1 and "no engine 'unknown'" in unknown.stderr
