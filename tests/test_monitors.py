"""What Lightning's callbacks watch, and what the module needs of those who derive from it, said before training."""

import math

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from tiny import QUIET, make_rows, tiny_model
from torch.utils.data import DataLoader
from transformers import ByT5Tokenizer

from srd_lightning import (
    GKD,
    Curriculum,
    CurriculumCallback,
    HyperparameterScheduler,
    KDLightningModule,
    SRDDataModule,
)
from srd_lightning.callbacks.monitors import check_monitors
from srd_lightning.errors import SettingError


def trainer(*callbacks, **options):
    checkpoints = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    settings = {**QUIET, "enable_checkpointing": checkpoints, "max_epochs": 1, **options}
    return L.Trainer(callbacks=list(callbacks), **settings)


class TestMonitors:
    @pytest.mark.parametrize(
        ("callback", "said"),
        [
            (
                lambda: EarlyStopping("val_loss"),
                r"EarlyStopping\(monitor='val_loss'\) waits for 'val_loss', which is never logged in this run; there "
                r"are train_ce, train_kd, train_loss, val_kl, val_nll$",
            ),
            (lambda: ModelCheckpoint(monitor="val_ppl"), r"ModelCheckpoint\(monitor='val_ppl'\) waits for 'val_ppl'"),
            (
                lambda: ModelCheckpoint(filename="{epoch}-{val_loss:.2f}"),
                r"ModelCheckpoint\(filename='\{epoch\}-\{val_loss:.2f\}'\) waits for 'val_loss'",
            ),
            (
                lambda: ModelCheckpoint(monitor="val_nll", mode="max"),
                r"ModelCheckpoint\(monitor='val_nll', mode='max'\) would look for the highest loss; set mode to 'min'",
            ),
        ],
    )
    def test_what_never_comes_is_refused(self, callback, said):
        with pytest.raises(SettingError, match=said):
            check_monitors(trainer(callback()), has_teacher=True)

    @pytest.mark.parametrize(
        "callbacks",
        [
            [EarlyStopping("val_nll"), ModelCheckpoint(monitor="val_kl", filename="{epoch}-{step}-{val_nll:.3f}")],
            [ModelCheckpoint(monitor="val_nll/dataloader_idx_1", filename="best")],
            [ModelCheckpoint(monitor="step", mode="max", save_top_k=2)],
            [
                ModelCheckpoint(filename="{epoch}-{schedule/kd_weight}"),
                HyperparameterScheduler({"kd_weight": {0: 1.0}}),
            ],
            [EarlyStopping("later", strict=False)],
        ],
    )
    def test_what_comes_is_not(self, callbacks):
        check_monitors(trainer(*callbacks), has_teacher=True)

    def test_a_stranger_may_log_it(self):
        class Logs(L.Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                pl_module.log("perplexity", 1.0)

        check_monitors(trainer(EarlyStopping("perplexity"), Logs()), has_teacher=True)

    @pytest.mark.parametrize("name", ["val_kl", "train_kd"])
    def test_without_a_teacher_there_is_no_divergence(self, name):
        with pytest.raises(SettingError, match=f"waits for '{name}'"):
            check_monitors(trainer(EarlyStopping(name)), has_teacher=False)

    @pytest.mark.parametrize(
        ("name", "options", "staged"),
        [
            ("train_ce", {}, {}),
            ("train_ce", {"kd_weight": 0.5, "rollouts": GKD(1.0)}, {}),
            ("train_ce", {"kd_weight": 0.5}, {0: 1.0}),
            ("train_kd", {"kd_weight": 0.0}, {}),
        ],
    )
    def test_a_part_of_the_objective_that_never_has_a_weight(self, name, options, staged):
        """With those that do is asked, and every value of a schedule counts."""
        callbacks = [HyperparameterScheduler({"kd_weight": staged})] if staged else []
        module = KDLightningModule(tiny_model(0), tiny_model(1), tokenizer=ByT5Tokenizer(), **options)
        data = SRDDataModule(make_rows(4), ByT5Tokenizer(), schedule={0: 1.0})
        data.read_rows = lambda *_: pytest.fail("rows were read")
        with pytest.raises(SettingError, match=f"waits for '{name}', which is never logged in this run"):
            trainer(EarlyStopping(name), *callbacks).fit(module, datamodule=data)

    @pytest.mark.filterwarnings("ignore:the values of kd_weight")  # the run is short
    @pytest.mark.parametrize(
        ("options", "staged"),
        [({"kd_weight": 0.5}, {}), ({"kd_weight": 0.5, "rollouts": GKD(0.9)}, {}), ({}, {0: 0.5, 1: 1.0})],
    )
    def test_a_part_that_has_a_weight_at_times(self, options, staged):
        callbacks = [HyperparameterScheduler({"kd_weight": staged})] if staged else []
        module = KDLightningModule(tiny_model(0), tiny_model(1), tokenizer=ByT5Tokenizer(), **options)
        data = SRDDataModule(make_rows(4), ByT5Tokenizer(), schedule={0: 1.0})
        data.read_rows = lambda *_: (_ for _ in ()).throw(InterruptedError)
        with pytest.raises(InterruptedError):
            trainer(EarlyStopping("train_ce"), EarlyStopping("train_kd"), *callbacks).fit(module, datamodule=data)

    @pytest.mark.parametrize("why", ["no rows", "limit"])
    def test_without_validation_there_is_no_val_nll(self, why):
        rows = make_rows(4)
        data = SRDDataModule(
            {"train": rows} if why == "no rows" else {"train": rows, "validation": rows},
            ByT5Tokenizer(),
            schedule={0: 1.0},
        )
        data.read_rows = lambda: pytest.fail("rows were read")
        options = {} if why == "no rows" else {"limit_val_batches": 0}
        with pytest.raises(SettingError, match="waits for 'val_nll', which is never logged in this run"):
            trainer(EarlyStopping("val_nll"), **options).fit(
                KDLightningModule(tiny_model(0), tiny_model(1)), datamodule=data
            )


def batches(collated):
    return DataLoader([collated] * 2, collate_fn=lambda rows: rows[0])


BATCH = {
    "input_ids": torch.tensor([[5, 6, 7, 8]]),
    "attention_mask": torch.ones(1, 4, dtype=torch.int64),
    "labels": torch.tensor([[-100, -100, 7, 8]]),
}


class TestSubclasses:
    def test_one_that_forgets_the_set_up(self):
        """It would train, but ask the teacher at every step though `teacher_cache` is set."""

        class Forgets(KDLightningModule):
            def setup(self, stage):
                self.ready = True

        with pytest.raises(SettingError, match=r"Forgets\.setup must call super\(\)\.setup\(stage\)"):
            trainer().fit(Forgets(tiny_model(0), tiny_model(1)), batches(BATCH))

    def test_one_that_does_not(self):
        class Does(KDLightningModule):
            def setup(self, stage):
                super().setup(stage)

        trainer().fit(Does(tiny_model(0), tiny_model(1)), batches(BATCH))

    @pytest.mark.parametrize("entry", ["test", "predict"])
    def test_answers_need_a_tokenizer_before_the_first_batch(self, entry):
        class Untouched(DataLoader):
            def __iter__(self):
                pytest.fail("a batch was asked for")

        with pytest.raises(SettingError, match=r"answers need a tokenizer: give KDLightningModule\(tokenizer="):
            getattr(trainer(), entry)(KDLightningModule(tiny_model(0), tiny_model(1)), Untouched([BATCH]))

    def test_answers_of_ones_own_need_none(self):
        class Own(KDLightningModule):
            def predict_step(self, batch, batch_idx):
                return batch["labels"]

        assert len(trainer().predict(Own(tiny_model(0), tiny_model(1)), batches(BATCH))) == 2


def test_a_validation_that_is_no_number_is_no_mean_of_the_others(monkeypatch):
    monkeypatch.setattr(
        "srd_lightning.training.compatibility.check_module", lambda *_: None
    )  # which refuses such a student
    student = tiny_model(0)
    poisoned = {**BATCH, "input_ids": torch.tensor([[5, 6, 9, 8]])}
    with torch.no_grad():
        student.model.embed_tokens.weight[9] = math.nan
    rows = DataLoader([BATCH, poisoned], collate_fn=lambda rows: rows[0])
    (found,) = trainer().validate(KDLightningModule(student, tiny_model(1)), rows, verbose=False)
    assert math.isnan(found["val_nll"])


def test_the_callback_of_a_curriculum_brings_its_rows_to_an_own_data_module():
    seen = []

    class Staged(L.LightningDataModule):
        curriculum = Curriculum(torch.arange(8), {0: 0.5, 1: 1.0})

        def train_dataloader(self):
            rows = self.curriculum.subset([BATCH] * 8, self.trainer.current_epoch)
            seen.append(len(rows))
            return DataLoader(rows, collate_fn=lambda rows: rows[0])

    L.Trainer(max_epochs=3, callbacks=[CurriculumCallback()], **QUIET).fit(
        KDLightningModule(tiny_model(0), tiny_model(1)), datamodule=Staged()
    )
    assert seen == [4, 8, 8]
