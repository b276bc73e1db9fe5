"""Pushing and loading over real HTTP against a stand-in for the Hub; the card's claims without it."""

from __future__ import annotations

import ast
import copy
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import traceback
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hub_server import TOKEN, Hub, serving
from huggingface_hub import ModelCard, constants
from models import BASES, GROUPS, adapted, adapter_config, tiny_llama, wrap
from peft import LoraConfig, get_peft_model
from safetensors.torch import load, load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from asymgqa_peft import hub, initialize_asymgqa_weights
from asymgqa_peft.card import Conversion, base_licence, check_repo_id, model_card
from asymgqa_peft.evaluate import kv_cache_bytes_per_token
from asymgqa_peft.hub import check_push_target, push_folder, save_adapter, save_merged
from asymgqa_peft.published import check_files
from recipes import merge_and_push

HERE = Path(__file__).parent
RECIPE = HERE.parent / "recipes" / "merge_and_push.py"


@dataclass
class Session:
    """A stand-in Hub after hub_client.py has pushed to it."""

    hub: Hub
    folder: Path
    errors: dict

    def run(self, *command: object) -> None:
        """Run Python on a script with the stand-in as its Hub."""
        run_client(self.hub, self.folder, *command)

    def logits(self, action: str) -> dict[str, torch.Tensor]:
        folder = self.folder / action
        folder.mkdir(exist_ok=True)
        self.run(HERE / "hub_client.py", action, folder)
        return load_file(folder / "logits.safetensors")

    def file(self, repo_id: str, name: str) -> bytes:
        return self.hub.repos[repo_id].files[name]

    def card(self, repo_id: str) -> ModelCard:
        return ModelCard(self.file(repo_id, "README.md").decode())


def run_client(hub: Hub, folder: Path, *command: object) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment |= {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "hf"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(HERE.parent),
    }
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    save_base(folder / "base")
    with serving() as hub:
        hub.add("them/base", folder / "base")
        hub.add("me/old", folder / "base")
        hub.repos["me/old"].private = True
        hub.repos["me/old"].files["notes.txt"] = b"mine"
        hub.failing_commits = 1
        run_client(hub, folder, HERE / "hub_client.py", "push", folder)
        yield Session(hub, folder, json.loads((folder / "errors.json").read_text()))


def save_base(folder: Path) -> None:
    """A tiny model with a card, a generation configuration and a tokenizer with a chat template."""
    base = tiny_llama()
    base.generation_config.max_new_tokens = 7
    base.save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({f"w{index}": index for index in range(64)}, unk_token="w0"))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0")
    fast.chat_template = "{{ messages[0].content }}"
    fast.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: tiny\nlicense_link: LICENSE\n---\n# base\n")


def test_adapter_loads_by_repo_id_with_the_import_line(session):
    pushed, loaded = load_file(session.folder / "logits.safetensors"), session.logits("load-adapter")
    torch.testing.assert_close(loaded["logits"], pushed["logits"], rtol=0, atol=1e-5)
    assert loaded["keys"].shape[1] == 2


def test_merged_model_loads_by_repo_id_without_this_package(session):
    pushed, loaded = load_file(session.folder / "logits.safetensors"), session.logits("load-merged")
    torch.testing.assert_close(loaded["logits"], pushed["logits"], rtol=0, atol=1e-4)
    assert loaded["keys"].shape[1] == 2


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [
        ("missing token", "ValueError", "hf auth login"),
        ("refused token", "ValueError", "refused the token"),
        ("bad id", "ValueError", "repo_id='adapter' must be 'owner/name'"),
        ("public repo", "ValueError", "is public"),
        ("not wrapped", "ValueError", "got LlamaForCausalLM"),
        ("unknown base", "ValueError", "'nobody/base' is not on the Hub"),
        ("unknown option", "TypeError", "calibration"),
        ("interrupted", "ConnectionError", "Push again"),
        ("existing repo", "ValueError", "exist_ok=True"),
        ("not merged", "ValueError", "merge_and_unload"),
        ("no adapter", "ValueError", "is merged and has no adapter"),
        ("no memory", "ValueError", "Conversion.from_configs"),
    ],
)
def test_failures_are_clear(session, name, kind, says):
    assert session.errors[name][0] == kind, session.errors[name]
    assert says in session.errors[name][1]


