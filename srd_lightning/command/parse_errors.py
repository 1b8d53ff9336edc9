"""What a parser says of a line or a recipe, made a sentence: the setting, what it takes, what it got."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import textwrap
from collections.abc import Collection, Iterator
from typing import Any, cast, get_args

from srd_lightning.command.subcommands import SUBCOMMANDS
from srd_lightning.errors import in_one_line

MANY = 16
"""More choices than this are not listed."""
TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "NoneType": "null",
    "dict": "settings by name ({name: value})",
    "list": "a list",
    "Iterable": "a list",
}
MOVED = {
    "model.top_k": "model.teacher_cache.k",
    "model.teacher_cache_dtype": "model.teacher_cache.dtype",
    "model.teacher_cache_dir": "model.teacher_cache.dir",
}
"""Settings of earlier versions, and where they are now."""
GONE = {
    "data.near_duplicates": "leave similar prompts out of `data`; data.decontaminate drops those that are equal",
    "data.decoding.continuous_batching": "examples/scores_from_vllm.py makes scores with vLLM, which refills batches",
}
"""Settings of earlier versions that nothing has replaced, and what to do instead."""
OF_SUBCOMMAND = re.compile(rf"\b(?:{'|'.join(SUBCOMMANDS)})\.(?=(?:model|data|trainer)\.)")
KEY = re.compile(r'Parser key "(?P<key>[^"]+)"(?: element \d+)?:\s*(?P<rest>.*)', re.DOTALL)
NO_PATH = re.compile(r"- Expected a path but .*? either not accessible or invalid\n- ", re.DOTALL)
UNION = re.compile(
    r"Does not validate against any of the Union subtypes\n.*?Errors:\n(?P<errors>.*)\n *Given value type: .*?\n *"
    r"Given value: (?P<value>.*)",
    re.DOTALL,
)
CLASS = re.compile(r"Problem with given class_path '(?P<path>[^']+)':\n(?P<rest>.*)", re.DOTALL)
EXPECTED = re.compile(r"Expected a (?P<type>.+?)(?:\. Got value: (?P<value>.*))?", re.DOTALL)
NO_CLASS = re.compile(
    r"Expected a dot import path string: (?P<name>.+)"
    r"|Import path (?P<path>\S*?) ?does not correspond to a subclass of .+"
    r"|Type .+ expects a function or a callable class: (?P<reason>.*)",
    re.DOTALL,
)
NOT_ACCEPTED = re.compile(
    r"(?:Group '(?P<group>.+)' does not accept option|Option) '(?P<name>.+?)'(?: is not accepted)?"
)
LITERAL = re.compile(r"typing\.Literal\[(.*)\]")
UNRECOGNIZED = re.compile(r"unrecognized arguments: (?P<first>\S+).*", re.DOTALL)
PACKAGES = ("srd_lightning", "lightning", "torch", "transformers")
"""Whose classes are listed by name: others may have been imported by chance."""
REQUIRED = re.compile(r"the following arguments are required: (?P<names>.+)")
NO_FILE = re.compile(r"File does not exist: '(?P<path>.+)'")
NOT_YAML = re.compile(
    r"Problems parsing config: (?P<problem>.*?)\s+in \"<unicode string>\", line (?P<line>\d+),.*", re.DOTALL
)


def plain(message: str, types: dict[str, Any], names: Collection[str]) -> str:
    r"""Return the sentence for what jsonargparse or argparse say.

    Args:
        message: Theirs.
        types: Type hints of the settings, by name.
        names: Of all settings and groups of settings.

    Example:
        >>> plain('Parser key "data.batch_size":\n  Expected a <class \'int\'>. Got value: big', {}, [])
        'data.batch_size: expected a whole number, but got big'
        >>> plain("unrecognized arguments: --data.schedul {0: 1.0}", {}, ["data.schedule", "data.seed"])
        'there is no setting data.schedul; did you mean data.schedule?'
    """
    message = OF_SUBCOMMAND.sub("", message)
    if found := KEY.fullmatch(message):
        key = found["key"]
        return f"{key}: {of_value(_dedented(found['rest']), types.get(key))}"
    if found := NOT_ACCEPTED.fullmatch(message):
        return unknown(".".join(part for part in (found["group"], found["name"]) if part), names)
    if found := UNRECOGNIZED.fullmatch(message):
        word = found["first"]
        if not word.startswith("-"):
            return f"{word} is no setting; settings are written --NAME VALUE"
        return unknown(word.lstrip("-").partition("=")[0], names)
    if found := REQUIRED.fullmatch(message):
        where = ", in a recipe (--config FILE) or on the command line" if "." in found["names"] else ""
        return f"{found['names'].replace(', ', ' and ')} must be given{where}"
    if found := NOT_YAML.fullmatch(message):
        return f"line {found['line']} is not YAML: {in_one_line(found['problem'])}"
    if message.startswith("Unexpected config: "):
        return "settings are written by name, such as data: {batch_size: 8}, but it holds " + _short(message[19:])
    return in_one_line(message)


def of_value(message: str, typehint: Any = None) -> str:
    """Return what is wrong with a value.

    Args:
        message: What jsonargparse says.
        typehint: Of the setting.
    """
    message = _dedented(NO_PATH.sub("", message))
    if found := UNION.fullmatch(message):
        return _of_union(_items(found["errors"]), found["value"], typehint)
    if found := CLASS.fullmatch(message):
        reason = of_value(found["rest"])
        missing = reason.startswith("No module named")
        return f"{found['path'] if missing else found['path'].rpartition('.')[2]}: {reason}"
    if found := NO_CLASS.fullmatch(message):
        return _no_class(found["name"] or found["path"] or "", found["reason"], typehint)
    if found := EXPECTED.fullmatch(message):
        return f"expected {_types([found['type']])}, but got {_short(found['value'] or '')}"
    if found := NO_FILE.fullmatch(message):
        return f"there is no file {found['path']}"
    if found := KEY.fullmatch(message):
        return f"{found['key']}: {of_value(_dedented(found['rest']))}"
    return in_one_line(message)


def unknown(name: str, known: Collection[str]) -> str:
    """Return the sentence for a setting that is none.

    Args:
        name: As it was written.
        known: What could have been.

    Example:
        >>> unknown("data.schedul", {"data.schedule", "data.seed", "model.loss"})
        'there is no setting data.schedul; did you mean data.schedule?'
    """
    if name in MOVED:
        return f"there is no setting {name} any more; it is {MOVED[name]} now, beside its kind, hidden or topk"
    if name in GONE:
        return f"there is no setting {name} any more; {GONE[name]}"
    leaf = name.rpartition(".")[2]
    near = difflib.get_close_matches(name, sorted(known), 1, cutoff=0.75)
    near = near or [other for other in sorted(known) if other.rpartition(".")[2] == leaf][:2]
    if near:
        return f"there is no setting {name}; did you mean {' or '.join(near)}?"
    few = f"there are {', '.join(sorted(known))}" if 0 < len(known) <= MANY else "--help.all shows all settings"
    return f"there is no setting {name}; {few}"


def _of_union(errors: list[str], value: str, typehint: Any) -> str:
    """Return what is wrong with a value that may be of several types: of the class that was named, if one was."""
    for kind in (CLASS, KEY):
        for error in errors:
            if kind.fullmatch(error):
                return of_value(error, typehint)
    expected = [found["type"] for error in errors if (found := EXPECTED.fullmatch(error))]
    if any(LITERAL.fullmatch(kind) for kind in expected):  # one of several words: who wants a class writes more
        return f"expected {_types(expected)}, but got {_short(value)}"
    others = [error for error in errors if not EXPECTED.fullmatch(error) and not NO_CLASS.fullmatch(error)]
    for error in errors:
        found = NO_CLASS.fullmatch(error)
        if found and not (found["path"] and others):  # of a class that refuses for itself
            named = f"Expected a dot import path string: {value}"
            return of_value(named if error.startswith("Import path does") else error, typehint)
    if others:
        return in_one_line(others[0])
    return f"expected {_types(expected)}, but got {_short(value)}"


def _no_class(name: str, reason: str | None, typehint: Any) -> str:
    """Return the sentence for a class that is none, or not of the kind that is wanted."""
    choices = {kind.__name__ for kind in _subclasses(typehint) if kind.__module__.partition(".")[0] in PACKAGES}
    near = difflib.get_close_matches(name, sorted(choices), 1, cutoff=0.7)
    public = importlib.import_module("srd_lightning").__all__  # which imports the rooms: only when it is asked
    choices = choices.intersection(public) or choices
    if reason and not name:
        return in_one_line(reason.partition(". Got value: ")[0])
    if near:
        hint = f"did you mean {near[0]}?"
    elif 0 < len(choices) <= MANY:
        hint = f"there are {', '.join(sorted(choices))}, or the import path of your own"
    else:
        hint = "write the import path of a class, such as package.module.Name"
    return f"{name} is not one of its classes; {hint}"


def _subclasses(typehint: Any) -> Iterator[type]:
    """Yield the classes that a type hint takes, and those made from them, but no private or abstract ones."""
    if isinstance(typehint, list):
        return
    if not isinstance(typehint, type) or get_args(typehint):
        for inner in get_args(typehint):
            yield from _subclasses(inner)
    elif typehint.__module__ != "builtins":
        if not inspect.isabstract(typehint) and not typehint.__name__.startswith("_"):
            yield typehint
        for kind in cast("list[type]", typehint.__subclasses__()):
            yield from _subclasses(kind)


def _items(text: str) -> list[str]:
    """Return the items of an indented list, each without its indentation."""
    return [_dedented(item) for item in re.split(r"(?m)^- ", textwrap.dedent(text)) if item.strip()]


def _dedented(text: str) -> str:
    """Remove the indentation of a text whose first line may have lost its own."""
    first, _, rest = text.strip("\n").partition("\n")
    return "\n".join([first.strip(), textwrap.dedent(rest)]).strip("\n")


def _types(texts: list[str]) -> str:
    """Return what a value may be."""
    literals = [found[1] for text in texts if (found := LITERAL.fullmatch(text))]
    if literals:  # whose numbers are asked for as whole numbers, too
        one = f"one of {', '.join(literals).replace(chr(39), '')}"
        return f"{one} or null" if "<class 'NoneType'>" in texts else one
    if "<class 'float'>" in texts:
        texts = [text for text in texts if text != "<class 'int'>"]
    return " or ".join(dict.fromkeys(map(_type, texts)))


def _type(text: str) -> str:
    name = re.sub(r"<class '(.*)'>", r"\1", text).rpartition(".")[2]
    return TYPES.get(name, f"a {name}")


def _short(text: str) -> str:
    text = in_one_line(text)
    return text if len(text) <= 80 else text[:79] + "…"
