"""The lock of a folder that one run at a time may write to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import filelock

from srd_lightning.errors import StorageError


def take(
    lock: filelock.BaseFileLock, folder: Path, patience: float, busy: str, unwritable: Callable[[object], str]
) -> None:
    """Make a folder if it is not there, and take its lock.

    Args:
        lock: To be released by the caller; it ends with the process.
        folder: To write to.
        patience: Seconds to wait for another run.
        busy: What to say where another run has it for longer.
        unwritable: Says why it cannot be written, from the reason.

    Raises:
        StorageError: Another run has it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=patience)
    except filelock.Timeout as error:
        raise StorageError(busy) from error
    except OSError as error:
        raise StorageError(unwritable(error.strerror or error)) from error
