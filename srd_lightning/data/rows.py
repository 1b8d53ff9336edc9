"""Ids and lengths of rows."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from numpy.typing import NDArray

from srd_lightning.data.fields import is_missing
from srd_lightning.errors import DataError


def row_ids(rows: Dataset) -> list[str]:
    """Return one id per row, which stays with the row wherever it stands.

    Args:
        rows: Rows with or without an ``id`` column.

    Returns:
        The ``id`` column as text; without one, a digest of the row's content, numbered where rows repeat.

    Raises:
        DataError: An id is missing or stands twice.
    """
    if "id" in rows.column_names:
        ids = [str(row_id) for row_id in rows["id"] if not is_missing(row_id)]
        if len(ids) < len(rows):
            raise DataError(f"{len(rows) - len(ids)} of {len(rows)} rows have no id; give every row one, or none")
        repeated = [row_id for row_id, count in Counter(ids).items() if count > 1]
        if repeated:
            raise DataError(
                f"row ids must be unique, but {len(repeated)} stand more than once, {repeated[0]!r} among them; "
                "give every row its own, or remove the column to use ids made from the content"
            )
        return ids
    seen: Counter[str] = Counter()
    ids = []
    for batch in rows.iter(batch_size=1000):
        for values in zip(*batch.values(), strict=True):
            content = sorted(zip(batch, values, strict=True))
            digest = hashlib.sha256(repr(content).encode()).hexdigest()[:16]
            ids.append(digest if not seen[digest] else f"{digest}-{seen[digest]}")
            seen[digest] += 1
    return ids


def ids_of(rows: Dataset) -> pa.Array:
    """Return the ids of tokenised rows, ``[N]``, as they stand in memory-mapped files."""
    return rows.select_columns(["id"]).with_format("arrow")[:]["id"].combine_chunks()


def lengths_of(rows: Dataset) -> NDArray[np.int32]:
    """Return the lengths of tokenised rows in tokens, ``[N]``; nothing else of them is read."""
    lengths: NDArray[np.int32] = rows.data.column("length").to_numpy()
    places = rows._indices  # which `datasets` itself makes Python numbers of: minutes for 100 million rows
    return lengths if places is None else lengths[places.column(0).to_numpy()]


def response_lengths(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return how many tokens the responses of some tokenised rows have, ``[B]``, the end token included.

    Example:
        >>> response_lengths([{"input_ids": [5, 6, 7], "prompt_length": 1}])
        [2]
    """
    return [len(row["input_ids"]) - row["prompt_length"] for row in rows]
