"""A student that reflects again while it trains: ``refresh.py FOLDER DEVICES STRATEGY [CHECKPOINT]``."""

import json
import sys
from pathlib import Path

import distil
import drive
import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from transformers import ByT5Tokenizer

from srd_lightning import Decoding, KDLightningModule, SRDDataModule

SCHEDULE = {0: 0.25, 1: 0.5, 3: 0.75}
REFRESH = [1, 3]
DECODING = Decoding(max_new_tokens=5)


class Module(KDLightningModule):
    """Without a teacher."""

    def __init__(self):
        super().__init__(
            distil.tiny(0),
            kd_weight=0.0,
            tokenizer=ByT5Tokenizer(),
            chunk=None,  # the same sums in the same order, sharded or not
            optimizer=lambda params: torch.optim.SGD(params, lr=0.5),
        )


class Recorder(L.Callback):
    """Keeps the order of the rows at each epoch, and (in one rank) the student that reflected."""

    def __init__(self):
        self.orders = {}
        self.students = {}

    def on_train_epoch_start(self, trainer, pl_module):
        self.orders[trainer.current_epoch] = trainer.datamodule.curriculum.order.tolist()
        if trainer.world_size == 1:
            self.students[trainer.current_epoch] = {
                name: weight.clone() for name, weight in pl_module.student.state_dict().items()
            }


def main(folder, devices=1, strategy="auto", checkpoint=None, **options):
    L.seed_everything(0)
    recorder = Recorder()
    data = SRDDataModule(
        distil.make_rows(),
        schedule=SCHEDULE,
        refresh=REFRESH,
        batch_size=3,
        scores=f"{folder}/scores",
        decoding=DECODING,
        reflection_tokens=600,
    )
    trainer = L.Trainer(
        max_epochs=5,
        accelerator="cpu",
        devices=int(devices),
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        if strategy == "fsdp2"
        else strategy,
        callbacks=[recorder, ModelCheckpoint(f"{folder}/checkpoints", "{epoch}", save_top_k=-1)],
        default_root_dir=folder,
        **drive.QUIET,
        **options,
    )
    trainer.fit(Module(), datamodule=data, ckpt_path=checkpoint)
    Path(folder, f"rank{trainer.global_rank}.json").write_text(
        json.dumps({"orders": recorder.orders, "generations": data.staged.generations})
    )
    return trainer, recorder


if __name__ == "__main__":
    main(*sys.argv[1:])
    drive.end_together()
