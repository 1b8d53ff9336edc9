"""Runs one project on some processes and writes down what each rank saw: ``drive.py PROJECT DEVICES FOLDER``."""

import importlib
import json
import sys
from pathlib import Path

import lightning as L
import torch

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}


class Recorder(L.Callback):
    """Keeps the rows of every epoch, as lists of numbers without padding, and the learning rate of every step."""

    def __init__(self):
        self.epochs = {}
        self.learning_rates = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if isinstance(batch, dict):
            real = zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True)
            rows = [[token for token, keep in zip(*row, strict=True) if keep] for row in real]
        else:
            rows = batch.tolist()
        self.epochs.setdefault(trainer.current_epoch, []).extend(rows)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.learning_rates.append(optimizer.param_groups[0]["lr"])


def main(project, devices, folder):
    recorder = Recorder()
    trainer = importlib.import_module(project).main(
        callbacks=[recorder],
        accelerator="cpu",
        devices=int(devices),
        strategy="ddp" if int(devices) > 1 else "auto",
        default_root_dir=folder,
        enable_checkpointing=False,
        **QUIET,
    )
    record = {
        "epochs": recorder.epochs,
        "learning_rates": recorder.learning_rates,
        "steps": trainer.global_step,
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "weights": sum(float(p.double().abs().sum()) for p in trainer.lightning_module.parameters()),
        "last_learning_rate": trainer.optimizers[0].param_groups[0]["lr"] if trainer.optimizers else None,
    }
    Path(folder, f"rank{trainer.global_rank}.json").write_text(json.dumps(record))


def end_together():
    """Leave the process group in order: gloo's threads may abort a process that just exits."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
    end_together()
