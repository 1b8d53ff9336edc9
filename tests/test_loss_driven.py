"""Settings that follow the loss: what they come to, on which steps, and where a run is resumed."""

import itertools

import lightning as L
import pytest
import references
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import QUIET, lively_model, make_rows, tiny_model
from torch.optim import SGD, AdamW
from transformers import ByT5Tokenizer

from srd_lightning import (
    GKD,
    TAID,
    Decoding,
    ForwardKL,
    HyperparameterScheduler,
    KDLightningModule,
    LossDrivenShare,
    NewOptimizerEachStage,
    Selected,
    SRDDataModule,
    TAIDSchedule,
)
from srd_lightning.errors import SettingError

ROWS = make_rows(24)


class Watch(L.Callback):
    """Keeps, for every step, the setting that it was made with, the loss, and steps that the optimizer knows of."""

    def __init__(self, attribute):
        self.attribute, self.values, self.losses, self.known = attribute, {}, {}, {}

    def on_train_batch_start(self, trainer, pl_module, *_):
        self._value = getattr(pl_module.loss, self.attribute, None)

    def on_train_batch_end(self, trainer, pl_module, *_):
        if (step := trainer.global_step) not in (0, *self.losses):
            self.values[step], self.losses[step] = self._value, float(trainer.callback_metrics["train_kd"])
            states = trainer.optimizers[0].state.values()
            self.known[step] = {int(state["step"]) for state in states if "step" in state}


def train(folder, callback, loss, attribute="t", ckpt_path=None, schedule=None, optimizer=None, **settings):
    watch = Watch(attribute)
    module = KDLightningModule(
        tiny_model(0), lively_model(1), loss, kd_weight=0.7, optimizer=optimizer or (lambda p: SGD(p, lr=0.05))
    )
    data = SRDDataModule(
        ROWS, ByT5Tokenizer(), schedule=schedule or {0: 1.0}, batch_size=6, decoding=Decoding(max_new_tokens=1)
    )
    callbacks = [watch, *([] if callback is None else [callback]), *settings.pop("callbacks", [])]
    settings = {"max_epochs": 3, **QUIET, **settings}
    trainer = L.Trainer(callbacks=callbacks, default_root_dir=folder, **settings)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return watch, module


@pytest.mark.parametrize("accumulated", [1, 2])
def test_t_of_every_step_follows_the_losses(accumulated, tmp_path):
    watch, module = train(
        tmp_path, TAIDSchedule(0.3, 0.9, alpha=0.5, momentum=0.5), TAID(), accumulate_grad_batches=accumulated
    )
    losses = [watch.losses[step] for step in sorted(watch.losses)]
    assert len(losses) == 12 // accumulated
    expected = references.following_t(losses, 0.3, 0.9, alpha=0.5, momentum=0.5)
    assert list(watch.values.values()) == pytest.approx(expected, rel=1e-6)
    linear = references.following_t(losses, 0.3, 0.9, alpha=0.0, momentum=0.5)
    assert any(abs(one - other) > 0.01 for one, other in zip(expected, linear, strict=True))
    assert module.loss.t == 0.9


def test_the_share_follows_the_loss(tmp_path):
    watch, _ = train(
        tmp_path, LossDrivenShare(rate=0.3, tolerance=0.01, decay=0.0, warm_up=0.0), Selected(), attribute="share"
    )
    share, reference, expected = 1.0, None, []
    for loss in watch.losses.values():
        expected.append(share)
        reference = loss if reference is None else reference
        if loss < 0.99 * reference:
            share, reference = max(share * 0.7, 0.1), loss
        elif loss > 1.01 * reference:
            share, reference = min(share * 1.3, 1.0), loss
    assert list(watch.values.values()) == pytest.approx(expected)
    assert len(set(expected)) > 3


def kept(folder, step=None):
    """Return a callback that saves after every step, or what it has saved after one."""
    if step is not None:
        return folder / "kept" / f"step={step}.ckpt"
    return ModelCheckpoint(folder / "kept", "{step}", save_top_k=-1, every_n_train_steps=1)


def test_a_resumed_run_goes_on_with_the_same_values_bit_for_bit(tmp_path):
    whole, module = train(
        tmp_path, TAIDSchedule(alpha=0.2), TAID(), callbacks=[kept(tmp_path)], enable_checkpointing=True
    )
    for step in (3, 8):
        found, resumed = train(tmp_path, TAIDSchedule(alpha=0.2), TAID(), ckpt_path=kept(tmp_path, step))
        assert list(found.values) == list(range(step + 1, 13))
        assert found.values == {number: whole.values[number] for number in found.values}
        assert found.losses == {number: whole.losses[number] for number in found.losses}
        for weight, expected in zip(resumed.parameters(), module.parameters(), strict=True):
            assert torch.equal(weight, expected)


