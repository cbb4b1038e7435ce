"""A mutation run: small changes to a module, one at a time, each against the tests that reach the change.

    pip install mutmut
    python tests/mutants.py src/visbi/certificate/weights.py tests/certificate --out weights.jsonl

The changes are those of mutmut's operators, made everywhere but in annotations, imports, decorators and
`__all__`; conditions of `if` are forced to either side, too; of a string the text is changed, not its case.

torch and visbi are imported and the tests collected once. Each mutant is a fork in which the code of the
loaded module's functions is exchanged (its default values and constants, too); then the tests that reach the
changed statement run until one fails, the likeliest for its time first: one that saw other mutants of the
function, and one of each test's cases before the second of any. A run without a change says which they are.

What survives is for a reader to judge: docs/quality.md says what was found.
"""

import argparse
import ast
import json
import math
import os
import random
import resource
import sys
import time
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, TextIO

import coverage
import libcst as cst  # type: ignore[import-not-found]
import pytest
from libcst.metadata import MetadataWrapper, PositionProvider  # type: ignore[import-not-found]
from mutmut.mutation.mutators import mutation_operators, operator_if_exp  # type: ignore[import-not-found]

SPARE = 20  # seconds, beside five times what its tests take; a loop without an end is killed then


@dataclass(frozen=True)
class Mutant:
    """One changed module: `lines` is the statement changed, `inside` the function around it."""

    source: str
    line: int
    change: str
    lines: tuple[int, int]
    inside: tuple[int, int]


class Mutator(cst.CSTVisitor):
    """Collects the changed modules."""

    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self, source: str, module: cst.Module) -> None:
        super().__init__()
        self.source, self.module, self.mutants = source, module, []
        lines = source.splitlines(keepends=True)
        self.starts = [0, *accumulate(map(len, lines))]  # offset of each line
        self.statements: list[tuple[int, int]] = [(0, 0)]
        self.functions: list[tuple[int, int]] = [(0, 0)]

    def span(self, node: cst.CSTNode) -> tuple[int, int]:
        position = self.get_metadata(PositionProvider, node)
        return position.start.line, position.end.line

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.Annotation | cst.Import | cst.ImportFrom | cst.Decorator):
            return False
        if isinstance(node, cst.Assign) and self.module.code_for_node(node).startswith("__all__"):
            return False
        if isinstance(node, cst.SimpleStatementLine | cst.BaseCompoundStatement):
            first, last = self.span(node)
            body = getattr(node, "body", None)  # of a compound statement only the head counts
            head = max(first, self.span(body)[0] - 1) if isinstance(body, cst.BaseSuite) else last
            self.statements.append((first, head))
        if isinstance(node, cst.FunctionDef):
            self.functions.append(self.span(node))
        for kind, operator in mutation_operators:
            if isinstance(node, kind):
                changed = list(operator(node))
                for new in changed[:1] if isinstance(node, cst.SimpleString) else changed:
                    self.add(node, new)
        if isinstance(node, cst.If):
            for new in operator_if_exp(node):
                self.add(node.test, new.test)
        return True

    def on_leave(self, original_node: cst.CSTNode) -> None:
        if isinstance(original_node, cst.SimpleStatementLine | cst.BaseCompoundStatement):
            self.statements.pop()
        if isinstance(original_node, cst.FunctionDef):
            self.functions.pop()

    def add(self, node: cst.CSTNode, new: cst.CSTNode) -> None:
        where = self.get_metadata(PositionProvider, node)
        first, last = (self.starts[at.line - 1] + at.column for at in (where.start, where.end))
        after = self.module.code_for_node(new)
        source = self.source[:first] + after + self.source[last:]
        if source != self.source and is_python(source):
            change = " ".join(f"{self.source[first:last]} -> {after}".split())
            self.mutants.append(
                Mutant(source, where.start.line, change, self.statements[-1], self.functions[-1])
            )


def is_python(source: str) -> bool:
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


