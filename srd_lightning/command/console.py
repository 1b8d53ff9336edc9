"""How a command ends: an error of the user's in one paragraph, a bug with its traceback.

====================================================  =========  ====================================
what ended it                                         exit code  what is said
====================================================  =========  ====================================
nothing                                               0
an error that the user can put right (`explain`)      2          one paragraph, where the traceback is
Ctrl-C                                                130        one line
SIGTERM, where `ResumeCheckpoint` has saved the run   143        how to go on
anything else is a bug                                1          its traceback
====================================================  =========  ====================================
"""

from __future__ import annotations

import datetime
import errno
import hashlib
import os
import shlex
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import TracebackType

from srd_lightning.errors import RankError, SRDError, in_one_line

USERS_ERROR = 2
INTERRUPTED = 130
SECONDS_TO_SPEAK = 1.5
"""How long a rank that was only told of a failure waits for the one that has failed to speak."""
SECONDS_APART = 10
"""How much later a rank that says the same is one of another run."""
RUN = "SRD_RUN"
"""Environment variable that the ranks of a run have in common; the first one hands it on to those it starts."""
REMEDIES = {
    errno.ENOSPC: "make room, or let the run write to another disk",
    errno.EDQUOT: "make room, or let the run write to another disk",
    errno.EACCES: "let it be read and written, or give another path",
    errno.EPERM: "let it be read and written, or give another path",
    errno.EROFS: "give a path that can be written",
    errno.ENOENT: "check the path",
    errno.EISDIR: "give the path of a file",
    errno.ENOTDIR: "give the path of a folder",
    errno.EEXIST: "give another path, or move it away",
}


class Ending:
    """Stands around a command, says what ended it, and exits with the code that fits.

    Args:
        name: Of the command, such as ``srd fit``.
        show_traceback: Show the traceback of an error of the user's instead of writing it into a file.

    Example:
        >>> from srd_lightning.errors import SettingError
        >>> try:
        ...     with Ending("srd fit"):
        ...         raise SettingError("kd_weight must lie in [0, 1], but is 2")
        ... except SystemExit as exit:
        ...     exit.code
        2
    """

    def __init__(self, name: str, show_traceback: bool = False) -> None:
        self.name = name
        self.show_traceback = show_traceback
        self._folder: str | None = None

    def begin_run(self, folder: str | Path) -> None:
        """From now on tracebacks are kept: what the user has written was understood, and work begins.

        Args:
            folder: For their file; where it cannot be written, a folder for temporary files is taken.
        """
        self._folder = str(folder)

    def __enter__(self) -> Ending:
        """Give the run a name, unless it has one from the process that started this one."""
        if rank() is None:
            os.environ.setdefault(RUN, uuid.uuid4().hex)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Say what ended the command; let through what has said so itself, and bugs."""
        if error is None:
            return
        if _is_interrupt(error):
            self._say("stopped by Ctrl-C")
            raise SystemExit(INTERRUPTED) from error
        if isinstance(error, SystemExit) or (paragraph := explain(error)) is None:
            return
        if isinstance(error, RankError) and _another_rank_has_spoken():
            raise SystemExit(USERS_ERROR) from error
        if self.show_traceback:
            traceback.print_exception(error)
        self._say(f"error: {paragraph}", error)
        raise SystemExit(USERS_ERROR) from error

    def _say(self, text: str, error: BaseException | None = None) -> None:
        """Say it, unless another rank of this run has said the same."""
        if not _first_to_say(text):
            return
        lines = [f"{self.name}: {text}"]
        if error is not None and self._folder is not None and not self.show_traceback:
            lines.append(_where(_write_traceback(error, self._folder)))
        sys.stdout.flush()
        print(*lines, sep="\n", file=sys.stderr, flush=True)


def explain(error: BaseException) -> str | None:
    """Return what to tell the user of an error that is the user's to put right; nothing of a bug.

    Args:
        error: As it arrived; where something wrapped it, its cause is what counts.

    Example:
        >>> explain(FileNotFoundError(2, "No such file or directory", "rows.jsonl"))
        'rows.jsonl: No such file or directory; check the path'
        >>> explain(KeyError("x")) is None
        True
    """
    for cause in _causes(error):
        if isinstance(cause, SRDError):
            return str(cause)
    if isinstance(error, OSError):
        return _of_files(error)
    from lightning.fabric.utilities.exceptions import MisconfigurationException  # what failed has loaded it

    from srd_lightning.errors import lacks_memory
    from srd_lightning.training.failures import MEMORY_HINT

    if lacks_memory(error):
        message = str(error)
        return message if MEMORY_HINT in message else f"{in_one_line(message) or 'out of memory'}{MEMORY_HINT}"
    if isinstance(error, MisconfigurationException):
        return in_one_line(error)
    if type(error).__name__ == "DatasetGenerationError" and error.__cause__ is not None:
        return f"data cannot be read: {in_one_line(error.__cause__)}"
    return None


def rank() -> int | None:
    """Return which process of a run this is, or nothing where none has been started beside it."""
    found = (os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    return next((int(number) for number in found if number is not None), None)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, what it was raised from, and what was being handled when it was raised."""
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        found = pending.pop()
        if found is not None and id(found) not in seen:
            seen.add(id(found))
            yield found
            pending += [found.__context__, found.__cause__]