@pytest.mark.parametrize(
    ("callbacks", "loss", "said"),
    [
        ([TAIDSchedule()], ForwardKL(), "KDLightningModule has no attribute 'loss.t' to schedule"),
        ([LossDrivenShare()], TAID(), "no attribute 'loss.share'"),
        (
            [TAIDSchedule(), HyperparameterScheduler({"loss.t": {0: 0.5}})],
            TAID(),
            "a HyperparameterScheduler and TAIDSchedule both set loss.t; leave one of them out",
        ),
    ],
    ids=["no_t", "no_share", "twice"],
)
def test_what_is_refused_before_rows_are_read(callbacks, loss, said, tmp_path):
    trainer = L.Trainer(max_epochs=1, callbacks=callbacks, default_root_dir=tmp_path, **QUIET)
    module = KDLightningModule(tiny_model(0), lively_model(1), loss)
    with pytest.raises(SettingError, match=said):
        trainer.fit(module, datamodule=SRDDataModule("none.jsonl", ByT5Tokenizer()))


def test_without_a_distillation_loss_there_is_nothing_to_follow(tmp_path):
    trainer = L.Trainer(max_epochs=1, callbacks=[TAIDSchedule()], default_root_dir=tmp_path, **QUIET)
    module = KDLightningModule(tiny_model(0), loss=TAID(), kd_weight=0.0)
    with pytest.warns(UserWarning, match=r"no step had a distillation loss, .* so loss.t stayed at 0.4"):
        trainer.fit(module, datamodule=SRDDataModule(ROWS, ByT5Tokenizer(), schedule={0: 1.0}))


def test_steps_without_a_distillation_loss_are_not_followed(tmp_path):
    """Only own text is distilled here, so a step of references says nothing: the loss that was logged last is older."""

    class Told(L.Callback):
        def __init__(self):
            self.t, self.distilled = [], []

        def on_train_batch_start(self, trainer, pl_module, *_):
            self.t.append(pl_module.loss.t)

        def on_train_batch_end(self, trainer, pl_module, *_):
            self.distilled.append(pl_module.step_kd() is not None)

    told = Told()
    module = KDLightningModule(
        tiny_model(0),
        lively_model(1),
        TAID(),
        kd_weight=0.0,
        tokenizer=ByT5Tokenizer(),
        rollouts=GKD(0.5, Decoding(max_new_tokens=2)),
    )
    trainer = L.Trainer(max_epochs=3, callbacks=[told, TAIDSchedule()], default_root_dir=tmp_path, **QUIET)
    trainer.fit(module, datamodule=SRDDataModule(ROWS, ByT5Tokenizer(), schedule={0: 1.0}, batch_size=3))
    moved = [after > before for before, after in itertools.pairwise(told.t)]
    assert moved == told.distilled[:-1]
    assert {True, False} == set(moved)


@pytest.mark.parametrize("make", [lambda: TAIDSchedule(0.9, 0.4), lambda: LossDrivenShare(rate=1.0)])
def test_settings_that_cannot_be(make):
    with pytest.raises(SettingError, match="must lie in"):
        make()


def test_settings_inside_a_loss_are_staged_by_epoch(tmp_path):
    schedules = {"loss.temperature": {0: 1.0, 1: 2.0}, "loss.share": {0: 0.5, 2: 0.25}, "loss.loss.t": {0: 0.4, 1: 0.8}}
    _, module = train(tmp_path, HyperparameterScheduler(schedules), Selected(TAID()), attribute="share")
    assert (module.loss.loss.loss.temperature, module.loss.share, module.loss.loss.t) == (2.0, 0.25, 0.8)


# A new optimizer each stage

STAGES = {"schedule": {0: 0.5, 2: 1.0}, "optimizer": lambda p: AdamW(p, lr=1e-3), "max_epochs": 4}


def test_the_optimizer_knows_of_the_steps_of_its_stage_only_also_where_a_run_is_resumed(tmp_path):
    settings = {"enable_checkpointing": True, **STAGES}
    watch, _ = train(tmp_path, NewOptimizerEachStage(), ForwardKL(), callbacks=[kept(tmp_path)], **settings)
    expected = {step: {step if step <= 4 else step - 4} for step in range(1, 13)}
    assert watch.known == expected
    for step in (4, 5):
        watch, _ = train(tmp_path, NewOptimizerEachStage(), ForwardKL(), ckpt_path=kept(tmp_path, step), **STAGES)
        assert watch.known == {number: expected[number] for number in range(step + 1, 13)}
