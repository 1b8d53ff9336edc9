"""Where the time of a run goes, and what the loaders make of it: a callback that measures."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from srd_lightning.callbacks.curriculum_check import rows_of_loaders
from srd_lightning.curriculum.curriculum import find_curriculum
from srd_lightning.data.batches import is_of_encoder_decoder
from srd_lightning.losses.base import IGNORE_INDEX
from srd_lightning.storage import check_file, write_atomically


class RuntimeBenchmark(Callback):
    """Measures where the time of a run goes: curation, each stage, validation. Logs padding and waiting of each epoch.

    Args:
        path: JSON file to write at the end of training, in place of an earlier report; by default ``runtime.json`` in
            the trainer's ``default_root_dir``. Where it can then no longer be written, the report is shown instead. A
            run with ``fast_dev_run`` writes none.

    Raises:
        StorageError: The file cannot be written, or holds something else than a report; said before rows are read.

    Attributes:
        report: ``curation`` (``rows, kept, scored, seconds``), ``refresh_seconds``, ``stages`` (``first_epoch, rows,
            steps, tokens, positions, padding, seconds, waiting_seconds, generation_seconds``: rows of the pool, and
            what this rank did and took, validation left out), ``validation_seconds``, ``peak_memory_bytes`` (of the
            GPU since the curation, where the run has one; else of the process since it was started).

            Of a stage, ``tokens`` are real ones, ``positions`` those of the batches with what pads them, and
            ``padding`` is its share of the positions. ``waiting_seconds`` is the part of ``seconds`` from the end of
            one batch, or the start of the epoch, to the start of the next: what the loader, and the way to the device,
            made it wait. It is the CPU's time; a GPU may have been at work in it. ``generation_seconds`` is the part in
            which the student wrote the texts of `Rollouts`; they are no waiting.
    """

    logged = ("runtime/padding", "runtime/waiting_seconds")

    def __init__(self, path: str | None = None) -> None:
        self.path = None if path is None else Path(path).expanduser()
        self.report: dict[str, Any] = {}
        self._device = torch.device("cpu")
        self._stages: dict[int, dict[str, Any]] = {}
        self._validation = 0.0
        self._validation_in_epoch = 0.0
        self._epoch_start = self._validation_start = 0.0
        self._waiting = self._idle_since = self._generated_before = 0.0
        self._steps_at_start = 0
        self._positions = 0
        self._tokens: torch.Tensor | int = 0

    def preflight(self, trainer: Trainer) -> None:
        """Refuse a file that could not be written at the end, or that is something else."""
        if trainer.is_global_zero and trainer.state.fn == TrainerFn.FITTING:
            check_file(self._file(trainer), "RuntimeBenchmark(path=...)", "the report of an earlier run", _is_report)

    def _file(self, trainer: Trainer) -> Path:
        return self.path or Path(trainer.default_root_dir, "runtime.json")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin anew, unless the trainer goes on."""
        self.preflight(trainer)
        self._device = trainer.strategy.root_device
        if stage == "fit" and trainer.current_epoch == 0:
            self._stages, self._validation = {}, 0.0
            if self._device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self._device)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of the epoch."""
        self._validation_in_epoch, self._steps_at_start = 0.0, trainer.global_step
        self._waiting, self._tokens, self._positions = 0.0, 0, 0
        self._generated_before = _generated(pl_module)
        self._epoch_start = self._idle_since = _now(self._device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stop the clock of the waiting; to wait for the GPU would slow the run down."""
        self._waiting += time.perf_counter() - self._idle_since

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count tokens where they are, without waiting for the GPU."""
        if isinstance(batch, Mapping) and "attention_mask" in batch:
            real = [batch["attention_mask"]]
            if is_of_encoder_decoder(batch):
                real.append(batch["labels"] != IGNORE_INDEX)
            self._tokens = self._tokens + sum(mask.sum() for mask in real)
            self._positions += sum(mask.numel() for mask in real)
        self._idle_since = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of the validation."""
        self._validation_start = _now(self._device)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock of the validation."""
        seconds = _now(self._device) - self._validation_start
        self._validation += seconds
        self._validation_in_epoch += seconds
        self._idle_since += seconds

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the epoch to its stage."""
        curriculum, epoch = find_curriculum(trainer), trainer.current_epoch
        stage = self._stages.setdefault(
            0 if curriculum is None else curriculum.stage(epoch),
            {
                "first_epoch": epoch,
                "rows": sum(rows or 0 for rows in rows_of_loaders(trainer.train_dataloader)),
                "steps": 0,
                "tokens": 0,
                "positions": 0,
                "padding": 0.0,
                "seconds": 0.0,
                "waiting_seconds": 0.0,
                "generation_seconds": 0.0,
            },
        )
        generated = _generated(pl_module) - self._generated_before
        waiting = self._waiting - generated  # a batch is written where it is fetched
        stage["steps"] += trainer.global_step - self._steps_at_start
        stage["tokens"] += int(self._tokens)
        stage["positions"] += self._positions
        stage["padding"] = 1 - stage["tokens"] / stage["positions"] if stage["positions"] else 0.0
        stage["seconds"] += _now(self._device) - self._epoch_start - self._validation_in_epoch
        stage["generation_seconds"] += generated
        stage["waiting_seconds"] += waiting
        padding = 1 - int(self._tokens) / self._positions if self._positions else 0.0
        pl_module.log_dict({"runtime/padding": padding, "runtime/waiting_seconds": waiting})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the report and write it."""
        datamodule = getattr(trainer, "datamodule", None)
        curation = getattr(datamodule, "curation", None)
        self.report = {
            "curation": curation and {name: getattr(curation, name) for name in ("rows", "kept", "scored", "seconds")},
            "refresh_seconds": getattr(datamodule, "refresh_seconds", 0.0),
            "stages": list(self._stages.values()),
            "validation_seconds": self._validation,
            "peak_memory_bytes": peak_memory_bytes(self._device),
        }
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            text, file = json.dumps(self.report, indent=2), self._file(trainer)
            try:
                write_atomically(file, text.encode())
            except OSError as error:  # what comes after it, such as an export, is worth more
                rank_zero_warn(f"RuntimeBenchmark could not write {file} ({error}); the report is:\n{text}")

    def state_dict(self) -> dict[str, Any]:
        """Return the stages so far, so that a resumed run reports all of them."""
        return {
            "stages": {str(stage): values for stage, values in self._stages.items()},
            "validation": self._validation,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the stages of the run that is resumed."""
        self._stages = {int(stage): {"generation_seconds": 0.0, **v} for stage, v in state_dict["stages"].items()}
        self._validation = state_dict["validation"]


def _generated(module: Any) -> float:
    """Return how long a module has had texts written, if it is one that does."""
    seconds: float = getattr(module, "generation_seconds", 0.0)
    return seconds


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory this process has held.

    Args:
        device: On which it computes; for any but a GPU it is the process's resident set.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _is_report(path: Path) -> bool:
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        return False
    return isinstance(found, dict) and {"stages", "peak_memory_bytes"} <= found.keys()
