"""What rollouts need done around a run: they learn of validations, and checkpoints keep their state."""

from __future__ import annotations

from typing import Any

from lightning import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from srd_lightning.distributed.process_group import Ranks
from srd_lightning.rollouts.base import Rollouts

KEY = "rollouts"
"""Where a checkpoint keeps the state of all ranks."""


class RolloutHooks(Callback):
    """Lets rollouts know of validations, and keeps their state in checkpoints; `configure_callbacks` adds it."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Tell whether there is something to validate, as far as that is known."""
        rollouts = _of(pl_module)
        if rollouts is not None:
            rollouts.started(trainer.val_dataloaders is None or sum(trainer.num_val_batches) > 0)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Tell what was measured, of a validation within a training."""
        rollouts = _of(pl_module)
        if rollouts is not None and trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            rollouts.validated(dict(trainer.callback_metrics))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Log how things stand."""
        rollouts = _of(pl_module)
        if rollouts is not None:
            pl_module.log_dict(rollouts.measures(), sync_dist=True)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Keep the state of all ranks, which save together."""
        rollouts = _of(pl_module)
        if rollouts is not None and rollouts.state():
            checkpoint[KEY] = Ranks().all_results(rollouts.state)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Go on with the state of the run that is resumed."""
        rollouts = _of(pl_module)
        if trainer.state.fn != TrainerFn.FITTING or rollouts is None or not rollouts.state():
            return
        if KEY in checkpoint:
            rollouts.load(checkpoint[KEY], Ranks().rank, Ranks().size)
        else:
            name = type(rollouts).__name__
            rank_zero_warn(f"the checkpoint was saved without {name}, which begins with its first share and no texts")


def _of(module: Any) -> Rollouts | None:
    return module.rollouts_handle.rollouts  # type: ignore[no-any-return]
