"""How many batches and optimizer steps each epoch of a run has; plain arithmetic."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from srd_lightning.curriculum.curriculum import value_at


class EpochSteps(NamedTuple):
    """What a run does in an epoch.

    Args:
        epoch: Its number.
        available: Batches that it would have, were the run not to end within it.
        batches: That are trained on.
        steps: Of the optimizer.
    """

    epoch: int
    available: int
    batches: int
    steps: int


def epochs_of_run(
    batches_of: Callable[[int], int],
    accumulation: Mapping[int, float],
    max_epochs: int | None,
    max_steps: int = -1,
    limit: float = 1.0,
) -> list[EpochSteps]:
    """Return what a run does in each epoch, as Lightning counts it.

    Args:
        batches_of: Takes an epoch; returns the batches of a rank.
        accumulation: ``{first epoch: batches per step}``; the last step of an epoch may have fewer.
        max_epochs: Of the run; ``None`` and -1 are no end.
        max_steps: Of the run; -1 is no end.
        limit: Batches of an epoch as a whole number, or as a share of them.

    Returns:
        The epochs that have a step.

    Example:
        >>> epochs_of_run(lambda epoch: 5, {0: 2}, max_epochs=3, max_steps=5)
        [EpochSteps(epoch=0, available=5, batches=5, steps=3), EpochSteps(epoch=1, available=5, batches=4, steps=2)]
    """
    found, left = list[EpochSteps](), math.inf if max_steps < 0 else max_steps
    for epoch in itertools.count() if max_epochs in (None, -1) else range(max_epochs or 0):
        batches, accumulated = batches_of(epoch), int(value_at(accumulation, epoch))
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        steps = int(min(math.ceil(batches / accumulated), left))
        if left == 0 or (steps == 0 and max_epochs in (None, -1)):
            break
        if steps == 0:  # a small stage, of which the limit leaves nothing
            continue
        left -= steps
        found.append(EpochSteps(epoch, batches, min(batches, steps * accumulated), steps))
    return found
