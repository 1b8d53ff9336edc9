"""Settings of a loss that follow how the distillation loss goes: TAID's moving target, AdaKD's share of the tokens.

Both look once per optimizer step at ``train_kd``, the mean over all response tokens of the step and all ranks, which
the module has read by then: nothing more is waited for, and every rank comes to the same value. What they know is in
checkpoints.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from srd_lightning.curriculum.staged_values import assign, try_values
from srd_lightning.errors import SettingError
from srd_lightning.preflight import callbacks_of
from srd_lightning.protocols import KnowsStepLoss
from srd_lightning.training.lr_plan import stage_steps


class _LossDriven(Callback):
    """Gives an attribute of the module a new value after each optimizer step.

    Args:
        attribute: Dotted.
        first: Its value in the first step.
    """

    def __init__(self, attribute: str, first: float) -> None:
        self.attribute = attribute
        self.state: dict[str, float] = {"value": first, "step": 0}
        self.logged = (f"schedule/{attribute}",)
        self._first, self._planned, self._loaded, self._followed = first, 1, False, False

    def following(self, loss: float, progress: float) -> float:
        """Return the value after the one in ``state``; what else is remembered goes there too."""
        raise NotImplementedError

    def advance(self, loss: float, progress: float) -> float:
        """Return the value for the next step.

        Args:
            loss: ``train_kd`` of the step that was made.
            progress: Steps made, over those of the run.
        """
        self.state["value"] = self.following(loss, progress)
        return self.state["value"]

    @property
    def state_key(self) -> str:
        """See Lightning: two of them, for two attributes, are kept apart."""
        return self._generate_state_key(attribute=self.attribute)

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered."""
        return dict(self.state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what the run that is resumed remembered."""
        self.state, self._loaded = dict(state_dict), True

    def preflight(self, trainer: Trainer) -> None:
        """Try the first value.

        Raises:
            SettingError: The attribute is not there, or is scheduled by a `HyperparameterScheduler` too.
        """
        if trainer.state.fn != TrainerFn.FITTING:
            return
        name = type(self).__name__
        if any(self.attribute in getattr(callback, "schedules", {}) for callback in callbacks_of(trainer)):
            raise SettingError(f"a HyperparameterScheduler and {name} both set {self.attribute}; leave one of them out")
        try_values(trainer.lightning_module, self.attribute, {0: self._first})

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check here too: other data modules than `SRDDataModule` do not ask for it."""
        self.preflight(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plan the run, and begin with the first value, or that of the run that is resumed."""
        self._planned = max(sum(stage_steps(trainer)), 1)
        if not self._loaded:
            self.state = {"value": self._first, "step": trainer.global_step}
        self._loaded = self._followed = False
        assign(pl_module, self.attribute, self.state["value"])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Set and log the value of the next step, where one was made; one without a distillation loss changes nothing.

        Raises:
            SettingError: The module logs no ``train_kd``.
        """
        if trainer.global_step == self.state["step"]:
            return
        if isinstance(pl_module, KnowsStepLoss):
            loss = pl_module.step_kd()  # what is logged stays from the step before
        elif "train_kd" in trainer.callback_metrics:
            loss = float(trainer.callback_metrics["train_kd"])
        else:
            raise SettingError(
                f"{type(self).__name__} follows train_kd, which {type(pl_module).__name__} does not log; log it, or "
                "leave the callback out"
            )
        if loss is None:
            self.state["step"] = trainer.global_step
            return
        self._followed = True
        value = self.advance(loss, trainer.global_step / self._planned)
        self.state["step"] = trainer.global_step
        assign(pl_module, self.attribute, value)
        pl_module.log(self.logged[0], torch.tensor(value))  # on the host, so nobody waits for it

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so where there was nothing to follow."""
        if not self._followed and trainer.global_step > 0:
            rank_zero_warn(
                f"no step had a distillation loss, which {type(self).__name__} follows, so {self.attribute} stayed at "
                f"{self.state['value']}; raise kd_weight, or leave the callback out"
            )


class TAIDSchedule(_LossDriven):
    r"""Moves TAID's target from the student to the teacher, faster while the loss falls (arXiv 2501.16937).

    With J the distillation loss of the last two steps, :math:`\delta = (J_{n-1} - J_n) / J_{n-1}`, a trend
    :math:`m \leftarrow \beta m + (1 - \beta) \delta` and N steps in all:
    :math:`t \leftarrow \min(t_1, \max(t_0 + (t_1 - t_0) \, n / N, \; t + \alpha \, \sigma(m) (1 - t)))`.

    Args:
        start: :math:`t_0`, in the first step.
        end: :math:`t_1`, which is reached at the last step at the latest.
        alpha: How much the trend hastens; 0 is the linear schedule.
        momentum: β of the trend.
        attribute: What is set, such as ``loss.loss.t`` where a `TAID` stands within another loss.

    Raises:
        SettingError: Before rows are read, where the module has no such attribute.

    Example:
        >>> schedule = TAIDSchedule(alpha=0.1)
        >>> [round(schedule.advance(loss, progress=step / 100), 4) for step, loss in ((1, 2.0), (2, 1.0))]
        [0.406, 0.4358]
    """

    def __init__(
        self,
        start: float = 0.4,
        end: float = 1.0,
        alpha: float = 5e-4,
        momentum: float = 0.99,
        attribute: str = "loss.t",
    ) -> None:
        if not (0 <= start <= end <= 1 and alpha >= 0 and 0 <= momentum < 1):
            raise SettingError(
                "start and end must lie in [0, 1] in this order, alpha at 0 or above, and momentum in [0, 1), but they "
                f"are {start}, {end}, {alpha} and {momentum}"
            )
        super().__init__(attribute, start)
        self.start, self.end, self.alpha, self.momentum = start, end, alpha, momentum

    def following(self, loss: float, progress: float) -> float:
        """See `_LossDriven.following`."""
        t, hastened = self.state["value"], 0.0
        if (last := self.state.get("loss")) is not None:
            change = (last - loss) / (last + 1e-15)
            self.state["trend"] = self.momentum * self.state.get("trend", 0.0) + (1 - self.momentum) * change
            hastened = self.alpha / (1 + math.exp(-self.state["trend"])) * (1 - t)
        self.state["loss"] = loss
        return min(self.end, max(self.start + (self.end - self.start) * progress, t + hastened))


class LossDrivenShare(_LossDriven):
    """Distils fewer tokens while the loss falls, and more where it rises (AdaKD's LATF, arXiv 2510.11615).

    A moving average of the distillation loss is held against what it was when the share last changed: where it is lower
    by more than ``tolerance``, the share is multiplied by ``1 - rate``; where it is higher by more, by ``1 + rate``.

    Args:
        rate: How much the share changes; the authors' 0.05.
        tolerance: Relative change of the average that matters; the authors' 0.05.
        least: Share below which it does not fall; the authors' 0.1.
        decay: Of the moving average.
        warm_up: Part of the run in which all tokens are distilled; the authors' 0.05.
        attribute: What is set, the share of a `Selected`.

    Raises:
        SettingError: Before rows are read, where the module has no such attribute.

    Example:
        >>> share = LossDrivenShare(decay=0.0, warm_up=0.0)
        >>> [round(share.advance(loss, progress=0.5), 4) for loss in (2.0, 1.0, 1.01, 2.0)]
        [1.0, 0.95, 0.95, 0.9975]
    """

    def __init__(
        self,
        rate: float = 0.05,
        tolerance: float = 0.05,
        least: float = 0.1,
        decay: float = 0.99,
        warm_up: float = 0.05,
        attribute: str = "loss.share",
    ) -> None:
        if not (0 <= rate < 1 and tolerance >= 0 and 0 < least <= 1 and 0 <= decay < 1 and 0 <= warm_up < 1):
            raise SettingError(
                "rate, decay and warm_up must lie in [0, 1), tolerance at 0 or above, and least in (0, 1], but are "
                f"{rate}, {decay}, {warm_up}, {tolerance} and {least}"
            )
        super().__init__(attribute, 1.0)
        self.rate, self.tolerance, self.least, self.decay, self.warm_up = rate, tolerance, least, decay, warm_up

    def following(self, loss: float, progress: float) -> float:
        """See `_LossDriven.following`."""
        share, average = self.state["value"], self.state.get("average", loss)
        average = self.state["average"] = self.decay * average + (1 - self.decay) * loss
        if progress <= self.warm_up:
            return share
        change = average - self.state.setdefault("reference", average)
        if abs(change) <= self.tolerance * self.state["reference"]:
            return share
        self.state["reference"] = average
        return min(share * (1 + self.rate), 1.0) if change > 0 else max(share * (1 - self.rate), self.least)
