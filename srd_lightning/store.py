"""Scores on disk, by row id, with a fingerprint of what they were made from.

A folder holds ``manifest.json``, the fingerprint, and ``part-*.parquet``, the scores. Files are written to a temporary
name and renamed, so that a killed run leaves only whole ones.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that others see all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # what a full disk left


class ScoreStore:
    """Scores of rows in a folder.

    Args:
        folder: Made if it does not exist.
        fingerprint: What the scores depend on, by name of the part: rows, student, tokenizer, …

    Raises:
        ValueError: The folder holds scores with another fingerprint; the message names the parts that differ.
    """

    def __init__(self, folder: str | Path, fingerprint: Mapping[str, str]) -> None:
        self.folder = Path(folder)
        manifest = self.folder / "manifest.json"
        if manifest.exists():
            self._check(json.loads(manifest.read_text()), dict(fingerprint))
        else:
            write_atomically(manifest, json.dumps(dict(fingerprint), indent=2).encode())

    def _check(self, stored: dict[str, str], wanted: dict[str, str]) -> None:
        different = [part for part in wanted if stored.get(part) != wanted[part]]
        if different:
            raise ValueError(
                f"the scores in {self.folder} were made with another {', '.join(different)}; "
                "point `scores` to a new folder, or delete this one, to reflect again"
            )

    def append(self, name: str, scores: Sequence[Mapping[str, Any]]) -> None:
        """Write the scores of some rows, each with its ``id``, as one file; the same name replaces it."""
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(list(scores)), buffer)
        write_atomically(self.folder / f"part-{name}.parquet", buffer.getvalue())

    def read(self) -> dict[str, dict[str, Any]]:
        """Return all scores by row id."""
        parts = sorted(self.folder.glob("part-*.parquet"))
        return {score["id"]: score for part in parts for score in pq.read_table(part).to_pylist()}
