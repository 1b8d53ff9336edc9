import time
from types import SimpleNamespace

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.states import TrainerFn
from tiny import QUIET

from srd_lightning import TrainingClock
from srd_lightning.studies.curves import read_curves

TRAINER = SimpleNamespace(
    state=SimpleNamespace(fn=TrainerFn.FITTING),
    strategy=SimpleNamespace(root_device=torch.device("cpu")),
    sanity_checking=False,
)


@pytest.fixture
def now(monkeypatch):
    """Both clocks; the processor's runs half as fast."""
    now = SimpleNamespace(time=100.0)
    monkeypatch.setattr(time, "perf_counter", lambda: now.time)
    monkeypatch.setattr(time, "process_time", lambda: now.time / 2)
    return now


def test_validation_is_left_out_and_a_resumed_run_goes_on(now):
    clock = TrainingClock()
    clock.on_validation_start(TRAINER, None)  # of the sanity check, before training
    clock.on_train_start(TRAINER, None)
    now.time += 3
    clock.on_validation_start(TRAINER, None)
    now.time += 7
    assert (clock.seconds, clock.processor_seconds) == (3, 1.5)
    clock.on_validation_end(TRAINER, None)
    now.time += 1
    saved = clock.state_dict()
    assert saved == {"seconds": 4, "processor_seconds": 2}

    resumed = TrainingClock()
    resumed.load_state_dict(saved)
    resumed.on_train_start(TRAINER, None)
    now.time += 2
    resumed.on_train_end(TRAINER, None)
    now.time += 9
    assert (resumed.seconds, resumed.processor_seconds) == (6, 3)


class Measured(BoringModel):
    def training_step(self, batch, batch_idx):
        found = super().training_step(batch, batch_idx)
        self.log("train_loss", found["loss"])
        return found

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", super().validation_step(batch, batch_idx)["x"])


def test_seconds_stand_beside_the_measures_of_any_module(tmp_path):
    options = {**QUIET, "logger": CSVLogger(tmp_path), "callbacks": [TrainingClock()], "log_every_n_steps": 1}
    Trainer(**options, max_steps=4, val_check_interval=2, limit_val_batches=1).fit(Measured())
    curves = read_curves(tmp_path)
    assert curves["train_loss"].steps.tolist() == [1, 2, 3, 4]
    assert curves["val_loss"].steps.tolist() == [2, 4]
    for curve in (curves["train_loss"], curves["val_loss"]):
        assert (curve.seconds[1:] > curve.seconds[:-1]).all()
        assert curve.seconds[0] > 0
