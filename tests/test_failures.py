"""What stops a run names its cause and what to do, ends all ranks, and leaves what is saved sound."""

import os
import re
import signal
import subprocess

import lightning as L
import pytest
import torch
from conftest import HANGS, of_launcher, of_project
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import QUIET, make_rows, tiny_model
from transformers import ByT5Tokenizer

from srd_lightning import ForwardKL, KDLightningModule, SRDDataModule
from srd_lightning.errors import NonFiniteError


def run(folder, devices, strategy, what, rank, launched=False):
    """Return what all ranks wrote; all have ended, or this fails. Lightning has started the second, or we did."""
    arguments = ("fail", folder, devices, strategy, what, rank)
    running = of_launcher(*arguments) if launched else of_project(*arguments, ranks=devices)
    process = subprocess.Popen(**running, stderr=subprocess.PIPE, start_new_session=True)
    try:
        _, error = process.communicate(timeout=HANGS)  # open until the last process that writes to it has ended
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 1
    return error


@pytest.mark.parametrize(
    ("strategy", "rank", "launched"), [("ddp", 0, False), ("ddp", 1, True), ("fsdp2", 1, True)], ids=str
)
def test_one_process_that_fails_ends_all_with_its_message(strategy, rank, launched, tmp_path):
    error = run(tmp_path, 2, strategy, "raise", rank, launched)
    assert f"[rank{rank}]: LookupError: something went wrong here" in error


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_is_named_by_the_other(rank, tmp_path):
    running = of_project("fail", tmp_path, 2, "ddp", "kill", rank, ranks=2)
    done = subprocess.run(**running, capture_output=True, timeout=HANGS, check=False)
    assert done.returncode != 0
    assert f"RankError: rank {rank} is gone: killed, perhaps for want of memory" in done.stderr


def test_what_helps_is_said_where_memory_is_out(tmp_path):
    error = run(tmp_path, 2, "ddp", "memory", 1)
    assert re.search(
        r"OutOfMemoryError: CUDA out of memory.*\n(.*rank1.*: )?This may help(.*\n)*.*micro_batch_tokens", error
    )


@pytest.mark.parametrize(("devices", "strategy", "rank"), [(1, "auto", 0), (2, "ddp", 1), (2, "fsdp2", 1)])
def test_a_loss_that_is_no_number_names_its_rows_on_all_processes(devices, strategy, rank, tmp_path):
    error = run(tmp_path, devices, strategy, "nan", rank)
    guilty = re.findall(r"Say (\d+)\.", (tmp_path / f"rows{rank}.txt").read_text())
    assert guilty
    said = rf"NonFiniteError: the loss is nan in batch \d+ of epoch \d+; its rows: {', '.join(guilty)}\. No step"
    assert len(re.findall(said, error)) == devices
    kept = torch.load(tmp_path / "kept.ckpt", weights_only=True)
    assert all(weight.isfinite().all() for weight in kept["state_dict"].values())


