"""The student of a module: loaded when it is needed, sharded under FSDP2, gathered to answer and to export."""

from __future__ import annotations

from typing import Any

import torch
from lightning import LightningModule
from torch import nn

from srd_lightning.distributed.fsdp2 import with_weights, without_weights
from srd_lightning.distributed.placement import shard_student, shards_student, whole_weights
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
        """The student with all of its weights, from the start to the end of ``test`` and ``predict``."""
        self._skeleton: nn.Module | None = None

    def prepare(self, student: nn.Module, module: LightningModule) -> None:
        """Make it ready for a run of the module, which may be the second one.

        Args:
            student: Of the module.
            module: With its trainer, if it has one.
        """
        student.train()  # transformers load in eval mode, without dropout
        if self.activation_checkpointing:
            settings: Any = student
            settings.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if module._trainer and shards_student(module._trainer):
            if self._skeleton is None:
                self._skeleton = without_weights(student)
            shard_student(student, module)

    def gather(self, student: nn.Module, module: LightningModule, only_first: bool = False) -> nn.Module | None:
        """Return the student with all of its weights: itself, or while a run shards it a copy.

        Args:
            student: Of the module.
            module: With its trainer.
            only_first: The copy is on the CPU of rank 0, and nothing on others. All of them must ask.
        """
        if self._skeleton is None:
            return student
        weights = whole_weights(module, "student", only_first)
        if only_first and not module.trainer.is_global_zero:
            return None
        copy = with_weights(self._skeleton, weights, torch.device("cpu") if only_first else module.device)
        return copy.train(student.training)

    def gather_for_generation(self, student: nn.Module, module: LightningModule) -> None:
        """Gather a full copy: a sharded student would have the ranks wait for each other at every token."""
        self.for_generation = self.gather(student, module)

    def free(self) -> None:
        """Free the gathered copy."""
        self.for_generation = None
