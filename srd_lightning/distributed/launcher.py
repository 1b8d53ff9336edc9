"""The ranks that Lightning's launcher has started, when a run ends."""

from __future__ import annotations

import signal
import subprocess
from typing import Any

from lightning import Trainer
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

TERMINATED = 128 + signal.SIGTERM
"""Exit code of a process that SIGTERM has ended: the run is not over."""


def children_of(trainer: Trainer) -> list[subprocess.Popen[Any]]:
    """Return the ranks that Lightning's launcher has started here, and let it forget them.

    It kills this rank as soon as one of them has ended with an error, though this one has something to say or to save.

    Args:
        trainer: Whose run ends.
    """
    launcher = trainer.strategy.launcher
    if not isinstance(launcher, _SubprocessScriptLauncher):
        return []
    children = list(launcher.procs)
    launcher.procs.clear()
    return children
