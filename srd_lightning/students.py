"""Which model reflects, the student before training or as trained so far, and by which tokenizer."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from srd_lightning.models import Pretrained


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
    found = getattr(module, "tokenizer", None)
    if found is None:
        raise ValueError("SRDDataModule needs a tokenizer: pass tokenizer=, or a student that is a Pretrained")
    return found


def fresh_student(source: Pretrained | nn.Module | None, module: Any) -> nn.Module:
    """Return the student that a data module was given, else the one of the module that is to be trained.

    Args:
        source: The student of the data module, if it was given one.
        module: The LightningModule, if there is one: with ``build_student()`` or a model as ``student``.

    Raises:
        ValueError: There is none.
    """
    if isinstance(source, Pretrained):
        return source.model()
    if source is not None:
        return source
    if hasattr(module, "build_student"):
        return cast(nn.Module, module.build_student())
    if isinstance(getattr(module, "student", None), nn.Module):
        return cast(nn.Module, module.student)
    raise ValueError(
        "SRDDataModule needs a student that reflects: pass student=, or train a module whose `student` is a model; "
        "schedule={0: 1.0} trains on all rows without reflection"
    )


def trained_student(source: Pretrained | nn.Module | None, module: Any) -> nn.Module:
    """Return the student as trained so far, with all of its weights; arguments as for `fresh_student`.

    Raises:
        ValueError: There is none that is trained.
    """
    if hasattr(module, "whole_student"):
        return cast(nn.Module, module.whole_student())
    student = getattr(module, "student", source)
    if not isinstance(student, nn.Module):
        raise ValueError("refresh needs the student that is trained: a module with `student`, or student= a model")
    return whole(student)


def whole(model: nn.Module) -> nn.Module:
    """Return the model, or where its weights are sharded (FSDP2) a copy that has them all, on the same device.

    Raises:
        ValueError: The model is sharded and is none of transformers' own.
    """
    parameter = next(model.parameters())
    if not isinstance(parameter, DTensor):
        return model
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"refresh under FSDP2 needs a student of transformers, not {type(model).__name__}")
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    with torch.random.fork_rng(), parameter.device:
        copy = type(model)(model.config)  # of the class before sharding
    for weight in copy.parameters():
        weight.data = weight.data.to(parameter.dtype)
    copy.load_state_dict(weights)
    return cast(nn.Module, copy)
