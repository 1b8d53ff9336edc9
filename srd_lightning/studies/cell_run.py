"""One cell is run: its commands one after the other, each in a process; what is done is kept beside its runs."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from srd_lightning.errors import SettingError, StorageError
from srd_lightning.storage import write_atomically
from srd_lightning.studies.plan import Cell
from srd_lightning.studies.surroundings import surroundings

RECORD = "cell.json"
STOPPED = (130, 143)
"""Exit codes of a command that was told to stop, by Ctrl-C or SIGTERM."""


class CommandError(Exception):
    """A command of a cell has failed; the message says what it said."""


class CellRun:
    """A cell with what has been done of it.

    Args:
        cell: What it is.

    Raises:
        SettingError: Something was done with other settings; configurations that are not there.
    """

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self._made_of = cell.made_of()
        self.read()

    def read(self) -> None:
        """Read again what has been done, perhaps elsewhere."""
        path = self.cell.folder / RECORD
        self.record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"commands": []}
        if self.record.get("made_of", self._made_of) != self._made_of:
            raise SettingError(
                f"{self.cell.folder} was run with other settings than {self.cell} has now; give the study another "
                "folder, or delete this one"
            )

    @property
    def done(self) -> list[dict[str, Any]]:
        """What is known of the commands that have ended well."""
        commands: list[dict[str, Any]] = self.record["commands"]
        return commands

    @property
    def finished(self) -> bool:
        """Whether all commands have ended well."""
        return len(self.done) == len(self.cell.commands)

    @contextmanager
    def locked(self) -> Iterator[int | None]:
        """Keep others from running this cell; yield the lock's descriptor, or nothing where another has it.

        A command that inherits the descriptor has the lock until it ends, though this process be killed.
        """
        self.cell.folder.mkdir(parents=True, exist_ok=True)
        with (self.cell.folder / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
            else:
                yield file.fileno()

    def run(self, lock: int, program: Sequence[str]) -> None:
        """Run the commands that are left.

        Args:
            lock: Descriptor that the commands inherit.
            program: Of ``srd``.

        Raises:
            CommandError: One has failed.
            SystemExit: One was told to stop.
        """
        cell = self.cell
        for path, text in cell.configs().items():
            write_atomically(path, text.encode())
        for arguments in cell.arguments()[len(self.done) :]:
            log = cell.folder / f"{len(self.done)}-{arguments[0]}.log"
            measured = run_measured([*program, *arguments], log, lock)
            if measured["code"] in STOPPED:
                raise SystemExit(measured["code"])
            if measured["code"] != 0:
                raise CommandError(f"srd {arguments[0]} ended with {measured['code']} ({log}): {last_line(log)}")
            self._keep({"command": arguments[0], "arguments": arguments[1:], **measured})

    def _keep(self, command: dict[str, Any]) -> None:
        known = {"arm": self.cell.arm, "seed": self.cell.seed, "made_of": self._made_of}
        self.record = {**known, **surroundings(), "commands": [*self.done, command]}
        try:
            write_atomically(self.cell.folder / RECORD, json.dumps(self.record, indent=1).encode())
        except StorageError as error:
            raise CommandError(str(error)) from error


def run_measured(command: Sequence[str], log: Path, lock: int) -> dict[str, Any]:
    """Run a process to its end; it is told to stop where this one is.

    Args:
        command: Program and arguments.
        log: File that what it says is appended to.
        lock: Descriptor that it inherits.

    Returns:
        ``code`` (negative: the signal that killed it), ``seconds``, ``processor_seconds`` of it and the processes that
        it waited for, and ``peak_memory_bytes`` of the largest of these.
    """
    start = time.perf_counter()
    with log.open("ab") as said:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, pass_fds=[lock])
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.terminate()
            process.wait()
            raise
    process.returncode = os.waitstatus_to_exitcode(status)
    return {
        "code": process.returncode,
        "seconds": time.perf_counter() - start,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "peak_memory_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    }


def last_line(log: Path) -> str:
    """Return what a command said of its error, else the last line that it said."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return next((line for line in reversed(lines) if ": error: " in line), lines[-1] if lines else "it said nothing")
