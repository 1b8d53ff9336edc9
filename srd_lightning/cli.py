"""The command line, ``srd SUBCOMMAND``; `srd_lightning.command.subcommands` says what there is.

Nothing is imported here but what ``srd --help`` needs; `srd_lightning.command.commandline` has the parser and the run.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srd_lightning.command.console import Ending
from srd_lightning.command.subcommands import OF_RUNS, SUBCOMMANDS, TOOLS
from srd_lightning.errors import SettingError

if TYPE_CHECKING:
    from lightning.pytorch.cli import ArgsType

    from srd_lightning.command.commandline import SRDCLI
    from srd_lightning.command.trainer import SRDTrainer

__all__ = ["SRDCLI", "SRDTrainer", "find_config", "main", "parse", "run"]

SHOW_TRACEBACK = "--traceback"
ALL = {**SUBCOMMANDS, **OF_RUNS, **TOOLS}
_HOME = {"SRDCLI": "command.commandline", "SRDTrainer": "command.trainer"}


def main() -> None:
    """Run the command line with the arguments of the process, and exit as `srd_lightning.command.console` says."""
    arguments = [argument for argument in sys.argv[1:] if argument != SHOW_TRACEBACK]
    show_traceback = SHOW_TRACEBACK in sys.argv or os.environ.get("SRD_TRACEBACK") == "1"
    name = f"srd {arguments[0]}" if arguments and arguments[0] in ALL else "srd"
    with Ending(name, show_traceback) as ending:
        if name == "srd":
            _answer_without_subcommand(arguments)
        if name.removeprefix("srd ") in OF_RUNS:
            from srd_lightning.studies.commands import PROGRAMS

            PROGRAMS[arguments[0]](arguments[1:])
            return
        if name.removeprefix("srd ") in TOOLS:
            importlib.import_module(f"srd_lightning.command.{arguments[0]}").main(arguments[1:])
            return
        importlib.import_module("srd_lightning.command.noise").quiet(name)
        _cli(arguments, run=True, ending=ending)


def _answer_without_subcommand(arguments: list[str]) -> None:
    """Show the help, or say what is missing; what may be an option of Lightning's is left to its parser."""
    first = arguments[0] if arguments else ""
    if first in ("-h", "--help"):
        print(_help(), end="")
        raise SystemExit
    if first.startswith("-"):
        return
    choices = ", ".join(ALL)
    if not first:
        raise SettingError(f"say what to do: {choices}; srd --help explains them")
    near = difflib.get_close_matches(first, ALL, 1)
    raise SettingError(
        f"there is no subcommand {first!r}; " + (f"did you mean {near[0]}?" if near else f"there are {choices}")
    )


def _help() -> str:
    parser = argparse.ArgumentParser(
        "srd",
        usage="srd SUBCOMMAND [--config FILE ...] [--SETTING VALUE ...]",
        description="Distil a language model from data that its student has reflected on.",
        epilog="srd SUBCOMMAND --help shows the settings that are needed first, --help.all shows all of them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    group = parser.add_subparsers(title="subcommands", metavar="")
    for name, description in ALL.items():
        group.add_parser(name, help=description)
    parser.add_argument(SHOW_TRACEBACK, help="show the traceback of an error", action="store_true")
    return parser.format_help()


def run(args: ArgsType = None) -> SRDCLI:
    """Run the command line from Python.

    Args:
        args: Arguments, subcommand first; by default those of the process.

    Returns:
        The CLI, with the trainer, module and data module of the run.

    Raises:
        SettingError: The arguments cannot be understood.
    """
    return _cli(args, run=True)


def parse(args: ArgsType) -> SRDCLI:
    """Return trainer, module and data module as a command line describes them, without running anything.

    Args:
        args: Arguments, without a subcommand.

    Raises:
        SettingError: The arguments cannot be understood.
    """
    return _cli(args, run=False)


def _cli(args: ArgsType, run: bool, ending: Ending | None = None) -> SRDCLI:
    from srd_lightning.command.commandline import SRDCLI

    return SRDCLI(args, run, ending)


def find_config(name: str) -> Path:
    """Return a configuration that comes with the package.

    Args:
        name: Such as ``debug.yaml``.

    Raises:
        FileNotFoundError: There is none of that name.
    """
    package = Path(__file__).parent
    for folder in (package / "configs", package.parent / "configs"):  # in the wheel, in a checkout
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"no configuration {name} in {package / 'configs'}")


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"srd_lightning.{_HOME[name]}"), name)
