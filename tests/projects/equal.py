"""The same training under any strategy: ``equal.py FOLDER DEVICES STRATEGY [JSON]``.

Writes the loss of every step (``losses.json``) and the trained student (``student.safetensors``).
"""

import json
import sys
from pathlib import Path

import distil
import drive
import lightning as L
import torch
from safetensors.torch import save_file
from transformers import ByT5Tokenizer

from srd_lightning import Decoding, HyperparameterScheduler, KDLightningModule, SRDDataModule
from srd_lightning.strategy import FSDP2

GLOBAL_BATCH = 4
STAGED = {"kd_weight": {0: 0.5, 2: 0.9}, "loss.temperature": {0: 1.0, 1: 2.0}}


class Losses(L.Callback):
    """Keeps the loss of every batch, which is the same on all processes."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, *_):
        self.losses.append(float(trainer.callback_metrics["train_loss"]))


def rows():
    return [
        {"id": n, "instruction": f"Say {n}.", "output": "ab" * (1 + 7 * (n % 3 == 0) + n % 5) + str(n)}
        for n in range(40)
    ]


def main(folder, devices=1, strategy="auto", settings="{}", accelerator="cpu"):
    settings = json.loads(settings)
    trainer_options, data_options = settings.pop("trainer", {}), settings.pop("data", {})
    tied = settings.pop("tied", False)
    L.seed_everything(0)
    losses = Losses()
    module = KDLightningModule(
        distil.tiny(0, tie_word_embeddings=tied),
        distil.tiny(1, tie_word_embeddings=tied),
        tokenizer=ByT5Tokenizer(),
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3),
        lr_scheduler=lambda optimizer, steps: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps),
        **settings,
    )
    processes = int(devices) if strategy != "fsdp2_and_tensors" else 1
    data = SRDDataModule(
        {"train": rows(), "validation": rows()[:6]},
        schedule={0: 0.25, 1: 0.5, 2: 0.75},
        batch_size=GLOBAL_BATCH // processes,
        scores=str(Path(folder).parent / ("scores-tied" if tied else "scores")),
        decoding=Decoding(max_new_tokens=2),
        **data_options,
    )
    strategies = {"fsdp2": FSDP2, "fsdp2_and_tensors": lambda: FSDP2(tensor_parallel_size=2)}
    trainer = L.Trainer(
        max_epochs=4,
        accelerator=accelerator,
        devices=int(devices),
        strategy=strategies[strategy]() if strategy in strategies else strategy,
        callbacks=[losses, HyperparameterScheduler(STAGED)],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **trainer_options,
    )
    trainer.fit(module, datamodule=data)
    student = module.whole_student(only_first=True)
    if trainer.is_global_zero:
        save_file(
            {name: weight.detach().float().cpu().clone() for name, weight in student.named_parameters()},
            f"{folder}/student.safetensors",
        )
    record = {"losses": losses.losses, "metrics": {name: float(v) for name, v in trainer.callback_metrics.items()}}
    Path(folder, f"rank{trainer.global_rank}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main(*sys.argv[1:])
    drive.end_together()
