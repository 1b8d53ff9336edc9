"""`pytorch_lightning` beside ours, each way round: writes what is said, and by whom."""

import json
import sys
import warnings
from pathlib import Path

import lightning as L
import pytorch_lightning as pl
import torch
from distil import make_rows, tiny
from own_both import Numbers, Regression
from own_data import Palindromes
from transformers import ByT5Tokenizer

from srd_lightning import Curriculum, CurriculumCallback, KDLightningModule, SRDDataModule

QUIET = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
QUIET |= {"enable_model_summary": False, "enable_checkpointing": False}


class Theirs(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    training_step, configure_optimizers = Regression.training_step, Regression.configure_optimizers


class TheirData(pl.LightningDataModule):
    def __init__(self):
        super().__init__()
        self.curriculum = Curriculum(torch.arange(20), {0: 0.5, 1: 1.0})
        self.dataset = [torch.tensor([float(number)]) for number in range(20)]

    train_dataloader = Numbers.train_dataloader


def ours():
    return KDLightningModule(tiny(0), tiny(1))


def rows():
    return SRDDataModule(make_rows()[:4], ByT5Tokenizer(), student=tiny(0), schedule={0: 1.0})


def only_the_callback():
    trainer = pl.Trainer(**{**QUIET, "max_epochs": 2}, callbacks=[CurriculumCallback()])
    trainer.fit(Theirs(), datamodule=TheirData())
    return trainer.global_step


CASES = {
    "our module in their trainer": lambda: pl.Trainer(**QUIET).fit(ours(), datamodule=Palindromes()),
    "our data in their trainer": lambda: pl.Trainer(**QUIET).fit(Theirs(), datamodule=rows()),
    "their module with our data": lambda: L.Trainer(**QUIET).fit(Theirs(), datamodule=rows()),
    "their data with our module": lambda: L.Trainer(**QUIET).fit(ours(), datamodule=TheirData()),
    "our callback in their trainer": only_the_callback,
}


def said_in(case):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            result = case()
        except Exception as error:
            result = f"{type(error).__name__}: {error}"
    return [result, [str(one.message) for one in said if "pytorch_lightning is imported" in str(one.message)]]


if __name__ == "__main__":
    Path(sys.argv[1], "said.json").write_text(json.dumps({name: said_in(case) for name, case in CASES.items()}))
