"""`NewOptimizerEachStage`: what the optimizer has gathered is forgotten where a stage begins."""

from __future__ import annotations

from typing import Any

from lightning import Callback, LightningModule, Trainer

from srd_lightning.curriculum.curriculum import find_curriculum


class NewOptimizerEachStage(Callback):
    """Lets every stage begin with an optimizer that knows nothing, as the authors' code does, a process per stage.

    Moments and step counts of the optimizers are dropped before the first step of a stage; the learning rate is the
    concern of ``restart_lr_each_stage``. A run that is resumed within a stage goes on with what it had.
    """

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Forget before the first batch of a stage's first epoch."""
        curriculum, epoch = find_curriculum(trainer), trainer.current_epoch
        if batch_idx == 0 and epoch > 0 and curriculum is not None and epoch in curriculum.schedule:
            for optimizer in trainer.optimizers:
                optimizer.state.clear()
