"""Reflecting again at the beginning of a stage, with the student as trained so far, on the rows still to come."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor

from srd_lightning.criteria.base import Criterion
from srd_lightning.curation.score_store import Scores, stored_scores
from srd_lightning.curriculum.curriculum import Curriculum
from srd_lightning.digests import digest
from srd_lightning.errors import ResumeError, SettingError


class Refresher:
    """Knows when the student reflects again, and where the scores of each time are.

    Args:
        first_epochs: At which it does.
        schedule: Of the curriculum.

    Attributes:
        generations: Name of the folder of the scores by first epoch; kept in checkpoints, because a run that is resumed
            later has no student any more that could make them again.

    Raises:
        SettingError: One of the epochs is not the first of a later stage.
    """

    def __init__(self, first_epochs: Sequence[int], schedule: Mapping[int, float]) -> None:
        later = [epoch for epoch in schedule if epoch > 0]
        if first_epochs and set(schedule.values()) == {1.0}:
            raise SettingError("refresh needs a schedule that ranks rows, but this one trains on all from the start")
        if wrong := sorted(set(first_epochs) - set(later)):
            raise SettingError(f"refresh must name first epochs of later stages, which are {later}, but names {wrong}")
        self.first_epochs = sorted(set(first_epochs))
        self.begin()

    def begin(self) -> None:
        """Forget an earlier run."""
        self.generations: dict[int, str] = {}
        self._done: list[int] = []

    def due(self, epoch: int) -> list[int]:
        """Return the first epochs whose refreshment is to be made, or made again by a resumed run, at an epoch."""
        due = [first for first in self.first_epochs if first <= epoch and first not in self._done]
        self._done += due
        return due

    def scores(
        self,
        first: int,
        epoch: int,
        folder: Path,
        rows: Dataset,
        criteria: Sequence[Criterion],
        reflect: Callable[[Dataset, Callable[[Mapping[str, str]], Path]], Scores],
    ) -> Scores:
        """Return the scores of a refreshment: those that were made then, else new ones.

        Args:
            first: First epoch of the refreshment.
            epoch: The current one.
            folder: Of the first reflection; that of the refreshment is in it.
            rows: Rows still to come.
            criteria: What they are scored by.
            reflect: Scores rows; takes a function from what they are made of to a folder.

        Raises:
            ResumeError: They were made in a run that this one does not know.
        """
        if first in self.generations:
            return stored_scores(folder / self.generations[first], rows, criteria)
        if epoch > first:
            raise ResumeError(
                f"the checkpoint does not say in which order rows came after the refresh at epoch {first}; resume from "
                f"one that was trained with the same refresh, or from the end of epoch {first - 1}"
            )
        scores = reflect(rows, lambda made_of: folder / f"epoch-{first}-{digest(made_of)}")
        self.generations[first] = scores.folder.name
        return scores


def rearrange(
    curriculum: Curriculum, first_epoch: int, rows: Dataset, order_of: Callable[[Dataset, int], Tensor]
) -> Curriculum:
    """Return the curriculum with the rows that have not entered before an epoch in a new order.

    Args:
        curriculum: As it was.
        first_epoch: Of a stage.
        rows: All rows.
        order_of: Takes the rows still to come and how many of them will enter; returns their order, easiest first.
    """
    seen, kept = curriculum.size(first_epoch - 1), curriculum.kept
    to_come = curriculum.order[seen:]
    order = order_of(rows.select(to_come.numpy()), kept - seen)
    return Curriculum(torch.cat([curriculum.order[:seen], to_come[order]]), curriculum.schedule)
