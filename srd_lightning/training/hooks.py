"""What `KDLightningModule` needs done around its steps, whichever of its hooks a subclass makes its own."""

from __future__ import annotations

from typing import Any

from lightning import Callback, Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.optim import Optimizer

from srd_lightning.curriculum.curriculum import EpochRows, find_curriculum
from srd_lightning.errors import SettingError


class TrainingHooks(Callback):
    """Normalises gradients by tokens, and gets a sharded student ready to answer; `configure_callbacks` adds it."""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Evaluate without inference mode: what it has touched can neither be sharded nor trained any more."""
        # Lightning asks the loops, which only an argument of the trainer tells, and wraps all of a step in it
        for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            loop.inference_mode = False

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Refuse a subclass that does not do what this module does in its set-up, and loaders that cannot grow.

        Raises:
            SettingError: The teacher's cache is left out by it, or a curriculum by the trainer.
        """
        if not pl_module.is_set_up:
            raise SettingError(
                f"{type(pl_module).__name__}.setup must call super().setup(stage): without it the teacher is not "
                "cached, and what an earlier run has left is used"
            )
        curriculum = find_curriculum(trainer)
        if curriculum is not None and curriculum.epochs_alike(0) is not None:
            check_rebuilt(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Refuse loaders that cannot grow, also of a curriculum that only they know.

        Raises:
            SettingError: They would be built only once.
        """
        for loader in CombinedLoader(trainer.train_dataloader).flattened:
            rows = getattr(loader, "dataset", None)
            if isinstance(rows, EpochRows) and rows.epochs is not None:
                check_rebuilt(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Get the student ready for answers, however it is spread."""
        pl_module.student_handle.begin_answering(pl_module.student, pl_module)

    on_predict_start = on_test_start

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Free what was gathered."""
        pl_module.student_handle.free()

    def on_predict_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Tell ranks that have no batch left."""
        pl_module.student_handle.begin_batch()

    def on_predict_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Go along with ranks that still answer, and free what was gathered."""
        pl_module.student_handle.end_predicting()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Free what was gathered."""
        pl_module.student_handle.free()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        """Weigh all response tokens of the step alike; callbacks before this one see them off by a factor near 1."""
        pl_module.token_normalizer.correct(pl_module.parameters())
        if not pl_module.reads_when_clipping:
            pl_module.read_measures()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Check that a token of the epoch was trained on."""
        pl_module.token_normalizer.check_learnt()


def check_rebuilt(trainer: Trainer) -> None:
    """Refuse a trainer that builds its loaders only once: with a curriculum, no row would ever come in.

    Raises:
        SettingError: It does.
    """
    if trainer.reload_dataloaders_every_n_epochs != 1:  # type: ignore[attr-defined]
        data = trainer.datamodule  # type: ignore[attr-defined]
        whose = "training data" if data is None else type(data).__name__
        raise SettingError(
            f"the {whose} has a curriculum, but its loader would be built only once, with the rows of the first "
            "stage: add CurriculumCallback() to the callbacks, with the curriculum, where the data module has none "
            "of this name"
        )
