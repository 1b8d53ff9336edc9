"""Reflection replay: what the student answered when it reflected is trained on, and costs no generation.

Curation has made it answer every prompt, and keeps the answers by row id. Ours, not from a paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from srd_lightning.digests import uniform
from srd_lightning.errors import SettingError
from srd_lightning.protocols import ReplaysAnswers
from srd_lightning.rollouts.base import Moment, Rollouts, check_share


@dataclass(frozen=True)
class ReplayedBatches:
    """Which batches hold answers of the student: a share of them, by seed, epoch and number within the epoch.

    Args:
        share: Of the batches.
        seed: Other batches for another one.
    """

    share: float
    seed: int

    def __call__(self, epoch: int, batch_idx: int) -> bool:
        """Return whether a batch does.

        Example:
            >>> [ReplayedBatches(0.5, seed=0)(epoch=0, batch_idx=batch) for batch in range(5)]
            [True, False, True, False, False]
        """
        return uniform(self.seed, epoch, batch_idx) < self.share


class ReflectionReplay(Rollouts):
    """On a share of the batches the student's answers of the reflection take the place of the responses.

    They are off-policy by as much as the student has learnt since; with ``refresh`` those of the rows to come are
    renewed with their order. An empty answer, or none, leaves the row its response. With a teacher's cache, answers are
    cached as rows are.

    Args:
        share: Probability that a batch has answers.
        seed: Decides which batches.

    Raises:
        SettingError: The share is outside [0, 1].

    Example:
        >>> ReflectionReplay(share=0.25).share
        0.25
    """

    writes = False

    def __init__(self, share: float = 0.5, seed: int = 0) -> None:
        self.share = check_share("share", share)
        self.seed = seed
        self._batches = ReplayedBatches(share, seed)

    def check(self, module: Any, trainer: Any, data: object) -> None:
        """Refuse data that have no answers, and batches that Lightning repeats.

        Raises:
            SettingError: The data module knows none, or ``overfit_batches`` takes batches as it likes.
        """
        if not isinstance(data, ReplaysAnswers):
            raise SettingError(
                f"ReflectionReplay needs the answers of the reflection, which an SRDDataModule has, but the data are a "
                f"{type(data).__name__}; use that, or GKD, whose texts are written in training"
            )
        if trainer.overfit_batches:
            raise SettingError(
                "ReflectionReplay chooses whole batches, which overfit_batches takes apart; leave it out"
            )
        data.check_replay(module.teacher_handle.cache is not None)

    def begin(self, data: object) -> None:
        """Let the data module bring answers along."""
        assert isinstance(data, ReplaysAnswers), "check() comes first"
        data.replay(self._batches)

    def is_own(self, moment: Moment) -> bool:
        """Return whether the batch has answers."""
        return self._batches(moment.epoch, moment.batch_idx)
