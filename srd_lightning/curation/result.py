"""What came of a curation: scores, order and curriculum of the rows, and numbers that follow from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import Tensor

from srd_lightning.curation.score_store import Scores
from srd_lightning.curriculum.curriculum import Curriculum
from srd_lightning.curriculum.ranking import Floats, average_ranks


@dataclass(frozen=True, eq=False)
class CurationResult:
    """Rows that were scored and ranked, and the curriculum that came of it.

    Args:
        ids: Id of each row ``[N]``.
        columns: Scores ``[N]``, float64, by criterion, in the order of the rows.
        higher_is_easier: Direction by criterion.
        order: Row numbers ``[N]``, easiest first.
        curriculum: Which rows enter when; its order is another one where an arrangement changed it.
        dropped: Rows that were left out before the ranking, by reason.
        seconds: Time of the curation.
        scored: Rows that this run scored; 0 if all scores came from disk.
        scores: Where the columns and the answers are kept; nothing where rows were not ranked.
    """

    ids: pa.ChunkedArray | pa.Array | Sequence[str]
    columns: Mapping[str, Floats]
    higher_is_easier: Mapping[str, bool]
    order: Tensor
    curriculum: Curriculum
    dropped: Mapping[str, int]
    seconds: float
    scored: int
    scores: Scores | None = None

    @property
    def rows(self) -> int:
        """Number of rows that were ranked."""
        return len(self.order)

    @property
    def kept(self) -> int:
        """Number of rows in the last stage."""
        return self.curriculum.kept

    @cached_property
    def sizes(self) -> dict[int, int]:
        """Rows that each stage trains on, by its first epoch."""
        return {first_epoch: self.curriculum.size(first_epoch) for first_epoch in self.curriculum.schedule}

    @cached_property
    def ranks(self) -> dict[str, Floats]:
        """Rank of each row ``[N]`` by criterion: 1 is the easiest, equal values share the mean of their ranks."""
        directions = self.higher_is_easier
        return {name: average_ranks(values if directions[name] else -values) for name, values in self.columns.items()}

    @cached_property
    def places(self) -> NDArray[np.int64]:
        """Place of each row ``[N]`` in the order of ease: 0 is the easiest."""
        return _places(self.order)

    @cached_property
    def stages(self) -> NDArray[np.int64]:
        """Number of the stage in which each row enters ``[N]``, from 0; -1 for the rows that never do."""
        stages = np.searchsorted(list(self.sizes.values()), _places(self.curriculum.order), side="right")
        return np.where(stages == len(self.sizes), -1, stages)


def _places(order: Tensor) -> NDArray[np.int64]:
    places = np.empty(len(order), dtype=np.int64)
    places[order.numpy()] = np.arange(len(order))
    return places
