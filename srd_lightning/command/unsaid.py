"""What a command line leaves unsaid: the paper's settings for GPT-2, and what suits the device."""

from __future__ import annotations

from typing import Any

import torch
from jsonargparse import Namespace

from srd_lightning.curriculum.curriculum import PAPER_EPOCHS

BATCH_SIZE = 16
"""Rows of a step."""
CLIP = 1.0
LR_SCHEDULER = {
    "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.CosineAnnealingLR", "init_args": {"eta_min": 1e-7}},
    "restart_lr_each_stage": True,
}


def of_a_run(trainer: Namespace, model: Namespace) -> dict[str, dict[str, Any]]:
    """Return settings, by group, for a run of the method that says nothing of them.

    Args:
        trainer: Settings of the trainer, as they were parsed.
        model: Of the module.

    Returns:
        Where the run has no end, its epochs; the norm at which gradients are clipped; where there is no
        ``lr_scheduler``, the paper's, once per stage. Every step is logged.
    """
    open_ended = trainer.max_epochs is None and trainer.max_steps == -1 and trainer.max_time is None
    added: dict[str, Any] = {"max_epochs": PAPER_EPOCHS} if open_ended else {}
    if trainer.gradient_clip_val is None:
        added["gradient_clip_val"] = CLIP
    if trainer.log_every_n_steps is None:
        added["log_every_n_steps"] = 1  # what is logged is on the host by then
    return {"trainer": added, "model": {} if model.lr_scheduler is not None else LR_SCHEDULER}


def of_the_device(trainer: Namespace) -> dict[str, dict[str, Any]]:
    """Return the precision of a trainer that names none: bf16-mixed on a GPU with units for it, else Lightning's."""
    if trainer.precision is None and _runs_on_gpu(trainer.accelerator) and torch.cuda.is_bf16_supported(False):
        return {"trainer": {"precision": "bf16-mixed"}}
    return {}


def csv_logger(root: str | None) -> dict[str, Any]:
    """Return the logger of a run that names none: a table below its folder, ``logs/version_N/metrics.csv``."""
    settings = {"save_dir": root or ".", "name": "logs"}
    return {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": settings}


def _runs_on_gpu(accelerator: str) -> bool:
    return accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