def test_failures_leave_nothing_visible(session):
    assert not session.errors["repos before"]
    assert session.errors["files after interruption"] == [".gitattributes"]


def test_pushes_are_private_unless_asked_otherwise_and_one_commit(session):
    adapter, merged = session.hub.repos["me/adapter"], session.hub.repos["me/merged"]
    assert adapter.private and not merged.private
    assert [message.split(" asymgqa")[0] for message in merged.commits] == ["initial commit", "Upload with"]
    assert {name for name in adapter.files if "." in name[1:]} >= {"adapter_model.safetensors", "README.md"}
    assert not any(name.endswith((".bin", ".pt")) for repo in session.hub.repos.values() for name in repo.files)


def test_replacing_a_repository_removes_what_would_shadow_the_adapter_and_nothing_else(session):
    files = session.hub.repos["me/old"].files
    assert {"notes.txt", "generation_config.json", "adapter_model.safetensors"} <= files.keys()
    assert not {"config.json", "model.safetensors"} & files.keys()
    assert len(session.hub.repos["me/old"].commits) == 2


def test_card_of_the_adapter_survives_the_push_and_a_later_one_by_peft(session):
    assert len(session.hub.repos["me/adapter"].commits) == 3  # initial, ours, PEFT's
    card = session.card("me/adapter")
    assert card.data.base_model == "them/base" and card.data.base_model_relation == "adapter"
    assert {"asymgqa", "peft"} <= set(card.data.tags)
    assert "import asymgqa_peft" in card.text and 'from_pretrained("me/adapter")' in card.text
    assert "Calibration data: random ids" in card.text and "Recovery training data: not stated" in card.text
    assert "| this model | 12.35 |" in card.text


def test_card_of_the_merged_model(session):
    card, text = session.card("me/merged"), session.card("me/merged").text
    assert card.data.base_model_relation == "finetune" and "peft" not in card.data.tags
    assert card.data.license == "other" and card.data.license_name == "tiny"
    assert session.hub.repos["them/base"].sha in card.data.license_link
    assert "AutoModelForCausalLM" in text and "import asymgqa_peft" not in text
    assert "| class | LlamaForCausalLM | MistralForCausalLM |" in text
    assert "| KV cache, bytes per token (float32) | 768 | 256 |" in text  # 2 * 2 layers * 8 * 4 bytes * 6 or 2 heads
    assert "layer 0: [0 2 3 5] [1 4]\nlayer 1: [1 2] [0 3 4 5]" in text
    assert f"Base revision: {session.hub.repos['them/base'].sha}" in text


def test_recipe_merges_a_repository_and_pushes_it(session):
    output = session.folder / "recipe" / "plain"
    session.run(RECIPE, "me/adapter", "--output", output, "--push", "me/again", "--recovery-data", "nothing")
    assert session.hub.repos["me/again"].private
    assert [path.name for path in output.parent.iterdir()] == ["plain"]  # nothing half-written is left beside
    assert {"generation_config.json", "chat_template.jinja", "tokenizer.json"} <= {p.name for p in output.iterdir()}
    assert (output / "README.md").read_bytes() == session.file("me/again", "README.md")
    assert "Recovery training data: nothing" in session.card("me/again").text
    ours, again = (load(session.file(repo, "model.safetensors")) for repo in ("me/merged", "me/again"))
    torch.testing.assert_close(again, ours, rtol=0, atol=1e-6)


