"""Callbacks: what is staged, what is checked, what is exported."""

from __future__ import annotations

import copy
import json
import shutil
from operator import attrgetter
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info

from srd_lightning.checkpoint import put_in_place
from srd_lightning.curriculum import Curriculum, check_schedule, value_at
from srd_lightning.planning import find_curriculum
from srd_lightning.resume import repair_progress
from srd_lightning.store import write_atomically


class HyperparameterScheduler(Callback):
    """Gives attributes of the module the value of the epoch.

    Args:
        schedules: ``{attribute: {first epoch: value}}``; an attribute may be dotted.

    Raises:
        ValueError: A schedule that does not begin at epoch 0, or (at set-up) an attribute that the module lacks.

    Example:
        >>> HyperparameterScheduler({"loss.temperature": {0: 1.0, 8: 1.5, 16: 2.0}}).values(epoch=8)
        {'loss.temperature': 1.5}
    """

    def __init__(self, schedules: dict[str, dict[int, float]]) -> None:
        self.schedules = {name: check_schedule(schedule, name) for name, schedule in schedules.items()}

    def values(self, epoch: int) -> dict[str, float]:
        """Return the values that hold in an epoch."""
        return {name: value_at(schedule, epoch) for name, schedule in self.schedules.items()}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse an attribute that is not there: assigning it would change nothing."""
        for name in self.schedules if stage == "fit" else ():
            try:
                attrgetter(name)(pl_module)
            except AttributeError as error:
                raise ValueError(
                    f"{type(pl_module).__name__} has no attribute {name!r} to schedule: {error}"
                ) from error

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the values also where a run is resumed within an epoch."""
        self._apply(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set and log the values of the epoch."""
        self._apply(trainer, pl_module)
        pl_module.log_dict({f"schedule/{name}": value for name, value in self.values(trainer.current_epoch).items()})

    def _apply(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, value in self.values(trainer.current_epoch).items():
            owner, _, attribute = name.rpartition(".")
            setattr(attrgetter(owner)(pl_module) if owner else pl_module, attribute, value)


class CurriculumCallback(Callback):
    """Makes any data module grow: loaders are rebuilt every epoch, and the size of the pool is checked and logged.

    Args:
        curriculum: By default the one of the data module.

    Raises:
        ValueError: There is no curriculum, or an epoch trains on another number of rows than planned.
    """

    def __init__(self, curriculum: Curriculum | None = None) -> None:
        self.curriculum = curriculum

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have the loaders rebuilt every epoch: one that is built once keeps its first length."""
        if stage != "fit":
            return
        trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]
        if find_curriculum(trainer) is None:
            raise ValueError("CurriculumCallback needs a curriculum: give it one, or use SRDDataModule")

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Repair what Lightning counted, for modules that do not do so themselves."""
        repair_progress(checkpoint, trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check and log the pool of the epoch."""
        curriculum, epoch = find_curriculum(trainer), trainer.current_epoch
        assert curriculum is not None
        planned, rows = curriculum.size(epoch), len(trainer.train_dataloader.dataset)  # type: ignore[union-attr]
        if rows != planned:
            raise ValueError(
                f"epoch {epoch} should train on {planned} rows, but its loader holds {rows}; build the loader in "
                "train_dataloader() from curriculum.subset(dataset, self.trainer.current_epoch)"
            )
        stage = curriculum.stage(epoch)
        if epoch in curriculum.schedule:
            rank_zero_info(f"stage {stage} begins at epoch {epoch} with {rows} rows")
        pl_module.log_dict({"curriculum/stage": float(stage), "curriculum/rows": float(rows)})


class AnswerWriter(BasePredictionWriter):
    """Writes what ``predict`` answers, one JSON object with prompt, response and answer a line.

    Args:
        path: The file; replaced when a run begins. With several processes each writes its own, ``NAME.RANK.jsonl``.
    """

    def __init__(self, path: str) -> None:
        super().__init__("batch")
        self.path = Path(path)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin a new file."""
        if stage == "predict":
            if trainer.world_size > 1:
                self.path = self.path.with_name(f"{self.path.stem}.{trainer.global_rank}{self.path.suffix}")
            write_atomically(self.path, b"")

    def write_on_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, prediction: Any, *_: Any, **__: Any
    ) -> None:
        """Append the answers of a batch."""
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in prediction)


class HuggingFaceExport(Callback):
    """Saves the trained student as a Hugging Face folder: safetensors, configuration, tokenizer.

    Args:
        dirpath: The folder; replaced as a whole when training ends. LoRA adapters are merged into the weights.
    """

    def __init__(self, dirpath: str) -> None:
        self.dirpath = Path(dirpath)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module whose student cannot be saved, before it is trained."""
        if stage == "fit" and not hasattr(pl_module, "student"):
            raise ValueError(f"HuggingFaceExport saves `student`, which {type(pl_module).__name__} does not have")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write to a folder beside it, which then takes its place."""
        module: Any = pl_module
        student = module.whole_student(only_first=True) if hasattr(module, "whole_student") else module.student
        if trainer.is_global_zero:
            self._save(student, trainer, pl_module)

    def _save(self, student: Any, trainer: Trainer, pl_module: LightningModule) -> None:
        if hasattr(student, "merge_and_unload"):
            student = copy.deepcopy(student).merge_and_unload()
        temporary = self.dirpath.with_name(f".{self.dirpath.name}.partial")
        shutil.rmtree(temporary, ignore_errors=True)
        student.save_pretrained(temporary)
        tokenizer = getattr(pl_module, "tokenizer", None) or getattr(trainer.datamodule, "tokenizer", None)  # type: ignore[attr-defined]
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        put_in_place(temporary, self.dirpath)
        rank_zero_info(f"student saved to {self.dirpath}")
