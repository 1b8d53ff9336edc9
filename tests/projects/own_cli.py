"""A stranger's LightningCLI, in which our module and data are named by class path, and theirs derive from ours."""

from pathlib import Path

import lightning as L
import torch
from distil import make_rows, tiny
from lightning.pytorch.cli import LightningCLI
from transformers import ByT5Tokenizer

from srd_lightning import ForwardKL, KDLightningModule, SRDDataModule


class Mine(KDLightningModule):
    """Their module: ours, with an objective and a measure more."""

    def __init__(self, decay: float = 0.0, **options: object) -> None:
        super().__init__(**options)
        self.decay = decay

    def setup(self, stage):
        super().setup(stage)
        self.was_set_up = True

    def training_step(self, batch, batch_idx):
        squares = sum(weight.square().sum() for weight in self.student.parameters())
        self.log("squares", squares.detach())
        return super().training_step(batch, batch_idx) + self.decay * squares


class Few(SRDDataModule):
    """Their data: ours, with rows of their own."""

    def __init__(self, rows: int, **options: object) -> None:
        super().__init__(make_rows()[:rows], ByT5Tokenizer(), **options)


def main(callbacks=(), **trainer_options):
    folder = Path(trainer_options["default_root_dir"])
    for seed, name in enumerate(["student", "teacher"]):
        tiny(seed).save_pretrained(folder / name)
        ByT5Tokenizer().save_pretrained(folder / name)
    model = {"class_path": "own_cli.Mine", "init_args": {"decay": 0.01, "student": str(folder / "student")}}
    model["init_args"] |= {"teacher": str(folder / "teacher"), "loss": {"class_path": "srd_lightning.ForwardKL"}}
    data = {"class_path": "own_cli.Few", "init_args": {"rows": 12, "schedule": {0: 0.5, 1: 1.0}, "batch_size": 2}}
    cli = LightningCLI(
        L.LightningModule,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        trainer_defaults={**trainer_options, "callbacks": list(callbacks), "max_epochs": 2},
        save_config_callback=None,
        seed_everything_default=0,
        args={"model": model, "data": data},
        run=False,
    )
    assert isinstance(cli.model.loss, ForwardKL)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    assert cli.model.was_set_up
    assert torch.isfinite(cli.trainer.callback_metrics["squares"])
    return cli.trainer
