"""What a run does, counted by what makes its batches: rows, steps, tokens and positions of each stage."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from datasets import Dataset
from lightning import Trainer

from srd_lightning.curriculum.curriculum import Curriculum
from srd_lightning.curriculum.steps import EpochSteps, epochs_of_run
from srd_lightning.data.samplers import batches_by_token_budget
from srd_lightning.datamodule import SRDDataModule
from srd_lightning.errors import SettingError
from srd_lightning.planning.cost import Ints, Work, batch_sizes
from srd_lightning.planning.schedule import Stage, limited, validations_of
from srd_lightning.teacher.precompute import TOKENS_AT_ONCE
from srd_lightning.training.lr_plan import accumulation_of, planned_epochs


def lengths_in(rows: Dataset, column: str) -> Ints:
    """Return a column of lengths of tokenised rows, ``[N]``."""
    found: Ints = rows.select_columns([column]).with_format("arrow")[:][column].to_numpy().astype(np.int64)
    return found


class Rows:
    """The training rows of a run, by their lengths.

    Args:
        data: Whose rows they are, read.
    """

    def __init__(self, data: SRDDataModule) -> None:
        self.data = data
        self.rows = data.rows["train"]
        self.prompts, self.lengths = (lengths_in(self.rows, column) for column in ("prompt_length", "length"))

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.rows)

    def batches(self, curriculum: Curriculum, epoch: int) -> Ints:
        """Return the row numbers of an epoch, as this rank sees them, batch after batch."""
        data, pool = self.data, curriculum.rows(epoch).numpy()
        places = data.loaders.places(range(len(pool)), self.lengths[pool], epoch, data.batch_size, data.ranks)
        return pool[places]

    def sizes(self, numbers: Ints, batch_size: int) -> tuple[Ints, Ints]:
        """Return tokens and positions of batches, ``[B]`` each; see `batch_sizes`."""
        collate = self.data.collate
        texts = collate.family.padded_apart(self.prompts, self.lengths)
        return batch_sizes(numbers, batch_size, texts, collate.pad_to_multiple_of)

    def all_data(self, epochs: Sequence[EpochSteps], trainer: Trainer) -> tuple[Work, int]:
        """Return the work and the steps of as many epochs on all rows."""
        curriculum = Curriculum(torch.arange(len(self)), {0: 1.0})
        ranks = self.data.ranks["num_replicas"]
        every = epochs_of_run(
            lambda epoch: curriculum.epoch_steps(epoch, self.data.batch_size, ranks),
            accumulation_of(trainer),
            len(epochs),
            limit=trainer.limit_train_batches,
        )
        _, positions = self.sizes(self.batches(curriculum, 0), self.data.batch_size)
        per_epoch = int(positions[: every[0].batches].sum())
        return Work(sum(epoch.batches for epoch in every), per_epoch * len(every)), sum(epoch.steps for epoch in every)


def stages_of(rows: Rows, curriculum: Curriculum, trainer: Trainer) -> tuple[list[Stage], list[EpochSteps], list[Ints]]:
    """Return the stages that a run reaches, its epochs, and the row numbers of some batches.

    Args:
        rows: Of the run.
        curriculum: Which of them come when.
        trainer: Set up for fitting.

    Raises:
        SettingError: The run has no end that is known.
    """
    if trainer.max_epochs in (None, -1) and trainer.max_steps < 0:
        raise SettingError("a plan needs a run that ends: set trainer.max_epochs or max_steps")
    batch_size = rows.data.batch_size
    epochs = planned_epochs(trainer, curriculum, batch_size)
    interval = trainer.val_check_interval
    if not isinstance(interval, (int, float)):
        raise SettingError(
            f"a plan needs val_check_interval in batches or as a share of an epoch, but it is {interval}"
        )
    often = validations_of(epochs, trainer.check_val_every_n_epoch, interval)
    stages, some = dict[int, Stage](), list[tuple[int, Ints]]()
    for epoch, validations in zip(epochs, often, strict=True):
        numbers = rows.batches(curriculum, epoch.epoch)
        tokens, positions = (found[: epoch.batches] for found in rows.sizes(numbers, batch_size))
        number = curriculum.stage(epoch.epoch)
        if number not in stages:
            stages[number] = Stage(epoch.epoch, curriculum.size(epoch.epoch))
            batches = [numbers[first : first + batch_size] for first in range(0, len(numbers), batch_size)]
            some += [(int(size), batch) for size, batch in zip(positions, batches, strict=False)]
        stage = stages[number]
        stage.epochs += 1
        stage.batches += epoch.batches
        stage.steps += epoch.steps
        stage.tokens += int(tokens.sum())
        stage.positions += int(positions.sum())
        stage.validations += validations
    return list(stages.values()), epochs, [batch for _, batch in sorted(some, key=lambda found: found[0])]


def validation_of(data: SRDDataModule, trainer: Trainer) -> tuple[Work, int, list[Ints]]:
    """Return the work of a validation, how many batches try it before training, and the row numbers of its batches."""
    if "validation" not in data.rows:
        return Work(0, 0), 0, []
    rows, ranks, size = data.rows["validation"], data.ranks, data.eval_batch_size
    own = np.arange(len(rows))[ranks["rank"] :: ranks["num_replicas"]]
    texts = data.collate.family.padded_apart(*(lengths_in(rows, column) for column in ("prompt_length", "length")))
    _, positions = batch_sizes(own, size, texts, data.collate.pad_to_multiple_of)
    batches = limited(len(positions), trainer.limit_val_batches)
    chosen = [own[first : first + size] for first in range(0, len(own), size)][:batches]
    first = min(trainer.num_sanity_val_steps, batches) if batches else 0
    return Work(batches, int(positions[:batches].sum())), int(first), chosen


def teaching(lengths: Ints) -> Work:
    """Return the work of a teacher that sees rows of some lengths, as its cache is filled."""
    if len(lengths) == 0:
        return Work(0, 0)
    batches = list(batches_by_token_budget(lengths, TOKENS_AT_ONCE))
    return Work(len(batches), sum(len(batch) * int(lengths[batch].max()) for batch in batches))
