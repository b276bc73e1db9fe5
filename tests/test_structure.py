"""The package's shape: imports run one way, every public thing is documented, nothing is patched."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "asymgqa_peft"

ROOMS = ("method", "adapter", "initialize")
MODULES = sorted(path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py"))


def tree(module: str) -> ast.Module:
    """The module's syntax tree."""
    return ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))


def imports(source: ast.AST, module: str) -> set[str]:
    """Names of all modules that `source`, the file `module` of the package, imports at any depth, written in full."""
    package = ["asymgqa_peft", *module.split("/")[:-1]]
    found = set()
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*parents, *(node.module or "").split(".")]).rstrip(".")
            found |= {f"{origin}.{alias.name}" for alias in node.names}
    return found


def in_room(module: str, room: str) -> list[str]:
    """What `module` imports from a room, or from a library of that name."""
    return [name for name in imports(tree(module), module) if f".{room}." in f".{name}."]


def modules_of(room: str) -> list[str]:
    """The room's files."""
    found = [module for module in MODULES if module.startswith(f"{room}/")]
    assert found, f"no modules in {room}"
    return found


@pytest.mark.parametrize("module", modules_of("method"))
def test_the_method_knows_neither_peft_nor_the_adapter(module):
    assert not in_room(module, "peft") + in_room(module, "adapter") + in_room(module, "initialize")


@pytest.mark.parametrize("module", modules_of("adapter"))
def test_the_adapter_never_imports_the_method(module):
    assert not in_room(module, "method") + in_room(module, "initialize")


@pytest.mark.parametrize("module", sorted(set(MODULES) - set(modules_of("method")) - set(modules_of("initialize"))))
def test_only_the_initialisation_joins_the_two(module):
    assert not in_room(module, "method")


def test_imports_make_no_circle():
    arrows = {}
    for module in set(MODULES) - {"__init__"}:
        arrows[module] = set(map(_module_of, imports(tree(module), module))) - {module, None}
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {error.args[1]}")


def _module_of(name: str) -> str | None:
    """The module of the package that a full name is or is in; None for another package's."""
    parts = name.split(".")
    while parts:
        path = "/".join(parts[1:])
        for module in (path, f"{path}/__init__"):
            if parts[0] == "asymgqa_peft" and module in MODULES:
                return module
        parts.pop()
    return None


def test_the_import_check_sees_every_form():
    forms = ["from .a import x", "from .. import b", "from ..c import y", "from asymgqa_peft.d import y"]
    source = "\n".join([*forms, "import peft.utils", "def f():", "    from .e import z"])
    expected = {"asymgqa_peft.adapter.a.x", "asymgqa_peft.b", "asymgqa_peft.c.y", "asymgqa_peft.d.y"}
    expected |= {"peft.utils", "asymgqa_peft.adapter.e.z"}
    assert imports(ast.parse(source), "adapter/model") == expected


def public_definitions(node: ast.AST, prefix: str = "") -> list[tuple[str, ast.AST]]:
    """Public classes, functions and methods, with their dotted names; nested functions are nobody's business."""
    found = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef) and not child.name.startswith("_"):
            found.append((prefix + child.name, child))
            if isinstance(child, ast.ClassDef):
                found += public_definitions(child, f"{prefix}{child.name}.")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_everything_public_has_a_docstring(module):
    assert ast.get_docstring(tree(module))
    missing = [name for name, node in public_definitions(tree(module)) if not ast.get_docstring(node)]
    assert not missing


@pytest.mark.parametrize("module", MODULES)
def test_no_family_is_named_outside_the_declarations(module):
    """Architectures differ in `families.py` only: elsewhere no model type appears as a string of its own."""
    from asymgqa_peft.families import FAMILIES

    named = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Constant) and node.value in FAMILIES:
            named.add(node.value)
    assert named == (set(FAMILIES) if module == "families" else set())


def test_heavy_libraries_are_imported_only_where_they_are_used():
    """`import asymgqa_peft` must not take the seconds that trl, datasets and matplotlib take."""
    show = "import sys, asymgqa_peft; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True)
    loaded = set(result.stdout.split())
    assert "asymgqa_peft.adapter.model" in loaded
    assert not loaded & {"trl", "datasets", "matplotlib", "asymgqa_peft.trainer", "asymgqa_peft.initialize"}
