"""Reflecting again at the beginning of a stage, with the student as trained so far, on the rows still to come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from datasets import Dataset
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from srd_lightning.curation.curator import Curator
from srd_lightning.curation.score_store import Scores, stored_scores
from srd_lightning.curation.student_source import ReflectingStudent
from srd_lightning.curriculum.arrangement import arranged
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

    def refresh(
        self,
        curriculum: Curriculum,
        epoch: int,
        curator: Curator,
        rows: Dataset,
        student: ReflectingStudent,
        root: Path,
    ) -> Curriculum:
        """Put the rows still to come in a new order, where that is due.

        Args:
            curriculum: As it was.
            epoch: The current one.
            curator: That made it.
            rows: All rows.
            student: Reflects as trained so far.
            root: Folder of the first reflection; those of the refreshments are in it.

        Returns:
            The curriculum from now on.

        Raises:
            ResumeError: A refreshment was made in a run that this one does not know.
        """
        for first in self.due(epoch):
            to_come = rows.select(curriculum.order[curriculum.size(first - 1) :].numpy())
            if first in self.generations:
                scores = stored_scores(root / self.generations[first], to_come, curator.criteria)
            elif epoch > first:
                raise ResumeError(
                    f"the checkpoint does not say in which order rows came after the refresh at epoch {first}; resume "
                    f"from one that was trained with the same refresh, or from the end of epoch {first - 1}"
                )
            else:
                model, reflector = student.as_trained(), curator.reflector(student)
                fingerprint = reflector.fingerprint(to_come, model)
                folder = root / f"epoch-{first}-{digest(fingerprint)}"
                scores = reflector.scores(to_come, model, folder, fingerprint)
                self.generations[first] = folder.name
            curriculum = rearranged(curriculum, first, curator, to_come, scores)
            rank_zero_info(f"rows still to come are in the order of {self.generations[first]}")
        return curriculum


def rearranged(curriculum: Curriculum, first: int, curator: Curator, to_come: Dataset, scores: Scores) -> Curriculum:
    """Return the curriculum with the rows that have not entered before an epoch in the order of new scores.

    Args:
        curriculum: As it was.
        first: Epoch with which a stage begins.
        curator: Ranks and arranges.
        to_come: The rows that enter in this stage or later, in their order so far.
        scores: Of these rows.
    """
    seen = curriculum.size(first - 1)
    order: Tensor = arranged(curator.arrangement, curator.order(to_come, scores), curriculum.kept - seen)
    return Curriculum(torch.cat([curriculum.order[:seen], curriculum.order[seen:][order]]), curriculum.schedule)
