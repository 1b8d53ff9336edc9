"""A plugin of pytest: a line for each test as soon as it has ended, for `run.py`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from record import told


class EachTest:
    """Tells of each test.

    Args:
        reporter: Of the terminal.
    """

    def __init__(self, reporter: Any) -> None:
        self.reporter = reporter

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Tell of a test that has been run, could not be, or was skipped."""
        if report.when != "call" and report.outcome == "passed":
            return
        reason = report.longrepr[2] if report.skipped else None  # file, line, reason
        says = f"{report.outcome}, {reason or f'{report.duration:.1f} s'}"
        name = report.nodeid.split("::", 1)[1]
        line = told(name, says, outcome=report.outcome, seconds=report.duration)
        self.reporter.write(f"\n{line}\n", flush=True)  # which may stand behind dots


@pytest.hookimpl(trylast=True)
def pytest_configure(config: Any) -> None:
    """Come after the terminal, whose lines these are."""
    config.pluginmanager.register(EachTest(config.pluginmanager.get_plugin("terminalreporter")))
