"""Which model reflects, the student before training or as trained so far, by which tokenizer, and where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from lightning import Trainer
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from srd_lightning.data.families import DECODER, Family
from srd_lightning.data.templates import ChatTemplate, PromptTemplate
from srd_lightning.distributed.fsdp2 import runs_inside
from srd_lightning.distributed.placement import asked_sharded, shard_student
from srd_lightning.models.family import family_of
from srd_lightning.models.pretrained import Pretrained
from srd_lightning.protocols import GathersStudent, HasStudent


@dataclass(frozen=True)
class ReflectingStudent:
    """The student of a run, which is only loaded when it reflects.

    Args:
        given: The student of the data module, if it was given one.
        module: The LightningModule, if there is one: a `HasStudent`, or with a model as ``student``.
        tokenizer: Of the rows.
        template: How rows became prompts.
        device: Where it reflects; by default where it is.
        trainer: Of the run, if there is one: under FSDP2 what is loaded to reflect is sharded.
    """

    given: Pretrained | nn.Module | None
    module: Any
    tokenizer: PreTrainedTokenizerBase
    template: PromptTemplate | ChatTemplate
    device: torch.device | None = None
    trainer: Trainer | None = None

    def untrained(self) -> nn.Module:
        """Return the student that a data module was given, else the one of the module that is to be trained.

        Under FSDP2 it is sharded, unless it is a model that was given to the data module alone.

        Raises:
            ValueError: There is none.
        """
        if isinstance(self.given, Pretrained):
            model = self.given.model()
            if self._shards:
                shard_student(model, cast(Trainer, self.trainer))
            return model
        if self.given is not None and self.given is not getattr(self.module, "student", None):
            return self.given
        if isinstance(self.module, HasStudent):
            student = self.module.build_student(self.trainer if self._shards else None)
            return _usable(student, "an earlier run has done so: make a new module")
        if isinstance(getattr(self.module, "student", None), nn.Module):
            return cast(nn.Module, self.module.student)
        raise ValueError(
            "SRDDataModule needs a student that reflects: pass student=, or train a module whose `student` is a model; "
            "schedule={0: 1.0} trains on all rows without reflection"
        )

    def as_trained(self) -> nn.Module:
        """Return the student as trained so far: sharded under FSDP2, else with all of its weights.

        Raises:
            ValueError: There is none that is trained, or its weights are sharded and the module cannot gather them.
        """
        student = getattr(self.module, "student", self.given)
        if self._shards and isinstance(student, nn.Module) and runs_inside(student):
            return student
        if isinstance(self.module, GathersStudent):
            return cast(nn.Module, self.module.whole_student())
        if not isinstance(student, nn.Module):
            raise ValueError("refresh needs the student that is trained: a module with `student`, or student= a model")
        return _usable(student, f"give {type(self.module).__name__} a method whole_student(), as KDLightningModule has")

    @property
    def _shards(self) -> bool:
        if self.trainer is None or not asked_sharded(self.trainer):
            return False
        return find_family(self.given, self.module) == DECODER  # see `StudentHandle.to_ask`


def find_tokenizer(
    given: str | PreTrainedTokenizerBase | None, student: Pretrained | nn.Module | None, module: Any
) -> PreTrainedTokenizerBase:
    """Return the tokenizer that a data module was given, else its student's, else the module's.

    Raises:
        ValueError: There is none.
    """
    if isinstance(given, str):
        return AutoTokenizer.from_pretrained(given)
    if given is not None:
        return given
    if isinstance(student, Pretrained):
        return student.tokenizer()
    found = module.student_tokenizer() if isinstance(module, HasStudent) else getattr(module, "tokenizer", None)
    if found is None:
        raise ValueError("SRDDataModule needs a tokenizer: pass tokenizer=, or a student that is a Pretrained")
    return cast(PreTrainedTokenizerBase, found)


def find_family(student: Pretrained | nn.Module | None, module: Any) -> Family:
    """Return the family of the student that a data module was given, else of the module's; else that of decoders."""
    if student is None:
        student = module.models_by_name().get("student") if isinstance(module, HasStudent) else _student_of(module)
    return family_of(student.config() if isinstance(student, Pretrained) else getattr(student, "config", None))


def _student_of(module: Any) -> nn.Module | None:
    student = getattr(module, "student", None)
    return student if isinstance(student, nn.Module) else None


def _usable(student: nn.Module, remedy: str) -> nn.Module:
    if isinstance(next(student.parameters()), DTensor) and not runs_inside(student):
        raise ValueError(f"a student that reflects needs all of its weights, but they are sharded; {remedy}")
    return student