class Spoil(L.Callback):
    """Makes one gradient infinite, at a batch whose loss is a number."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 2:
            self.before = {name: weight.clone() for name, weight in pl_module.state_dict().items()}
            pl_module.student.model.norm.weight.register_hook(lambda gradient: gradient + torch.inf)


@pytest.mark.parametrize(
    ("precision", "clipping"),
    [("32-true", {"gradient_clip_val": 1.0}), ("bf16-mixed", {"gradient_clip_val": 1.0}), ("32-true", {})],
    ids=str,
)
def test_a_gradient_that_is_no_number_makes_no_step(precision, clipping, tmp_path):
    spoil, keep = Spoil(), ModelCheckpoint(tmp_path, "kept", save_on_exception=True)
    module = KDLightningModule(tiny_model(0), tiny_model(1))
    data = SRDDataModule(make_rows(16), ByT5Tokenizer(), schedule={0: 1.0}, batch_size=4)
    options = {**QUIET, "enable_checkpointing": True, "precision": precision, **clipping}
    trainer = L.Trainer(max_epochs=1, callbacks=[spoil, keep], default_root_dir=tmp_path, **options)
    with pytest.raises(
        FloatingPointError, match=r"the norm of the gradient is inf in batch 2 of epoch 0; its rows: \w+"
    ):
        trainer.fit(module, datamodule=data)
    kept = torch.load(tmp_path / "kept.ckpt", weights_only=True)
    assert kept["global_step"] == 2
    assert kept["state_dict"].keys() == spoil.before.keys()
    assert all(torch.equal(weight, spoil.before[name]) for name, weight in kept["state_dict"].items())


class Breaks(ForwardKL):
    """Gives NaN where it is told to."""

    broken = False

    def divergence(self, teacher_logp, student_logp):
        return super().divergence(teacher_logp, student_logp) + (torch.nan if self.broken else 0.0)


class BreakAt(L.Callback):
    """Breaks the loss of one batch, and keeps the weights that it has met."""

    def __init__(self, batch_idx):
        self.batch_idx = batch_idx

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.loss.broken = batch_idx == self.batch_idx
        if pl_module.loss.broken:
            self.before = {name: weight.clone() for name, weight in pl_module.state_dict().items()}
            self.rows = trainer.train_dataloader.ids(batch_idx)


class OwnClipping(KDLightningModule):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        """Clip nothing."""


class ClipsTwice(KDLightningModule):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        super().configure_gradient_clipping(optimizer, 1.0, "norm")


class OwnStep(KDLightningModule):
    """Measures nothing, so that there is a norm and no loss to read."""

    def training_step(self, batch, batch_idx):
        return self(batch).square().mean()


@pytest.mark.parametrize("kind", [ClipsTwice, OwnStep])
def test_a_subclass_that_clips_or_steps_for_itself_trains(kind, tmp_path):
    module = kind(tiny_model(0), tiny_model(1))
    data = SRDDataModule(make_rows(8), ByT5Tokenizer(), schedule={0: 1.0}, batch_size=4)
    trainer = L.Trainer(max_epochs=1, gradient_clip_val=1.0, default_root_dir=tmp_path, **QUIET)
    trainer.fit(module, datamodule=data)
    assert (trainer.global_step, module._measured) == (2, [])


class StepsByHand(KDLightningModule):
    """With an optimizer of torch, of whose steps Lightning hears nothing; validates by training steps."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()

    def validation_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)


def test_steps_by_hand_are_logged_and_stop_at_a_loss_that_is_nan(tmp_path):
    module, spoil = StepsByHand(tiny_model(0), tiny_model(1), Breaks()), BreakAt(3)
    rows = {"train": make_rows(24), "validation": make_rows(4)}
    data = SRDDataModule(rows, ByT5Tokenizer(), schedule={0: 1.0}, batch_size=4)
    trainer = L.Trainer(
        max_epochs=1, val_check_interval=2, callbacks=[spoil], default_root_dir=tmp_path, log_every_n_steps=1, **QUIET
    )
    with pytest.raises(NonFiniteError, match="the loss is nan in batch 3 of epoch 0"):
        trainer.fit(module, datamodule=data)
    assert module._measured == []
    assert trainer.logged_metrics["train_loss"].isfinite()
    assert all(torch.equal(weight, spoil.before[name]) for name, weight in module.state_dict().items())


@pytest.mark.parametrize("kind", [KDLightningModule, OwnClipping])
@pytest.mark.parametrize(("batch_idx", "accumulate"), [(1, 1), (2, 2), (3, 2)])
def test_of_accumulated_batches_the_broken_one_is_named_before_their_step(kind, batch_idx, accumulate, tmp_path):
    module, spoil = kind(tiny_model(0), tiny_model(1), Breaks()), BreakAt(batch_idx)
    data = SRDDataModule(make_rows(24), ByT5Tokenizer(), schedule={0: 1.0}, batch_size=4)
    options = {**QUIET, "accumulate_grad_batches": accumulate}
    trainer = L.Trainer(max_epochs=1, callbacks=[spoil], default_root_dir=tmp_path, **options)
    with pytest.raises(NonFiniteError, match=f"the loss is nan in batch {batch_idx} of epoch 0") as caught:
        trainer.fit(module, datamodule=data)
    assert f"its rows: {', '.join(spoil.rows)}. No step was made" in str(caught.value)
    assert trainer.global_step == 1
    assert all(torch.equal(weight, spoil.before[name]) for name, weight in module.state_dict().items())
