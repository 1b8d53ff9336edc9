"""A study is run: cell by cell, by one process or several that share the folder, in one go or in slices."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import filelock
from rich.console import Console

from srd_lightning.errors import SRDError
from srd_lightning.storage import check_folder, write_atomically
from srd_lightning.studies.cell_run import CellRun, CommandError
from srd_lightning.studies.plan import Study
from srd_lightning.studies.run_files import last_metrics

RESULTS = "results.jsonl"
PROGRAM = (sys.executable, "-m", "srd_lightning")


class StudyRun:
    """Runs the cells of a study that are not finished.

    Args:
        study: Its plan.
        folder: For all that it writes.
        console: Says what is done.
        program: Of ``srd``.

    Raises:
        SettingError: A cell was run with other settings.
        StorageError: Nothing can be written to the folder.
    """

    def __init__(self, study: Study, folder: Path, console: Console, program: Sequence[str] = PROGRAM) -> None:
        check_folder(folder, "a study")
        self.folder, self._console, self._program = folder, console, program
        self.cells = [CellRun(cell) for cell in study.cells(folder)]

    def run(self, seconds: float | None = None) -> None:
        """Run what is left.

        Args:
            seconds: No cell is begun that would not end within so many of them from now, judged by those that are done;
                one is begun where nothing is known.

        Raises:
            SRDError: Cells have failed; all others were run nevertheless.
        """
        until = math.inf if seconds is None else time.monotonic() + seconds
        failed = []
        for number, run in enumerate(self.cells, 1):
            where = f"{number}/{len(self.cells)} {run.cell}"
            with run.locked() as lock:
                if lock is None:
                    self._say(f"{where}: is run elsewhere")
                    continue
                run.read()
                if run.finished or not self._fits(run, until, where):
                    continue
                try:
                    run.run(lock, self._program)
                except CommandError as error:
                    failed.append(f"{run.cell}: {error}")
                    self._say(f"{where}: {error}", style="red")
                    continue
            self._say(f"{where}: done, {sum(command['seconds'] for command in run.done):.0f} s")
            self.write_results()
        if failed:
            raise SRDError(f"{len(failed)} of {len(self.cells)} cells failed; mend this and call again: {failed[0]}")

    def _fits(self, run: CellRun, until: float, where: str) -> bool:
        """Say whether a cell begins: it does where nothing is known of how long it takes, or enough time is left."""
        expected = self.expected_seconds(run)
        if expected is not None and time.monotonic() + expected > until:
            self._say(f"{where}: takes about {expected:.0f} s, which are not left")
            return False
        self._say(f"{where}: begins" + ("" if expected is None else f"; {self._seconds_left() / 60:.1f} min to go"))
        return True

    def _say(self, text: str, style: str | None = None) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True, style=style)

    def expected_seconds(self, run: CellRun) -> float | None:
        """Return how long what is left of a cell may take: each command as long as the longest of its arm, or of all.

        Args:
            run: The cell.
        """
        seconds = 0.0
        for place in range(len(run.done), len(run.cell.commands)):
            known = [(other.cell.arm, other.done[place]["seconds"]) for other in self.cells if place < len(other.done)]
            of_arm = [found for arm, found in known if arm == run.cell.arm]
            if not known:
                return None
            seconds += max(of_arm or [found for _, found in known])
        return seconds

    def _seconds_left(self) -> float:
        return sum(self.expected_seconds(run) or 0.0 for run in self.cells if not run.finished)

    def write_results(self) -> list[dict[str, Any]]:
        """Write ``results.jsonl``, a line for each finished cell, whoever ran it; return the lines."""
        with filelock.FileLock(self.folder / ".lock"):
            results = []
            for run in self.cells:
                run.read()
                if run.finished:
                    own = {name: value for name, value in run.record.items() if name != "made_of"}
                    settings = {"settings": run.cell.settings, "metrics": last_metrics(run.cell.folder)}
                    results.append({**own, **settings, "folder": str(run.cell.folder.relative_to(self.folder))})
            lines = "".join(json.dumps(result) + "\n" for result in results)
            write_atomically(self.folder / RESULTS, lines.encode())
        return results
