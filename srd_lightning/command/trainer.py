"""`SRDTrainer`: Lightning's Trainer that can also stop after curation, or after the teacher was cached."""

from __future__ import annotations

import warnings
from typing import Any

from lightning import LightningDataModule, LightningModule, Trainer
from rich.console import Console
from torch.utils.data import DataLoader

from srd_lightning.datamodule import SRDDataModule
from srd_lightning.module import KDLightningModule
from srd_lightning.preflight import Preflight


class SRDTrainer(Trainer):
    """Lightning's Trainer that can also curate."""

    def fit(self, *args: Any, ckpt_path: Any = None, **kwargs: Any) -> None:
        """Train; the path of a checkpoint is known from now on, so that what differs from it shows early."""
        if ckpt_path in (None, "", "best", "last", "hpc") or str(ckpt_path).startswith("registry"):
            super().fit(*args, **kwargs, ckpt_path=ckpt_path)  # type: ignore[misc]
            return
        self.ckpt_path = ckpt_path
        try:
            super().fit(*args, **kwargs)
        finally:
            self.ckpt_path = None  # or what comes after would begin with it as well

    def curate(self, model: LightningModule, datamodule: SRDDataModule) -> None:
        """Reflect and rank only: let the student answer every prompt, save the scores, show what came of it."""
        self._only_set_up(_Bystander(model), datamodule)
        if self.is_global_zero:
            datamodule.report(Console())

    def cache_teacher(self, model: KDLightningModule, datamodule: SRDDataModule) -> None:
        """Curate, and let the teacher see every row that is kept, so that ``fit`` need not load it."""
        self._only_set_up(_Cacher(model), datamodule)

    def _only_set_up(self, bystander: _Bystander, datamodule: SRDDataModule) -> None:
        """Curate, and do what the bystander does in its own set-up, on every process."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Total length of")  # there is nothing to predict
            self.predict(bystander, datamodule=_CurationOnly(datamodule))


setattr(SRDTrainer, "cache-teacher", SRDTrainer.cache_teacher)  # LightningCLI looks for the name of the subcommand


class _Bystander(LightningModule):
    """Stands where a model must stand in a run without steps; knows the student, never loads the teacher."""

    def __init__(self, model: LightningModule) -> None:
        super().__init__()
        self.models: list[Any] = [model]  # in a list, so that it is no part of this module

    def build_student(self) -> Any:
        return self.models[0].build_student()

    def whole_student(self, only_first: bool = False) -> Any:
        return self.models[0].whole_student(only_first)

    def student_tokenizer(self) -> Any:
        return self.models[0].student_tokenizer()

    def models_by_name(self) -> Any:
        return self.models[0].models_by_name()

    def preflight(self, trainer: Trainer) -> None:
        """Let the module that it stands for check, if it can."""
        if isinstance(self.models[0], Preflight):
            self.models[0].preflight(trainer)

    def configure_model(self) -> None:
        """Nothing to shard; strategies that shard ask for it."""

    def predict_step(self, *_: Any) -> None: ...


class _Cacher(_Bystander):
    """Lets the teacher of the module that it stands for be cached, on every process."""

    def preflight(self, trainer: Trainer) -> None:
        super().preflight(trainer)
        self.models[0].check_cache(trainer)

    def setup(self, stage: str) -> None:
        self.models[0].cache(self.trainer.datamodule.datamodule, self.trainer)  # type: ignore[attr-defined]


class _CurationOnly(LightningDataModule):
    """Runs the curation of a data module in its own set-up, on every process."""

    def __init__(self, datamodule: SRDDataModule) -> None:
        super().__init__()
        self.datamodule = datamodule

    def setup(self, stage: str) -> None:
        self.datamodule.trainer = self.trainer
        self.datamodule.setup("fit")

    def predict_dataloader(self) -> DataLoader[Any]:
        return DataLoader([])  # type: ignore[arg-type]
