"""`TrainingClock`: how long training has taken when a measure is logged, so that quality stands against time."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn


class TrainingClock(Callback):
    """Logs ``seconds`` and ``processor_seconds`` of training beside the measures of every step and every validation.

    Set-up, curation and validation are left out. A run that is resumed goes on from the seconds of its checkpoint. On
    a GPU the seconds of a validation are those after the work that was asked for; those of a step do not wait for it.

    Attributes:
        seconds: Of training so far, by the clock on the wall.
        processor_seconds: Of this process in that time, all threads together; those of the loader's workers are not
            among them.
    """

    def __init__(self) -> None:
        self._seconds = self._processor_seconds = 0.0
        self._since: tuple[float, float] | None = None

    @property
    def seconds(self) -> float:
        """Seconds of training so far."""
        return self._seconds + (0.0 if self._since is None else time.perf_counter() - self._since[0])

    @property
    def processor_seconds(self) -> float:
        """Seconds of the processor in that time."""
        return self._processor_seconds + (0.0 if self._since is None else time.process_time() - self._since[1])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start."""
        self._go_on()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log where a step is logged."""
        pl_module.log_dict({"seconds": self.seconds, "processor_seconds": self.processor_seconds}, on_step=True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pause."""
        if self._since is not None:
            if trainer.strategy.root_device.type == "cuda":
                torch.cuda.synchronize(trainer.strategy.root_device)
            self._pause()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log beside the measures."""
        if trainer.state.fn == TrainerFn.FITTING:
            pl_module.log_dict({"seconds": self.seconds, "processor_seconds": self.processor_seconds})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on, where it is a validation within training."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._go_on()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop."""
        self._pause()

    def state_dict(self) -> dict[str, float]:
        """Return the seconds so far."""
        return {"seconds": self.seconds, "processor_seconds": self.processor_seconds}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Go on from the seconds of the run that is resumed."""
        self._seconds, self._processor_seconds = state_dict["seconds"], state_dict["processor_seconds"]

    def _go_on(self) -> None:
        self._since = time.perf_counter(), time.process_time()

    def _pause(self) -> None:
        self._seconds, self._processor_seconds, self._since = self.seconds, self.processor_seconds, None
