"""A run in which something goes wrong at a batch: ``fail.py FOLDER DEVICES STRATEGY WHAT RANK``.

WHAT is ``raise``, ``kill``, ``memory`` or ``nan``; RANK is the process to which it happens.
"""

import os
import signal
import sys
from pathlib import Path

import distil
import drive
import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from srd_lightning.distributed.fsdp2 import FSDP2

BATCH = 3


class Accident(L.Callback):
    def __init__(self, what, rank, folder):
        self.what = what
        self.rank = int(rank)
        self.folder = folder

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.fit_loop.total_batch_idx != BATCH:
            return
        prompts = pl_module.tokenizer.batch_decode(batch["input_ids"])
        Path(self.folder, f"rows{trainer.global_rank}.txt").write_text("\n".join(prompts))
        if trainer.global_rank == self.rank:
            if self.what == "raise":
                raise LookupError("something went wrong here")
            if self.what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.what == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            pl_module.student.model.norm.register_forward_hook(lambda module, args, hidden: hidden * torch.nan)


def main(folder, devices, strategy, what, rank):
    module, data = distil.parts(folder)
    trainer = L.Trainer(
        max_epochs=5,
        accelerator="cpu",
        devices=int(devices),
        strategy=FSDP2(save_distributed_checkpoint=False) if strategy == "fsdp2" else strategy,
        callbacks=[Accident(what, rank, folder), ModelCheckpoint(folder, "kept", save_on_exception=True)],
        default_root_dir=folder,
        **drive.QUIET,
    )
    trainer.fit(module, datamodule=data)


if __name__ == "__main__":
    main(*sys.argv[1:])
    drive.end_together()
