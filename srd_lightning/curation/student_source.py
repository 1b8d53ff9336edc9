"""Which model reflects, the student before training or as trained so far, and by which tokenizer."""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from srd_lightning.models.pretrained import Pretrained
from srd_lightning.protocols import GathersStudent, HasStudent


def find_tokenizer(
    source: str | PreTrainedTokenizerBase | None, student: Pretrained | nn.Module | None, module: Any
) -> PreTrainedTokenizerBase:
    """Return the tokenizer that a data module was given, else its student's, else the module's.

    Raises:
        ValueError: There is none.
    """
    if isinstance(source, str):
        return AutoTokenizer.from_pretrained(source)
    if source is not None:
        return source
    if isinstance(student, Pretrained):
        return student.tokenizer()
    found = module.student_tokenizer() if isinstance(module, HasStudent) else getattr(module, "tokenizer", None)
    if found is None:
        raise ValueError("SRDDataModule needs a tokenizer: pass tokenizer=, or a student that is a Pretrained")
    return found


def fresh_student(source: Pretrained | nn.Module | None, module: Any) -> nn.Module:
    """Return the student that a data module was given, else the one of the module that is to be trained.

    Args:
        source: The student of the data module, if it was given one.
        module: The LightningModule, if there is one: a `HasStudent`, or with a model as ``student``.

    Raises:
        ValueError: There is none.
    """
    if isinstance(source, Pretrained):
        return source.model()
    if source is not None:
        return source
    if isinstance(module, HasStudent):
        return _whole(module.build_student(), "an earlier run has done so: make a new module")
    if isinstance(getattr(module, "student", None), nn.Module):
        return cast(nn.Module, module.student)
    raise ValueError(
        "SRDDataModule needs a student that reflects: pass student=, or train a module whose `student` is a model; "
        "schedule={0: 1.0} trains on all rows without reflection"
    )


def trained_student(source: Pretrained | nn.Module | None, module: Any) -> nn.Module:
    """Return the student as trained so far, with all of its weights; arguments as for `fresh_student`.

    Raises:
        ValueError: There is none that is trained, or its weights are sharded and the module cannot gather them.
    """
    if isinstance(module, GathersStudent):
        return cast(nn.Module, module.whole_student())
    student = getattr(module, "student", source)
    if not isinstance(student, nn.Module):
        raise ValueError("refresh needs the student that is trained: a module with `student`, or student= a model")
    return _whole(student, f"give {type(module).__name__} a method whole_student(), as KDLightningModule has")


def _whole(student: nn.Module, remedy: str) -> nn.Module:
    if isinstance(next(student.parameters()), DTensor):
        raise ValueError(f"a student that reflects needs all of its weights, but they are sharded; {remedy}")
    return student
