"""Every code block of the README, and of what it leads to, runs or parses."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def blocks(document: str, language: str) -> list[str]:
    text = (ROOT / document).read_text(encoding="utf-8")
    found = re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    assert found, f"{document} has no {language} block"
    return found


def test_it_is_read_in_a_few_minutes():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_quickstarts_figures_are_those_of_its_table():
    results = (ROOT / "recipes/RESULTS.md").read_text(encoding="utf-8")
    section = results.partition("## What does the quickstart show?")[2].partition("\n## ")[0]
    header, _, *rows = [line.split("|") for line in section.splitlines() if line.startswith("|")]
    column = [name.strip() for name in header].index("perplexity, recovered")
    table = [row[column].strip() for row in rows]
    assert len(table) == 4
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (sentence,) = re.findall(r"It puts\s+the bundled.*?\.\n\n", readme, flags=re.DOTALL)
    (comparison,) = re.findall(r"base \d.*?\. \*\*What", readme, flags=re.DOTALL)
    assert re.findall(r"\d+\.\d+", sentence) == re.findall(r"\d+\.\d+", comparison) == table


@pytest.mark.parametrize("document", ["README.md", "recipes/README.md"])
def test_only_languages_that_are_tested(document):
    assert set(re.findall(r"^```(\w+)$", (ROOT / document).read_text(), flags=re.MULTILINE)) <= {"python", "bash"}


def test_python_runs_with_the_recovery_in_its_place(tmp_path, monkeypatch):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    (code,), (recovery,) = blocks("README.md", "python"), blocks("recipes/README.md", "python")
    initialised, save, merge = code.partition("model.save_pretrained")
    assert save
    namespace: dict = {}
    for part in (initialised, recovery, save + merge):
        exec(compile(part, "README.md", "exec"), namespace)
    assert namespace["trainer"].state.global_step == 2
    assert namespace["plain"].config.num_key_value_heads < namespace["base"].config.num_attention_heads
    assert (tmp_path / "out" / "plain" / "model.safetensors").exists()


BASH = [
    *blocks("README.md", "bash"),
    *blocks("recipes/README.md", "bash"),
    *blocks("recipes/RESULTS.md", "bash"),
    *blocks("recipes/ENGINES.md", "bash"),
]


@pytest.mark.parametrize("code", BASH)
def test_bash_blocks_parse_and_name_files_that_exist(code):
    subprocess.run(["bash", "-n"], input=code, text=True, check=True)
    for script in re.findall(r"(?:bash|python3?) ((?:recipes|tests)/\S+)", code):
        assert (ROOT / script).exists(), script
