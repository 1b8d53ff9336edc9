"""Lightning's standard equipment beside ours: rows and values are those that were planned, whatever is plugged in."""

import lightning as L
import pytest
import torch
from lightning.pytorch import callbacks, loggers, profilers
from lightning.pytorch.tuner import Tuner
from tiny import QUIET, make_rows, tiny_model
from torch.optim import SGD
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader, IterableDataset
from transformers import ByT5Tokenizer

from srd_lightning import Curriculum, Decoding, HyperparameterScheduler, KDLightningModule, SRDDataModule
from srd_lightning.errors import SettingError
from srd_lightning.training.lr_plan import stage_steps

STAGED = {"loss.temperature": {0: 1.0, 1: 2.0}, "kd_weight": {0: 0.5, 2: 1.0}}
PLANNED = [(0, 4, 1.0, 0.5), (1, 4, 2.0, 0.5), (2, 8, 2.0, 1.0)]
"""Epoch, rows, temperature and weight of a run of three epochs on 8 rows, of which half come in first."""


class Seen(L.Callback):
    """Keeps the ids of the rows of each epoch, and the values that hold in it."""

    def __init__(self):
        self.rows, self.values = {}, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rows.setdefault(trainer.current_epoch, []).extend(trainer.train_dataloader.ids(batch_idx))
        self.values[trainer.current_epoch] = (pl_module.loss.temperature, pl_module.kd_weight)

    def of_epochs(self):
        return [(epoch, len(set(rows)), *self.values[epoch]) for epoch, rows in self.rows.items()]


def parts(folder, **options):
    module = KDLightningModule(tiny_model(0), tiny_model(1), optimizer=lambda params: SGD(params, lr=0.1), **options)
    rows = [{"id": number, **row} for number, row in enumerate(make_rows(8))]
    data = SRDDataModule(
        {"train": rows, "validation": rows[:2]},
        ByT5Tokenizer(),
        schedule={0: 0.5, 2: 1.0},
        scores=str(folder / "scores"),
        decoding=Decoding(max_new_tokens=1),
        batch_size=2,
    )
    return module, data


def tensorboard(folder):
    pytest.importorskip("torch.utils.tensorboard", reason="tensorboard is not installed", exc_type=ImportError)
    return loggers.TensorBoardLogger(folder)


EQUIPMENT = {
    "what watches": lambda folder: {
        "callbacks": [
            callbacks.EarlyStopping("val_nll", patience=9),
            callbacks.ModelCheckpoint(folder, monitor="val_kl", save_top_k=2, save_last=True),
            callbacks.OnExceptionCheckpoint(folder),
            callbacks.LearningRateMonitor(),
            callbacks.DeviceStatsMonitor(cpu_stats=True),
            callbacks.Timer("00:01:00:00"),
        ],
        "logger": loggers.CSVLogger(folder),
        "log_every_n_steps": 1,
        "enable_checkpointing": True,
    },
    "SWA": lambda folder: {"callbacks": [callbacks.StochasticWeightAveraging(0.01, swa_epoch_start=1)]},
    "EMA": lambda folder: {"callbacks": [callbacks.EMAWeightAveraging(decay=0.9)]},
    "steps": lambda folder: {
        "callbacks": [callbacks.GradientAccumulationScheduler({1: 2})],
        "gradient_clip_val": 1.0,
        "val_check_interval": 1,
        "detect_anomaly": True,
    },
    "TQDM": lambda folder: {
        "callbacks": [callbacks.TQDMProgressBar(), callbacks.RichModelSummary()],
        "enable_progress_bar": True,
        "enable_model_summary": True,
        "profiler": profilers.SimpleProfiler(folder, "simple"),
    },
    "Rich": lambda folder: {
        "callbacks": [callbacks.RichProgressBar()],
        "enable_progress_bar": True,
        "profiler": profilers.AdvancedProfiler(folder, "advanced"),
    },
    "TensorBoard": lambda folder: {"logger": tensorboard(folder), "log_every_n_steps": 1},
}


@pytest.mark.parametrize("equipment", EQUIPMENT.values(), ids=EQUIPMENT)
def test_rows_and_values_are_those_that_were_planned(equipment, tmp_path):
    module, data = parts(tmp_path)
    seen, options = Seen(), {**QUIET, **equipment(tmp_path)}
    own = [*options.pop("callbacks", []), seen, HyperparameterScheduler(STAGED)]
    L.Trainer(max_epochs=3, callbacks=own, default_root_dir=tmp_path, **options).fit(module, datamodule=data)
    assert seen.of_epochs() == PLANNED
    pools = {epoch: {str(row) for row in data.curriculum.rows(epoch).tolist()} for epoch in range(3)}
    assert {epoch: set(rows) for epoch, rows in seen.rows.items()} == pools


