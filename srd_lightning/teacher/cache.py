"""What the teacher said to each row, on disk: computed once, read by every epoch after.

A folder holds ``manifest.json``, which says what it was made from; ``head.safetensors``, the teacher's output head; and
shards, Arrow files that are memory-mapped. A row is found by a number made of its id and its tokens, so a row whose
text or template has changed is simply not there. Shards are written whole, so a kill loses the last one at most. The
name of a shard is a digest of its bytes and of the manifest, and the head has one beside it: what was cut, changed or
brought from another folder is noticed when a run begins, put aside and made again. A run holds the folder's lock while
it writes; its ranks need none against each other.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from numpy.typing import NDArray
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.data import get_worker_info

from srd_lightning.data.layout import FIRST
from srd_lightning.data.tokenization import response_lengths
from srd_lightning.digests import digest, file_digest
from srd_lightning.losses.head import Head
from srd_lightning.results_folder import ResultsFolder
from srd_lightning.storage import write_atomically
from srd_lightning.teacher.live import HiddenStates, TopK

Row = Mapping[str, Any]
SHARDS, HEAD, WEIGHTS = "part-*.arrow", "head.json", "head.safetensors"
SHARD_BYTES = 64 * 2**20
"""Written at a time."""
THREADS = 8
"""That look whether shards are sound."""


class TeacherCache:
    """What a teacher said, by row.

    Args:
        folder: Made if it does not exist.
        kind: What is kept.
        made_of: What it depends on, by name of the part.

    Raises:
        StorageError: The folder was made of something else (the message names the parts that differ), or its manifest
            cannot be read.
    """

    def __init__(self, folder: Path, kind: HiddenStates | TopK, made_of: Mapping[str, str]) -> None:
        self.folder = folder
        self.kind = kind
        self._digest = digest(made_of)
        self._buffer: list[tuple[int, dict[str, bytes]]] = []
        if not check_same(folder, lambda: made_of):
            _results(folder).write_manifest(made_of)

    @classmethod
    @contextmanager
    def locked(cls, folder: Path, kind: HiddenStates | TopK, made_of: Mapping[str, str]) -> Iterator[TeacherCache]:
        """Open a folder to write to it, and see whether all in it is as it was written; other runs are kept from it.

        Raises:
            StorageError: Another run holds the lock, for longer than one needs to look; or as for the class.
        """
        with _results(folder).locked():
            cache = cls(folder, kind, made_of)
            cache._verify()
            yield cache

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is mapped: a process that loads batches maps it for itself."""
        return {name: value for name, value in vars(self).items() if name != "_index"}

    def _verify(self) -> None:
        """Remove what killed processes left half-written, and put aside what is not as it was written.

        Reads the whole folder, once per run and on the first rank only, in several threads.
        """
        for name in (".part-*", ".head.*", ".manifest.*"):
            for left in self.folder.glob(name):
                left.unlink(missing_ok=True)
        shards = sorted(self.folder.glob(SHARDS))
        with ThreadPoolExecutor(THREADS) as threads:
            names = threads.map(lambda shard: f"part-{file_digest(shard, self._digest)[:32]}.arrow", shards)
            damaged = [shard for shard, name in zip(shards, names, strict=True) if shard.name != name]
        if (self.folder / HEAD).exists() and not self._head_is_sound():
            damaged += [path for path in (self.folder / WEIGHTS, self.folder / HEAD) if path.exists()]
        for path in damaged:
            path.replace(path.with_name(f"{path.name}.damaged"))
        if damaged:
            others = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
            warnings.warn(
                f"in the teacher cache in {self.folder}, {damaged[0].name}{others} is damaged or of an earlier "
                "version; it was renamed to *.damaged, and the teacher is asked again for what was in it",
                stacklevel=2,
            )

    def missing(self, rows: Dataset) -> NDArray[np.int64]:
        """Return the places of tokenised rows that are not there yet."""
        chosen = rows.select_columns(["id", "input_ids", "prompt_length"])
        keys = [
            row_key(dict(zip(some, row, strict=True)))
            for some in chosen.iter(batch_size=1000)
            for row in zip(*some.values(), strict=True)
        ]
        return np.flatnonzero(~np.isin(np.array(keys, dtype=np.uint64), self._index[0]))

    def reread(self) -> None:
        """Look again at what is there: other ranks may have written."""
        vars(self).pop("_index", None)

    def append(self, rows: Sequence[Row], kept: Mapping[str, Tensor]) -> None:
        """Add rows, whose response tokens stand one after the other in ``kept``, ``[N, width]`` each."""
        lengths = response_lengths(rows)
        parts = {name: torch.split(values.cpu(), lengths) for name, values in kept.items()}
        for place, row in enumerate(rows):
            self._buffer.append((row_key(row), {name: _to_bytes(values[place]) for name, values in parts.items()}))
        if sum(len(value) for _, values in self._buffer for value in values.values()) >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what was added; it is safe when this returns."""
        if not self._buffer:
            return
        keys, values = zip(*self._buffer, strict=True)
        columns = {name: pa.array([value[name] for value in values], pa.large_binary()) for name in self.kind.fields}
        table = pa.table({"key": pa.array(keys, pa.uint64()), **columns})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        content = sink.getvalue()
        name = hashlib.sha256(self._digest.encode() + hashlib.sha256(content).digest()).hexdigest()[:32]
        write_atomically(self.folder / f"part-{name}.arrow", content)
        self._buffer = []

    @cached_property
    def _index(self) -> tuple[NDArray[np.uint64], NDArray[np.int64], pa.Table]:
        """Sorted keys, where each stands, and all shards one after the other, mapped."""
        columns = {name: pa.large_binary() for name in self.kind.fields}
        empty = pa.schema({"key": pa.uint64(), **columns}).empty_table()
        tables = [pa.ipc.open_file(pa.memory_map(str(shard))).read_all() for shard in sorted(self.folder.glob(SHARDS))]
        whole = pa.concat_tables([empty, *tables])
        keys = whole["key"].to_numpy()
        order = np.argsort(keys, kind="stable")
        return keys[order], order, whole

    def batch(self, rows: Sequence[Row], pin_memory: bool = False) -> dict[str, Tensor]:
        """Return what is kept of some rows, one after the other: ``[N, width]`` each, for their N response tokens.

        With it comes `FIRST`, by which each token finds its own.

        Args:
            rows: Tokenised rows.
            pin_memory: Copy it to where a GPU can fetch it by itself; a process that loads batches for another cannot.

        Raises:
            KeyError: A row is not there.
        """
        keys, order, whole = self._index
        answered = [row for row in rows if len(row["input_ids"]) > row["prompt_length"]]  # others only fill up
        wanted = np.array([row_key(row) for row in answered], dtype=np.uint64)
        places = np.searchsorted(keys, wanted)
        for row, key, place in zip(answered, wanted, places, strict=True):
            if place == len(keys) or keys[place] != key:
                raise KeyError(f"row {row['id']} is not in the teacher cache in {self.folder}")
        lengths = np.array(response_lengths(rows))
        tokens, pin = int(lengths.sum()), pin_memory and get_worker_info() is None
        before = np.cumsum(lengths) - lengths - [row["prompt_length"] for row in rows]
        return {FIRST: torch.from_numpy(before)} | {
            name: _joined([whole[name][int(order[place])].as_buffer() for place in places], dtype, tokens, pin)
            for name, dtype in self.kind.fields.items()
        }

    def save_head(self, head: Head) -> None:
        """Keep the teacher's head; the cache is complete only with it."""
        tensors = {"weight": head.weight, **({} if head.bias is None else {"bias": head.bias})}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        settings = {"scale": head.scale, "soft_cap": head.soft_cap}
        write_atomically(self.folder / WEIGHTS, save(tensors))
        described = {**settings, "digest": self._head_digest(settings)}
        write_atomically(self.folder / HEAD, json.dumps(described).encode())

    def head(self) -> Head | None:
        """Return the teacher's head, or nothing where it is still to be saved."""
        if not (self.folder / HEAD).exists():
            return None
        tensors, settings = load_file(self.folder / WEIGHTS), json.loads((self.folder / HEAD).read_text())
        return Head(tensors["weight"], tensors.get("bias"), settings["scale"], settings["soft_cap"])

    def _head_digest(self, settings: Mapping[str, Any]) -> str:
        return file_digest(self.folder / WEIGHTS, f"{self._digest} {settings['scale']} {settings['soft_cap']}")

    def _head_is_sound(self) -> bool:
        try:
            settings = json.loads((self.folder / HEAD).read_text())
            return bool(settings["digest"] == self._head_digest(settings))
        except (ValueError, TypeError, KeyError, FileNotFoundError):
            return False


