"""A configuration for another folder: the paths of its trainer move, and all else stays as it was written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import yaml

from srd_lightning.errors import SettingError, in_one_line


def root_of(text: str) -> str | None:
    """Return the trainer's ``default_root_dir`` of a configuration, if it names one.

    Raises:
        SettingError: It is not YAML.
    """
    trainer = _trainer(text)
    pairs = trainer.value if isinstance(trainer, yaml.MappingNode) else []
    return next((str(value.value) for key, value in pairs if key.value == "default_root_dir"), None)


def moved(text: str, root: str, folder: Path) -> str:
    """Return a configuration whose trainer, with its callbacks and loggers, writes to another folder.

    Args:
        text: YAML.
        root: What its paths begin with.
        folder: What they begin with instead.

    Raises:
        SettingError: It is not YAML.

    Example:
        >>> print(moved("trainer: {default_root_dir: runs/a, logger: {save_dir: runs/a/logs}}", "runs/a", Path("b")))
        trainer: {default_root_dir: "b", logger: {save_dir: "b/logs"}}
    """
    found = {node.start_mark.index: node for node in _scalars(_trainer(text))}
    for start, node in sorted(found.items(), reverse=True):
        if node.value == root or node.value.startswith(f"{root}/"):
            path = json.dumps(f"{folder}{node.value.removeprefix(root)}")
            text = text[:start] + path + text[node.end_mark.index :]
    return text


def _trainer(text: str) -> yaml.Node | None:
    try:
        node = yaml.compose(text)
    except yaml.YAMLError as error:
        raise SettingError(f"a configuration is not YAML: {in_one_line(error)}") from error
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return next((value for key, value in pairs if key.value == "trainer"), None)


def _scalars(node: yaml.Node | None) -> Iterator[yaml.ScalarNode]:
    """Yield the values of a tree that are neither lists nor mappings."""
    if isinstance(node, yaml.ScalarNode):
        yield node
    elif isinstance(node, yaml.MappingNode):
        for _, value in node.value:
            yield from _scalars(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _scalars(value)
