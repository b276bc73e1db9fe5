"""The package's shape: imports run one way, every public thing is documented, nothing is patched."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "asymgqa_peft"

# A module imports only from modules on earlier lines. The one place that says so.
ORDER = [
    "files",
    "attention",
    "groups",
    "families",
    "threads",
    "statistics",
    "merge",
    "search",
    "refit",
    "config",
    "layers",
    "sites",
    "export",
    "tuner",
    "streams",
    "initialize",
    "distillation",
    "trainer",
    "evaluate",
    "footprint",
    "card",
    "hub",
    "plotting",
]
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def tree(module: str) -> ast.Module:
    """The module's syntax tree."""
    return ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))


def imported_siblings(source: ast.AST) -> set[str]:
    """Modules of this package that `source` imports, at any depth."""
    found = set()
    for node in ast.walk(source):
        if isinstance(node, ast.ImportFrom):
            path = ("asymgqa_peft." if node.level else "") + (node.module or "")
            if path.rstrip(".") == "asymgqa_peft":
                found |= {alias.name for alias in node.names}
            elif path.startswith("asymgqa_peft."):
                found.add(path.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("asymgqa_peft.")}
    return found


def test_every_module_has_a_place_in_the_order():
    assert MODULES, "no modules found"
    assert set(MODULES) <= set(ORDER)


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module):
    earlier = set(ORDER[: ORDER.index(module)])
    assert imported_siblings(tree(module)) <= earlier


def test_the_import_check_sees_every_form():
    forms = ["from .a import x", "from . import b", "from asymgqa_peft.c import y", "import asymgqa_peft.d"]
    source = "\n".join([*forms, "def f():", "    from .e import z"])
    assert imported_siblings(ast.parse(source)) == {"a", "b", "c", "d", "e"}


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

    strings = {n.value for n in ast.walk(tree(module)) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    named = strings & set(FAMILIES)
    assert named == set(FAMILIES) if module == "families" else not named


def test_heavy_libraries_are_imported_only_where_they_are_used():
    """What `import asymgqa_peft` pulls in must not reach trl, datasets or matplotlib."""
    eager, queue = set(), ["__init__"]
    while queue:
        module = queue.pop()
        for name in imported_at_run_time(tree(module)) & set(MODULES) - eager:
            eager.add(name)
            queue.append(name)
    assert "tuner" in eager
    for module in eager | {"__init__"}:
        heavy = {n.split(".")[0] for n in absolute_imports(tree(module))} & {"trl", "datasets", "matplotlib"}
        assert not heavy, module


def imported_at_run_time(source: ast.Module) -> set[str]:
    """Siblings imported when the module itself is: not inside functions, nor under TYPE_CHECKING."""
    return set().union(*(imported_siblings(n) for n in source.body if isinstance(n, ast.ImportFrom | ast.Import)))


def absolute_imports(source: ast.Module) -> set[str]:
    """Other packages' modules imported at the top level."""
    found = set()
    for node in source.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module)
    return found
