"""What the teacher said to each row, on disk: computed once, read by every epoch after.

A folder holds ``manifest.json``, which says what it was made from; ``head.safetensors``, the teacher's output head; and
shards, Arrow files that are memory-mapped. A row is found by a number made of its id and its tokens, so a row whose
text or template has changed is simply not there. Shards are written whole and name the manifest, so processes need no
lock against each other, a kill loses the last shard at most, and one that was copied from elsewhere is not read.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import uuid
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray
from safetensors.torch import load_file, save
from torch import Tensor

from srd_lightning.fingerprint import digest
from srd_lightning.objective import Head
from srd_lightning.store import write_atomically
from srd_lightning.teacher import HiddenStates, TopK

Row = Mapping[str, Any]
HEAD = "head.json"
SHARD_BYTES = 64 * 2**20
"""Written at a time."""


class TeacherCache:
    """What a teacher said, by row.

    Args:
        folder: Made if it does not exist.
        kind: What is kept.
        made_of: What it depends on, by name of the part.

    Raises:
        ValueError: The folder was made of something else; the message names the parts that differ.
    """

    def __init__(self, folder: Path, kind: HiddenStates | TopK, made_of: Mapping[str, str]) -> None:
        self.folder = folder
        self.kind = kind
        self._digest = digest(made_of)
        self._buffer: list[tuple[int, dict[str, bytes]]] = []
        manifest = folder / "manifest.json"
        if manifest.exists():
            stored = json.loads(manifest.read_text())
            if different := sorted(part for part in made_of if stored.get(part) != made_of[part]):
                raise ValueError(
                    f"the teacher cache in {folder} was made with another {', '.join(different)}; point "
                    "`teacher_cache_dir` to a new folder, or delete this one, to make it again"
                )
        else:
            write_atomically(manifest, json.dumps(dict(made_of), indent=2).encode())

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is mapped: a process that loads batches maps it for itself."""
        return {name: value for name, value in vars(self).items() if name != "_index"}

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
        """Look again at what is there: other processes may have written."""
        vars(self).pop("_index", None)

    def check_room(self, rows: Dataset, width: int) -> None:
        """Say what rows will take on disk, and refuse to begin what it cannot hold.

        Raises:
            OSError: The disk is too small.
        """
        tokens = int(np.sum(rows["length"]) - np.sum(rows["prompt_length"]))
        needed, free = tokens * self.kind.bytes_per_token(width), shutil.disk_usage(self.folder).free
        rank_zero_info(
            f"teacher cache: {len(rows)} rows with {tokens} response tokens take {needed / 1e9:.3f} GB in {self.folder}"
        )
        if needed > free:
            raise OSError(
                f"the teacher cache needs {needed / 1e9:.3f} GB in {self.folder}, where {free / 1e9:.3f} GB are free; "
                "point `teacher_cache_dir` to a larger disk, or keep less with teacher_cache: topk"
            )

    def append(self, rows: Sequence[Row], kept: Mapping[str, Tensor]) -> None:
        """Add rows, whose response tokens stand one after the other in ``kept``, ``[N, width]`` each."""
        lengths = [len(row["input_ids"]) - row["prompt_length"] for row in rows]
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
        table = table.replace_schema_metadata({b"made_of": self._digest.encode()})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        write_atomically(self.folder / f"part-{uuid.uuid4().hex}.arrow", sink.getvalue())
        self._buffer = []

    @cached_property
    def _index(self) -> tuple[NDArray[np.uint64], NDArray[np.int64], pa.Table]:
        """Sorted keys, where each stands, and all shards one after the other, mapped."""
        columns = {name: pa.large_binary() for name in self.kind.fields}
        empty = pa.schema({"key": pa.uint64(), **columns}).empty_table()
        tables = [self._read(shard) for shard in sorted(self.folder.glob("part-*.arrow"))]
        whole = pa.concat_tables([empty, *(table for table in tables if table is not None)])
        keys = whole["key"].to_numpy()
        order = np.argsort(keys, kind="stable")
        return keys[order], order, whole

    def _read(self, shard: Path) -> pa.Table | None:
        """Map a shard, or put it aside if it is damaged."""
        try:
            table = pa.ipc.open_file(pa.memory_map(str(shard))).read_all()
        except pa.ArrowInvalid:
            shard.replace(shard.with_suffix(".damaged"))
            warnings.warn(f"{shard} is damaged and was put aside; its rows are made again", stacklevel=2)
            return None
        if table.schema.metadata != {b"made_of": self._digest.encode()}:
            raise ValueError(f"{shard} belongs to another teacher cache; remove it")
        return table.replace_schema_metadata(None)

    def batch(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Return what is kept of some rows, padded to the longest response: ``[B, R, width]`` each.

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
        return {
            name: self._padded(rows, [whole[name][int(order[place])].as_buffer() for place in places], dtype)
            for name, dtype in self.kind.fields.items()
        }

    @staticmethod
    def _padded(rows: Sequence[Row], buffers: Sequence[pa.Buffer], dtype: torch.dtype) -> Tensor:
        lengths = [len(row["input_ids"]) - row["prompt_length"] for row in rows]
        left = iter(buffers)
        values = [
            torch.frombuffer(bytearray(next(left)), dtype=dtype).view(length, -1) if length else None
            for length in lengths
        ]
        width = next((value.shape[1] for value in values if value is not None), 1)
        padded = torch.zeros(len(rows), max(lengths), width, dtype=dtype)
        for row, value in enumerate(values):
            if value is not None:
                padded[row, : len(value)] = value
        return padded

    def save_head(self, head: Head) -> None:
        """Keep the teacher's head; the cache is complete only with it."""
        tensors = {"weight": head.weight, **({} if head.bias is None else {"bias": head.bias})}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_atomically(self.folder / "head.safetensors", save(tensors))
        write_atomically(self.folder / HEAD, json.dumps({"scale": head.scale, "soft_cap": head.soft_cap}).encode())

    def head(self) -> Head | None:
        """Return the teacher's head, or nothing where it is still to be saved."""
        if not (self.folder / HEAD).exists():
            return None
        tensors = load_file(self.folder / "head.safetensors")
        return Head(tensors["weight"], tensors.get("bias"), **json.loads((self.folder / HEAD).read_text()))


def row_key(row: Row) -> int:
    """Return a number of 64 bits that is made of a row's id and tokens."""
    content = f"{row['id']} {row['prompt_length']} ".encode() + np.array(row["input_ids"], np.int32).tobytes()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], sys.byteorder)


def _to_bytes(values: Tensor) -> bytes:
    return values.contiguous().flatten().view(torch.uint8).numpy().tobytes()
