"""A plan is made: a trainer looks at a run instead of doing it, and tries a few of its batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from lightning import Trainer
from lightning.pytorch.callbacks import Timer

from srd_lightning.datamodule import SRDDataModule
from srd_lightning.errors import SettingError
from srd_lightning.metering.memory import peak_memory
from srd_lightning.module import KDLightningModule
from srd_lightning.planning.clock import Calibrate, ClockName, Throughput
from srd_lightning.planning.memory import memory_of
from srd_lightning.planning.plan import Plan, plan_of
from srd_lightning.planning.rehearsal import Rehearsal
from srd_lightning.preflight import callbacks_of
from srd_lightning.storage import check_file, write_atomically


def make_plan(
    trainer: Trainer,
    module: KDLightningModule,
    data: SRDDataModule,
    calibrate: Calibrate,
    throughput: Throughput | None,
    clock: ClockName,
    file: Path | None,
) -> Plan:
    """Make the plan of a run.

    Args:
        trainer: That would do it; it has done nothing yet.
        module: That would be trained.
        data: On which.
        calibrate: How long may be measured.
        throughput: What is known; then nothing is measured.
        clock: By which is measured.
        file: To which it is written, as JSON.

    Raises:
        SettingError: The run is none that can be planned.
    """
    check_plannable(trainer, module, data)
    if file is not None:
        check_file(file, "json", "an earlier plan", lambda path: path.read_bytes().startswith(b"{"))
    rehearsal, running = Rehearsal(data, calibrate, throughput, clock, list(callbacks_of(trainer))), cast(Any, trainer)
    running.loggers = []
    try:
        trainer.fit(module, datamodule=rehearsal)
    finally:
        if trainer.is_global_zero:
            rehearsal.clean()
    assert rehearsal.seen is not None
    assert rehearsal.sizes is not None
    peaks = peak_memory(trainer.strategy.root_device)
    peak = None if throughput is not None else peaks.get("device", peaks["host"])
    devices = data.ranks["num_replicas"]
    measured_by = None if throughput is not None else clock
    made = plan_of(rehearsal.seen, rehearsal.prices, memory_of(rehearsal.sizes), peak, devices, measured_by)
    if file is not None and trainer.is_global_zero:
        write_atomically(file, made.as_json().encode())
    return made


def check_plannable(trainer: Trainer, module: object, data: object) -> None:
    """Refuse what cannot be planned, before anything is read.

    Raises:
        SettingError: Module or data are another's, or the run ends by a clock.
    """
    if not isinstance(module, KDLightningModule):
        raise SettingError(f"a plan needs a KDLightningModule, whose steps it knows, but got a {type(module).__name__}")
    if not isinstance(data, SRDDataModule):
        raise SettingError(
            f"a plan needs an SRDDataModule, whose rows it can count, but got a {type(data).__name__}; time a "
            "few steps of your own with Trainer(max_steps=...)"
        )
    if any(isinstance(callback, Timer) for callback in callbacks_of(trainer)):
        raise SettingError(
            "a plan needs a run that ends after epochs or steps, but this one ends by trainer.max_time; set max_epochs "
            "or max_steps instead"
        )
