"""What stops a run, said so that the user knows what to do."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.distributed.tensor import DTensor

from srd_lightning.distributed.launcher import TERMINATED, children_of
from srd_lightning.distributed.process_group import Team, tell_failure
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
"""Exceptions that come to all processes at the same place."""
SECONDS_TO_SPEAK = 2


def check_finite(
    value: Tensor,
    name: str,
    module: LightningModule,
    batch_idx: int,
    own: Tensor | None = None,
    reason: Callable[[], str | None] = lambda: None,
) -> None:
    """Stop a run before it makes a step with what is no number.

    Args:
        value: The same on all processes.
        name: What it is.
        module: Which is trained.
        batch_idx: Of the batch within the epoch.
        own: The share of this process, by which the rows are found; by default those of all processes are named.
        reason: Says, asked only then and on all processes, which model is to blame and what to do, if it can tell.

    Raises:
        NonFiniteError: It is infinite or not a number; names the rows of the batch.
    """
    value = value.full_tensor() if isinstance(value, DTensor) else value
    if bool(value.isfinite().all()):
        return

    def rows_of_batch() -> list[str]:
        ids = getattr(module._trainer and module._trainer.train_dataloader, "ids", None)
        guilty = own is None or not bool(own.isfinite().all())
        return ids(batch_idx) if ids is not None and guilty else []

    rows = [row for found in Team().from_all(rows_of_batch) for row in found]
    reasons = [found for found in Team().from_all(reason) if found is not None]
    advice = "look at these rows, resume from the last checkpoint with a lower gradient_clip_val or another precision, "
    advice = reasons[0] if reasons else f"{advice}or begin anew with a lower learning rate"
    raise NonFiniteError(
        f"the {name} is {float(value)} in batch {batch_idx} of epoch {module.current_epoch}; its rows: "
        f"{', '.join(rows) or 'unknown'}. No step was made with it, so what is saved is sound: {advice}"
    )


class Failures(Callback):
    """Says what helps when memory is out, and lets no process wait for one that has failed."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Add the hint to the message, and end the other processes where Lightning would not."""
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
            for callback in trainer.checkpoint_callbacks:  # to save, this process would wait for the others
                if isinstance(callback, ModelCheckpoint):
                    callback.save_on_exception = False  # Lightning asks nothing else, and this run is over
            if children:
                time.sleep(SECONDS_TO_SPEAK)  # perhaps it was another process that failed, and has something to say
            for child in children:
                child.kill()
