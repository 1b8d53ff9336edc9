"""How much of the library must be known to follow it, use it and change it: revisions side by side.

    python benchmarks/house.py --before 2406d72 51eceba --json benchmarks/results/house.json

measures each revision in a temporary worktree and the working tree as it is, prints a table in markdown, and writes the
numbers with what they are made of. Nothing is timed.

- **A row, a batch, a checkpoint** are followed through tiny runs: see `benchmarks/house_runs.py`.
- **To read** is what somebody opens until a change is understood. Which places these are is a reader's judgement: it
  stands in `READING`, by names of classes and functions, so that they are found wherever they have moved. Each name
  must exist; files and lines (docstrings included) are counted.
- **Attributes set from afar**: assigned or deleted, also by ``setattr``, ``delattr`` or ``object.__setattr__``, of
  anything but ``self``, ``cls``, the ``ctx`` of an autograd function, and a variable that the same function has made:
  assigned from a call of a class (a name in CapWords), of ``copy``, ``deepcopy`` or ``__new__``. ``self.other.x = 1``
  is from afar, and so is ``trainer.x = 1``, wherever it stands.
- **Circles** are sets of files that import each other, those for types and within functions counted too.
- **Bases with one subclass** are classes of the library, protocols included, that one class of it derives from.
- **Arguments** are those of ``__init__``, without ``self``.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from record import record

ROOT = Path(__file__).parents[1]
PACKAGE = "srd_lightning"

DIGESTS = ("_settings", "_digests_of_rows", "_digests_of_order")

READING: dict[str, list[list[str]]] = {
    "a new loss": [["head of DistillationLoss", "DistillationLoss"]],
    "a loss of hidden states": [
        ["head of AuxiliaryLoss", "AuxiliaryLoss", "HiddenStateMSE"],
        # no place for one: the step, the objective, whose states, parts of a batch, and where weights are
        [f"file of {name}" for name in ("Step", "chunked_objective", "LiveTeacher", "split", "in_parts", "shard")],
    ],
    "a criterion": [
        ["head of Criterion", "Criterion", "ReflectionBatch"],
        ["head of Criterion", "Criterion", "Reflected"],
    ],
    "another grouping of batches": [
        ["head of MakeSampler", "MakeSampler", "Shuffled", "LengthGrouped"],
        [
            "SRDDataModule.train_dataloader",
            "SRDDataModule._loaders",
            "file of Loaders",
            "file of LengthGrouped",
            "ResumableLoader",
            "_epoch_steps",
            "Curriculum.epoch_steps",
            "SRDDataModule._rows_to_come",
            "ADVICE",
        ],
    ],
    "why a resume was refused: its rows": [
        ["file of check_same_rows", *(f"SRDDataModule.{part}" for part in DIGESTS)],
        ["file of check_same_rows", *(f"SRDDataModule.{part}" for part in ("_settings", "_read", "_ranked"))],
        ["ADVICE", "order_digest", "check_same_rows", "SRDDataModule._rows_to_come", "SRDDataModule.load_state_dict"],
    ],
    "why a resume was refused: all that refuses": [
        ["raise ResumeError", *(f"SRDDataModule.{part}" for part in DIGESTS)],
        ["raise ResumeError", *(f"SRDDataModule.{part}" for part in ("_settings", "_read", "_ranked"))],
        [
            "ADVICE",
            "order_digest",
            "check_same_rows",
            "SRDDataModule._rows_to_come",
            "SRDDataModule.load_state_dict",
            "ResumeCheckpoint._find_last_checkpoints",
            "ResumeCheckpoint.on_train_start",
            "Refresher.scores",
            "stored_scores",
        ],
    ],
}
"""What is read for a change: the first list whose names all exist, the others being those of older revisions.

