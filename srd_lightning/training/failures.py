"""What stops a run, said so that the user knows what to do."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.distributed.tensor import DTensor

from srd_lightning.distributed.launcher import TERMINATED, children_of
from srd_lightning.distributed.process_group import Ranks, tell_failure
from srd_lightning.errors import NonFiniteError, RankError, lacks_memory

MEMORY_HINT = """
This may help, the first ones at no cost in what is computed:
- micro_batch_tokens (not where the student is sharded), or a smaller batch_size with accumulate_grad_batches
- teacher_cache: hidden, or teacher_placement: shard or offload
- activation_checkpointing: true
- a smaller chunk, and a loss that does not need all logits
- precision: bf16-mixed, or strategy FSDP2 on several devices
- max_length of the data"""
ON_ALL_PROCESSES = (NonFiniteError, SIGTERMException, KeyboardInterrupt)
"""Exceptions that come to all ranks at the same place."""
SECONDS_TO_SPEAK = 2


@dataclass(frozen=True)
class Measured:
    """What was measured in a batch, still on its device.

    Args:
        batch_idx: Number of the batch within the epoch.
        means: Loss first, over the tokens of all ranks, ``[n]``; the same on each.
        tokens: How many they are, a scalar.
        own: The share of this rank in the loss, by which its rows are found.
        reason: Says, asked only where the loss is NaN or infinite and on all ranks, which model is to blame and what to
            do, if it can tell.
        kd_weight: Share of the distillation loss; a part without weight was not computed.
    """

    batch_idx: int
    means: Tensor
    tokens: Tensor
    own: Tensor
    reason: Callable[[], str | None]
    kd_weight: float = 1.0


def read_finite(batches: Sequence[Measured], norm: Tensor | None, module: LightningModule) -> Tensor | None:
    """Fetch what was measured for a step, all at once, and stop a run before a step with a NaN or an infinity.

    This is where the host waits for the device, once per step: when its gradients are there, before they are used.

    Args:
        batches: Of the step; none, where they have been read.
        norm: Of its gradient, where that is known; the same on all ranks.
        module: Which is trained.

    Returns:
        The means over the tokens of the step, ``[n]``, on the host.

    Raises:
        NonFiniteError: A loss or the norm is infinite or not a number; names the rows of the batch.
    """
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    scalars = [] if norm is None else [norm[None]]
    if not batches and not scalars:
        return None
    measured = [torch.cat([batch.means, batch.tokens[None]]) for batch in batches]
    found = torch.tensor(torch.cat([*measured, *scalars]).tolist())
    width = len(measured[0]) if measured else 0
    rows = found[: len(batches) * width].view(len(batches), width)
    for batch, row in zip(batches, rows.tolist(), strict=True):
        if not math.isfinite(row[0]):
            guilty = not bool(batch.own.isfinite())
            raise _not_finite("loss", row[0], module, batch.batch_idx, guilty, batch.reason)
    if norm is not None and not math.isfinite(found[-1]):
        raise _not_finite("norm of the gradient", float(found[-1]), module, module.trainer.fit_loop.batch_idx)
    if len(batches) < 2:
        return rows[0, :-1] if batches else None
    return (rows[:, :-1] * rows[:, -1:]).sum(0) / rows[:, -1].sum().clamp(min=1)


def _not_finite(
    name: str,
    value: float,
    module: LightningModule,
    batch_idx: int,
    guilty: bool = True,
    reason: Callable[[], str | None] = lambda: None,
) -> NonFiniteError:
    """Return what names the rows of the guilty ranks; all must ask."""

    def rows_of_batch() -> list[str]:
        ids = getattr(module._trainer and module._trainer.train_dataloader, "ids", None)
        return ids(batch_idx) if ids is not None and guilty else []

    rows = [row for found in Ranks().all_results(rows_of_batch) for row in found]
    trainer = module._trainer
    with trainer.precision_plugin.forward_context() if trainer else contextlib.nullcontext():  # as in the step
        reasons = [found for found in Ranks().all_results(reason) if found is not None]
    advice = "look at these rows, resume from the last checkpoint with a lower gradient_clip_val or another precision, "
    advice = reasons[0] if reasons else f"{advice}or begin anew with a lower learning rate"
    return NonFiniteError(
        f"the {name} is {value} in batch {batch_idx} of epoch {module.current_epoch}; its rows: "
        f"{', '.join(rows) or 'unknown'}. No step was made with it, so what is saved is sound: {advice}"
    )


class Failures(Callback):
    """Says what helps when memory is out, and lets no process wait for one that has failed."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Add the hint to the message, and end the other ranks where Lightning would not."""
        message = str(exception)
        if lacks_memory(exception) and MEMORY_HINT not in message:
            arguments: Any = (message + MEMORY_HINT,)  # Python 3.10 has no notes, and another error would hide this one
            exception.args = arguments
        if isinstance(exception, SIGTERMException) and not exception.code:  # raised by Lightning: nothing is saved
            exception.code = TERMINATED
            children_of(trainer)
        if trainer.world_size > 1 and not isinstance(exception, ON_ALL_PROCESSES):
            children = children_of(trainer)
            if (reason := tell_failure(exception)) is not None:
                exception.__cause__ = RankError(reason)
            for callback in trainer.checkpoint_callbacks:  # to save, this rank would wait for the others
                if isinstance(callback, ModelCheckpoint):
                    callback.save_on_exception = False  # Lightning asks nothing else, and this run is over
            if children:
                time.sleep(SECONDS_TO_SPEAK)  # perhaps it was another rank that failed, and has something to say
            for child in children:
                child.kill()
