"""From scores to an order, the same on any number of ranks and for any order of the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import pyarrow as pa
from torch import Tensor

from srd_lightning.criteria.base import Criterion
from srd_lightning.curation.score_store import Floats
from srd_lightning.curriculum.ranking import reciprocal_rank_fusion
from srd_lightning.errors import DataError, ModelError


def rank(
    columns: Mapping[str, Floats], criteria: Sequence[Criterion], ids: pa.Array, ties: Literal["average", "order"]
) -> Tensor:
    """Order rows by their scores, easiest first.

    Args:
        columns: Scores by column, ``[N]``.
        criteria: Their directions and weights.
        ids: ``[N]``; rows that no score can tell apart stand in the order of their ids, not of the file.
        ties: See `reciprocal_rank_fusion`; with ``"order"`` the order of the file decides, as in the paper's code.

    Returns:
        Row numbers ``[N]``, int64.
    """
    for criterion in criteria:
        missing = np.flatnonzero(np.isnan(columns[criterion.column]))
        if len(missing) == len(ids):
            raise ModelError(
                f"{criterion.column} is NaN for all {len(ids)} rows, so it is not the rows but the student that gives "
                f"NaN, or {type(criterion).__name__}; look at its weights"
            )
        if len(missing):
            raise DataError(
                f"{criterion.column} is NaN for {len(missing)} of {len(ids)} rows, {ids[int(missing[0])].as_py()!r} "
                "among them; leave the rows or the criterion out"
            )
    ease = [
        columns[criterion.column] if criterion.higher_is_easier else -columns[criterion.column]
        for criterion in criteria
    ]
    order = reciprocal_rank_fusion(*ease, ties=ties, weights=[criterion.weight for criterion in criteria])
    return order if ties == "order" else _settle_by_id(order, ease, ids)


def _settle_by_id(order: Tensor, ease: Sequence[Floats], ids: pa.Array) -> Tensor:
    rows = order.numpy()
    as_before = np.ones(max(len(rows) - 1, 0), dtype=bool)
    for values in ease:
        in_order = values[rows]
        as_before &= in_order[1:] == in_order[:-1]
    places = np.flatnonzero(np.append(as_before, False) | np.insert(as_before, 0, False))
    if len(places):
        group = np.cumsum(~np.insert(as_before, 0, False)[places])
        names = np.array(ids.take(pa.array(rows[places])).to_pylist())
        rows[places] = rows[places][np.lexsort((names, group))]
    return order
