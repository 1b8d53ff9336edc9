"""The student of a module: loaded when it is needed, sharded under FSDP2, gathered to export."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import nn

from srd_lightning.distributed.fsdp2 import is_sharded, whole_tensors, with_weights, without_weights
from srd_lightning.distributed.placement import asked_sharded, shard_student, shards_student, whole_weights
from srd_lightning.errors import ModelError
from srd_lightning.models.lockstep import lockstep
from srd_lightning.models.pretrained import Pretrained


class StudentHandle:
    """Builds, shards and gathers a student. The model itself is the module's ``student``, which registers it.

    Args:
        source: What it is loaded from, where it was not given as a model.
        activation_checkpointing: Keep one activation per block, and make the others again in the backward pass.
    """

    def __init__(self, source: Pretrained | None, activation_checkpointing: bool) -> None:
        self.source = source
        self.activation_checkpointing = activation_checkpointing
        self.for_generation: nn.Module | None = None
        """A student with all of its weights, from the start to the end of ``test`` and ``predict``, if need be."""
        self._skeleton: nn.Module | None = None
        self._trained: list[bool] = []
        self._answering = ExitStack()

    def spread(self, student: nn.Module, trainer: Trainer) -> None:
        """Have a student sharded, once, where the strategy of a trainer does so.

        Args:
            student: Of the module.
            trainer: Of the run.
        """
        if shards_student(trainer):
            if self._skeleton is None:
                self._skeleton = without_weights(student)
                self._trained = [weight.requires_grad for weight in student.parameters()]
            shard_student(student, trainer)

    def prepare(self, student: nn.Module, module: LightningModule) -> None:
        """Make it ready for a run of the module, which may be the second one.

        Args:
            student: Of the module.
            module: With its trainer, if it has one.

        Raises:
            ModelError: Weights were frozen, or unfrozen, after it was sharded to reflect.
        """
        trained = [weight.requires_grad for weight in student.parameters()]
        if is_sharded(student) and self._trained not in ([], trained):
            raise ModelError(
                "weights of the student were frozen or unfrozen after it was sharded, which FSDP2 does not see; do so "
                "before fit, or in a configure_model of your own before super().configure_model()"
            )
        student.train()  # transformers load in eval mode, without dropout
        if self.activation_checkpointing:
            settings: Any = student
            settings.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if module._trainer:
            self.spread(student, module._trainer)

    def gather(self, student: nn.Module, module: LightningModule, only_first: bool = False) -> nn.Module | None:
        """Return the student with all of its weights: itself, or while a run shards it a copy.

        Args:
            student: Of the module.
            module: With its trainer.
            only_first: The copy is on the CPU of rank 0, and nothing on others. All of them must ask.
        """
        if self._skeleton is None:
            return student
        one_by_one = is_sharded(student)
        weights = whole_tensors(student) if one_by_one else whole_weights(module, "student", only_first).items()
        if only_first and not module.trainer.is_global_zero:
            for _ in weights:  # the first rank cannot have them without the others
                pass
            return None
        copy = with_weights(self._skeleton, weights, torch.device("cpu") if only_first else module.device)
        return copy.train(student.training)

    def begin_answering(self, student: nn.Module, module: LightningModule) -> None:
        """Get ready for answers, in as many batches as each rank has: in lockstep under FSDP2, else by a full copy.

        Args:
            student: Of the module.
            module: With its trainer.
        """
        if not asked_sharded(module.trainer):
            self.for_generation = self.gather(student, module)
        elif module.trainer.predicting:  # else a teacher runs between two answers
            self._answering.enter_context(lockstep(student))

    def end_answering(self, error: BaseException | None = None) -> None:
        """Wait for the others in lockstep, unless an error ends it, and free the copy.

        Args:
            error: That ends it.
        """
        self.for_generation = None
        if error is None:
            self._answering.close()
        else:
            self._answering.__exit__(type(error), error, error.__traceback__)
