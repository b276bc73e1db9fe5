"""What an installation gets: every library that is imported, type hints, a README that stands alone."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = SETTINGS["project"]
OF_ANOTHER_PROJECT = {"conversion", "convert_hf_to_gguf"}
"""llama.cpp's converter, which a user has in a folder."""


def canonical(name: str) -> str:
    """A distribution's name without its version and extras, in the spelling of package indexes."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", name).group()).lower()


def imported_distributions(folder: str) -> set[str]:
    """Distributions whose modules the files of a folder import, at any depth."""
    modules = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules.add(node.module.split(".")[0])
    modules -= sys.stdlib_module_names | OF_ANOTHER_PROJECT | {"asymgqa_peft", "recipes"}
    owners = packages_distributions()
    found = set()
    for module in modules:
        found.add(canonical(owners.get(module, [module])[0]))
    return found


@pytest.mark.parametrize("folder", ["asymgqa_peft", "recipes"])
def test_every_library_that_is_imported_is_declared(folder):
    declared = {canonical(requirement) for requirement in PROJECT["dependencies"]}
    for extra in ("plot", "eval", "quant", "engines"):
        declared |= {canonical(requirement) for requirement in PROJECT["optional-dependencies"][extra]}
    imported = imported_distributions(folder)
    assert {"torch", "transformers", "peft", "pyyaml"} & imported
    # tokenizers comes with transformers, which is made for one version of it.
    assert imported - declared <= {"tokenizers"}


def test_the_package_is_imported_where_there_is_no_resource_module():
    """Windows has none; what our libraries do there is theirs, so they are imported before it goes."""
    code = "import sys, peft, torch; sys.modules['resource'] = None; import asymgqa_peft, asymgqa_peft.initialize"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_type_hints_are_announced():
    assert (ROOT / "asymgqa_peft" / "py.typed").is_file()


def test_the_readme_of_a_package_index_points_to_nothing_beside_it():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    beside = re.compile(r"\]\((?!https?:)[^)]+\)")
    assert beside.search(text)
    for rule in SETTINGS["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    assert not beside.search(text)


DOCUMENTS = [path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *(ROOT / "recipes").rglob("*.md"))]


@pytest.mark.parametrize("path", DOCUMENTS)
def test_links_lead_to_files_and_headings_that_exist(path):
    document = ROOT / path
    for target, heading in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", document.read_text(encoding="utf-8")):
        there = document.parent / target if target else document
        assert there.exists(), target
        assert not heading or heading in headings(there), f"{target}#{heading}"


def headings(document: Path) -> set[str]:
    """Names of a document's headings in links, as GitHub makes them."""
    found = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def test_documents_are_found():
    assert {"README.md", "CONTRIBUTING.md", "recipes/RESULTS.md", "recipes/LOG.md", "recipes/ENGINES.md"} <= {
        *DOCUMENTS
    }


def test_the_workflow_runs_the_suite_as_a_contributor_does():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))
    job = workflow["jobs"]["tests"]
    assert job["steps"][-1]["run"] == "bash tests/run.sh"
    oldest = PROJECT["requires-python"].removeprefix(">=")
    assert job["strategy"]["matrix"]["python"][0] == oldest
    script = (ROOT / "tests" / "run.sh").read_text(encoding="utf-8")
    assert "ruff check ." in script and "ruff format --check ." in script


def test_no_hint_names_a_package_of_no_index():
    """This project is installed from its sources: `pip install asymgqa_peft` would not find it."""
    for pattern in ("asymgqa_peft/**/*.py", "recipes/**/*.py", "recipes/**/*.sh", "*.md", "recipes/**/*.md"):
        paths = list(ROOT.glob(pattern))
        assert paths, pattern
        for path in paths:
            assert not re.search(r"pip install '?asymgqa", path.read_text(encoding="utf-8")), path
