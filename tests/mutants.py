"""Small faults put into the package, and which of them its tests notice: python tests/mutants.py [module ...]

A mutant is a module with one change: another comparison or operator, a number one off, a condition negated, a
statement gone, arguments swapped. A sample of each module's mutants goes one by one into a copy of the repository,
where the module's fast tests run, and for those that survive them the slow ones. A mutant that hangs or crashes is
killed. Every run is a fork of this process, which has the libraries imported already. Results are JSON lines, and a
run that was stopped goes on where it was. `TESTS` names the modules.
"""

from __future__ import annotations

import argparse
import ast
import compileall
import contextlib
import gc
import hashlib
import importlib.util
import json
import os
import random
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "asymgqa_peft"
FAMILIES = "gemma gemma2 gemma3 gpt_bigcode gpt_neox llama mistral olmo olmo2 opt phi phi3 qwen2 qwen3 stablelm"
PRELOADED = (
    *("torch", "torch._dynamo", "transformers", "peft", "accelerate", "datasets", "hypothesis", "pytest"),
    *(f"transformers.models.{family}.modeling_{family}" for family in FAMILIES.split()),
)
SECONDS = 150
"""A test that takes longer hangs."""
TEST, LOG = "test.txt", "log.txt"
MEMORY = 8 << 30
"""Bytes that a process of tests may take."""


@dataclass(frozen=True)
class Tests:
    """What pytest is to run on a module's mutants: first the fast ones, then, on those that survive, the slow ones."""

    fast: str
    slow: str


INITIALIZE = "test_initialize.py -k 'not interrupted'"
SOME = "-k 'test_layers or (dense or bitwise or own_heads) and (qwen2-wide-gqa or olmo2-gqa or qwen3-wide or phi3)'"
WHOLE = "test_families.py test_peft_contract.py test_wide.py"
# The other tests of exports wait for a process that loads them all.
WRITTEN = (
    "-k 'folded or twice or tasks or device or invalid or long_input or left_in or fp32 or empty_slots "
    "or without_a_place or merged_base or epsilon'"
)
TESTS = {
    "groups": Tests("test_groups.py", "test_layers.py test_config.py test_groups_travel.py"),
    "method/search": Tests("test_search.py", f"test_planted.py {INITIALIZE}"),
    "method/merge": Tests("test_merge.py test_norms.py", f"test_heads.py test_planted.py {INITIALIZE}"),
    "method/refit": Tests("test_refit.py", INITIALIZE),
    "method/norms": Tests("test_norms.py", f"test_planted.py {INITIALIZE}"),
    "adapter/layer": Tests(f"test_layers.py test_families.py {SOME}", f"test_quantised.py {WHOLE}"),
    "adapter/slots": Tests(f"test_layers.py test_families.py {SOME}", f"test_groups_travel.py {WHOLE}"),
    "adapter/export": Tests(
        f"test_norms.py test_peft_contract.py test_export.py {WRITTEN}",
        "test_peft_contract.py test_wide.py test_export.py",
    ),
}


# -------------------------------------------------------------------------------------------------------- mutants

COMPARED = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
OPPOSITES = {"min": "max", "amin": "amax", "minimum": "maximum", "clamp_min": "clamp_max", "all": "any"}
OPPOSITES |= {other: one for one, other in OPPOSITES.items()}
# Of these the arguments may change places, or are no values.
UNSWAPPED = {"getattr", "setattr", "hasattr", "map", "min", "max", "zip"}
UNCHANGED = {"annotation", "returns", "decorator_list"}
"""Fields of nodes that are no code, or say what a class is."""


@dataclass(frozen=True)
class Mutant:
    """One change of a module: its line, its kind, what it reads before and after, and the module's new source."""

    module: str
    line: int
    kind: str
    change: str
    source: str


