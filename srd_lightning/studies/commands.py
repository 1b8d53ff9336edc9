"""``srd study`` and ``srd report``: what stands behind their names."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from srd_lightning.errors import SettingError
from srd_lightning.storage import check_file
from srd_lightning.studies.plan import read_study
from srd_lightning.studies.report import write_report
from srd_lightning.studies.runs import read_runs
from srd_lightning.studies.study_run import PROGRAM, StudyRun
from srd_lightning.studies.summary import Runs, rich_table, write_summary


class Parser(argparse.ArgumentParser):
    """Raises `SettingError` with a sentence."""

    def error(self, message: str) -> None:  # type: ignore[override]
        """Raise what was wrong."""
        raise SettingError(f"{message}; {self.prog} --help explains it")


def study(arguments: Sequence[str], program: Sequence[str] = PROGRAM) -> None:
    """Run what is left of a study, and show what came of it.

    Args:
        arguments: Of ``srd study``.
        program: Of ``srd``.
    """
    parser = Parser("srd study", description="Run every arm of a study with every seed, and compare them.")
    parser.add_argument("study", type=Path, help="YAML file: arms, base, seeds, baseline, commands, reach")
    parser.add_argument("--folder", type=Path, help="what is written; by default runs/, and the name of the file")
    parser.add_argument("--minutes", type=float, help="begin no cell that would not end within so many of them")
    options = parser.parse_args(arguments)
    plan = read_study(options.study)
    folder = options.folder or Path("runs") / options.study.stem
    console = Console(file=sys.stderr)
    run = StudyRun(plan, folder, console, program)
    former = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        run.run(None if options.minutes is None else 60 * options.minutes)
    finally:
        signal.signal(signal.SIGTERM, former)
        runs = Runs(run.write_results(), folder, plan.baseline_arm, plan.reach)
        if runs.results:
            outcomes = write_summary(plan, runs)
            Console(width=None if sys.stdout.isatty() else 120).print(rich_table(outcomes, plan.baseline_arm))
        console.print(
            f"{len(runs.results)} of {len(run.cells)} cells are finished; {folder}/summary.* and results.jsonl"
        )


def report(arguments: Sequence[str]) -> None:
    """Write a page about runs.

    Args:
        arguments: Of ``srd report``.
    """
    parser = Parser("srd report", description="Show what runs have written, side by side, as one HTML page.")
    parser.add_argument(
        "runs", metavar="RUN", type=Path, nargs="+", help="folders: the default_root_dir of a run, or a study's"
    )
    parser.add_argument("--path", type=Path, default=Path("report.html"), help="the page [report.html]")
    options = parser.parse_args(arguments)
    check_file(options.path, "--path", "an earlier report", _is_page)
    write_report(read_runs(options.runs), options.runs, options.path)
    Console(file=sys.stderr).print(f"the report is in {options.path}", highlight=False, soft_wrap=True)


def _is_page(path: Path) -> bool:
    return b"runs of srd</title>" in path.read_bytes()[:1000]


PROGRAMS: dict[str, Callable[[Sequence[str]], None]] = {"study": study, "report": report}
"""By subcommand of ``srd``."""