``file of X`` is all of the file that defines X, ``head of X`` the docstring of that file, and ``raise X`` all functions
that raise it.
"""

GOALS = {
    "row: files it passes": 20,
    "batch: frames": 8,
    "checkpoint: files": 3,
    "files to read for a new loss": 1,
    "files to read for a loss of hidden states": 2,
    "files to read for a criterion": 2,
    "files to read for another grouping of batches": 2,
    "files to read for why a resume was refused: its rows": 2,
    "circles": 0,
    "lines": 13_511,
}


class Source:
    """The files of the library in a checkout, parsed.

    Args:
        checkout: Folder of the repository.
    """

    def __init__(self, checkout: Path) -> None:
        self.texts = {path.relative_to(checkout): path.read_text() for path in (checkout / PACKAGE).rglob("*.py")}
        self.trees = {path: ast.parse(text) for path, text in sorted(self.texts.items())}

    @cached_property
    def modules(self) -> dict[str, Path]:
        """Files by the name under which they are imported."""
        return {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in self.trees}

    @cached_property
    def defined(self) -> dict[str, tuple[Path, ast.stmt]]:
        """Classes, their methods, functions and constants by name; of a name that stands twice the first."""
        found: dict[str, tuple[Path, ast.stmt]] = {}
        for path, tree in self.trees.items():
            for statement in tree.body:
                for name in names_of(statement):
                    found.setdefault(name, (path, statement))
                    for member in statement.body if isinstance(statement, ast.ClassDef) else ():
                        for own in names_of(member):
                            found.setdefault(f"{name}.{own}", (path, member))
        return found

    @cached_property
    def classes(self) -> dict[str, ast.ClassDef]:
        """Classes by name."""
        return {name: node for name, (_, node) in self.defined.items() if isinstance(node, ast.ClassDef)}

    def numbers(self) -> dict[str, Any]:
        """Return what is counted without running anything."""
        calls = [call_name(node) for node in self.nodes() if isinstance(node, ast.Call)]
        return {
            **self.reading(),
            "attributes set from afar": [place for path in self.trees for place in set_from_afar(path, self)],
            "calls of hasattr and getattr": sum(name in ("hasattr", "getattr") for name in calls),
            "circles": [sorted(circle) for circle in circles(self.imports())],
            "bases with one subclass": self.single_bases(),
            "arguments of KDLightningModule": self.arguments("KDLightningModule"),
            "arguments of SRDDataModule": self.arguments("SRDDataModule"),
            "files": len(self.trees),
            "lines": sum(len(text.splitlines()) for text in self.texts.values()),
        }

    def nodes(self) -> Iterator[ast.AST]:
        """Yield all nodes of all files."""
        for tree in self.trees.values():
            yield from ast.walk(tree)

    def reading(self) -> dict[str, Any]:
        """Return files and lines of `READING`."""
        found: dict[str, Any] = {}
        for change, lists in READING.items():
            missing = [[name for name in names if not self.places(name)] for names in lists]
            if all(missing):
                raise SystemExit(f"READING for {change} names {missing[0]}, which this revision lacks: correct it")
            names = lists[missing.index([])]
            lines = {place for name in names for place in self.places(name)}
            found[f"files to read for {change}"] = sorted({path.as_posix() for path, _ in lines})
            found[f"lines to read for {change}"] = len(lines)
        return found

    def places(self, name: str) -> set[tuple[Path, int]]:
        """Return the lines of what `READING` names; none if it does not exist."""
        if name.startswith("raise "):
            spans = [(path, node) for path, tree in self.trees.items() for node in raising(tree, name.split()[1])]
        elif name.startswith("file of "):
            path = self.defined.get(name.removeprefix("file of "), (None,))[0]
            return set() if path is None else {(path, line + 1) for line in range(len(self.texts[path].splitlines()))}
        elif name.startswith("head of "):
            path = self.defined.get(name.removeprefix("head of "), (None,))[0]
            spans = [] if path is None else [(path, self.trees[path].body[0])]
        else:
            spans = [self.defined[name]] if name in self.defined else []
        return {(path, line) for path, node in spans for line in lines_of(node)}

    def imports(self) -> dict[str, set[str]]:
        """Return which modules of the library each one imports."""
        found: dict[str, set[str]] = {}
        for module, path in self.modules.items():
            named = set()
            for node in ast.walk(self.trees[path]):
                if isinstance(node, ast.Import):
                    named |= {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    members = {f"{node.module}.{alias.name}" for alias in node.names}
                    named |= {name if name in self.modules else str(node.module) for name in members}
            found[module] = named & self.modules.keys()
        return found

    def single_bases(self) -> list[str]:
        """Return the classes that one class derives from."""
        bases = [name_of(base) for node in self.nodes() if isinstance(node, ast.ClassDef) for base in node.bases]
        return sorted(name for name in self.classes if bases.count(name) == 1)

    def arguments(self, name: str) -> int:
        """Return how many arguments a class takes."""
        init = self.defined[f"{name}.__init__"][1]
        assert isinstance(init, ast.FunctionDef)
        return len(init.args.posonlyargs) + len(init.args.args) + len(init.args.kwonlyargs) - 1


def names_of(statement: ast.stmt) -> list[str]:
    """Return the names that a statement defines."""
    if isinstance(statement, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        return [statement.name]
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def lines_of(node: ast.stmt) -> range:
    """Return the lines of a definition, decorators included."""
    first = min([node.lineno, *(entry.lineno for entry in getattr(node, "decorator_list", []))])
    return range(first, (node.end_lineno or node.lineno) + 1)


def name_of(node: ast.expr) -> str:
    """Return the last part of a dotted name, without what it is given in brackets."""
    if isinstance(node, ast.Subscript):
        return name_of(node.value)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def call_name(node: ast.Call) -> str:
    return name_of(node.func)


def functions_of(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def raising(tree: ast.AST, error: str) -> list[ast.stmt]:
    """Return the functions that raise an error."""
    return [
        function
        for function in functions_of(tree)
        for node in ast.walk(function)
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and call_name(node.exc) == error
    ]


# Attributes set from afar


def set_from_afar(path: Path, source: Source) -> list[str]:
    """Return where attributes of other objects are set, as ``path:line what``."""
    found = {}
    tree = source.trees[path]
    for scope in [tree, *functions_of(tree)]:
        own = {"self", "cls", "ctx", *made_in(scope)}
        for node in ast.walk(scope):
            for owner in owners_set_by(node):
                place = f"{path.as_posix()}:{getattr(node, 'lineno', 0)}"
                if isinstance(owner, ast.Name) and owner.id in own:
                    found[place] = ""  # also where an outer scope has seen it
                else:
                    found.setdefault(place, f"{place} {ast.unparse(owner)}")
    return sorted(text for text in found.values() if text)


def owners_set_by(node: ast.AST) -> list[ast.expr]:
    """Return the objects of which a statement or call sets or deletes an attribute."""
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, (ast.Store, ast.Del)):
        return [node.value]
    if isinstance(node, ast.Call) and node.args and call_name(node) in ("setattr", "delattr", "__setattr__"):
        return [] if ast.unparse(node.func).startswith("super()") else node.args[:1]
    return []


def made_in(scope: ast.AST) -> set[str]:
    """Return the variables that a scope assigns from a call that makes an object."""
    return {
        target.id
        for node in ast.walk(scope)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and makes(call_name(node.value))
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def makes(name: str) -> bool:
    return name in ("copy", "deepcopy", "__new__", "cls") or name.lstrip("_")[:1].isupper()


# Circles


def circles(imports: dict[str, set[str]]) -> list[set[str]]:
    """Return the sets of modules that reach each other."""
    reached = {module: reach(module, imports) for module in imports}
    found = {frozenset(other for other in reached[module] if module in reached[other]) for module in imports}
    return [set(circle) for circle in found if circle]


def reach(module: str, imports: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = [*imports[module]]
    while waiting:
        other = waiting.pop()
        if other not in seen:
            seen.add(other)
            waiting += imports[other]
    return seen


# Revisions, and what they are compared by


def measure(checkout: Path) -> dict[str, Any]:
    """Return all numbers of a checkout, with what they count."""
    runs = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("house_runs.py"))],
        env={**os.environ, "PYTHONPATH": str(checkout), "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.PIPE,
        check=True,
    )
    seen = json.loads(runs.stdout.splitlines()[-1])
    assert Path(seen["package"]) == (checkout / PACKAGE).resolve()
    return {
        "row: files it passes": seen["row"]["files"],
        "row: files that run until it is trained on": seen["row"]["run"],
        "batch: frames": seen["batch"]["frames"],
        "batch: files on that stack": seen["batch"]["files"],
        "batch: files that run in a step": seen["batch"]["run"],
        "checkpoint: files": seen["checkpoint"]["files"],
        "checkpoint: files with hooks for a state": seen["checkpoint"]["hooks"],
        **Source(checkout).numbers(),
    }


def measure_revision(revision: str) -> dict[str, Any]:
    """Return the numbers of a commit."""
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder, "checkout")
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(checkout), revision], check=True)
        try:
            return measure(checkout)
        finally:
            subprocess.run([*git, "remove", "--force", str(checkout)], check=True)


def table(found: dict[str, dict[str, Any]]) -> str:
    """Return the numbers in markdown, a column a revision."""
    lines = [["", *found, "at most"], ["---", *["---:"] * (len(found) + 1)]]
    for measured in next(iter(found.values())):
        values = [numbers[measured] for numbers in found.values()]
        counts = [len(value) if isinstance(value, list) else value for value in values]
        lines.append(
            [measured, *(f"{count:,}" for count in counts), f"{GOALS[measured]:,}" if measured in GOALS else ""]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", nargs="+", default=[], metavar="REVISION", help="commits to compare with")
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    found = {revision: measure_revision(revision) for revision in options.before}
    found["now"] = measure(ROOT)
    record({"revisions": found}, options.json)
    print(table(found))


if __name__ == "__main__":
    main()
