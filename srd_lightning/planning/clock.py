"""By which clock is measured, and what was measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch

from srd_lightning.errors import SettingError
from srd_lightning.planning.cost import Rate

ClockName = Literal["wall", "processor"]
Clock = Callable[[], float]


def clock_of(name: ClockName, device: torch.device) -> Clock:
    """Return what tells seconds.

    Args:
        name: ``wall``, or ``processor``: seconds of this process, all threads together, which a busy machine does not
            change; those of the loader's workers are not among them.
        device: Whose work is waited for before the clock is read.
    """
    read = time.perf_counter if name == "wall" else time.process_time

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return read()

    return now


@dataclass(frozen=True)
class Calibrate:
    """How long a plan may measure.

    Args:
        seconds: A third of them each for reflection, the teacher's cache and training; a piece that has begun is ended.
    """

    seconds: float = 60.0

    def __post_init__(self) -> None:
        """Check it."""
        if not self.seconds > 0:
            raise SettingError(f"calibrate.seconds must be positive, but is {self.seconds}")


@dataclass(frozen=True)
class Throughput:
    """What a device does in a second, where it is known; then nothing is measured.

    Args:
        train: Positions, tokens and what pads them, that are trained on.
        reflect: Tokens that the student answers with.
        cache: Positions that the teacher sees.
        validate: Positions that are validated on; by default three times as many as are trained on.
    """

    train: float
    reflect: float | None = None
    cache: float | None = None
    validate: float | None = None

    def __post_init__(self) -> None:
        """Check them."""
        for name, value in vars(self).items():
            if value is not None and not value > 0:
                raise SettingError(f"throughput: {name} must be a positive number of tokens a second, but is {value}")


@dataclass
class Prices:
    """What each kind of work costs, in seconds.

    Args:
        reflect: Passes and positions of the reflection.
        reflect_once: To load the student and to look which scores there are.
        cache: Batches and positions that the teacher sees.
        cache_once: To load the teacher and to look at and close its cache.
        batch: Batches and positions that are trained on.
        step: What the optimizer's step takes, clipping included.
        epoch: What an epoch takes besides its steps.
        validate: Batches and positions of the validation.
        validation: What a validation takes besides its batches.
    """

    reflect: Rate = field(default=Rate(0, 0))
    reflect_once: float = 0.0
    cache: Rate = field(default=Rate(0, 0))
    cache_once: float = 0.0
    batch: Rate = field(default=Rate(0, 0))
    step: float = 0.0
    epoch: float = 0.0
    validate: Rate = field(default=Rate(0, 0))
    validation: float = 0.0