@pytest.mark.parametrize("way", ["callback", "tuner"])
def test_a_learning_rate_can_be_searched_for(way, tmp_path):
    """And the run after it begins with the first row, the first values, and the weights that were there."""
    module, data = parts(tmp_path)
    module.lr, module.optimizer = 1e-4, lambda params: SGD(params, lr=module.lr)
    before = {name: weight.clone() for name, weight in module.student.state_dict().items()}
    unchanged = []

    class First(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 0:
                now = pl_module.student.state_dict()
                unchanged.append(all(torch.equal(now[name], weight) for name, weight in before.items()))

    search = {"min_lr": 1e-6, "max_lr": 1e-3}
    own = [callbacks.LearningRateFinder(num_training_steps=16, **search)] if way == "callback" else []
    seen = Seen()
    trainer = L.Trainer(
        max_epochs=3, callbacks=[*own, HyperparameterScheduler(STAGED)], default_root_dir=tmp_path, **QUIET
    )
    if way == "tuner":
        Tuner(trainer).lr_find(module, datamodule=data, num_training=16, **search)
    trainer.callbacks.extend([seen, First()])
    trainer.fit(module, datamodule=data)
    assert unchanged[-1]
    assert trainer.global_step == 2 + 2 + 4
    if way == "tuner":
        assert seen.of_epochs() == PLANNED


class Numbers(L.LightningDataModule):
    """A stranger's data, of six batches."""

    def __init__(self, make=list):
        super().__init__()
        self.make = make

    def train_dataloader(self):
        ids = [torch.tensor([5, 6, 7, number]) for number in range(12)]
        rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]
        return DataLoader(self.make(rows), batch_size=2)


class Endless(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def planned(options, make=list):
    module = KDLightningModule(
        tiny_model(0),
        tiny_model(1),
        optimizer=lambda params: SGD(params, lr=0.1),
        lr_scheduler=lambda optimizer, steps: LinearLR(optimizer, 1.0, 0.0, steps),
    )
    trainer = L.Trainer(max_epochs=3, **QUIET, **options)
    trainer.fit(module, datamodule=Numbers(make))
    return stage_steps(trainer), trainer.global_step, trainer.optimizers[0].param_groups[0]["lr"]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, 18),
        ({"accumulate_grad_batches": 4}, 2 * 3),
        ({"callbacks": [callbacks.GradientAccumulationScheduler({0: 1, 1: 2, 2: 4})]}, 6 + 3 + 2),
        ({"limit_train_batches": 4, "max_steps": 7}, 7),
    ],
    ids=["plain", "accumulated", "accumulation by epoch", "limited"],
)
def test_steps_are_planned_without_a_curriculum(options, steps):
    assert planned(options) == ([steps], steps, pytest.approx(0, abs=1e-9))


def test_a_loader_without_length_needs_max_steps():
    assert planned({"max_steps": 5}, Endless) == ([5], 5, pytest.approx(0, abs=1e-9))
    with pytest.raises(SettingError, match=r"the training loader has no length; set the trainer's max_steps") as said:
        planned({}, Endless)
    assert "\n" not in str(said.value)


class Grown(Numbers):
    """Half of the rows in the first epoch, by a curriculum under a name of the stranger's own."""

    staged = Curriculum(torch.arange(12), {0: 0.5, 1: 1.0})

    def train_dataloader(self):
        rows = super().train_dataloader().dataset
        return DataLoader(self.staged.subset(rows, self.trainer.current_epoch), batch_size=2)


def test_a_curriculum_that_only_a_loader_knows_is_found():
    module = KDLightningModule(tiny_model(0), tiny_model(1))
    trainer = L.Trainer(max_epochs=2, **QUIET)
    with pytest.raises(SettingError, match=r"Grown has a curriculum, but .* only once.*: add CurriculumCallback"):
        trainer.fit(module, datamodule=Grown())
    assert trainer.global_step == 0


class Own(L.LightningModule):
    """A stranger's module."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch["input_ids"].float()).sum()

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=0.0)


def test_rows_that_are_read_beyond_their_stage_say_so():
    """Nothing of ours is in the run but the rows: 6/6 of them where 6/12 were planned."""
    with pytest.warns(UserWarning, match="the 6 rows of epoch 0 are read again after the 1 epochs that have these"):
        L.Trainer(max_epochs=2, **QUIET).fit(Own(), datamodule=Grown())


def test_rows_of_the_last_stage_may_be_read_for_ever(recwarn):
    rows = Curriculum(torch.arange(4), {0: 0.5, 1: 0.5, 2: 1.0})
    for epoch, epochs in [(0, 2), (1, 1), (2, None), (9, None)]:
        assert rows.epochs_alike(epoch) == epochs
        loader = DataLoader(rows.subset(range(4), epoch), batch_size=3)
        for _ in range(epochs or 5):
            assert torch.cat(list(loader)).tolist() == list(range(2 if epoch < 2 else 4))
    assert not [said for said in recwarn if "are read again" in str(said.message)]


def test_a_data_module_whose_setup_does_not_call_super():
    class NoSuper(SRDDataModule):
        def setup(self, stage):
            pass

    data = NoSuper(make_rows(4), ByT5Tokenizer())
    with pytest.raises(SettingError, match=r"the rows of NoSuper are not there yet: .* super\(\)\.setup\(stage\)"):
        L.Trainer(max_epochs=1, **QUIET).fit(KDLightningModule(tiny_model(0), tiny_model(1)), datamodule=data)
