"""How large models, batches and state of the optimizer are, as far as memory depends on it."""

from __future__ import annotations

from typing import Any

import torch
from lightning import Trainer
from torch import nn

from srd_lightning.distributed.placement import compute_dtype, shards_student
from srd_lightning.losses.chunked import chunk_size
from srd_lightning.models.vocabulary import vocabulary_size
from srd_lightning.module import KDLightningModule
from srd_lightning.planning.memory import Sizes
from srd_lightning.teacher.precompute import depth_of, width_of


def sizes_of(largest: int, module: KDLightningModule, trainer: Trainer) -> Sizes:
    """Return what the memory of a device depends on.

    Args:
        largest: Positions of the largest batch.
        module: Of the run, whose student is loaded, and its teacher where it will be run at every step.
        trainer: Of the run.
    """
    student, handle = module.build_student(trainer), module.teacher_handle
    weights = list(student.parameters())
    trained = [weight for weight in weights if weight.requires_grad]
    world = max(trainer.world_size, 1)
    device, dtype = trainer.strategy.root_device.type, compute_dtype(trainer) or weights[0].dtype
    width, vocabulary = width_of(student) or 0, vocabulary_size(student) or 0
    positions = min(largest, module.step.micro_batch_tokens or largest)
    chunk = module.step.chunk
    if chunk is None:
        chunk = positions
    teacher = 0
    if handle.cache is not None and handle.given is not None:
        teacher = (width_of(handle.given) or 0) * vocabulary * dtype.itemsize
    elif handle.given is not None:
        teacher = bytes_of(handle.load())
    return Sizes(
        student=bytes_of(student),
        trained=sum(weight.numel() * weight.element_size() for weight in trained),
        state=state_per_byte(module.optimizer, trained[0].dtype) if trained else 0.0,
        teacher=teacher,
        ranks=world if shards_student(trainer) else 1,
        teacher_ranks=1 if handle.placement == "replicate" else world,
        positions=positions,
        layers=depth_of(student) or 0,
        width=width,
        vocabulary=vocabulary,
        chunk=min(chunk_size(device, width, dtype) if chunk == "auto" else chunk, positions),
        teachers=1 if handle.given is not None else 0,
        itemsize=dtype.itemsize,
        checkpointing=module.student_handle.activation_checkpointing,
    )


def bytes_of(model: nn.Module) -> int:
    """Return the bytes of a model's weights, those that are shared once."""
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


def state_per_byte(make: Any, dtype: torch.dtype) -> float:
    """Return how many bytes of state an optimizer keeps for each byte of a weight, by one step of a small one.

    Args:
        make: Makes the optimizer from its parameters.
        dtype: Of the weight.

    Returns:
        2, that of Adam, for an optimizer that cannot take the step on a CPU.
    """
    weight = nn.Parameter(torch.zeros(64, 64, dtype=dtype))
    weight.grad = torch.ones_like(weight)
    try:
        optimizer = make([weight])
        optimizer.step()
    except Exception:  # what another library's optimizer needs is not known
        return 2.0
    kept = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(value.numel() * value.element_size() for value in kept if value.numel() > 1) / (4096 * dtype.itemsize)
