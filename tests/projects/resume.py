"""Runs that are stopped and resumed, one after the other: ``resume.py FOLDER '[{"stop": {"step": 5}}, {}]'``.

Each run is a process, or several, of its own. Writes ``ends.json``: how the ranks of each run ended.
"""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import distil
import drive
import lightning as L
import torch
from forked import start
from fsdp1_on_cpu import FSDP1OnCPU
from transformers import ByT5Tokenizer

from srd_lightning import (
    GKD,
    CurriculumCallback,
    Decoding,
    DistiLLM,
    HyperparameterScheduler,
    KDLightningModule,
    MiniLLM,
    ReflectionReplay,
    ResumeCheckpoint,
    SRDDataModule,
)
from srd_lightning.distributed.fsdp2 import FSDP2
from srd_lightning.distributed.placement import whole_weights

BATCH = 6
"""Rows in a batch of all ranks; 41 rows make 2, 4, 4 and 5 batches in the epochs, and 1, 2, 2 and 3 steps."""
STAGED = {"kd_weight": {0: 0.5, 2: 1.0}, "loss.temperature": {0: 1.0, 1: 2.0}}


class Recorder(L.Callback):
    """Writes what a process sees at once, one JSON object a line, and a digest of the student at the end."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def _write(self, **seen):
        self.file.write(json.dumps(seen) + "\n")

    def setup(self, trainer, pl_module, stage):
        self.file = (self.folder / f"seen-{trainer.global_rank}.jsonl").open("a", buffering=1)
        self._write(run=True)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        real = zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True)
        self._write(
            batch=trainer.fit_loop.epoch_loop.total_batch_idx,
            epoch=trainer.current_epoch,
            batch_idx=batch_idx,
            step=trainer.global_step,
            rows=[[token for token, keep in zip(*row, strict=True) if keep] for row in real],
            ids=trainer.train_dataloader.ids(batch_idx),
            learning_rate=trainer.optimizers[0].param_groups[0]["lr"],
            staged=[pl_module.kd_weight, pl_module.loss.temperature],
        )

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self._write(validated=trainer.current_epoch, val_nll=float(trainer.callback_metrics["val_nll"]))

    def on_train_epoch_start(self, trainer, pl_module):
        self._write(begins=trainer.current_epoch)

    def on_train_epoch_end(self, trainer, pl_module):
        self._write(ends=trainer.current_epoch)

    def on_train_end(self, trainer, pl_module):
        digest, size = hashlib.sha256(), 0.0
        for name, weight in sorted(whole_weights(pl_module, "student").items()):
            digest.update(name.encode() + weight.detach().cpu().numpy().tobytes())
            size += float(weight.double().abs().sum())
        self._write(weights=digest.hexdigest(), size=size, steps=trainer.global_step)


class Stop(L.Callback):
    """Sends a process a signal: amid the batches of a ``step``, in the ``validation`` of an epoch, or when half of the
    checkpoint of a step is written (``saving``)."""

    def __init__(self, at, how="KILL", rank=0):
        self.at, self.how, self.rank = at, signal.Signals[f"SIG{how}"], rank

    def _stop(self, trainer):
        if trainer.global_rank == self.rank:
            os.kill(os.getpid(), self.how)

    def setup(self, trainer, pl_module, stage):
        save = trainer.strategy.save_checkpoint

        def save_half(checkpoint, filepath, storage_options=None):
            save(checkpoint, filepath, storage_options)
            if trainer.global_step == self.at.get("saving"):
                if trainer.is_global_zero:
                    path = Path(filepath)
                    for file in path.rglob("*") if path.is_dir() else [path]:
                        os.truncate(file, file.stat().st_size // 2)
                self._stop(trainer)

        trainer.strategy.save_checkpoint = save_half

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.at.get("step") and batch_idx % 2 == 1:
            self._stop(trainer)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if not trainer.sanity_checking and trainer.current_epoch == self.at.get("validation") and batch_idx == 1:
            self._stop(trainer)


SHARDED = {"fsdp1": lambda: FSDP1OnCPU(state_dict_type="sharded"), "fsdp2": FSDP2}


SAMPLED = Decoding(max_new_tokens=4, temperature=1.0)
ROLLOUTS = {
    "gkd": lambda: GKD(0.5, SAMPLED),
    "distillm": lambda: DistiLLM(0.5, tolerance=-100.0, capacity=4, decoding=SAMPLED),  # a buffer that is full soon
    "minillm": lambda: MiniLLM(0.7, max_new_tokens=4),
    "replay": lambda: ReflectionReplay(0.5),
    None: lambda: None,
}


def parts(folder, devices=1, dropout=0.1, rollouts=None, **data_options):
    """Return the module and its data."""
    module = KDLightningModule(
        distil.tiny(0, attention_dropout=dropout),
        distil.tiny(1),
        tokenizer=ByT5Tokenizer(),
        rollouts=ROLLOUTS[rollouts](),
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3),
        lr_scheduler=lambda optimizer, steps: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps),
    )
    options = {"schedule": distil.SCHEDULE, "batch_size": BATCH // devices, "scores": f"{Path(folder).parent}/scores"}
    data = SRDDataModule(
        {"train": distil.make_rows(), "validation": distil.make_rows()[:14]},
        eval_batch_size=3,
        decoding=Decoding(max_new_tokens=5),
        reflection_tokens=300,
        **{**options, **data_options},
    )
    return module, data


def main(
    folder, devices=1, strategy="auto", stop=None, seed=0, dropout=0.1, ckpt_path="last", accelerator="cpu", **options
):
    data, saves = options.pop("data", {}), options.pop("saves", {})
    module, rows = parts(folder, devices, dropout, options.pop("rollouts", None), **data)
    L.seed_everything(seed)
    trainer = L.Trainer(
        max_epochs=options.pop("max_epochs", 4),
        accelerator=accelerator,
        devices=devices,
        strategy=SHARDED[strategy]() if strategy in SHARDED else strategy,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        callbacks=[
            Recorder(folder),
            HyperparameterScheduler(STAGED),
            CurriculumCallback(),
            ResumeCheckpoint(**{"every_n_train_steps": 1, **saves}),
            *([Stop(**stop)] if stop else []),
        ],
        default_root_dir=folder,
        **drive.QUIET,
        **options,
    )
    trainer.fit(module, datamodule=rows, ckpt_path=ckpt_path)
    return trainer


def processes(folder, settings):
    """Run one after the other; where one is killed the others are too. Return how they ended."""

    def program():
        main(folder, **settings)
        drive.end_together()

    ranks = start(program, settings.get("devices", 1))
    ends = {}
    while len(ends) < len(ranks):
        process, status = os.wait()
        ends[process] = os.waitstatus_to_exitcode(status)
        if ends[process] == -signal.SIGKILL:
            for process in [process for process in ranks if process not in ends]:
                os.kill(process, signal.SIGKILL)
    return [ends[process] for process in ranks]


if __name__ == "__main__":
    if sys.argv[2:]:
        runs = json.loads(sys.argv[2])
        Path(sys.argv[1], "ends.json").write_text(json.dumps([processes(sys.argv[1], run) for run in runs]))
    else:  # started by Lightning's launcher, which only tells rank 0
        main(sys.argv[1], devices=2, strategy="ddp", stop={"at": {"step": 3}, "how": "TERM"})
