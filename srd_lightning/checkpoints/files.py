"""Checkpoints on disk: which are complete, what of one is damaged, what one says, and how it gets its name."""

from __future__ import annotations

import functools
import json
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import Strategy

from srd_lightning.distributed.process_group import Ranks
from srd_lightning.errors import StorageError
from srd_lightning.storage import put_in_place

CHECKSUMS = "checksums.json"
"""In a sharded checkpoint: CRC-32 of each of its files. A single file has those of its parts in itself."""
BLOCK = 2**24
UNREADABLE = (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, OSError, ValueError)
"""What reading a damaged zip file raises."""


def newest(folder: Path, extension: str) -> tuple[Path | None, list[Path]]:
    """Return the newest complete checkpoint of a folder, and the newer files that were cut off.

    Args:
        folder: That may be there.
        extension: Of checkpoints, such as ``.ckpt``.
    """
    there = sorted(folder.glob(f"*{extension}"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    found = next(filter(is_complete, there), None)
    newer = there if found is None else there[: there.index(found)]
    return found, [path for path in newer if is_cut_off(path)]  # others may be weights alone


def is_complete(path: Path) -> bool:
    """Return whether a run can be resumed from a checkpoint: a file, or a folder of shards.

    Args:
        path: That may be there.
    """
    if path.is_dir():
        return (path / ".metadata").is_file() and zipfile.is_zipfile(path / "meta.pt")
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as file:
            outline = next((name for name in file.namelist() if name.endswith("/data.pkl")), None)
            return outline is not None and b"optimizer_states" in file.read(outline)
    except UNREADABLE:
        return False


def is_cut_off(path: Path) -> bool:
    """Return whether a file lacks the list of contents that a checkpoint has at its end."""
    return path.is_file() and not zipfile.is_zipfile(path)


def damaged_part(path: Path) -> str | None:
    """Compare a checkpoint with its checksums: about a second for each GB, once per rank.

    Args:
        path: A file of ``torch.save``, or a folder that `FSDP2` has written; one without checksums is only read.

    Returns:
        The name of the first part that is not what was written, if there is one.
    """
    checked = path / CHECKSUMS if path.is_dir() else path
    if not checked.is_file():
        return None
    state = checked.stat()
    return (_of_folder if path.is_dir() else _of_file)(path, state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=8)
def _of_file(path: Path, modified: int, size: int) -> str | None:
    """Compare a file with its own checksums; again only where it has changed."""
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
            begins = min((part.header_offset for part in file.infolist()), default=None)
    except UNREADABLE:
        return "the list of contents"
    if begins != 0:
        return "its beginning"
    return None if damaged is None else damaged.partition("/")[2]


@functools.lru_cache(maxsize=8)
def _of_folder(folder: Path, modified: int, size: int) -> str | None:
    """Compare the files of a folder with its checksums; again only where they were saved anew."""
    checksums = json.loads((folder / CHECKSUMS).read_text()).items()
    damaged = (name for name, sum in checksums if not (folder / name).is_file() or checksum_of(folder / name) != sum)
    return next(damaged, None)


def read_outline(path: Path) -> Any:
    """Return what a checkpoint says, without running code from it; its weights are mapped and not read.

    Args:
        path: An undamaged file or folder.

    Raises:
        UnpicklingError: It holds more than tensors and plain values, or is none of ``torch.save``.
    """
    return torch.load(_outline_of(path), map_location="cpu", mmap=True, weights_only=True)


def classes_in(path: Path) -> list[str]:
    """Return the classes and functions that a checkpoint would call when it is loaded, but those of tensors.

    Args:
        path: What `read_outline` cannot read.

    Returns:
        Their names; none where the file is of another protocol of pickle than ``torch.save`` writes.
    """
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(_outline_of(path)))
    except (UnpicklingError, EOFError):
        return []


def _outline_of(path: Path) -> Path:
    return path / "meta.pt" if path.is_dir() else path


def write(trainer: Trainer, path: Path, weights_only: bool = False) -> None:
    """Write beside the place where a checkpoint belongs, and put it there when all ranks have written.

    Args:
        trainer: Whose state it is.
        path: Its name, when it is complete.
        weights_only: As `Trainer.save_checkpoint` takes it.

    Raises:
        StorageError: The disk is full, or does not let it be written.
    """
    temporary, team = path.with_name(f".{path.name}.partial"), Ranks()
    with _straight_to_disk(trainer.strategy), _naming_the_disk(path):
        trainer.save_checkpoint(temporary, weights_only)
        checksums = team.all_results(lambda: checksums_of_rank(temporary, team.rank))
        team.rank0_result(lambda: finish(temporary, path, checksums))


class _StraightToDisk(TorchCheckpointIO):
    """Writes a file as it is made; Lightning's makes all of it in memory, and then moves it through ``/tmp``."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        torch.save(checkpoint, path)


@contextmanager
def _straight_to_disk(strategy: Strategy) -> Iterator[None]:
    plugin = strategy.checkpoint_io
    if type(plugin) is TorchCheckpointIO:  # else the user has chosen how
        strategy.checkpoint_io = _StraightToDisk()
    try:
        yield
    finally:
        strategy.checkpoint_io = plugin


@contextmanager
def _naming_the_disk(path: Path) -> Iterator[None]:
    """Say of which disk there is not enough, where a checkpoint cannot be written."""
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


def checksums_of_rank(folder: Path, rank: int) -> dict[str, int]:
    """Return those of the files of a sharded checkpoint that a rank has written, by name; nothing of a single file.

    Args:
        folder: Or file.
        rank: That of the process.
    """
    files = [*folder.glob(f"__{rank}_*"), *(folder / name for name in (".metadata", "meta.pt") if rank == 0)]
    return {file.name: checksum_of(file) for file in files if file.is_file()}


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
