"""What a run does, stage by stage and epoch by epoch. Without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from srd_lightning.curriculum.steps import EpochSteps


@dataclass
class Stage:
    """What is trained on in the epochs of a stage, by one rank.

    Args:
        first_epoch: Of the stage.
        rows: Of its pool.
        epochs: That the run has of it.
        batches: Of all these epochs; so are all that follow.
        steps: Of the optimizer.
        tokens: Real ones.
        positions: Tokens and what pads them.
        validations: Of the whole validation split.
    """

    first_epoch: int
    rows: int
    epochs: int = 0
    batches: int = 0
    steps: int = 0
    tokens: int = 0
    positions: int = 0
    validations: int = 0
    seconds: float = field(default=0.0)


def validations_of(epochs: Sequence[EpochSteps], every_n_epochs: int | None, interval: float) -> list[int]:
    """Return how often each epoch of a run validates, as Lightning decides it.

    Args:
        epochs: Of the run.
        every_n_epochs: ``check_val_every_n_epoch``; without, epochs do not matter.
        interval: ``val_check_interval``: batches as a whole number, or a share of an epoch's.

    Example:
        >>> validations_of([EpochSteps(0, 8, 8, 8), EpochSteps(1, 8, 4, 4)], 1, 0.5)
        [2, 1]
    """
    found, before = [], 0
    for epoch in epochs:
        apart = interval if isinstance(interval, int) else max(1, int(epoch.available * interval))
        if every_n_epochs is None:
            found.append((before + epoch.batches) // apart - before // apart)
        else:
            found.append(epoch.batches // apart if (epoch.epoch + 1) % every_n_epochs == 0 else 0)
        before += epoch.batches
    return found


def limited(batches: int, limit: float) -> int:
    """Return how many batches Lightning takes of some, by a whole number or a share.

    Example:
        >>> limited(7, 0.5), limited(7, 5)
        (3, 5)
    """
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)
