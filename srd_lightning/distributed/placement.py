"""Where the weights of student and teacher are, under each strategy of Lightning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from srd_lightning.distributed.fsdp2 import blocks, is_sharded, send_from_first, shard
from srd_lightning.errors import SettingError

TeacherPlacement = Literal["replicate", "shard", "offload"]


def shards_student(trainer: Trainer) -> bool:
    """Return whether the strategy spreads the weights of the student over processes."""
    return isinstance(trainer.strategy, (ModelParallelStrategy, FSDPStrategy))


def asked_sharded(trainer: Trainer) -> bool:
    """Return whether a student answers as it is sharded: under FSDP2, where each rank has rows of its own.

    Elsewhere a copy with all of its weights answers: ranks that split layers would have to see the same rows, and
    FSDP1 has wrapped the module, of which the student is but a part.
    """
    return isinstance(trainer.strategy, ModelParallelStrategy) and data_parallel_mesh(trainer).size() == (
        trainer.world_size
    )


def data_parallel_mesh(trainer: Trainer) -> DeviceMesh:
    """Return the ranks that see different rows."""
    strategy = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy):
        return strategy.device_mesh["data_parallel"]
    return init_device_mesh(strategy.root_device.type, (trainer.world_size,))


def compute_dtype(trainer: Trainer) -> torch.dtype | None:
    """Return the type in which matrix products are made, where it is not that of the weights."""
    device = trainer.strategy.root_device.type
    with trainer.precision_plugin.forward_context():
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def shard_student(student: nn.Module, trainer: Trainer) -> None:
    """Shard the student where the strategy leaves that to the module (FSDP2), or tell the strategy how (FSDP1)."""
    strategy = trainer.strategy
    if isinstance(strategy, FSDPStrategy):
        # Lightning wraps the whole module, by what its strategy was made with: blocks are known only now
        send_from_first(student, strategy.root_device)
        strategy.kwargs.setdefault("auto_wrap_policy", ModuleWrapPolicy({type(block) for block in blocks(student)}))
        if strategy.mixed_precision is None and (config := strategy.mixed_precision_config) is not None:
            # Lightning would sum gradients in half precision, and round what positions are computed from.
            strategy.mixed_precision = replace(
                config, reduce_dtype=torch.float32, buffer_dtype=None, cast_root_forward_inputs=False
            )
    elif isinstance(strategy, ModelParallelStrategy) and not is_sharded(student):
        shard(student, data_parallel_mesh(trainer), compute_dtype(trainer))


def shard_along(other: nn.Module, trainer: Trainer) -> None:
    """Shard what is trained beside a student that `shard_student` shards: an optimizer takes no mixture.

    Args:
        other: With parameters of its own, or without; called by itself, never within the student.
        trainer: Of the run.
    """
    strategy = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy) and not is_sharded(other) and any(True for _ in other.parameters()):
        shard(other, data_parallel_mesh(trainer), compute_dtype(trainer))


def place_teacher(teacher: nn.Module, trainer: Trainer, placement: TeacherPlacement, dtype: torch.dtype | None) -> None:
    """Put the teacher on the device, or spread it over the ranks.

    Args:
        teacher: Frozen.
        trainer: Of the run.
        placement: ``replicate``: whole on each device. ``shard``: spread over the devices. ``offload``: spread over the
            memories of their hosts.
        dtype: In which weights that are spread are gathered and used; by default each in its own.

    Raises:
        SettingError: There are no processes to spread it over.
    """
    if placement == "replicate":
        teacher.to(trainer.strategy.root_device)
        return
    check_placement(trainer, placement)
    if not is_sharded(teacher):
        shard(teacher, data_parallel_mesh(trainer), dtype, offload=placement == "offload")


def check_placement(trainer: Trainer, placement: TeacherPlacement) -> None:
    """Check that there are processes to spread a teacher over.

    Raises:
        SettingError: There are none.
    """
    if placement != "replicate" and not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise SettingError(
            f"teacher_placement {placement} needs a strategy of several ranks, such as ddp (on one device too), "
            f"but this is {type(trainer.strategy).__name__}; choose one, or replicate"
        )


def whole_weights(module: LightningModule, part: str, only_first: bool = False) -> Mapping[str, Tensor]:
    """Return the state dict of a part of a module, gathered from all ranks; all of them must ask.

    Args:
        module: Under any strategy.
        part: Its name.
        only_first: On the CPU of rank 0; others need not get any.
    """
    strategy = module.trainer.strategy
    # from CPU to CPU, FSDP1 would not copy what it then frees
    elsewhere = strategy.root_device.type != "cpu"
    options = StateDictOptions(full_state_dict=True, cpu_offload=only_first and elsewhere)
    weights: Mapping[str, Any] = get_model_state_dict(cast(nn.Module, strategy.model), options=options)
    prefix = f"{part}."
    return {name[len(prefix) :]: weight for name, weight in weights.items() if name.startswith(prefix)}
