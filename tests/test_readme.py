"""Every code block of the README runs or parses."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    found = [code for name, code in BLOCKS if name == language]
    assert found, f"the README has no {language} block"
    return found


def test_only_languages_that_are_tested():
    assert {language for language, _ in BLOCKS} <= {"python", "bash"}


def test_python_blocks_run_in_order(tmp_path, monkeypatch):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), namespace)
    assert namespace["plain"].config.num_key_value_heads < namespace["base"].config.num_attention_heads
    assert (tmp_path / "out" / "plain" / "model.safetensors").exists()


@pytest.mark.parametrize("code", blocks("bash"))
def test_bash_blocks_parse_and_name_files_that_exist(code):
    subprocess.run(["bash", "-n"], input=code, text=True, check=True)
    for script in re.findall(r"(?:bash|python3?) ((?:recipes|tests)/\S+)", code):
        assert (ROOT / script).exists(), script
