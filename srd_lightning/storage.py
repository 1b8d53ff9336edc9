"""Files that are written whole, and folders that are locked, writable and large enough."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock

from srd_lightning.errors import StorageError


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that others see all of it or nothing.

    Raises:
        StorageError: It cannot be written: the disk is full, or the folder is not to be written to.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)  # what a full disk left
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written: {error.strerror or error}; make room, or use another folder"
        ) from error


def put_in_place(temporary: Path, path: Path) -> None:
    """Give a complete file or folder its name, on disk and for good; what had it is there until then.

    Args:
        temporary: In the same folder.
        path: Its name from now on.
    """
    for file in _files(temporary):
        _to_disk(file)
    if path.exists() and (path.is_dir() or temporary.is_dir()):
        # Only files replace files. The older one keeps a name by which it is found until the newer one has its own.
        older = older_of(path)
        remove(older)
        path.rename(older)
        temporary.rename(path)
        remove(older)
    else:
        temporary.replace(path)
    _to_disk(path.parent)


def older_of(path: Path) -> Path:
    """Return the name that a checkpoint has while the next one takes its own."""
    return path.with_name(f"{path.stem}-older{path.suffix}")


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _files(path: Path) -> Iterator[Path]:
    yield from (inner for inner in path.rglob("*") if inner.is_file()) if path.is_dir() else [path]


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