class Sites:
    """Where a module's tree can be changed: `found` holds (node, kind of change, function that makes it in place)."""

    def __init__(self, tree: ast.Module) -> None:
        self.found: list[tuple[ast.AST, str, Callable[[], None]]] = []
        self._assigned: set[str] = set()
        self._visit(tree)

    def _add(self, node: ast.AST, kind: str, owner: object, name: str | int, value: object) -> None:
        def change() -> None:
            if isinstance(name, int):
                owner[name] = value
            else:
                setattr(owner, name, value)

        self.found.append((node, kind, change))

    def _visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef):
            self._assigned = {argument.arg for argument in ast.walk(node.args) if isinstance(argument, ast.arg)}
        self._changes_of(node)
        for name, value in ast.iter_fields(node):
            if name in UNCHANGED:
                continue
            children = value if isinstance(value, list) else [value]
            for position, child in enumerate(children):
                if not isinstance(child, ast.AST):
                    continue
                last = isinstance(node, ast.FunctionDef) and position == len(children) - 1
                if isinstance(child, ast.stmt) and not (last and isinstance(child, ast.Return)):
                    self._deletion(child, children, position)
                kind = "default" if isinstance(node, ast.arguments) else "constant"
                if isinstance(child, ast.Constant):
                    self._constants(child, kind)
                elif not self._is_said(child):
                    self._visit(child)

    @staticmethod
    def _is_said(node: ast.AST) -> bool:
        """Messages, types, and what should go without saying: zip's `strict`."""
        if isinstance(node, ast.Call):
            return getattr(node.func, "id", "") == "isinstance"
        return isinstance(node, ast.Raise | ast.JoinedStr) or getattr(node, "arg", None) == "strict"

    def _deletion(self, statement: ast.stmt, body: list, position: int) -> None:
        if isinstance(statement, ast.Assign | ast.AnnAssign):
            names = {
                name.id
                for name in ast.walk(statement)
                if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)
            }
            # Without its only assignment a name is missing, which everything notices.
            deletable = statement.value is not None and names <= self._assigned
            self._assigned |= names
        elif isinstance(statement, ast.Expr):
            deletable = not isinstance(statement.value, ast.Constant)
        else:
            deletable = isinstance(statement, ast.AugAssign | ast.Raise | ast.Return | ast.Continue | ast.Break)
        if deletable:
            self._add(statement, "deletion", body, position, ast.Pass())

    def _constants(self, node: ast.Constant, kind: str) -> None:
        if isinstance(node.value, bool):
            self._add(node, kind, node, "value", not node.value)
        elif isinstance(node.value, int | float):
            for step in (1, -1):
                self._add(node, kind, node, "value", node.value + step)

    def _changes_of(self, node: ast.AST) -> None:
        if isinstance(node, ast.Compare):
            for position, operator in enumerate(node.ops):
                self._add(node, "comparison", node.ops, position, COMPARED[type(operator)]())
        elif isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp) and type(node.op) in OPERATORS:
            self._add(node, "operator", node, "op", OPERATORS[type(node.op)]())
        elif isinstance(node, ast.UnaryOp):
            if isinstance(node.op, ast.Not):
                self._add(node, "negation", node, "operand", ast.UnaryOp(ast.Not(), node.operand))
            else:
                self._add(node, "sign", node, "op", ast.UAdd())
        elif isinstance(node, ast.If | ast.While | ast.IfExp) and not isinstance(node.test, ast.Compare | ast.UnaryOp):
            self._add(node.test, "negation", node, "test", ast.UnaryOp(ast.Not(), node.test))
        elif isinstance(node, ast.Name) and node.id in OPPOSITES:
            self._add(node, "opposite", node, "id", OPPOSITES[node.id])
        elif isinstance(node, ast.Attribute) and node.attr in OPPOSITES:
            self._add(node, "opposite", node, "attr", OPPOSITES[node.attr])
        elif isinstance(node, ast.Call):
            self._swaps(node)

    def _swaps(self, node: ast.Call) -> None:
        name = getattr(node.func, "id", "")
        if name in UNSWAPPED or any(isinstance(argument, ast.Starred) for argument in node.args):
            return
        for position in range(len(node.args) - 1):
            first, second = node.args[position : position + 2]
            swapped = [*node.args[:position], second, first, *node.args[position + 2 :]]
            if ast.dump(first) != ast.dump(second):
                self._add(node, "swap", node, "args", swapped)


def sample(module: str, number: int, seed: int) -> list[Mutant]:
    """As many mutants of a module as wanted, drawn at random, in the order of its source."""
    text = path_of(module).read_text()
    count = len(Sites(ast.parse(text)).found)
    drawn = random.Random(f"{seed} {module}").sample(range(count), min(number, count))
    return [mutant(module, text, index) for index in sorted(drawn)]


