"""A stranger's own scores, in a file: nothing is asked of the student."""

from pathlib import Path

import lightning as L
from distil import make_rows, tiny
from transformers import ByT5Tokenizer

from srd_lightning import KDLightningModule, SRDDataModule
from srd_lightning.criteria import Column
from srd_lightning.storage import write_atomically


def main(callbacks=(), **trainer_options):
    L.seed_everything(0)
    scores = Path(trainer_options["default_root_dir"], "scores.csv")
    text = "".join(["id,mistakes\n", *(f"{n},{(n * 7) % 12}\n" for n in range(12))])
    write_atomically(scores, text.encode())  # which all ranks do
    data = SRDDataModule(
        make_rows()[:12],
        ByT5Tokenizer(),
        schedule={0: 0.5, 1: 1.0},
        scores=str(scores),
        criteria=[Column("mistakes", higher_is_easier=False)],
        batch_size=2,
    )
    trainer = L.Trainer(max_epochs=2, callbacks=list(callbacks), **trainer_options)
    trainer.fit(KDLightningModule(tiny(0), tiny(1)), datamodule=data)
    return trainer
