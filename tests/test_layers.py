"""Imports go as the table in docs/architecture.md says, also those for types and those inside functions."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINES = re.findall(r"^\| (`.*?) \| .* \| (.*) \|$", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE)


def named(text):
    return set(re.findall(r"`(\w+)`", text))


def room_of(module):
    return [*module.split("."), ""][1]


def imports_of(path):
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: write {'.' * node.level}{node.module} out in full"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else node.module for name in names}
    return found & FILES.keys()


FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "srd_lightning").rglob("*.py")
}
IMPORTS = {module: imports_of(path) for module, path in FILES.items()}
FOR_ALL = named(LINES[0][0])
MAY_IMPORT = {room: FOR_ALL | named(imports) for rooms, imports in LINES for room in named(rooms)}


def test_every_room_is_in_the_table():
    assert {room_of(module) for module in FILES} == MAY_IMPORT.keys() | {"", "_moved"}


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_a_room_imports_what_it_may(room):
    found = [(module, other) for module in FILES if room_of(module) == room for other in IMPORTS[module]]
    assert not [(module, other) for module, other in found if room_of(other) not in MAY_IMPORT[room] | {room}]
    needless = MAY_IMPORT[room] - {room_of(other) for _, other in found} - FOR_ALL
    assert not needless, f"the table lets {room} import {needless}, which it does not need"


@pytest.mark.parametrize("room", sorted(MAY_IMPORT.keys() - FOR_ALL - {"module", "datamodule", "cli"}))
def test_a_room_says_what_it_imports(room):
    said = re.search(
        r"Imports (.*?)[.;]", ast.get_docstring(ast.parse(FILES[f"srd_lightning.{room}"].read_text())), re.DOTALL
    )
    assert said
    assert named(said[1]) == MAY_IMPORT[room] - FOR_ALL


def test_there_is_no_circle():
    list(graphlib.TopologicalSorter(IMPORTS).static_order())