def mutants_of(path: Path) -> list[Mutant]:
    """All of them, in the order of the text."""
    source = path.read_text()
    wrapper = MetadataWrapper(cst.parse_module(source), unsafe_skip_copy=True)
    mutator = Mutator(source, wrapper.module)
    wrapper.visit(mutator)
    return mutator.mutants


class Run:
    """The plugin that, in place of pytest's loop over the tests, tries the mutants."""

    def __init__(self, mutants: list[Mutant], asked: argparse.Namespace, out: TextIO) -> None:
        self.path, self.mutants, self.out = asked.module.resolve(), mutants, out
        self.slowest, self.enough, self.cases = asked.slowest, asked.enough, asked.cases
        self.killers: dict[tuple[int, int], Counter[str]] = {}  # of each function
        self.seconds: Counter[str] = Counter()
        self.passed: set[str] = set()
        self.failed: list[str] = []
        self.tally: Counter[str] = Counter()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        cases: Counter[str] = Counter()
        for item in list(items):
            cases[item.nodeid.split("[")[0]] += 1
            if cases[item.nodeid.split("[")[0]] > self.cases:
                items.remove(item)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.failed.append(report.nodeid)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        reached = self.baseline(session.items)
        for mutant in self.mutants:
            began = time.monotonic()
            became, by = self.outcome(mutant, self.chosen(mutant, session.items, reached))
            self.tally[became] += 1
            if by:
                self.killers.setdefault(mutant.inside, Counter())[by] += 1
            taken = {"by": by, "seconds": round(time.monotonic() - began, 1)}
            line = {"line": mutant.line, "change": mutant.change, "became": became, **taken}
            self.out.write(json.dumps(line) + "\n")
            self.out.flush()
        return True

    def baseline(self, items: list[pytest.Item]) -> dict[str, set[int]]:
        """Which lines of the module each test reaches; those that fail are left out."""
        recorder = coverage.Coverage(data_file=None, include=[str(self.path)], config_file=False)
        recorder.start()
        for item in items:
            recorder.switch_context(item.nodeid)
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
        recorder.stop()
        if self.failed:
            print(f"\nleft out, since they fail without a change: {self.failed}")  # noqa: T201
        reached: dict[str, set[int]] = {}
        for line, names in recorder.get_data().contexts_by_lineno(str(self.path)).items():
            for name in set(names) - {"", *self.failed}:
                reached.setdefault(name, set()).add(line)
        self.passed = set(self.seconds) - set(self.failed)
        self.failed = []
        took = sum(self.seconds[name] for name in reached)
        reaching = f"{len(reached)} tests reach {self.path.name} in {took:.0f} s"
        print(f"\n{reaching}; {len(self.mutants)} mutants")  # noqa: T201
        return reached

    def chosen(
        self, mutant: Mutant, items: list[pytest.Item], reached: dict[str, set[int]]
    ) -> list[pytest.Item]:
        """Tests that reach the statement, else all, in the order in which they run."""

        def reaching(first: int, last: int) -> list[str]:
            return [name for name, lines in reached.items() if any(first <= line <= last for line in lines)]

        around = set(reaching(*mutant.inside))
        names = set(reaching(*mutant.lines)) or self.passed  # what is done on import, such as default values
        quick = [each for each in items if each.nodeid in names and self.seconds[each.nodeid] <= self.slowest]
        killers, cases = self.killers.get(mutant.inside, Counter()), Counter()
        rate = {}
        for item in sorted(quick, key=lambda item: self.seconds[item.nodeid]):
            name = item.nodeid.split("[")[0]
            cases[name] += 1
            near = 0.1 if item.nodeid in around else 0.03
            rate[item] = (killers[item.nodeid] + near / cases[name]) / (0.02 + self.seconds[item.nodeid])
        quick.sort(key=rate.__getitem__, reverse=True)
        spent = accumulate(self.seconds[item.nodeid] for item in quick)
        return [item for item, seconds in zip(quick, spent, strict=True) if seconds <= self.enough]

    def outcome(self, mutant: Mutant, items: list[pytest.Item]) -> tuple[str, str]:
        """What became of a mutant, and which test saw it."""
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            limit = SPARE + int(5 * sum(self.seconds[item.nodeid] for item in items))
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
            os.write(writing, self.first_failure(mutant, items).encode())
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            answer = pipe.read().decode()
        status = os.waitpid(child, 0)[1]
        if status:
            return "killed", f"status {status}"
        return ("killed", answer) if answer else ("survived", "")

    def first_failure(self, mutant: Mutant, items: list[pytest.Item]) -> str:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        try:
            apply(self.path, mutant.source)
        except Exception as error:  # noqa: BLE001 - a module that cannot be loaded is noticed, too
            return f"import: {error!r}"
        for item in items:
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
            if self.failed:
                return self.failed[0]
        return ""


