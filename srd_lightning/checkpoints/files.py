"""Checkpoints as files and folders: whether they are complete and undamaged, and how they get their names."""

from __future__ import annotations

import functools
import json
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from srd_lightning.errors import ResumeError, StorageError
from srd_lightning.storage import put_in_place

CHECKSUMS = "checksums.json"
"""In a sharded checkpoint: CRC-32 of each of its files. A single file has those of its parts in itself."""
BLOCK = 2**24
UNREADABLE = (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError)
"""What reading a damaged zip file raises."""


def is_complete(path: Path) -> bool:
    """Return whether a run can be resumed from a checkpoint: a file, or a folder of shards.

    Args:
        path: That may be there.
    """
    if path.is_dir():
        return (path / ".metadata").is_file() and zipfile.is_zipfile(path / "meta.pt")
    if not zipfile.is_zipfile(path):  # what is cut off lacks the list of contents at its end
        return False
    try:
        with zipfile.ZipFile(path) as file:
            outline = next((name for name in file.namelist() if name.endswith("/data.pkl")), None)
            return outline is not None and b"optimizer_states" in file.read(outline)
    except UNREADABLE:
        return False


def check_intact(path: Path) -> None:
    """Read a checkpoint once and compare it with its checksums: about a second for each GB, once per process.

    Args:
        path: A file of ``torch.save``, or a folder that `FSDP2` has written; one without checksums is only read.

    Raises:
        ResumeError: It is not there, no checkpoint, cut off, or its bytes are not those that were written.
    """
    if not path.exists():
        raise ResumeError(f"ckpt_path: there is no checkpoint {path}; check the path, or leave it out to begin anew")
    if path.is_dir():
        _check_sharded(path)
    elif not zipfile.is_zipfile(path):
        size = path.stat().st_size
        raise ResumeError(
            f"ckpt_path: {path} ({size} bytes) is no checkpoint, or was cut off while it was written or copied; give "
            "another one"
        )
    else:
        state = path.stat()
        _check_file(path, state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=8)
def _check_file(path: Path, modified: int, size: int) -> None:
    """Compare a file with its own checksums; again only where it has changed."""
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
    except UNREADABLE as error:
        raise _damaged(path, "the list of contents") from error
    if damaged is not None:
        raise _damaged(path, damaged.partition("/")[2])


def _check_sharded(folder: Path) -> None:
    if not is_complete(folder):
        raise ResumeError(f"ckpt_path: the folder {folder} is no checkpoint, or not a complete one; give another one")
    if not (folder / CHECKSUMS).is_file():
        return
    _check_shards(folder, (folder / CHECKSUMS).stat().st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _check_shards(folder: Path, modified: int) -> None:
    """Compare the files of a folder with its checksums; again only where they were saved anew."""
    for name, checksum in json.loads((folder / CHECKSUMS).read_text()).items():
        if not (folder / name).is_file() or checksum_of(folder / name) != checksum:
            raise _damaged(folder, name)


def _damaged(path: Path, part: str) -> ResumeError:
    return ResumeError(
        f"ckpt_path: {path} is damaged: {part} in it is not what was written; give another checkpoint, or a copy of it"
    )


def checksum_of(file: Path) -> int:
    """Return the CRC-32 of a file.

    Args:
        file: Read in blocks.
    """
    checksum = 0
    with file.open("rb") as opened:
        while block := opened.read(BLOCK):
            checksum = zlib.crc32(block, checksum)
    return checksum


def checksums_of_rank(folder: Path, rank: int) -> dict[str, int]:
    """Return those of the files of a sharded checkpoint that a rank has written, by name; nothing of a single file.

    Args:
        folder: Or file.
        rank: That of the process.
    """
    files = [*folder.glob(f"__{rank}_*"), *(folder / name for name in (".metadata", "meta.pt") if rank == 0)]
    return {file.name: checksum_of(file) for file in files if file.is_file()}


def read_outline(path: Path) -> dict[str, Any]:
    """Return what a checkpoint says without its weights, which are mapped and not read.

    Args:
        path: An undamaged file or folder.

    Raises:
        ResumeError: It is none of Lightning's.
    """
    file = path / "meta.pt" if path.is_dir() else path
    # What it holds besides tensors may be any class; it is trusted here as Lightning trusts it right after.
    content = torch.load(file, map_location="cpu", mmap=True, weights_only=False)
    if not isinstance(content, dict) or "pytorch-lightning_version" not in content:
        raise ResumeError(f"ckpt_path: {path} is not a checkpoint of Lightning; give one that a Trainer has saved")
    return content


@contextmanager
def naming_the_disk(path: Path) -> Iterator[None]:
    """Say of which disk there is not enough, where a checkpoint cannot be written.

    Args:
        path: Of the checkpoint.

    Raises:
        StorageError: It could not be written.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        full = "unexpected pos" in str(error) or "file write failed" in str(error)  # how PyTorch says it
        if isinstance(error, StorageError) or (isinstance(error, RuntimeError) and not full):
            raise
        free = shutil.disk_usage(path.parent).free
        raise StorageError(
            f"the checkpoint {path} could not be written ({getattr(error, 'strerror', None) or 'the disk is full'}), "
            f"{free / 1e9:.3f} GB are free there; make room, and go on from the one before it with ckpt_path=last"
        ) from error


def finish(temporary: Path, path: Path, checksums: Sequence[Mapping[str, int]]) -> None:
    """Keep the checksums in a sharded checkpoint, and give it its name.

    Args:
        temporary: File or folder, completely written.
        path: Its name from now on.
        checksums: Of the files of each rank, by name.
    """
    if temporary.is_dir():
        whole = {name: checksum for some in checksums for name, checksum in some.items()}
        (temporary / CHECKSUMS).write_text(json.dumps(whole, indent=2))
    put_in_place(temporary, path)
