"""The student of a module: loaded when it is needed, sharded under FSDP2, gathered to export."""

from __future__ import annotations

from typing import Any, cast

import torch
from lightning import LightningModule, Trainer
from torch import nn

from srd_lightning.distributed.fsdp2 import is_sharded, runs_inside, whole_tensors, with_weights, without_weights
from srd_lightning.distributed.placement import asked_sharded, shard_student, shards_student, whole_weights
from srd_lightning.distributed.process_group import Ranks
from srd_lightning.errors import ModelError
from srd_lightning.models.family import is_encoder_decoder
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
        """The student as it is asked, from the start to the end of ``test`` and ``predict``; see `to_ask`."""
        self._skeleton: nn.Module | None = None
        self._trained: list[bool] = []

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

    def to_ask(self, student: nn.Module, module: LightningModule) -> nn.Module:
        """Return the student as `generate` takes it, on all ranks together: as it is, else a copy with all weights.

        An encoder-decoder is copied too: its decoder makes many passes for one of its encoder, so ranks that generate
        unlike numbers of tokens would not stay together.

        Args:
            student: Of the module.
            module: With its trainer.
        """
        as_it_is = self._skeleton is None or (asked_sharded(module.trainer) and not is_encoder_decoder(student))
        return student if as_it_is else cast(nn.Module, self.gather(student, module))

    def begin_answering(self, student: nn.Module, module: LightningModule) -> None:
        """Get ready for ``test`` or ``predict``.

        Args:
            student: Of the module.
            module: With its trainer.
        """
        self.for_generation = self.to_ask(student, module)

    def begin_batch(self) -> None:
        """Tell ranks that have no batch left that this one has: loaders of ``predict`` may give unlike numbers."""
        if self.for_generation is not None and runs_inside(self.for_generation):
            Ranks().all_results(lambda: True)

    def end_predicting(self) -> None:
        """Go along with ranks that have batches left, and free what was gathered."""
        student = self.for_generation
        while student is not None and runs_inside(student) and any(Ranks().all_results(lambda: False)):
            with lockstep(student):  # of the answers to their batch
                pass
        self.free()

    def free(self) -> None:
        """Free what was gathered."""
        self.for_generation = None
