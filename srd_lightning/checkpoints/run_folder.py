"""A folder of checkpoints belongs to one run at a time, and what an earlier run has left in it is put aside."""

from __future__ import annotations

import datetime
from pathlib import Path

import filelock
from lightning.pytorch.utilities import rank_zero_info

from srd_lightning.checkpoints.files import is_complete
from srd_lightning.storage import older_of, remove, take

PATIENCE = 10.0
"""Seconds in which the ranks of a run that was killed let go of its folder."""


class RunLock:
    """Keeps other runs out of a folder while this one saves to it; ends with the process that holds it.

    Args:
        folder: Made if it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = filelock.FileLock(folder.with_name(f".{folder.name}.lock"), is_singleton=True)

    def acquire(self) -> None:
        """Take the folder.

        Raises:
            StorageError: Another run has it, or it cannot be written.
        """
        take(
            self._lock,
            self.folder,
            PATIENCE,
            busy=f"another run saves to {self.folder}; wait until it has ended, or give this one another folder "
            "(ResumeCheckpoint.dirpath, or trainer.default_root_dir)",
            unwritable=lambda reason: (
                f"ResumeCheckpoint saves to {self.folder}, where nothing can be written ({reason}); give it another "
                "dirpath"
            ),
        )

    def check(self) -> None:
        """See whether the folder could be taken, where it is there; see `acquire`."""
        if self.folder.is_dir():
            self.acquire()
            self.release()

    def release(self) -> None:
        """Let other runs have it."""
        self._lock.release()


def put_aside(folder: Path, extension: str) -> None:
    """Move checkpoints of an earlier run into a folder beside them, where ``ckpt_path="last"`` does not find them.

    Args:
        folder: In which a run begins anew.
        extension: Of checkpoints, such as ``.ckpt``.
    """
    earlier = sorted(filter(is_complete, folder.glob(f"*{extension}")))
    if not earlier:
        return
    newest = max(path.stat().st_mtime for path in earlier)
    aside = folder / f"earlier-{datetime.datetime.fromtimestamp(newest):%Y-%m-%d-%H%M%S}"
    aside.mkdir(exist_ok=True)
    for path in earlier:
        path.rename(aside / path.name)
    rank_zero_info(
        f"this run begins anew, so the checkpoints of an earlier one were moved to {aside}; delete them, or go on from "
        "one of them with ckpt_path"
    )


def clean(folder: Path, extension: str) -> None:
    """Remove what a run that was killed has left: half-written checkpoints, and older ones that have a successor.

    Args:
        folder: Of checkpoints.
        extension: Of checkpoints, such as ``.ckpt``.
    """
    for left in folder.glob(".*.partial"):
        remove(left)
    for path in folder.glob(f"*{extension}"):
        if not path.stem.endswith("-older") and older_of(path).exists():
            remove(older_of(path))
