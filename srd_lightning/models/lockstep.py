"""Ranks that share a sharded model run it in lockstep: each as often as it needs, and all equally often.

A forward pass of a model that is sharded gathers its blocks from all ranks, so all must make it. Before each pass ranks
tell each other whether they have one to make; who has none left goes on with a dummy token until nobody has.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from srd_lightning.data.batches import DECODER_INPUT
from srd_lightning.distributed.fsdp2 import blocks, inside, release, runs_inside
from srd_lightning.distributed.process_group import Ranks, reason_of
from srd_lightning.errors import RankError
from srd_lightning.models.calling import eval_mode, logits_of
from srd_lightning.models.family import is_encoder_decoder

_IN_LOCKSTEP: WeakSet[nn.Module] = WeakSet()


def share(model: nn.Module) -> AbstractContextManager[Callable[[], None]]:
    """Return the context in which each rank does its share of work with a model, and then waits for the others.

    Where the model is sharded they stay in `lockstep`; else each works at its own pace, see `Ranks.work_then_wait`.

    Args:
        model: The same on all ranks, which enter and leave together.
    """
    return lockstep(model) if runs_inside(model) else Ranks().work_then_wait()


@contextmanager
def lockstep(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Let each rank call a sharded model as often as it needs, without gradients, whatever the others do.

    All ranks enter and leave together. Meanwhile each may make any number of forward passes, none included, over
    batches of any size; but no other collective operation. What is gathered at a time is a block, besides what is no
    block (embeddings, last norm and head), which stays. Within another lockstep of the model, and for one that is
    whole, this does nothing.

    Args:
        model: Sharded by `shard`.

    Yields:
        A function that does nothing; see `share`.

    Raises:
        RankError: Another rank has failed between two forward passes, with its reason.
    """
    if not runs_inside(model) or model in _IN_LOCKSTEP:
        yield lambda: None
        return
    pace = _Pace(model)
    inside(model, lambda: None)  # gathers what is no block, once
    _IN_LOCKSTEP.add(model)
    try:
        with pace.kept():
            yield lambda: None
            with torch.no_grad(), eval_mode(model):
                while pace.others_go_on():
                    pace.pass_along()
    except Exception as error:
        pace.tell(error)
        raise
    finally:
        _IN_LOCKSTEP.discard(model)
        release(model)


class _Pace:
    """Keeps the forward passes of a model together with those of other ranks."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._blocks = blocks(model)
        weight = next(weight for weight in model.parameters() if isinstance(weight, DTensor))
        self._device = torch.device(weight.device_mesh.device_type)
        self._last = len(self._blocks)
        self._within = self._idle = self._over = False

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Agree with the others before each pass."""
        hooks: list[Any] = []
        for number, block in enumerate(self._blocks):
            # before that of FSDP2, which gathers
            hooks.append(block.register_forward_pre_hook(lambda *_, number=number: self._enter(number), prepend=True))
            hooks.append(block.register_forward_hook(lambda *_: self._leave()))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, number: int) -> None:
        if number <= self._last and not self._idle:  # blocks come in their order, so another pass begins
            self._agree(goes_on=True)
        self._last, self._within = number, True

    def _leave(self) -> None:
        self._within = False

    def others_go_on(self) -> bool:
        """Say that this rank has no pass to make, and return whether another one has."""
        self._idle = True
        return self._agree(goes_on=False)

    def pass_along(self) -> None:
        """Make a pass with a dummy token, since others make one."""
        token = torch.zeros(1, 1, dtype=torch.int64, device=self._device)
        batch = {"input_ids": token, "attention_mask": torch.ones_like(token)}
        logits_of(self._model, batch | ({DECODER_INPUT: token} if is_encoder_decoder(self._model) else {}))

    def tell(self, error: Exception) -> None:
        """Let the others know why this rank fails, unless they are in a pass, where they cannot listen."""
        if not self._over and not self._within:
            with contextlib.suppress(RankError):
                self._agree(goes_on=False, error=error)

    def _agree(self, goes_on: bool, error: Exception | None = None) -> bool:
        signs = torch.tensor([goes_on, error is not None], dtype=torch.int64, device=self._device)
        dist.all_reduce(signs)
        going, failed = signs.tolist()
        if failed:
            self._over = True
            reasons: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(reasons, None if error is None else reason_of(dist.get_rank(), error))
            raise RankError(next(cast(str, reason) for reason in reasons if reason is not None))
        return bool(going)