def row_key(row: Row) -> int:
    """Return a number of 64 bits that is made of a row's id and tokens."""
    content = f"{row['id']} {row['prompt_length']} ".encode() + np.array(row["input_ids"], np.int32).tobytes()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], sys.byteorder)


def _to_bytes(values: Tensor) -> bytes:
    return values.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _joined(buffers: Sequence[pa.Buffer], dtype: torch.dtype, tokens: int, pin_memory: bool) -> Tensor:
    """Copy mapped buffers, once, to behind each other: ``[tokens, width]``."""
    joined = torch.empty(sum(buffer.size for buffer in buffers), dtype=torch.uint8, pin_memory=pin_memory)
    if buffers:
        np.concatenate([np.frombuffer(buffer, np.uint8) for buffer in buffers], out=joined.numpy())
    return joined.view(dtype).view(tokens, -1) if tokens else joined.view(dtype).view(0, 1)


def check_same(folder: Path, made_of: Callable[[], Mapping[str, str]]) -> bool:
    """Check that what is cached in a folder was made of something.

    Args:
        folder: Of the cache.
        made_of: Returns it by name of the part; only asked where there is a cache.

    Returns:
        Whether there is one.

    Raises:
        StorageError: It was made of something else (names the parts), or nobody knows of what.
    """
    kept = _results(folder)
    stored = kept.manifest(teacher=str, kind=str)
    if stored is None:
        return False
    now = made_of()
    kept.refuse(sorted(part for part in now if stored.get(part) != now[part]))
    return True


def _results(folder: Path) -> ResultsFolder:
    return ResultsFolder(folder, "outputs of a teacher", "teacher_cache.dir")
