"""`CurriculumCallback`: any data module grows with its curriculum, checked."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.combined_loader import CombinedLoader

from srd_lightning.checkpoints.resume_state import ResumeState
from srd_lightning.curriculum.curriculum import Curriculum, find_curriculum
from srd_lightning.data.loaders import RebuiltEveryEpoch
from srd_lightning.errors import SettingError


class CurriculumCallback(Callback):
    """Makes any data module grow: loaders are rebuilt every epoch, and the size of the pool is checked and logged.

    Where there are several training loaders, one of them, or all together, must hold the rows of the epoch.

    Args:
        curriculum: By default the one of the data module.

    Raises:
        SettingError: There is no curriculum or there are two, or an epoch trains on another number of rows than
            planned, or on a number that is not known.
    """

    logged = ("curriculum/stage", "curriculum/rows")

    def __init__(self, curriculum: Curriculum | None = None) -> None:
        self.curriculum = curriculum
        self._every_epoch = RebuiltEveryEpoch()

    def preflight(self, trainer: Trainer) -> None:
        """Refuse to begin without a curriculum, or with two."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        datamodule: Any = getattr(trainer, "datamodule", None)
        if self.curriculum is None and not hasattr(datamodule, "curriculum"):
            raise SettingError("CurriculumCallback needs a curriculum: give it one, or use SRDDataModule")
        theirs = getattr(datamodule, "curriculum", self.curriculum)
        if self.curriculum is not None and theirs is not self.curriculum:
            raise SettingError(
                f"CurriculumCallback has a curriculum, and {type(datamodule).__name__} has another, by which its rows "
                "are chosen; leave that of the callback out"
            )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have the loaders rebuilt every epoch: one that is built once keeps its first length."""
        self.preflight(trainer)
        if stage == "fit":
            if find_curriculum(trainer) is None:
                raise SettingError("CurriculumCallback needs a curriculum: give it one, or use SRDDataModule")
            self._every_epoch.begin(trainer)
            ResumeState.attach_to(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the trainer build its loaders as it did before."""
        self._every_epoch.end(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check and log the pool of the epoch."""
        curriculum, epoch = find_curriculum(trainer), trainer.current_epoch
        assert curriculum is not None
        planned, sizes = curriculum.size(epoch), rows_of_loaders(trainer.train_dataloader)
        if planned not in [*sizes, sum(size or 0 for size in sizes)]:
            found = " and ".join("a number that is not known" if size is None else str(size) for size in sizes)
            raise SettingError(
                f"epoch {epoch} should train on {planned} rows, but its loader holds {found}; build the loader in "
                "train_dataloader() from curriculum.subset(dataset, self.trainer.current_epoch), of a data set that "
                "has a length"
            )
        stage = curriculum.stage(epoch)
        if epoch in curriculum.schedule:
            rank_zero_info(f"stage {stage} begins at epoch {epoch} with {planned} rows")
        pl_module.log_dict({"curriculum/stage": float(stage), "curriculum/rows": float(planned)})


def rows_of_loaders(loaders: Any) -> list[int | None]:
    """Return how many rows each training loader holds, nothing where its data set does not know.

    Args:
        loaders: Of a trainer: one, or a list or dict of them.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> rows_of_loaders({"a": DataLoader(range(8)), "b": [DataLoader(range(4)), iter("ab")]})
        [8, 4, None]
    """
    data = [getattr(loader, "dataset", None) for loader in CombinedLoader(loaders).flattened]
    return [len(rows) if isinstance(rows, Sized) else None for rows in data]