def apply(path: Path, source: str) -> None:
    """Give what the loaded module defines the code of `source`; every reference to it stays good."""
    module = next(m for m in list(sys.modules.values()) if getattr(m, "__file__", None) == str(path))
    fresh = ModuleType(module.__name__)
    fresh.__file__ = str(path)
    name, spare = module.__name__, sys.modules[module.__name__]
    sys.modules[name] = fresh  # dataclasses look their module up
    exec(compile(source, str(path), "exec"), vars(fresh))
    sys.modules[name] = spare
    for key, new in vars(fresh).items():
        old = vars(module).get(key)
        if key.startswith("__"):
            continue
        if getattr(new, "__module__", None) != name or type(new) is not type(old):
            vars(module)[key] = old if isinstance(new, ModuleType) else new
        elif isinstance(new, type):
            for attribute, value in vars(new).items():
                replace(old, attribute, vars(old).get(attribute), value)
        else:
            replace(module, key, old, new)


def replace(owner: Any, name: str, old: Any, new: Any) -> None:
    """Put `new` in the place of `old`: the code of a function, anything else by its name."""
    parts = [part for part in ("fget", "fset", "__func__", "__wrapped__") if getattr(new, part, None)]
    for part in parts:
        replace(None, part, getattr(old, part), getattr(new, part))
    if parts or (owner is None and not isinstance(new, FunctionType)):
        return
    same_names = isinstance(old, FunctionType) and isinstance(new, FunctionType)
    if same_names and new.__code__.co_freevars == old.__code__.co_freevars:
        old.__code__, old.__defaults__, old.__kwdefaults__ = (
            new.__code__,
            new.__defaults__,
            new.__kwdefaults__,
        )
        for variable, was, now in zip(
            old.__code__.co_freevars, old.__closure__ or (), new.__closure__ or (), strict=True
        ):
            if variable != "__class__":
                was.cell_contents = now.cell_contents
    elif not name.startswith("__") and type(new).__name__ != "member_descriptor":
        setattr(owner, name, new)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("module", type=Path)
    parser.add_argument("tests", nargs="+")
    parser.add_argument("--out", type=Path, required=True, help="one JSON line for each mutant")
    parser.add_argument("--sample", type=int, help="that many mutants, at random; all if not given")
    parser.add_argument(
        "--slowest", type=float, default=5.0, help="leave out tests that take longer, in seconds"
    )
    parser.add_argument("--enough", type=float, default=math.inf, help="seconds of tests for each mutant")
    parser.add_argument("--cases", type=float, default=math.inf, help="of each test, that many at most")
    parser.add_argument("--again", type=Path, help="only the survivors in this output of an earlier run")
    asked = parser.parse_args()
    mutants = mutants_of(asked.module)
    if asked.again:
        earlier = map(json.loads, asked.again.read_text().splitlines())
        again = {each["change"] for each in earlier if each["became"] == "survived"}
        mutants = [each for each in mutants if each.change in again]
    if asked.sample is not None:
        mutants = random.Random(0).sample(mutants, min(asked.sample, len(mutants)))
    with asked.out.open("w") as out:
        run = Run(mutants, asked, out)
        pytest.main([*asked.tests, "-q", "-s", "-p", "no:cacheprovider"], plugins=[run])
    print(dict(run.tally))  # noqa: T201


if __name__ == "__main__":
    main()
