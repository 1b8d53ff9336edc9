"""What other libraries say in a good run, though a user can do nothing about it; the command line leaves it out.

In Python nothing is left out: whoever calls the parts decides for himself.
"""

from __future__ import annotations

import logging
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import datasets
import transformers
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.utilities import rank_zero_info

WARNINGS = {
    r"No seed found, seed set to \d+": "the seed is said in the next line",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated": "Lightning calls torch so",
    r"Starting from v1.9.0, `tensorboardX`": "a table of metrics is what is wanted",
    r"Total length of `list` across ranks is zero": "a split that was not given has no rows",
    r"Checkpoint directory .* exists and is not empty": "a run that goes on finds its own checkpoints there",
    r"\.fit\(ckpt_path=\"last\"\) is set, but there is no last checkpoint": "ResumeCheckpoint says that the run begins",
}
"""Beginnings of warnings, each with the reason why it is left out."""
LOGGED = {
    r"TPU available: False": "nothing was asked of one",
    r"💡 Tip: ": "an advertisement",
    r"\nDetected KeyboardInterrupt": "the last line says so",
}
"""Beginnings of lines that Lightning logs, likewise."""
PACKAGE = str(Path(__file__).parents[1])


def quiet(name: str) -> None:
    """Leave it out from now on, and let our own warnings be seen to be ours.

    Args:
        name: Of the command, such as ``srd fit``.
    """
    for pattern in WARNINGS:
        warnings.filterwarnings("ignore", pattern)
    for logger in ("lightning", "lightning.fabric", "lightning.pytorch"):
        for handler in logging.getLogger(logger).handlers:
            handler.addFilter(is_told)
    former = warnings.formatwarning

    def formatwarning(message: Any, category: type[Warning], filename: str, *place: Any, **line: Any) -> str:
        if filename.startswith(PACKAGE):
            return f"{name}: warning: {message}\n"
        return former(message, category, filename, *place, **line)

    warnings.formatwarning = formatwarning
    transformers.logging.disable_progress_bar()
    if not sys.stderr.isatty():  # in a file each state of a bar is a line
        datasets.disable_progress_bars()


def is_told(record: logging.LogRecord) -> bool:
    """Return whether a line of Lightning's log is of use."""
    return not any(re.match(pattern, record.getMessage()) for pattern in LOGGED)


class OneLineSummary(ModelSummary):
    """Says how large the student is, instead of Lightning's table of parts and of operations that nobody counts."""

    @staticmethod
    def summarize(summary_data: Any, total_parameters: int, trainable_parameters: int, *_: Any, **__: Any) -> None:
        """Say it in a line."""
        trained = "all of them" if trainable_parameters == total_parameters else f"{trainable_parameters:,} of them"
        rank_zero_info(f"student: {total_parameters:,} parameters, {trained} trained")
