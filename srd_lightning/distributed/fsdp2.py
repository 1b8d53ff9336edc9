"""FSDP2: models whose weights are spread over the ranks, block by block, whole copies of them, and the strategy."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp import register_fsdp_forward_method as register_forward
from torch.distributed.tensor import DTensor

from srd_lightning.digests import weights_digest
from srd_lightning.errors import ModelError, SettingError

T = TypeVar("T")
INSIDE = "_srd_inside"
"""The method of a sharded model that runs any function as its forward pass."""


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the layers that a model repeats: the members of its outermost lists.

    Example:
        >>> layers = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(3))
        >>> len(blocks(nn.ModuleDict({"embed": nn.Linear(2, 2), "layers": layers})))
        3
    """
    if isinstance(model, nn.ModuleList):
        return list(model)
    return [block for child in model.children() for block in blocks(child)]


def shard(model: nn.Module, mesh: DeviceMesh, dtype: torch.dtype | None = None, offload: bool = False) -> None:
    """Spread the weights of a model over processes, in place; all begin with those of rank 0.

    Args:
        model: Its blocks become units that are gathered one after the other; the rest, with the head, is one more.
        mesh: The processes, one-dimensional.
        dtype: In which weights are gathered and used; masters keep theirs, and gradients are summed in fp32.
        offload: Keep the shards in the memory of the host.

    Raises:
        ModelError: A weight was left whole, or weights that were tied no longer are.
    """
    send_from_first(model, torch.device(mesh.device_type))
    tied = _tied(model)
    policies: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False),
    }
    if offload:
        policies["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu")
    for part in (*blocks(model), model):
        fully_shard(part, **policies)
    # FSDP2 makes weights whole in methods that are registered, by name, and models have none that runs a function
    setattr(model, INSIDE, types.MethodType(lambda _, work: work(), model))
    register_forward(model, INSIDE)
    if whole := [name for name, weight in model.named_parameters() if not isinstance(weight, DTensor)]:
        raise ModelError(f"these weights of {type(model).__name__} cannot be sharded: {', '.join(whole)}")
    if _tied(model) != tied:
        raise ModelError(
            f"sharding unties weights of {type(model).__name__} ({tied} became {_tied(model)}); train it under ddp, or "
            "with teacher_placement replicate"
        )


def is_sharded(model: nn.Module | None) -> bool:
    """Return whether `shard`, or a module of one's own, has sharded a model as one."""
    return isinstance(model, FSDPModule)


def inside(model: nn.Module, work: Callable[[], T]) -> T:
    """Do something with the parts of a model: where it is sharded, as its forward pass, in which they can be used."""
    return cast(T, getattr(model, INSIDE)(work)) if hasattr(model, INSIDE) else work()


def runs_inside(model: nn.Module) -> bool:
    """Return whether `shard` has sharded a model: then all ranks must make each of its forward passes."""
    return hasattr(model, INSIDE)


def gathered_digest(model: nn.Module) -> str:
    """Return a digest of the weights that a model is run with: that of a whole one, unless they are rounded before.

    Of a sharded model all ranks must ask.
    """
    if not runs_inside(model):
        return weights_digest(model)
    stored = next(model.parameters()).dtype
    used = inside(model, lambda: next(model.parameters()).dtype)
    release(model)
    return weights_digest(model) + ("" if used == stored else f" as {used}")


def release(model: nn.Module) -> None:
    """Let go of weights that a forward pass has gathered, where no backward pass will."""
    if isinstance(model, FSDPModule):
        model.reshard()


def whole_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the state dict of a model, each tensor gathered when it is its turn; all ranks must take them all.

    So no device ever holds more than one of them.
    """
    for name, tensor in model.state_dict().items():
        yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def without_weights(model: nn.Module) -> nn.Module:
    """Return a copy of a model that has no weights yet; see `with_weights`."""
    return _copy(model, torch.device("meta"))


@torch.no_grad()
def with_weights(skeleton: nn.Module, weights: Iterable[tuple[str, Tensor]], device: torch.device) -> nn.Module:
    """Return a model of the structure of another, tied weights included.

    Args:
        skeleton: The structure.
        weights: All of its state dict, whole; taken one after the other.
        device: Where it shall be.

    Example:
        >>> linear = nn.Linear(1, 1)
        >>> copied = with_weights(without_weights(linear), linear.state_dict().items(), torch.device("cpu"))
        >>> torch.equal(copied.weight, linear.weight), copied.weight is linear.weight
        (True, False)
    """
    model = _copy(skeleton, device)
    own = model.state_dict()
    for name, weight in weights:
        own.pop(name).copy_(weight)
    assert not own, f"these weights were not given: {', '.join(own)}"
    return model.to(device)


def _copy(model: nn.Module, device: torch.device) -> nn.Module:
    """Copy all but the values of weights: for `deepcopy` it has copied them already."""
    weights = {
        id(weight): nn.Parameter(torch.empty_like(weight, device=device), weight.requires_grad)
        for weight in model.parameters()
    }
    return copy.deepcopy(model, cast(Any, weights))


@torch.no_grad()
def send_from_first(model: nn.Module, device: torch.device) -> None:
    """Give the model the weights of rank 0, as DDP does; each tensor goes over the device."""
    for tensor in (*model.parameters(), *model.buffers()):
        value = tensor.to(device).contiguous()
        dist.broadcast(value, src=0)
        tensor.copy_(value)


def _tied(model: nn.Module) -> list[list[str]]:
    """Return the names of weights that are one."""
    names: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(weight), []).append(name)
    return [found for found in names.values() if len(found) > 1]


class FSDP2(ModelParallelStrategy):
    """Shards student and teacher over all ranks; without it, Lightning's own would split layers within a node.

    Takes what `ModelParallelStrategy` takes. With ``save_distributed_checkpoint``, which is the default, each rank
    writes its shard into a folder; else the first writes one file.

    Raises:
        SettingError: When a run begins, where ``data_parallel_size`` is less than that, or layers are to be split.

    Example:
        >>> from lightning import Trainer
        >>> Trainer(accelerator="cpu", devices=8, strategy=FSDP2(), logger=False).num_devices
        8
    """

    def setup_environment(self) -> None:
        """Settle the sizes before Lightning does."""
        processes = self.num_nodes * self.num_processes
        if self._data_parallel_size not in ("auto", processes) or self._tensor_parallel_size not in ("auto", 1):
            raise SettingError(
                f"FSDP2 shards over all ranks, here {processes}, and splits no layers, but data_parallel_size is "
                f"{self._data_parallel_size} and tensor_parallel_size {self._tensor_parallel_size}; leave them out, or "
                "use Lightning's ModelParallelStrategy with a configure_model of your own"
            )
        self._data_parallel_size, self._tensor_parallel_size = processes, 1
        super().setup_environment()
