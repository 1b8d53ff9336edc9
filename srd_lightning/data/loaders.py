"""Loaders of tokenised rows for training and evaluation, sharded over the processes."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from lightning import Trainer
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, DistributedSampler
from transformers import PreTrainedTokenizerBase

from srd_lightning.data.batches import collate
from srd_lightning.data.samplers import LengthGrouped, Lengths, Shuffled
from srd_lightning.protocols import BatchColumns


@dataclass(frozen=True)
class Loaders:
    """Makes loaders.

    Args:
        tokenizer: Says what pads.
        num_workers: Processes that load batches.
        seed: Of the order within an epoch.
        rank: This process.
        world_size: Processes that see different rows.
        batch_columns: Takes rows; returns what their batch brings along besides, such as what a teacher said to them.
        pad_to_multiple_of: Batches are as long as their longest row, rounded up to a multiple of this.
    """

    tokenizer: PreTrainedTokenizerBase
    num_workers: int
    seed: int
    rank: int
    world_size: int
    batch_columns: BatchColumns | None = None
    pad_to_multiple_of: int = 1

    def train(self, pool: Any, epoch: int, batch_size: int, lengths: Lengths | None = None) -> ResumableLoader:
        """Return rows shuffled by seed and epoch; the last processes may see a row again to even out.

        Args:
            pool: The rows of the epoch.
            epoch: Its number.
            batch_size: Rows per process and batch.
            lengths: Of the rows, in tokens, ``[N]``: those of like length stand together. Without, a plain shuffle.

        Returns:
            The loader of this process.
        """
        place = (self.world_size, self.rank, self.seed)
        sampler = Shuffled(pool, *place) if lengths is None else LengthGrouped(pool, lengths, batch_size, *place)
        sampler.set_epoch(epoch)  # Lightning calls it too late where workers prefetch
        return ResumableLoader(pool, **self._settings(sampler, batch_size))

    def evaluation(self, rows: Any, batch_size: int) -> DataLoader[Any]:
        """Return rows in their order. Every process gets as many; those that fill up have no response to count."""
        blanks: Any = [{**rows[0], "prompt_length": len(rows[0]["input_ids"])}] * (-len(rows) % self.world_size)
        full: ConcatDataset[Any] = ConcatDataset([rows, blanks])
        sampler: DistributedSampler[Any] = DistributedSampler(full, self.world_size, self.rank, shuffle=False)
        return DataLoader(full, **self._settings(sampler, batch_size))

    def _settings(self, sampler: DistributedSampler[Any], batch_size: int) -> dict[str, Any]:
        pad = self.tokenizer.pad_token_id
        return {
            "batch_size": batch_size,
            "sampler": sampler,
            "num_workers": self.num_workers,
            "collate_fn": functools.partial(
                _collate,
                pad_token_id=self.tokenizer.eos_token_id if pad is None else pad,
                batch_columns=self.batch_columns,
                pad_to_multiple_of=self.pad_to_multiple_of,
            ),
            "pin_memory": torch.cuda.is_available(),
        }


class RebuiltEveryEpoch:
    """Has a trainer build its loaders anew at every epoch, and as before when the run has ended.

    A loader is as long as it was when it was built: the pool can only grow in a new one.
    """

    def __init__(self) -> None:
        self._former: int | None = None

    def begin(self, trainer: Trainer) -> None:
        """Have the loaders of a run rebuilt, unless they are already."""
        former = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
        self._former = None if former == 1 else former
        trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]

    def end(self, trainer: Trainer) -> None:
        """Let the trainer do as it did before."""
        if self._former is not None:
            trainer.reload_dataloaders_every_n_epochs = self._former  # type: ignore[attr-defined]
            self._former = None


def _collate(
    rows: Sequence[Mapping[str, Any]], pad_token_id: int, batch_columns: BatchColumns | None, pad_to_multiple_of: int
) -> dict[str, Tensor]:
    batch = collate(rows, pad_token_id, pad_to_multiple_of)
    return batch if batch_columns is None else {**batch, **batch_columns(rows)}


class ResumableLoader(DataLoader[Any]):
    """A loader that goes on within an epoch: what was delivered before is left out, and not even loaded.

    Its sampler is a `Shuffled`. The length stays that of the whole epoch.
    """

    delivered = 0
    """Batches of the epoch that were delivered, also by the run that is resumed."""
    _start = 0

    @property
    def _shuffled(self) -> Shuffled:
        return cast(Shuffled, self.sampler)

    @property
    def _in_order(self) -> bool:
        return isinstance(self.sampler, Shuffled)

    def __iter__(self) -> Any:
        """Deliver what is left of the epoch; the next time, all of it."""
        self._shuffled.start = self._start * cast(int, self.batch_size)
        self.delivered = self._start
        return self._count(super().__iter__())  # workers begin now, not at the first batch

    def _count(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self._start = 0  # not before: Lightning makes an iterator twice, and uses the second
            self.delivered += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, and how many of its batches were delivered; nothing where ``overfit_batches`` repeats."""
        return {"epoch": self._shuffled.epoch, "delivered": self.delivered} if self._in_order else {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Leave out what was delivered, if it was of this epoch: another one begins with its first batch."""
        same_epoch = self._in_order and state_dict.get("epoch") == self._shuffled.epoch
        self._start = self.delivered = state_dict["delivered"] if same_epoch else 0

    def ids(self, batch_idx: int) -> list[str]:
        """Return the ids of the rows of a batch, whether it was delivered or not.

        Args:
            batch_idx: Its number within the epoch.
        """
        sampler, rows = copy.copy(self._shuffled), cast(int, self.batch_size)
        sampler.start = batch_idx * rows
        return [str(self.dataset[place]["id"]) for place in itertools.islice(sampler, rows)]
