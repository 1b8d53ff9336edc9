"""How often a host would wait for a GPU: once per optimizer step, when its gradients are there; see `device.py`."""

import copy
from dataclasses import replace

import lightning as L
import pytest
from device import WAITS, OnDevice, to_device
from lightning.pytorch.loggers import CSVLogger
from tiny import QUIET, lively_model, make_rows, tiny_model
from transformers import ByT5Tokenizer

from srd_lightning import (
    TAID,
    AdaptiveKL,
    AlphaBeta,
    CacheSettings,
    ForwardKL,
    Hellinger,
    KDLightningModule,
    LossDrivenShare,
    RuntimeBenchmark,
    Selected,
    SRDDataModule,
    TAIDSchedule,
    TokenTemperature,
)
from srd_lightning.data.layout import Layout, _each


class OnGPU(KDLightningModule):
    """Has its models, its batches and their layouts as if on a GPU."""

    def configure_model(self):
        super().configure_model()
        to_device(self.student)
        if self.teacher is not None:
            to_device(self.teacher)
        if (cached := self.teacher_handle.cached) is not None:
            head = replace(cached.head, weight=OnDevice(cached.head.weight))
            self.teacher_handle.cached = replace(cached, head=head)
            self.prepare()


class Watch(L.Callback):
    """Counts what is waited for from the second step on: before gradients are there, and in all."""

    def __init__(self):
        self.early = self.steps = 0
        self.validation = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 1 and not WAITS.on:
            WAITS.clear()
            WAITS.on = True
        self._before = WAITS.total()

    def on_after_backward(self, trainer, pl_module):
        self.early += WAITS.total() - self._before

    def on_train_batch_end(self, trainer, *_):
        self.steps = trainer.global_step - 1

    def on_train_epoch_end(self, *_):
        WAITS.on = False
        self.waits = dict(WAITS)

    def on_validation_batch_start(self, *_):
        self.waits = dict(WAITS)
        WAITS.clear()
        WAITS.on = True

    def on_validation_epoch_end(self, *_):
        WAITS.on = False
        self.validation = dict(WAITS)


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Return a function that trains as if on a GPU, and tells what was waited for."""
    move = L.LightningModule.transfer_batch_to_device

    def to_gpu(self, batch, device, dataloader_idx):
        return {name: OnDevice(values) for name, values in move(self, batch, device, dataloader_idx).items()}

    monkeypatch.setattr(L.LightningModule, "transfer_batch_to_device", to_gpu)
    monkeypatch.setattr(Layout, "to", lambda self, device: _each(self, OnDevice))

    def run(settings=None, callbacks=(), student=None, loss=None, validate=False, **options):
        watch = Watch()
        rows = make_rows(24)
        data = SRDDataModule(
            {"train": rows, "validation": rows[:5]} if validate else rows,
            ByT5Tokenizer(),
            schedule={0: 1.0},
            batch_size=4,
        )
        module = OnGPU(student or tiny_model(0), lively_model(1), loss, kd_weight=0.7, **options)
        settings = {**QUIET, "max_epochs": 1, "num_sanity_val_steps": 0, **(settings or {})}
        try:
            L.Trainer(callbacks=[watch, *callbacks], default_root_dir=tmp_path, **settings).fit(module, datamodule=data)
        finally:
            WAITS.on = False
        return watch

    return run


def check(watch):
    """Check that a step was read once, and that nothing was waited for before its gradients were there."""
    assert watch.early == 0, watch.waits
    assert watch.waits == {("tolist", "failures"): watch.steps}
    assert watch.steps > 1


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ({}, {}),
        ({}, {"gradient_clip_val": 1.0}),
        ({}, {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}),
        ({}, {"gradient_clip_val": 1.0, "accumulate_grad_batches": 2}),
        ({}, {"precision": "bf16-mixed"}),
        ({"teacher_cache": "hidden"}, {"gradient_clip_val": 1.0}),
        ({"packing": True}, {}),
        ({"micro_batch_tokens": 60}, {}),
        ({"micro_batch_tokens": 60, "packing": True, "teacher_cache": "hidden"}, {}),
        ({"chunk": None}, {}),
        ({"activation_checkpointing": True}, {}),
    ],
    ids=str,
)
def test_a_step_is_read_once_when_its_gradients_are_there(options, settings, train):
    check(train(settings, **options))


@pytest.mark.parametrize(
    ("loss", "callbacks", "options"),
    [
        (TAID(AdaptiveKL()), [TAIDSchedule(alpha=0.1)], {}),
        (Selected(TokenTemperature(), Hellinger()), [LossDrivenShare(decay=0.0, warm_up=0.0)], {}),
        (Selected(TokenTemperature(AlphaBeta())), [], {"chunk": None}),
    ],
    ids=["taid", "selected", "all_logits"],
)
def test_losses_that_look_ahead_or_follow_another_wait_for_nothing_more(loss, callbacks, options, train):
    check(train({"log_every_n_steps": 1}, copy.deepcopy(callbacks), loss=copy.deepcopy(loss), **options))


def test_logging_and_bars_wait_for_nothing(train, tmp_path):
    bar = {"enable_progress_bar": True, "log_every_n_steps": 1, "logger": CSVLogger(tmp_path)}
    check(train({"gradient_clip_val": 1.0, **bar}))


def test_measuring_where_the_time_goes_waits_for_nothing(train, tmp_path):
    check(train({"gradient_clip_val": 1.0}, [RuntimeBenchmark(str(tmp_path / "runtime.json"))]))


def test_the_likeliest_tokens_are_only_weighed_by_numbers_of_the_host(train):
    watch = train(teacher_cache=CacheSettings("topk", k=8))
    watch.early -= watch.waits.pop(("copy to the device", "top_k"), 0)
    check(watch)


@pytest.mark.parametrize(
    "options", [{}, {"micro_batch_tokens": 60}, {"chunk": None}, {"teacher_cache": "hidden"}], ids=str
)
def test_validation_waits_for_no_batch(options, train):
    assert train(validate=True, **options).validation == {}


ASKING = {
    "item": lambda states: states.sum().item(),
    "if": lambda states: bool(states.isfinite().all()),
    "mask": lambda states: states[states > 0],
    "nonzero": lambda states: states.nonzero(),
    "list": lambda states: states[0, 0].tolist(),
    "numpy": lambda states: states.detach().numpy(),
    "cpu": lambda states: states.cpu(),
}


@pytest.mark.parametrize("ask", ASKING.values(), ids=ASKING)
def test_a_student_that_asks_is_noticed(ask, train):
    student = tiny_model(0)
    student.model.norm.register_forward_hook(lambda module, given, states: (ask(states), states)[1])
    watch = train(student=student)
    assert watch.early == watch.steps == 5
    with pytest.raises(AssertionError):
        check(watch)


class Asking(ForwardKL):
    def divergence(self, teacher_logp, student_logp):
        return super().divergence(teacher_logp, student_logp) * (1.0 if bool(student_logp.isfinite().all()) else 0.0)


def test_a_loss_that_asks_is_noticed(train):
    assert train(loss=Asking()).early > 0


class Relabels(L.Callback):
    """Changes labels where they are, when the host has looked at them already."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        batch["labels"][0] = -100


def test_labels_that_are_changed_on_the_device_are_looked_at_there(train):
    watch = train(callbacks=[Relabels()])
    assert ("nonzero.default", "layout") in watch.waits
