"""Loaders of tokenised rows for training and evaluation, sharded over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from lightning import Trainer
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, DistributedSampler

from srd_lightning.checkpoints.resume_state import ResumableLoader
from srd_lightning.data.families import DECODER, Family
from srd_lightning.data.samplers import Lengths, MakeSampler, sampler_of
from srd_lightning.protocols import BatchColumns


@dataclass(frozen=True)
class Loaders:
    """Makes loaders.

    Args:
        num_workers: Processes that load batches.
        seed: Of the order within an epoch.
        sampler: Says which rows make a training batch.
    """

    num_workers: int
    seed: int
    sampler: MakeSampler

    def train(
        self,
        pool: Any,
        lengths: Lengths,
        epoch: int,
        batch_size: int,
        ranks: Mapping[str, int],
        collate: Collate,
        pin_memory: bool,
    ) -> ResumableLoader:
        """Return the rows of an epoch in a random order; the last ranks may see a row again to even out.

        Args:
            pool: The rows.
            lengths: Theirs, in tokens, ``[N]``.
            epoch: Its number.
            batch_size: Rows per rank and batch.
            ranks: ``rank``, and ``num_replicas`` that see different rows.
            collate: Makes batches.
            pin_memory: Put them where a GPU can fetch them by itself.

        Returns:
            The loader of this rank.
        """
        sampler = sampler_of(self.sampler, pool, lengths, batch_size, ranks, self.seed)
        sampler.set_epoch(epoch)  # Lightning calls it too late where workers prefetch
        return ResumableLoader(pool, **self._settings(sampler, batch_size, collate, pin_memory))

    def only_in(
        self, is_wanted: Callable[[int], bool], pool: Any, lengths: Lengths, epoch: int, batch_size: int, ranks: int
    ) -> NDArray[np.bool_]:
        """Return which rows of an epoch stand in wanted batches only: those that fill up the last one may be in two.

        Args:
            is_wanted: Takes the number of a batch within the epoch, which is the same for those of all ranks.
            pool: As for `train`.
            lengths: As for `train`.
            epoch: As for `train`.
            batch_size: As for `train`.
            ranks: That see different rows.

        Returns:
            ``[N]``
        """
        found = np.ones(len(pool), dtype=np.bool_)
        for rank in range(ranks):
            whose = {"num_replicas": ranks, "rank": rank}
            places = self.places(pool, lengths, epoch, batch_size, whose)
            for number, first in enumerate(range(0, len(places), batch_size)):
                if not is_wanted(number):
                    found[places[first : first + batch_size]] = False
        return found

    def places(
        self, pool: Any, lengths: Lengths, epoch: int, batch_size: int, ranks: Mapping[str, int]
    ) -> NDArray[np.int64]:
        """Return the places in the pool of the rows that a rank sees in an epoch, batch after batch.

        Args:
            pool: As for `train`.
            lengths: As for `train`.
            epoch: As for `train`.
            batch_size: As for `train`.
            ranks: As for `train`.

        Returns:
            ``[ceil(N / num_replicas)]``
        """
        sampler = sampler_of(self.sampler, pool, lengths, batch_size, ranks, self.seed)
        sampler.set_epoch(epoch)
        return np.fromiter(sampler, dtype=np.int64)

    def evaluation(
        self, rows: Any, batch_size: int, ranks: Mapping[str, int], collate: Collate, pin_memory: bool
    ) -> DataLoader[Any]:
        """Return rows in their order. Every rank gets as many; those that fill up have no response to count."""
        fill = -len(rows) % ranks["num_replicas"]
        blanks: Any = [{**rows[0], "prompt_length": len(rows[0]["input_ids"])}] * fill
        full: ConcatDataset[Any] = ConcatDataset([rows, blanks])
        sampler: DistributedSampler[Any] = DistributedSampler(full, ranks["num_replicas"], ranks["rank"], shuffle=False)
        return DataLoader(full, **self._settings(sampler, batch_size, collate, pin_memory))

    def _settings(
        self, sampler: DistributedSampler[Any], batch_size: int, collate: Collate, pin_memory: bool
    ) -> dict[str, Any]:
        return {
            "batch_size": batch_size,
            "sampler": sampler,
            "num_workers": self.num_workers,
            "collate_fn": collate,
            "pin_memory": pin_memory,
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


@dataclass(frozen=True)
class Collate:
    """Makes batches of rows.

    Args:
        pad_token_id: What pads.
        pad_to_multiple_of: Batches are as long as their longest row, rounded up to a multiple of this.
        columns: What batches carry besides, such as what a teacher said to their rows.
        family: Of the models that they are made for.
    """

    pad_token_id: int
    pad_to_multiple_of: int = 1
    columns: BatchColumns | None = None
    family: Family = DECODER

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return the batch, see `Family.collate`."""
        batch = self.family.collate(rows, self.pad_token_id, self.pad_to_multiple_of)
        return batch if self.columns is None else {**batch, **self.columns(rows)}
