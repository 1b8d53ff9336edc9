"""`RuntimeBenchmark`: where the time of a run goes, how fast it is, and what it takes of the machine."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console
from torch import Tensor
from torch.optim import Optimizer

from srd_lightning.callbacks.curriculum_check import rows_of_loaders
from srd_lightning.curriculum.curriculum import find_curriculum
from srd_lightning.data.batches import is_of_encoder_decoder
from srd_lightning.distributed.placement import compute_dtype
from srd_lightning.metering.batches import counts_of
from srd_lightning.metering.clock import HostTimeline, PartClock, timeline_of
from srd_lightning.metering.energy import EnergyMeter
from srd_lightning.metering.memory import peak_memory, reset_peaks
from srd_lightning.metering.operations import Parameters, measured_peak
from srd_lightning.metering.record import Record, are_lines, is_report
from srd_lightning.metering.table import table_of
from srd_lightning.metering.work import Work, added
from srd_lightning.preflight import callbacks_of
from srd_lightning.protocols import RunsTeacher, TellsParts, unwatched
from srd_lightning.storage import check_file, write_atomically

LOGGED_PARTS = ("forward", "teacher", "backward", "optimizer")
"""Whose seconds are logged, besides those of waiting."""


class RuntimeBenchmark(Callback):
    r"""Measures where the time of a run goes, its speed, memory and energy, for any module and data; no step waits.

    At the end of training the report is written, and shown as a table. After each epoch the epochs so far are written
    beside it, a line each (``runtime.jsonl``), and ``runtime/…`` is logged. A run that is resumed goes on from what its
    checkpoint says. With ``fast_dev_run`` nothing is written or shown.

    The time is divided into parts (docs/runtime.md says where each begins and ends), which follow each other without a
    gap. On a GPU they are read from events in its stream: they are what the device was at. Elsewhere they are the
    host's.

    Args:
        path: JSON file to write at the end of training, in place of an earlier report; by default ``runtime.json`` in
            the trainer's ``default_root_dir``. Where it can then no longer be written, the report is shown instead.

    Raises:
        StorageError: A file cannot be written, or holds something else than a report; said before rows are read.

    Attributes:
        report: What ``runtime.json`` holds, of the first rank; what is not known is left out.

            ``seconds`` of the run, and the ``parts`` that they are; ``curation`` (``rows, kept, scored, seconds``);
            ``refresh_seconds``; ``stages``; ``validation_seconds``; ``host_peak_memory_bytes`` (on Linux since the run
            began, else since the process did), ``device_peak_memory_bytes`` (of a GPU), ``peak_memory_bytes`` (of the
            GPU, else of the host); ``energy_joules`` of the training (``gpu``, ``cpu``); ``parameters`` (``trained,
            frozen, teacher``, without embeddings); ``machine`` (``device``, ``dtype`` of matrix products,
            ``peak_flops_per_second``: of some large ones, for less than a second when training begins).

            Of a stage ``first_epoch``; ``rows`` of the pool, and what this rank did and took: ``steps``; ``tokens``,
            real ones; ``positions``, with what pads them, and ``padding``, its share; ``seconds`` of training, all
            ``parts`` but validation, checkpoints and refreshes; ``waiting_seconds`` for data; ``generation_seconds`` in
            which the student wrote the texts of `Rollouts`; ``trained_rows``; ``response_tokens``; ``rows_per_second``,
            ``response_tokens_per_second`` and ``positions_per_second`` of training; ``model_flops`` and ``mfu``.

            ``model_flops`` is :math:`(6 N_\text{trained} + 2 N_\text{frozen}) \cdot \text{tokens} + 2 N_\text{teacher}
            \cdot \text{tokens that a teacher was run on}`, see `Parameters`; ``mfu`` is ``model_flops`` over what
            ``peak_flops_per_second`` would have made in the ``seconds``. Both are left out for encoder-decoders, of
            which a token passes one half, and under FSDP1 and DeepSpeed, which hide how large a parameter is.
    """

    logged = (
        "runtime/padding",
        "runtime/waiting_seconds",
        *(f"runtime/{part}_seconds" for part in LOGGED_PARTS),
        "runtime/rows_per_second",
        "runtime/response_tokens_per_second",
        "runtime/positions_per_second",
        "runtime/mfu",
    )

    def __init__(self, path: str | None = None) -> None:
        self.path = None if path is None else Path(path).expanduser()
        self.report: dict[str, Any] = {}
        self._record = Record()
        self._clock = PartClock(HostTimeline())
        self._step_hooks: list[Callable[[], None]] = []
        self._begin_counting(torch.device("cpu"))

    def _begin_counting(self, device: torch.device) -> None:
        self._device = device
        self._dtype = torch.get_default_dtype()
        self._parameters: Parameters | None = None
        self._peak: float | None = None
        self._meter: EnergyMeter | None = None
        self._epoch: Work | None = None
        self._counts: dict[str, Tensor | int] = {}
        self._steps_before = 0
        self._unwritable = False

    def preflight(self, trainer: Trainer) -> None:
        """Refuse a file that could not be written, or is something else; start the clock, for curation comes next."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if trainer.is_global_zero:
            for file, is_ours in ((self._file(trainer), is_report), (self._lines(trainer), are_lines)):
                check_file(file, "RuntimeBenchmark(path=...)", "the report of an earlier run", is_ours)
        if self._clock.part is None:
            self._begin(trainer)

    def _begin(self, trainer: Trainer) -> None:
        """Begin anew, unless the trainer goes on."""
        self._begin_counting(trainer.strategy.root_device)
        if trainer.current_epoch == 0:
            self._record = Record()
        reset_peaks(self._device)
        self._clock = PartClock(timeline_of(self._device))
        self._clock.start("rest")
        for holder in _tellers(trainer):
            holder.watch(self._clock.around)

    def _end(self, trainer: Trainer) -> None:
        self._clock.stop()
        for holder in _tellers(trainer):
            holder.watch(unwatched)
        while self._step_hooks:
            self._step_hooks.pop()()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Do so also for runs with other data modules."""
        self.preflight(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count parameters, and see how fast the machine is."""
        if not isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
            teacher = pl_module.run_teacher() if isinstance(pl_module, RunsTeacher) else None
            self._parameters = Parameters.of(pl_module, teacher)
        of_weights = (weights.dtype for weights in pl_module.parameters() if weights.is_floating_point())
        self._dtype = compute_dtype(trainer) or next(of_weights, self._dtype)
        self._peak = measured_peak(self._device, self._dtype)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count; of an epoch in which a run goes on, Lightning does not say that it begins."""
        self._meter, self._steps_before = EnergyMeter(self._device), trainer.global_step
        epochs = self._record.epochs
        if epochs and epochs[-1].epoch == trainer.current_epoch:
            self.on_train_epoch_start(trainer, pl_module)
        if not pl_module.automatic_optimization:  # no other hook says that a step is over and training_step goes on
            for optimizer in trainer.optimizers:
                handle = optimizer.register_step_post_hook(lambda *_: self._clock.enter("forward"))
                self._step_hooks.append(handle.remove)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to wait for data."""
        self._work(trainer)
        self._clock.enter("data")

    def _work(self, trainer: Trainer) -> Work:
        """Return the work of the epoch."""
        epoch, epochs = trainer.current_epoch, self._record.epochs
        if self._epoch is None or self._epoch.epoch != epoch:
            self._settle()
            if not epochs or epochs[-1].epoch != epoch:
                curriculum = find_curriculum(trainer)
                pool = sum(rows or 0 for rows in rows_of_loaders(trainer.train_dataloader))
                epochs.append(Work(epoch, 0 if curriculum is None else curriculum.stage(epoch), pool))
            self._epoch = epochs[-1]
        return self._epoch

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """End the waiting."""
        self._clock.seen.clear()
        self._clock.enter("forward")

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """End the forward pass."""
        self._clock.enter("optimizer")

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Begin the backward pass."""
        self._clock.enter("backward")

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End it; what follows in a step by hand may be anything."""
        self._clock.enter("optimizer" if pl_module.automatic_optimization else "forward")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Begin an optimizer's step."""
        self._clock.enter("optimizer")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count what the batch held, without waiting for the GPU."""
        counts = counts_of(batch)
        counts["steps"], self._steps_before = trainer.global_step - self._steps_before, trainer.global_step
        if "teacher" in self._clock.seen:
            counts["taught"] = counts.get("tokens", 0)
        for name, number in counts.items():
            self._counts[name] = self._counts.get(name, 0) + number
        if isinstance(batch, Mapping) and is_of_encoder_decoder(batch):
            self._parameters = None
        self._keep_up()
        self._clock.enter("rest" if trainer.is_last_batch else "data")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the validation."""
        self._clock.enter("validation")

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        """Keep up with the energy."""
        self._keep_up()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the validation."""
        self._clock.enter("rest" if trainer.sanity_checking or trainer.is_last_batch else "data")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Begin what lasts until the next hook: Lightning does not say when a checkpoint is written."""
        self._clock.enter("checkpoints")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log and write what the epoch took; what comes until the next one is added to it later."""
        work = self._work(trainer)
        self._settle()
        self._clock.enter("rest")
        taken = {f"{part}_seconds": work.parts.get(part, 0.0) for part in LOGGED_PARTS}
        speed = {
            name: value for name, value in work.speed(self._parameters, self._peak).items() if name != "model_flops"
        }
        values = {"padding": work.padding, "waiting_seconds": work.parts.get("data", 0.0), **taken, **speed}
        pl_module.log_dict({f"runtime/{name}": value for name, value in values.items()})
        self._write_lines(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the report and write it."""
        self._settle()
        self._end(trainer)
        self._record, self._meter, self._epoch = self._so_far(), None, None
        machine = {"device": _name(self._device), "dtype": str(self._dtype).removeprefix("torch.")}
        curation = getattr(getattr(trainer, "datamodule", None), "curation", None)
        self.report = {
            **self._record.report(self._parameters, self._peak),
            "curation": curation and {name: getattr(curation, name) for name in ("rows", "kept", "scored", "seconds")},
            "machine": {**machine, **({} if self._peak is None else {"peak_flops_per_second": self._peak})},
        }
        self._write_lines(trainer)
        if _writes(trainer):
            text = json.dumps(self.report, indent=2)
            self._write(self._file(trainer), text, f"; the report is:\n{text}")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the report."""
        if _writes(trainer) and self.report:
            console = Console(width=None if sys.stdout.isatty() else 120)
            with console.capture() as shown:
                console.print(table_of(self.report))
            pl_module.print(shown.get().rstrip())  # beside a progress bar

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop the clock."""
        self._end(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return what was measured so far, so that a run that is resumed reports all of it."""
        self._settle()
        return self._so_far().state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what was measured of the run that is resumed."""
        self._record = Record.of_state(state_dict)

    def _settle(self) -> None:
        """Give what was measured to the epoch, or to what comes before the first; a GPU is waited for."""
        parts, counts, self._counts = self._clock.take(), self._counts, {}
        if self._epoch is None:
            self._record.before = added([self._record.before, parts])
            return
        self._epoch.parts = added([self._epoch.parts, parts])
        self._epoch.count({name: int(number) for name, number in counts.items()})

    def _so_far(self) -> Record:
        return self._record.with_machine(peak_memory(self._device), self._meter.joules() if self._meter else {})

    def _keep_up(self) -> None:
        if self._meter is not None:
            self._meter.keep_up()

    def _file(self, trainer: Trainer) -> Path:
        return self.path or Path(trainer.default_root_dir, "runtime.json")

    def _lines(self, trainer: Trainer) -> Path:
        file = self._file(trainer)
        return file.with_suffix(".epochs.jsonl" if file.suffix == ".jsonl" else ".jsonl")

    def _write_lines(self, trainer: Trainer) -> None:
        if _writes(trainer) and not self._unwritable:
            self._write(self._lines(trainer), self._record.lines(self._parameters, self._peak))

    def _write(self, file: Path, text: str, instead: str = "") -> None:
        try:
            write_atomically(file, text.encode())
        except OSError as error:  # training, and what comes after it, such as an export, are worth more
            self._unwritable = True
            rank_zero_warn(f"RuntimeBenchmark could not write {file} ({error}){instead}")


def _writes(trainer: Trainer) -> bool:
    return trainer.is_global_zero and not trainer.fast_dev_run  # type: ignore[attr-defined]


def _tellers(trainer: Trainer) -> Iterator[TellsParts]:
    for holder in (trainer.lightning_module, getattr(trainer, "datamodule", None), *callbacks_of(trainer)):
        if isinstance(holder, TellsParts):
            yield holder


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
