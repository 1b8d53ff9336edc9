"""The help of a subcommand: the settings that are needed first, a line each; the rest by ``--help.all``.

What is said of them is what the parser says, and that comes from the docstrings; only which ones are shown is settled
here.
"""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Mapping
from typing import Any

from jsonargparse import Namespace

FIRST: Mapping[str, tuple[str, ...]] = {
    "the run": ("config", "ckpt_path", "print_config", "seed_everything"),
    "what is written": (
        "path",
        "split",
        "writer",
        "decoding.max_new_tokens",
        "decoding.temperature",
        "sets",
        "protocol.seeds",
        "calibrate.seconds",
        "throughput",
        "clock",
        "json",
    ),
    "data": (
        "data.data",
        "data.template",
        "data.schedule",
        "data.criteria",
        "data.batch_size",
        "data.max_length",
        "data.max_prompt_length",
        "data.decoding.max_new_tokens",
        "data.scores",
    ),
    "models and loss": (
        "model.student",
        "model.teacher",
        "model.loss",
        "model.kd_weight",
        "model.optimizer",
        "model.lr_scheduler",
        "model.teacher_cache",
        "model.micro_batch_tokens",
    ),
    "trainer": (
        "trainer.max_epochs",
        "trainer.accelerator",
        "trainer.devices",
        "trainer.strategy",
        "trainer.precision",
        "trainer.accumulate_grad_batches",
        "trainer.gradient_clip_val",
        "trainer.callbacks",
        "defaults",
        "trainer.logger",
        "trainer.default_root_dir",
    ),
}
"""Settings by heading; a name that a subcommand does not have is left out there."""
WIDTH = 120


class AllHelp(argparse._HelpAction):
    """Shows the help of all settings."""

    OPTION = "--help.all"

    def __call__(self, parser: Any, *_: Any) -> None:
        """Print it, and exit."""
        parser.print_all_help()
        parser.exit()


def first_help(parser: argparse.ArgumentParser, defaults: Namespace) -> str:
    """Return the help that fits a screen.

    Args:
        parser: Of a subcommand.
        defaults: What its settings are if nothing is given.
    """
    known = {option.lstrip("-"): action for action in parser._actions for option in action.option_strings}
    name = parser.prog.replace(" [options]", "")
    lines = [f"usage: {name} [--config FILE ...] [--SETTING VALUE ...]", "", parser.description or ""]
    for heading, names in FIRST.items():
        settings = [line(known[name], name, defaults.get(name)) for name in names if name in known]
        lines += ["", f"{heading}:", *settings] if settings else []
    lines += [
        "",
        f"{name} --help.all shows all settings; {name} --model.loss.help ForwardKL those of a class.",
        "Settings also stand in YAML files (--config), one over the other; --print_config writes one.",
    ]
    return "\n".join(lines) + "\n"


def line(action: argparse.Action, name: str, default: Any) -> str:
    """Return a setting, its default, and the first sentence of what is said about it."""
    text = " ".join((action.help or "").replace("``", "").split())
    sentence = re.split(r"(?<=[.;])\s", text, maxsplit=1)[0].rstrip(".;")
    shown = "" if default is None or isinstance(default, Namespace) else f" [{_short(default)}]"
    width = min(WIDTH, shutil.get_terminal_size((WIDTH, 40)).columns)
    return _cut(f"  --{name:<31} {sentence}{shown}", width)


def _short(value: Any) -> str:
    return _cut(str(value), 40)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
