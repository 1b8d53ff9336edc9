"""How many optimizer steps a run will take, stage by stage.

``trainer.estimated_stepping_batches`` multiplies the first stage by the number of epochs, so a learning-rate schedule
built on it is over long before a growing curriculum is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate

from lightning import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, SequentialLR

from srd_lightning.curriculum.curriculum import Curriculum, find_curriculum
from srd_lightning.curriculum.steps import EpochSteps, epochs_of_run
from srd_lightning.errors import SettingError
from srd_lightning.preflight import callbacks_of


def stage_steps(trainer: Trainer) -> list[int]:
    """Plan the optimizer steps of each stage.

    Args:
        trainer: Set up for fitting, with ``max_epochs`` or ``max_steps``.

    Returns:
        One number per stage that the run reaches; a single one without a curriculum.

    Raises:
        SettingError: The run has no end to plan for, or its loader no length.
    """
    endless = trainer.max_epochs in (None, -1)
    if endless and trainer.max_steps < 0:
        raise SettingError(
            "a learning-rate schedule needs the length of the run: set the trainer's max_epochs or max_steps"
        )
    if endless:
        return [trainer.max_steps]
    curriculum = find_curriculum(trainer)
    if curriculum is None:
        same = _batches_of_loader(trainer)
        if math.isinf(same):
            return [trainer.max_steps]
        found = epochs_of_run(lambda _: int(same), accumulation_of(trainer), trainer.max_epochs, trainer.max_steps)
        return [sum(epoch.steps for epoch in found)]
    steps: dict[int, int] = {}
    for epoch in planned_epochs(trainer, curriculum, _batch_size(trainer)):
        stage = curriculum.stage(epoch.epoch)
        steps[stage] = steps.get(stage, 0) + epoch.steps
    return list(steps.values())


def planned_epochs(trainer: Trainer, curriculum: Curriculum, batch_size: int) -> list[EpochSteps]:
    """Return the batches and optimizer steps of each epoch that a run has.

    Args:
        trainer: Set up for fitting, with ``max_epochs`` or ``max_steps``.
        curriculum: Of the run.
        batch_size: Rows per rank and batch.
    """
    world_size = (trainer.distributed_sampler_kwargs or {"num_replicas": 1})["num_replicas"]
    return epochs_of_run(
        lambda epoch: curriculum.epoch_steps(epoch, batch_size, world_size),
        accumulation_of(trainer),
        trainer.max_epochs,
        trainer.max_steps,
        trainer.limit_train_batches,
    )


def accumulation_of(trainer: Trainer) -> dict[int, int]:
    """Return how many batches make a step, by first epoch.

    Args:
        trainer: With or without a `GradientAccumulationScheduler`.
    """
    for callback in callbacks_of(trainer):
        if isinstance(callback, GradientAccumulationScheduler):
            return {int(epoch): batches for epoch, batches in sorted(callback.scheduling.items())}
    return {0: trainer.accumulate_grad_batches}


def _batches_of_loader(trainer: Trainer) -> float:
    """Return the batches of every epoch of a run without a curriculum, infinite where ``max_steps`` ends it instead."""
    if trainer.train_dataloader is None:
        trainer.fit_loop.setup_data()
    batches = trainer.num_training_batches
    if math.isinf(batches) and trainer.max_steps < 0:
        raise SettingError(
            "cannot plan the steps of a schedule of the learning rate: the training loader has no length; set the "
            "trainer's max_steps, or leave lr_scheduler out"
        )
    return batches


def _batch_size(trainer: Trainer) -> int:
    known = getattr(getattr(trainer, "datamodule", None), "batch_size", None)
    if isinstance(known, int):
        return known
    trainer.fit_loop.setup_data()
    batch_size = getattr(trainer.train_dataloader, "batch_size", None)
    if batch_size is None:
        raise SettingError("cannot plan the steps: the training loader has no batch_size; give the data module one")
    return int(batch_size)


def staged_schedule(
    make: Callable[[Optimizer, int], LRScheduler], optimizer: Optimizer, steps: list[int], restart: bool
) -> LRScheduler:
    """Return one schedule over all steps, or one per stage, one after the other.

    Args:
        make: Makes a schedule from the optimizer and a number of steps.
        optimizer: Whose learning rate is scheduled.
        steps: Of each stage.
        restart: One per stage.
    """
    if not restart or len(steps) == 1:
        return make(optimizer, sum(steps))
    return SequentialLR(optimizer, [make(optimizer, count) for count in steps], milestones=list(accumulate(steps))[:-1])
