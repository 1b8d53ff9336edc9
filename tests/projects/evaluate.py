"""Evaluation alone, of a student as it is."""

import distil
import lightning as L


def main(**trainer_options):
    module, data = distil.parts(trainer_options["default_root_dir"])
    trainer = L.Trainer(**trainer_options)
    trainer.test(module, datamodule=data)
    return trainer