def _is_interrupt(error: BaseException) -> bool:
    """Return whether Ctrl-C was pressed; Lightning then exits with 1."""
    exited = isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt)
    return exited or isinstance(error, KeyboardInterrupt)


def _of_files(error: OSError) -> str:
    names = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    if error.strerror is None:
        return in_one_line(error)
    remedy = REMEDIES.get(error.errno or 0)
    return (f"{names}: " if names else "") + error.strerror + (f"; {remedy}" if remedy else "")


def _write_traceback(error: BaseException, folder: str) -> Path | OSError:
    """Write what a developer needs to know; return where it is, or why it is nowhere."""
    number = rank()
    name = f"srd-error-rank{number}.log" if number else "srd-error.log"
    when = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "lightning", "transformers"))
    text = "\n".join([when, shlex.join(sys.argv), versions, "", *traceback.format_exception(error)])
    try:
        if "://" in folder:
            raise OSError(f"{folder} is no folder of a file system")
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path
    except OSError:
        pass
    try:
        with tempfile.NamedTemporaryFile("w", prefix="srd-error-", suffix=".log", delete=False) as file:
            file.write(text)
        return Path(file.name)
    except OSError as reason:
        return reason


def _where(log: Path | OSError) -> str:
    if isinstance(log, OSError):
        return f"(The traceback could not be written, {log}; --traceback shows it.)"
    return f"(The traceback is in {log}; --traceback shows it.)"


def _run() -> str:
    """Return what this run is called by all of its processes on this machine."""
    if (name := os.environ.get(RUN)) is not None:
        return name
    known = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT", "SLURM_JOB_ID", "SLURM_STEP_ID")
    parts = [str(os.getppid()), *(os.environ.get(part, "") for part in known)]
    return _digest("\0".join(parts))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _said() -> Path:
    """Return the folder in which the ranks of one machine note what they have just said."""
    return Path(tempfile.gettempdir()) / f"srd-said-{getattr(os, 'getuid', int)()}"


def _is_fresh(note: Path) -> bool:
    try:
        return time.time() - note.stat().st_mtime < SECONDS_APART
    except FileNotFoundError:
        return False


def _first_to_say(text: str) -> bool:
    """Return whether no other rank has just said so; whoever makes the note first is the one that speaks."""
    if rank() is None:
        return True
    note = _said() / f"{_run()}-{_digest(text)}"
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        for old in note.parent.iterdir():
            if not _is_fresh(old):
                old.unlink(missing_ok=True)
        note.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # rather twice than never
        return True
    return True


def _another_rank_has_spoken() -> bool:
    """Wait a little for the rank that has failed to say why."""
    if rank() is None:
        return False
    end = time.monotonic() + SECONDS_TO_SPEAK
    while time.monotonic() < end:
        if any(_is_fresh(note) for note in _said().glob(f"{_run()}-*")):
            return True
        time.sleep(0.05)
    return False