def mutant(module: str, text: str, index: int) -> Mutant:
    """A module's text with one of its sites changed."""
    tree = ast.parse(text)
    node, kind, change = Sites(tree).found[index]
    what, lines = ast.unparse(node), ast.unparse(tree).splitlines()
    change()
    source = ast.unparse(ast.fix_missing_locations(tree))
    if kind != "deletion":
        new = [line.strip() for old, line in zip(lines, source.splitlines(), strict=True) if old != line]
        what += "  ->  " + " ".join(new)
    return Mutant(module, node.lineno, kind, " ".join(what.split()), source)


def path_of(module: str, folder: Path = ROOT) -> Path:
    return folder / PACKAGE / f"{module}.py"


# ----------------------------------------------------------------------------------------------------------- runs


class Watch:
    """A plugin of pytest: a limit for every test, and in the file TEST the name of the one that runs."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / TEST

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        signal.alarm(SECONDS)
        self.file.write_text(nodeid)


@dataclass
class Run:
    """One run of tests in a folder of its own, on a mutant or, without one, on the package as it is."""

    module: str
    tests: str
    mutant: Mutant | None = None
    status: int = 0
    test: str = ""
    log: str = ""
    seconds: float = 0.0

    def start(self, folder: Path) -> int:
        """Fork; the child's process id."""
        self.seconds = -time.perf_counter()
        source = path_of(self.module, folder)
        if self.mutant is not None:
            source.write_text(self.mutant.source)
        # A compiled file of the same second and size would pass for the mutant's.
        Path(importlib.util.cache_from_source(source)).unlink(missing_ok=True)
        (folder / TEST).write_text("before any test")
        process = os.fork()
        if process == 0:
            os._exit(self._child(folder))
        return process

    def _child(self, folder: Path) -> int:
        os.setsid()
        os.chdir(folder)
        log = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        os.environ["PYTHONPATH"] = str(folder)
        sys.path[0] = str(folder)
        signal.alarm(SECONDS)
        tests = [f"tests/{word}" if word.endswith(".py") else word for word in shlex.split(self.tests)]
        options = ["-x", "-q", "-p", "no:cacheprovider", "--durations=10", f"--basetemp={folder / 'scratch'}"]
        return int(pytest.main([*options, *tests], plugins=[Watch(folder)]))

    def end(self, folder: Path, process: int, status: int) -> None:
        """The child has ended with this status of os.wait."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)  # what it has started
        self.seconds += time.perf_counter()
        self.status = os.waitstatus_to_exitcode(status)
        self.test = (folder / TEST).read_text()
        self.log = (folder / LOG).read_text()
        # The copy is whole again for the next module.
        shutil.copy(path_of(self.module), path_of(self.module, folder))

    @property
    def outcome(self) -> str:
        """ "survived", or how the mutant was killed."""
        if self.status == -signal.SIGALRM:
            return "hangs"
        if self.status < 0:
            return "crashes"
        return "fails" if self.status else "survived"


def finished(runs: Iterable[Run], folders: list[Path]) -> Iterator[Run]:
    """The runs as they end, as many at a time as there are folders."""
    free, running, waiting = list(folders), {}, iter(runs)
    while True:
        while free:
            run = next(waiting, None)
            if run is None:
                break
            folder = free.pop()
            running[run.start(folder)] = (run, folder)
        if not running:
            return
        process, status = os.wait()
        run, folder = running.pop(process)
        run.end(folder, process, status)
        free.append(folder)
        yield run


def copies(scratch: Path, number: int) -> list[Path]:
    """Copies of what the tests need of the repository."""
    folders = [scratch / str(index) for index in range(number)]
    for folder in folders:
        ignored = shutil.ignore_patterns("__pycache__", ".*")
        shutil.copytree(ROOT, folder, ignore=ignored)
        compileall.compile_dir(folder / PACKAGE, quiet=1)
    return folders


def preload() -> None:
    """Import what tests and package import, but neither of them; a fork then has it at once."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    for name in PRELOADED:
        importlib.import_module(name)
    import torch
    from hypothesis import HealthCheck, settings

    torch.set_num_threads(1)  # threads do not survive a fork
    # On a busy machine no test is to fail for its time, and every mutant is to meet the same examples.
    calm = {"deadline": None, "suppress_health_check": list(HealthCheck)}
    settings.register_profile("mutants", **calm, database=None, derandomize=True)
    settings.load_profile("mutants")
    gc.freeze()


