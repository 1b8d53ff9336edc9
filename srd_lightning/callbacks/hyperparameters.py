"""`HyperparameterScheduler`: settings of the module that change with the epoch."""

from __future__ import annotations

from operator import attrgetter

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from srd_lightning.curriculum.curriculum import find_curriculum, never_reached, value_at
from srd_lightning.curriculum.staged_values import assign, check_values, try_values
from srd_lightning.errors import SettingError
from srd_lightning.preflight import callbacks_of

PAPER = {"loss.temperature": (1.0, 2.0), "kd_weight": (0.8, 1.0)}
"""What the paper raises from the first stage to the last, in equal steps."""
UNSET = 1.0
"""What each of them is where nobody has said otherwise."""


class HyperparameterScheduler(Callback):
    """Gives attributes of the module the value of the epoch.

    Args:
        schedules: ``{attribute: {first epoch: value}}``; an attribute may be dotted. By default the paper's: in equal
            steps over the stages of the curriculum, ``loss.temperature`` rises from 1 to 2, and ``kd_weight`` from 0.8
            to 1. One of the two that is not 1 stays as it is, and so does one that another such callback schedules.

    Raises:
        SettingError: A schedule that does not begin at epoch 0 or whose values are no numbers; before rows are read
            also an attribute that the module lacks, and a value that it does not take.

    Example:
        >>> HyperparameterScheduler({"loss.temperature": {0: 1.0, 8: 1.5, 16: 2.0}}).values(epoch=8)
        {'loss.temperature': 1.5}
    """

    def __init__(self, schedules: dict[str, dict[int, float]] | None = None) -> None:
        self._follows_stages = schedules is None
        if schedules is None:  # until the stages are known
            schedules = {name: dict(enumerate(ends)) for name, ends in PAPER.items()}
        self.schedules = check_values(schedules)
        self.logged = [f"schedule/{name}" for name in self.schedules]

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
        if self._follows_stages:
            for name in self._unset(trainer):
                try_values(trainer.lightning_module, name, dict(enumerate(PAPER[name])))
            return
        for name, schedule in self.schedules.items():
            if name in self._scheduled_by_others(trainer):
                raise SettingError(f"two HyperparameterSchedulers have a schedule for {name}; leave one of them out")
            try_values(trainer.lightning_module, name, schedule)
            if late := never_reached(schedule, trainer.max_epochs):
                rank_zero_warn(
                    f"the values of {name} for epochs {late} never hold: the run has {trainer.max_epochs} epochs "
                    f"(`max_epochs`), the last of which is {(trainer.max_epochs or 0) - 1}"
                )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check here too: other data modules than `SRDDataModule` do not ask for it. Learn the stages, if need be."""
        if self._follows_stages and stage == "fit":
            curriculum = find_curriculum(trainer)
            if curriculum is None:
                raise SettingError(
                    "HyperparameterScheduler() follows the stages of a curriculum, but there is none; give it schedules"
                )
            self.schedules = self._over_stages(trainer, list(curriculum.schedule))
        self.preflight(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave what followed the stages as it was found, for a run that may come."""
        if self._follows_stages and stage == "fit":
            for name in self.schedules:
                assign(pl_module, name, UNSET)

    def _over_stages(self, trainer: Trainer, epochs: list[int]) -> dict[str, dict[int, float]]:
        """Return the paper's schedules for stages that begin with some epochs; a single stage has none."""
        names = self._unset(trainer) if len(epochs) > 1 else []
        schedules = {name: over_stages(*PAPER[name], epochs) for name in names}
        for epoch in epochs if schedules else ():
            values = ", ".join(f"{name} {schedule[epoch]:.4g}" for name, schedule in schedules.items())
            rank_zero_info(f"from epoch {epoch}: {values}")
        return schedules

    def _unset(self, trainer: Trainer) -> list[str]:
        """Return which of the paper's schedules nobody has said otherwise of."""
        module, others = trainer.lightning_module, self._scheduled_by_others(trainer)
        for name in PAPER:
            try_values(module, name, {})
        return [name for name in PAPER if name not in others and attrgetter(name)(module) == UNSET]

    def _scheduled_by_others(self, trainer: Trainer) -> set[str]:
        others = [other for other in callbacks_of(trainer) if isinstance(other, HyperparameterScheduler)]
        return {name for other in others if other is not self and not other._follows_stages for name in other.schedules}

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


def over_stages(first: float, last: float, epochs: list[int]) -> dict[int, float]:
    """Return a schedule that leads from one value to another in equal steps.

    Args:
        first: Value of the first stage.
        last: Value of the last one.
        epochs: With which the stages begin, at least two.

    Example:
        >>> over_stages(0.8, 1.0, [0, 8, 16])
        {0: 0.8, 8: 0.9, 16: 1.0}
    """
    steps = len(epochs) - 1
    return {epoch: round(first + (last - first) * stage / steps, 6) for stage, epoch in enumerate(epochs)}