@pytest.fixture
def saved(tmp_path):
    """Folders of a base and of an adapter of it."""
    save_base(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model = wrap(base, GROUPS["llama"])
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path


def run_recipe(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["merge_and_push.py", *map(str, arguments)])
    merge_and_push.main()


def test_recipe_publishes_an_adapter_without_loading_a_model(saved, monkeypatch):
    pushed = []
    monkeypatch.setattr(merge_and_push, "AutoModelForCausalLM", None)
    monkeypatch.setattr(merge_and_push, "check_push_target", lambda *args, **options: None)
    monkeypatch.setattr(merge_and_push, "push_folder", lambda *args, **options: pushed.append((args, options)))
    output, push = saved / "copy", ("--push", "me/copy", "--base-model", "them/base")
    run_recipe(monkeypatch, saved / "adapter", "--output", output, "--adapter-only", *push)
    assert pushed == [((output, "me/copy"), {"private": True, "exist_ok": False})]
    assert 'from_pretrained("me/copy")' in (output / "README.md").read_text()
    assert json.loads((output / "adapter_config.json").read_text())["base_model_name_or_path"] == "them/base"
    weights = "adapter_model.safetensors"
    assert (output / weights).read_bytes() == (saved / "adapter" / weights).read_bytes()
    assert (output / "chat_template.jinja").exists()


def test_recipe_asks_for_the_repository_of_a_base_in_a_folder(saved, monkeypatch):
    monkeypatch.setattr(merge_and_push, "check_push_target", lambda *args, **options: None)
    monkeypatch.setattr(merge_and_push, "base_source", lambda config, args: str(saved))
    with pytest.raises(SystemExit, match="--push me/copy: the base .* is a folder.*--base-model"):
        run_recipe(monkeypatch, saved / "adapter", "--output", saved / "copy", "--adapter-only", "--push", "me/copy")
    assert not (saved / "copy").exists()


def test_recipe_says_how_to_repeat_an_interrupted_push(saved, monkeypatch):
    def interrupted(*args, **options):
        raise ConnectionError("cut")

    monkeypatch.setattr(merge_and_push, "check_push_target", lambda *args, **options: None)
    monkeypatch.setattr(merge_and_push, "push_folder", interrupted)
    with pytest.raises(SystemExit, match="push_folder\\('.*plain', 'me/copy'"):
        run_recipe(monkeypatch, saved / "adapter", "--output", saved / "plain", "--push", "me/copy")
    assert (saved / "plain" / "model.safetensors").exists()


def test_recipe_checks_its_output_before_it_loads_anything(saved, monkeypatch):
    monkeypatch.setattr(merge_and_push, "load_adapter_config", None)
    (saved / "file").write_text("")
    for output, says in ((saved / "base", "exists"), (saved / "file" / "plain", "cannot be written")):
        with pytest.raises(SystemExit, match=says):
            run_recipe(monkeypatch, saved / "adapter", "--output", output)
    (saved / "link").symlink_to(saved / "base")
    (saved / "project").mkdir()
    (saved / "project" / "config.json").write_text("{}")  # the configuration of something else
    (saved / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(saved / "adapter" / name, saved / "checkpoints")
    refusals = {"": "holds no model", "project": "holds no model", "checkpoints": "holds no model", "link": "symbolic"}
    before = sorted(saved.rglob("*"))
    for name, says in refusals.items():
        with pytest.raises(SystemExit, match=says):
            run_recipe(monkeypatch, saved / "adapter", "--output", saved / name, "--overwrite")
    assert sorted(saved.rglob("*")) == before


def test_recipe_keeps_an_earlier_output_when_it_fails(saved, monkeypatch):
    before = {path.name: path.read_bytes() for path in (saved / "base").iterdir()}
    monkeypatch.setattr(merge_and_push, "save_merged", None)
    with pytest.raises(TypeError):
        run_recipe(monkeypatch, saved / "adapter", "--output", saved / "base", "--overwrite")
    assert {path.name: path.read_bytes() for path in (saved / "base").iterdir()} == before
    assert sorted(path.name for path in saved.iterdir()) == ["adapter", "base"]


def test_recipe_copies_everything_a_loader_needs_and_reports_the_export(saved, monkeypatch, capsys):
    LlamaForCausalLM.from_pretrained(saved / "base", dtype=torch.bfloat16).save_pretrained(saved / "base")
    (saved / "base" / "tokenizer.model").write_bytes(b"sentences")
    run_recipe(monkeypatch, saved / "adapter", "--output", saved / "plain", "--max-shard-size", "20KB")
    names = {path.name for path in (saved / "plain").iterdir()}
    assert {"generation_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"} <= names
    assert (saved / "plain" / "tokenizer.model").read_bytes() == b"sentences"
    assert "model.safetensors.index.json" in names and len(list((saved / "plain").glob("*.safetensors"))) > 1
    classes = [
        json.loads((saved / part / "tokenizer_config.json").read_text())["tokenizer_class"]
        for part in ("base", "plain")
    ]
    assert classes == ["TokenizersBackend", "PreTrainedTokenizerFast"]
    config = json.loads((saved / "plain" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["num_key_value_heads"] == 2
    assert not {"export_plan", "duplicate_kv_heads"} & config.keys()
    report = json.loads((saved / "plain" / "export_report.json").read_text())
    assert [report[which]["kv_heads"] for which in ("base", "plain", "other")] == [6, 2, 3]
    assert ["kv_heads", "6", "2", "3"] in [line.split() for line in capsys.readouterr().out.splitlines()]


def test_recipe_stores_heads_twice_only_where_asked(saved, monkeypatch):
    """Groups of 4 and 2: two heads with four slots each, or three with two."""
    options = ("--duplicate-kv-heads", "--cached-tokens", "0")
    run_recipe(monkeypatch, saved / "adapter", "--output", saved / "plain", *options)
    config = json.loads((saved / "plain" / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (6, 3)
    assert config["architectures"] == ["LlamaForCausalLM"]  # no slot is empty
    text = (saved / "plain" / "README.md").read_text()
    assert "| distinct K/V heads per layer | 6 | 2 |" in text
    assert "| K/V heads per layer in the cache | 6 | 3 |" in text
    assert "| query slots, empty ones included | 6 | 6 |" in text and "a KV cache of 50% of the base's" in text


@pytest.mark.parametrize("family", BASES)
def test_adapter_card_states_the_groups_and_what_is_unknown(family):
    model = wrap(BASES[family](), GROUPS[family])
    conversion = Conversion.of(model)
    text = model_card(conversion, name="folder")
    assert f"| class | {type(model.get_base_model()).__name__} |" in text
    listed = {"llama": "layer 0: [0 2 3 5] [1 4]", "qwen2": "layer 1: [0 1 3] [2]", "phi": "layer 1: [1 2 3 4] [0 5]"}
    assert listed[family] in text
    assert text.count("not stated") == 3 and "Not stated." in text
    assert ModelCard(text).data.to_dict().keys() == {"library_name", "pipeline_tag", "tags"}  # nothing invented
    layers = [layer.self_attn for layer in model.get_base_model().model.layers]
    layout, shape = layers[0].k_proj.lora_groups["default"].slots, conversion.converted_shape
    assert (shape.num_attention_heads, shape.base_kv_heads) == (layout.num_slots, layout.kv_heads)
    before, after = (kv_cache_bytes_per_token(counted, torch.float32) for counted in (conversion.base, model))
    assert f"| KV cache, bytes per token (float32) | {before:,} | {after:,} |" in text


@pytest.mark.filterwarnings("ignore:GPTBigCodeForCausalLM counts positions")
@pytest.mark.parametrize(
    ("name", "plain_class", "heads", "width", "share", "caution"),
    [
        ("gpt_neox", "PhiForCausalLM", 3, 8, "38%", False),
        ("gpt_neox-wide", "PhiForCausalLM", 3, 16, "75%", False),
        ("opt-single", "GPTBigCodeForCausalLM", 1, 8, "12%", True),
    ],
)
def test_the_card_of_another_class_states_what_that_caches(name, plain_class, heads, width, share, caution):
    model = adapted(name)
    text = model_card(Conversion.of(model), name="folder")
    assert "| K/V heads per layer in the cache | 8 | 8 |" in text and "for a KV cache as large as before" in text
    plain = model.merge_and_unload()
    text = model_card(Conversion.of(plain), name="folder")
    assert f"ForCausalLM | {plain_class} |" in text and f"for a KV cache of {share} of the base's" in text
    assert (
        f"| K/V heads per layer in the cache | 8 | {heads} |" in text and f"| head dimension | 8 | {width} |" in text
    )
    assert f"| {kv_cache_bytes_per_token(plain, torch.float32):,} |" in text
    assert kv_cache_bytes_per_token(plain, torch.float32) == 2 * 2 * heads * width * 4
    assert (f"{plain_class} counts positions from the first column" in text) == caution


def test_the_card_of_wide_heads_warns_of_engines_and_converters_that_lose_their_frequencies():
    """Only the merged model's: an adapter cannot be converted."""
    warning = "does not read its factors computes other logits without a message; `recipes/ENGINES.md`"
    base = tiny_llama()
    wide = wrap(base, GROUPS["llama"], head_dim=2 * base.config.head_dim)
    assert warning not in model_card(Conversion.of(wide), name="folder")
    text = model_card(Conversion.of(wide.merge_and_unload()), name="folder")
    usage = text[text.index("## Use") : text.index("## Groups")]
    assert warning in usage and "A GGUF for llama.cpp must be made with `recipes/convert_gguf.py`" in usage
    narrow = wrap(tiny_llama(), GROUPS["llama"]).merge_and_unload()
    assert warning not in model_card(Conversion.of(narrow), name="folder")


def test_the_card_of_a_merged_model_says_that_adapters_of_the_base_do_not_fit():
    says, permuted = (
        "Adapters that were trained on the base do not fit",
        "query heads stand in the order of the groups",
    )
    model = wrap(tiny_llama(), GROUPS["llama"])
    assert says not in model_card(Conversion.of(model), name="folder")
    text = model_card(Conversion.of(model.merge_and_unload()), name="folder")
    assert says in text and permuted in text
    in_order = wrap(tiny_llama(), [[[0, 1], [2, 3], [4, 5]]] * 2).merge_and_unload()
    text = model_card(Conversion.of(in_order), name="folder")
    assert says in text and permuted not in text


@pytest.mark.parametrize("name", [None, 3, "name", "a/b/c", ""])
def test_what_is_no_repository_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"repo_id={name!r} must be 'owner/name' of a repository"):
        check_repo_id(name)


def test_card_tells_what_the_report_says_and_refuses_another_adapters():
    model = wrap(tiny_llama())
    report = initialize_asymgqa_weights(model, [torch.arange(2, 50).view(4, 12)], progress=False)
    text = model_card(Conversion.of(model), name="folder", report=report, calibration_data="books")
    assert "Calibration data: books (48 tokens)" in text and "Cost of the groups: " in text
    assert all(note in text for note in report.notes)
    other = Conversion.of(wrap(tiny_llama(), [[[0, 5], [1, 2, 3, 4]]] * 2))
    with pytest.raises(ValueError, match="head_groups are not the adapter's"):
        model_card(other, name="folder", report=report)
    with pytest.raises(ValueError, match="evaluation=.* must be rows"):
        model_card(other, name="folder", evaluation={"base": 38.3})


def test_saved_folders_keep_our_card_and_local_paths_stay_unpublished(tmp_path):
    save_base(tmp_path / "base")
    model = wrap(LlamaForCausalLM.from_pretrained(tmp_path / "base"), GROUPS["llama"])
    with pytest.raises(ValueError, match="base_model='owner/name'"):
        save_adapter(model, None, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    save_adapter(model, None, tmp_path / "adapter", base_model="them/base")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "them/base"

    save_merged(model.merge_and_unload(), None, tmp_path / "plain")
    text = (tmp_path / "plain" / "README.md").read_text()
    assert "base (a local folder)" in text and str(tmp_path) not in text
    assert ModelCard(text).data.license_name == "tiny" and ModelCard(text).data.license_link is None


@pytest.mark.parametrize("family", BASES)
def test_the_card_is_the_same_whether_facts_come_from_the_merged_model_or_from_configurations(family, tmp_path):
    model = wrap(BASES[family](), GROUPS[family])
    before = Conversion.of(model)
    config = model.peft_config["default"]
    plain = model.merge_and_unload()
    save_merged(plain, None, tmp_path / "merged", name="me/model")
    configs = Conversion.from_configs(config, before.base, torch.float32)
    for conversion in (before, configs):
        save_merged(plain, None, tmp_path / "again", conversion, name="me/model")
        assert (tmp_path / "again" / "README.md").read_bytes() == (tmp_path / "merged" / "README.md").read_bytes()
        shutil.rmtree(tmp_path / "again")
    text = (tmp_path / "merged" / "README.md").read_text()
    assert f"| class | {before.base.architectures[0]} | {type(plain).__name__} |" in text


def test_saved_folders_are_whole_or_absent_and_never_mixed(tmp_path, monkeypatch):
    model = wrap(tiny_llama(), GROUPS["llama"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "model-00001-of-00002.safetensors").write_bytes(b"of another")
    (tmp_path / "empty").mkdir()

    def disk_full(folder, text):
        assert list(Path(folder).glob("*.safetensors"))  # late enough
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(hub, "write_card", disk_full)
        for folder in ("adapter", "empty"):
            with pytest.raises(OSError, match="disk full"):
                save_adapter(model, None, tmp_path / folder, base_model="them/base")
        plain = model.merge_and_unload()
        with pytest.raises(OSError, match="disk full"):
            save_merged(plain, None, tmp_path / "plain")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]
    assert not list((tmp_path / "empty").iterdir())
    with pytest.raises(ValueError, match="full' holds something already"):
        save_merged(plain, None, tmp_path / "full")
    save_merged(plain, None, tmp_path / "empty")
    assert {"config.json", "model.safetensors", "README.md"} <= {path.name for path in (tmp_path / "empty").iterdir()}


def test_another_adapter_name_is_saved_where_loaders_look(tmp_path):
    model = get_peft_model(tiny_llama(), adapter_config(GROUPS["llama"]), adapter_name="other")
    save_adapter(model, None, tmp_path / "adapter", base_model="them/base")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_other_adapters_and_pickles_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="PeftModelForCausalLM with LoraConfig"):
        Conversion.of(get_peft_model(tiny_llama(), LoraConfig(task_type="CAUSAL_LM")))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (tmp_path / "training_args.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="training_args.bin would run code"):
        push_folder(tmp_path, "me/adapter")


class Runs:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return print, ("code ran",)


def pickled(protocol: int) -> bytes:
    return pickle.dumps({"x": Runs()}, protocol)


def saved_by_torch(**options) -> bytes:
    file = io.BytesIO()
    torch.save({"x": torch.zeros(2)}, file, **options)
    return file.getvalue()


BAD_FILES = {
    "training_args.bin": (b"", "would run code"),
    "old.PT": (b"", "would run code"),
    **{f"protocol{number}.txt": (pickled(number), "holds a pickle") for number in range(6)},
    "zipped.md": (saved_by_torch(), "holds a pickle"),
    "legacy.md": (saved_by_torch(_use_new_zipfile_serialization=False), "holds a pickle"),
    "tokenizer.json": (b'{"half": ', "no whole JSON"),
    "model.safetensors.index.json": (b'{"weight_map": {"a": "absent.safetensors"}}', "missing: absent.safetensors"),
    "other.safetensors": (pickled(2), "no whole safetensors"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_files_that_must_not_be_published_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    content, says = BAD_FILES[name]
    save_file({"x": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} .*{says}"):
        push_folder(tmp_path, "me/model")


def test_files_of_a_saved_model_and_whatever_is_no_pickle_may_be_published(saved):
    """Also a header of safetensors whose length reads as a pickle's first bytes: 640 is 80 02 in hexadecimal."""
    save_file({"x": torch.zeros(2)}, saved / "base" / "extra.safetensors", metadata={"x": ""})
    content = (saved / "base" / "extra.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].ljust(640)
    (saved / "base" / "extra.safetensors").write_bytes((640).to_bytes(8, "little") + header + content[8 + length :])
    (saved / "base" / "code.py").write_text("import os\nimport sys\nclass A:\n    pass\n")
    (saved / "base" / "merges.txt").write_text("#version: 0.2\ni n\n")
    (saved / "base" / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00")
    (saved / "base" / "empty").touch()
    for folder in ("base", "adapter"):
        check_files(saved / folder, [path.name for path in (saved / folder).iterdir()])


def test_links_are_not_followed(saved, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (saved / "secret").write_text("mine")
    (saved / "base" / "notes.txt").symlink_to(saved / "secret")
    (saved / "base" / "elsewhere").symlink_to(saved / "adapter")
    with pytest.raises(ValueError, match="elsewhere is a symbolic link.*notes.txt is a symbolic link"):
        push_folder(saved / "base", "me/model")


@pytest.mark.parametrize("kind", ["link", "cut", "foreign", "pickle"])
def test_recipe_checks_the_adapter_that_it_copies(kind, saved, monkeypatch):
    weights = saved / "adapter" / "adapter_model.safetensors"
    (saved / "secret").write_text("PRIVATE KEY")
    if kind == "link":
        weights.unlink()
        weights.symlink_to(saved / "secret")
    elif kind == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif kind == "foreign":
        save_file({"base_model.model.lora_A.weight": torch.zeros(2)}, weights)
    else:
        weights.write_bytes(pickled(2))
    says = {"link": "symbolic link", "foreign": "no shared heads"}.get(kind, "no whole safetensors")
    with pytest.raises(SystemExit, match=says):
        run_recipe(monkeypatch, saved / "adapter", "--output", saved / "copy", "--adapter-only")
    assert not (saved / "copy").exists()


HOSTILE = "a\n# b\n---\n<script>c</script> [d](http://e) ![f](g) `h` **i** _j_ | k \u202e{{ 7 * 7 }} $l$\n```\nm"


def test_nothing_that_an_adapter_or_a_command_line_says_becomes_markup(tmp_path):
    save_base(tmp_path / "base")
    model = wrap(LlamaForCausalLM.from_pretrained(tmp_path / "base"), GROUPS["llama"])
    plain_text, hostile_text = (
        model_card(
            replace(
                Conversion.of(model),
                base_source=f"/{text.replace('/', '')}",
                base_revision=text,
                adapter=copy.copy(model.peft_config["default"]),
            ),
            name=text,
            licence={"license": "other", "license_name": text, "license_link": f"https://{text}"},
            evaluation=[{"model": text, text: 1.5}],
            calibration_data=text,
            recovery_data=text,
        )
        for text in ("word", HOSTILE)
    )
    data = ModelCard(hostile_text).data.to_dict()
    assert data.keys() == ModelCard(plain_text).data.to_dict().keys() and data["license_name"] == HOSTILE
    body, plain_body = (text.split("\n---\n", 1)[1] for text in (hostile_text, plain_text))
    body = body[body.index("\n# ") :]
    plain_body = plain_body[plain_body.index("\n# ") :]
    assert len(body.splitlines()) == len(plain_body.splitlines())
    assert body.count("\n```") == plain_body.count("\n```") and body.count("\n#") == plain_body.count("\n#")
    (code,) = [line for line in body.splitlines() if ".from_pretrained(" in line]
    assert ast.literal_eval(code.partition("from_pretrained(")[2][:-1]) == HOSTILE
    shown = body.replace(code, "")
    for markup in ("<script>", "[d]", "![f]", " `h`", "**i**", " _j_", " | k", "\u202e", "$l$"):
        assert markup not in shown, markup
    assert r"{{ 7 \* 7 }}" in shown and "&lt;script&gt;" in shown


@pytest.mark.parametrize("token", ["hf_secret\n", " hf_secret\r\n", "hf_sec\nret", "hf_sécret", "hf_sec ret"])
def test_a_token_never_appears_in_a_message(token, tmp_path, monkeypatch):
    """The transport's own error for a header with a line end shows the header."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    save_file({"x": torch.zeros(2)}, tmp_path / "model.safetensors")
    with serving() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        for call in (
            lambda: push_folder(tmp_path, "me/model", token=token),
            lambda: check_push_target("me/model", token=token),
            lambda: base_licence("me/model", token=token),
        ):
            text = ""
            try:
                call()
            except Exception:
                text = traceback.format_exc()
            assert token.strip() not in text.replace("\\n", "\n") and "secret" not in text and "ret'" not in text


def test_a_base_without_card_has_no_licence(tmp_path):
    assert base_licence(str(tmp_path)) == {} == base_licence(None)
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")  # not YAML
    assert base_licence(str(tmp_path)) == {}
