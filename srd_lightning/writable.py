"""Whether what a run writes when it ends can be written, asked before it begins; nothing is left behind by asking."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from srd_lightning.errors import StorageError


def check_folder(folder: Path, setting: str) -> None:
    """Try to write into a folder, or into the nearest one above it that is there.

    Args:
        folder: That a run will make, if it is not there.
        setting: For the message, as the user wrote it.

    Raises:
        StorageError: Nothing can be written there.
    """
    place = _nearest(folder)
    if not place.is_dir():
        raise StorageError(f"{setting} needs the folder {folder}, but {place} is a file; name another place")
    try:
        with tempfile.TemporaryFile(dir=place, buffering=0) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise StorageError(
            f"{setting} needs the folder {folder}, but nothing can be written to {place} ({error.strerror}); name "
            "another place, or make room and give yourself the right to write there"
        ) from error


def check_file(path: Path, setting: str, replaces: str, is_replaceable: Callable[[Path], bool]) -> None:
    """Refuse a file that cannot be written, or that holds what is not to be lost.

    Args:
        path: That a run will write, in place of what is there.
        setting: For the message, as the user wrote it.
        replaces: What may stand there, for the message.
        is_replaceable: Tells whether a file that is there may be replaced.

    Raises:
        StorageError: It is a folder or a device, holds something else, or cannot be written.
    """
    if path.exists() and not path.is_file():
        raise StorageError(f"{setting} must name a file, but {path} is {'a folder' if path.is_dir() else 'a device'}")
    if path.exists() and path.stat().st_size and not is_replaceable(path):
        raise StorageError(
            f"{setting} would replace {path}, which does not hold {replaces}; name another file, or move this one away"
        )
    check_folder(path.parent, setting)


def check_room(needed: int, folder: Path, setting: str) -> None:
    """Refuse a disk that is too full.

    Args:
        needed: Bytes.
        folder: That a run will write to, if only later.
        setting: For the message, as the user wrote it.

    Raises:
        StorageError: There is less room.
    """
    free = shutil.disk_usage(_nearest(folder)).free
    if needed > free:
        raise StorageError(
            f"{setting} will write {needed / 1e9:.3g} GB to {folder}, but only {free / 1e9:.3g} GB are free there; "
            "make room, or name a folder on another disk"
        )


def _nearest(path: Path) -> Path:
    """Return the path, or the nearest one above it that is there."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