# -------------------------------------------------------------------------------------------------------- results


@dataclass
class Results:
    """What became of mutants, by what they change; a file of JSON lines, of which the last about a mutant counts."""

    file: Path

    def __post_init__(self) -> None:
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.records = {tuple(record["mutant"]): record for record in map(json.loads, lines)}

    def add(self, run: Run, speed: str) -> None:
        record = {"mutant": key(run.mutant), "outcome": run.outcome, "test": run.test, "tests": speed}
        record["seconds"] = round(run.seconds, 1)
        self.records[tuple(record["mutant"])] = record
        with self.file.open("a") as lines:
            lines.write(json.dumps(record) + "\n")

    def wants(self, mutant: Mutant, speed: str) -> bool:
        """Whether the fast or the slow tests are still to run on a mutant."""
        record = self.records.get(tuple(key(mutant)))
        if record is None:
            return speed == "fast"
        return speed == "slow" and record["outcome"] == "survived" and record["tests"] == "fast"

    def print_table(self, sampled: dict[str, list[Mutant]]) -> None:
        """A row for every module, and all survivors."""
        survivors, total = [], 0
        print("| module | mutants | killed | share | hangs, crashes |\n|---|---|---|---|---|")
        for module, mutants in sampled.items():
            outcomes = []
            for mutant in mutants:
                outcome = self.records[tuple(key(mutant))]["outcome"]
                outcomes.append(outcome)
                if outcome == "survived":
                    survivors.append(f"{module}.py:{mutant.line}  {mutant.kind}: {mutant.change}")
            killed, total = len(outcomes) - outcomes.count("survived"), total + len(outcomes)
            others = outcomes.count("hangs") + outcomes.count("crashes")
            print(f"| {module} | {len(outcomes)} | {killed} | {killed / len(outcomes):.0%} | {others} |")
        killed = total - len(survivors)
        print(f"| all | {total} | {killed} | {killed / total:.0%} | |", *survivors, sep="\n")


def key(mutant: Mutant) -> list:
    """A mutant's module, a digest of its whole source, line, kind and change."""
    digest = hashlib.sha256(mutant.source.encode()).hexdigest()[:12]
    return [mutant.module, digest, mutant.line, mutant.kind, mutant.change]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="module", help=", ".join(TESTS))
    parser.add_argument("--number", type=int, default=28, help="mutants of each module")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=Path("mutants.jsonl"))
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--again", action="store_true", help="test survivors anew, after tests were added")
    parser.add_argument("--fast", action="store_true", help="leave out the slow tests of what survives the fast ones")
    args = parser.parse_args()
    results = Results(args.results.absolute())
    if args.again:
        kept = {name: record for name, record in results.records.items() if record["outcome"] != "survived"}
        results.records = kept
    sampled = {module: sample(module, args.number, args.seed) for module in args.modules or TESTS}
    with tempfile.TemporaryDirectory() as scratch:
        folders = copies(Path(scratch), args.workers)
        preload()
        for speed in ("fast",) if args.fast else ("fast", "slow"):
            wanted = [mutant for mutants in sampled.values() for mutant in mutants if results.wants(mutant, speed)]
            modules = sorted({mutant.module for mutant in wanted})
            # Tests that fail on the package as it is would kill everything.
            for run in finished((Run(module, getattr(TESTS[module], speed)) for module in modules), folders):
                print(f"{run.module}: {run.outcome} as it is, {run.seconds:.0f} s ({speed})", flush=True)
                if run.status != 0:
                    sys.exit(run.log)
            runs = (Run(mutant.module, getattr(TESTS[mutant.module], speed), mutant) for mutant in wanted)
            for run in finished(runs, folders):
                results.add(run, speed)
                print(f"{run.module}.py:{run.mutant.line} {run.mutant.change}: {run.outcome}, {run.test}", flush=True)
    results.print_table(sampled)


if __name__ == "__main__":
    main()
