"""`HyperparameterScheduler`: settings of the module that change with the epoch."""

from __future__ import annotations

from math import isfinite
from numbers import Real
from operator import attrgetter
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from srd_lightning.curriculum.curriculum import check_schedule, never_reached, value_at
from srd_lightning.errors import SettingError


class HyperparameterScheduler(Callback):
    """Gives attributes of the module the value of the epoch.

    Args:
        schedules: ``{attribute: {first epoch: value}}``; an attribute may be dotted.

    Raises:
        SettingError: A schedule that does not begin at epoch 0 or whose values are no numbers; before rows are read
            also an attribute that the module lacks, and a value that it does not take.

    Example:
        >>> HyperparameterScheduler({"loss.temperature": {0: 1.0, 8: 1.5, 16: 2.0}}).values(epoch=8)
        {'loss.temperature': 1.5}
    """

    def __init__(self, schedules: dict[str, dict[int, float]]) -> None:
        self.schedules = {name: check_schedule(schedule, name) for name, schedule in schedules.items()}
        self.logged = [f"schedule/{name}" for name in self.schedules]
        for name, schedule in self.schedules.items():
            if wrong := [value for value in schedule.values() if not isinstance(value, Real) or not isfinite(value)]:
                raise SettingError(f"the values of {name} must be numbers, but one is {wrong[0]!r}")

    def values(self, epoch: int) -> dict[str, float]:
        """Return the values that hold in an epoch."""
        return {name: value_at(schedule, epoch) for name, schedule in self.schedules.items()}

    def preflight(self, trainer: Trainer) -> None:
        """Give every attribute every value once, and then the one that it had.

        Raises:
            SettingError: An attribute is not there, is not a number, is scheduled twice, or does not take a value.
        """
        if trainer.state.fn != TrainerFn.FITTING:
            return
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        others = [other for other in callbacks if isinstance(other, HyperparameterScheduler) and other is not self]
        for name, schedule in self.schedules.items():
            if any(name in other.schedules for other in others):
                raise SettingError(f"two HyperparameterSchedulers have a schedule for {name}; leave one of them out")
            try_values(trainer.lightning_module, name, schedule)
            if late := never_reached(schedule, trainer.max_epochs):
                rank_zero_warn(
                    f"the values of {name} for epochs {late} never hold: the run has {trainer.max_epochs} epochs "
                    f"(`max_epochs`), the last of which is {(trainer.max_epochs or 0) - 1}"
                )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check here too: other data modules than `SRDDataModule` do not ask for it."""
        self.preflight(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the values also where a run is resumed within an epoch."""
        self._apply(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set and log the values of the epoch."""
        self._apply(trainer, pl_module)
        pl_module.log_dict({f"schedule/{name}": value for name, value in self.values(trainer.current_epoch).items()})

    def _apply(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, value in self.values(trainer.current_epoch).items():
            assign(pl_module, name, value)


def assign(module: Any, name: str, value: float) -> None:
    """Give an attribute of a module, which may be dotted, a value."""
    owner, _, attribute = name.rpartition(".")
    setattr(attrgetter(owner)(module) if owner else module, attribute, value)


def try_values(module: Any, name: str, schedule: dict[int, float]) -> None:
    """Give an attribute every value of a schedule once, and then the one that it had.

    Raises:
        SettingError: It is not there, is not a number, or does not take a value.
    """
    path, _, attribute = name.rpartition(".")
    try:
        owner = attrgetter(path)(module) if path else module
        former = getattr(owner, attribute)
    except AttributeError as error:
        raise SettingError(f"{type(module).__name__} has no attribute {name!r} to schedule: {error}") from error
    if former is not None and not isinstance(former, (int, float, Tensor)):
        raise SettingError(
            f"{name} of {type(module).__name__} is a {type(former).__name__}, not a number that can be scheduled"
        )
    for epoch, value in schedule.items():
        try:
            setattr(owner, attribute, value)
        except (ValueError, TypeError, AttributeError) as error:
            raise SettingError(f"the schedule of {name} cannot begin {value} at epoch {epoch}: {error}") from error
        setattr(owner, attribute, former)
