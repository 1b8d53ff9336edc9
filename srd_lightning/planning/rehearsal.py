"""`Rehearsal`: the data of a run that only tries a few of its batches."""

from __future__ import annotations

import dataclasses
import functools
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from lightning import Callback, LightningDataModule
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from srd_lightning.callbacks.hyperparameters import HyperparameterScheduler
from srd_lightning.curation.reflection import Known
from srd_lightning.curation.student_source import ReflectingStudent
from srd_lightning.curriculum.curriculum import Curriculum
from srd_lightning.data.tokenization import lengths_of
from srd_lightning.datamodule import SRDDataModule
from srd_lightning.distributed.process_group import Ranks
from srd_lightning.module import KDLightningModule
from srd_lightning.planning.clock import Calibrate, Clock, ClockName, Prices, Throughput, clock_of
from srd_lightning.planning.cost import Ints, evenly, rate_of
from srd_lightning.planning.counting import teaching
from srd_lightning.planning.memory import Sizes
from srd_lightning.planning.plan import known_prices
from srd_lightning.planning.reflecting import Tried, try_reflection
from srd_lightning.planning.sizes import sizes_of
from srd_lightning.planning.survey import Seen, survey
from srd_lightning.planning.trying import WARM_UP, NoTrial, Passes, Trial
from srd_lightning.preflight import callbacks_of
from srd_lightning.protocols import BatchColumns, IsReplayed
from srd_lightning.teacher.handle import TeacherHandle

BATCHES = 7
"""Of training, that are measured at most."""
HELD_OUT = 3
"""Of the validation."""
AGAIN = 6
"""How often each comes while there is time: on a machine that does other things too, some steps take longer."""


class Rehearsal(LightningDataModule):
    """Stands in a trainer in the place of a run's data: looks at all of it, and gives the trainer a few batches.

    Args:
        data: Of the run.
        calibrate: How long may be measured.
        throughput: What is known; then nothing is tried.
        clock: By which is measured.
        left_out: Callbacks of the trainer that take no part: they stop a run, write something, or change what is tried.
    """

    def __init__(
        self,
        data: SRDDataModule,
        calibrate: Calibrate,
        throughput: Throughput | None,
        clock: ClockName,
        left_out: Sequence[Callback],
    ) -> None:
        super().__init__()
        self.data = data
        self.batch_size = data.batch_size
        self.prices = Prices()
        self.seen: Seen | None = None
        self.sizes: Sizes | None = None
        self._seconds = calibrate.seconds / 3
        self._clock: ClockName = clock
        self._throughput = throughput
        self._folder: Path | None = None
        self._left_out = left_out
        self._passes: Passes | None = None
        self._tried = np.zeros(0, np.int64)
        self._began = 0.0

    @property
    def curriculum(self) -> Curriculum | None:
        """Which rows come when, as far as it is known."""
        return self.data.curriculum

    @functools.cached_property
    def _now(self) -> Clock:
        trainer: Any = self.trainer
        return clock_of(self._clock, trainer.strategy.root_device)

    def setup(self, stage: str) -> None:
        """Look at the run; then have the trainer do only what is tried."""
        trainer: Any = self.trainer
        module: KDLightningModule = trainer.lightning_module
        self.data.trainer = trainer
        try_out = self._try_reflection if self._throughput is None else None
        self.seen = survey(self.data, module, trainer, self._now, self.prices, try_out)
        self.sizes = sizes_of(self.seen.largest, module, trainer)
        if self._throughput is not None:
            self.prices = known_prices(self.seen, self._throughput)
        self._let_little_run(self.seen, module.teacher_handle, trainer)

    def _let_little_run(self, seen: Seen, teacher: TeacherHandle, trainer: Any) -> None:
        """Have a trainer do only what is tried, and write only into a folder that is then removed."""
        tries = self._throughput is None
        self._batches = [seen.batches[place] for place in evenly(BATCHES + 1, len(seen.batches))]
        self._held_out = [seen.held_out[place] for place in evenly(HELD_OUT, len(seen.held_out))]
        if not tries:
            teacher.cache = None
        elif teacher.cache is not None and seen.caching is not None and seen.caching.rows:
            self._folder = Path(Ranks().rank0_result(functools.partial(tempfile.mkdtemp, prefix="srd-plan-")))
            teacher.cache = dataclasses.replace(teacher.cache, dir=str(self._folder))
        kept = [one for one in callbacks_of(trainer) if one not in self._left_out or _shapes(one)]
        trainer.callbacks = [*kept, Trial(self._now, self._seconds, self.prices) if tries else NoTrial()]
        trainer.accumulate_grad_batches = min(trainer.accumulate_grad_batches, 2)
        trainer.limit_train_batches = trainer.limit_val_batches = 1.0
        trainer.val_check_interval, trainer.check_val_every_n_epoch, trainer.num_sanity_val_steps = 1.0, 1, 0
        trainer.reload_dataloaders_every_n_epochs = 1

    def clean(self) -> None:
        """Remove what the teacher has said."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _try_reflection(self, known: Known, student: ReflectingStudent) -> Tried:
        rows, model = self.data.rows["train"], student.untrained()
        return try_reflection(self.data.curator, rows, known, model, student, self._now, self._seconds)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return a few batches that are not counted, and in the next epoch those that are."""
        trainer: Any = self.trainer
        batches = self._batches[:WARM_UP] if trainer.current_epoch == 0 else self._batches * AGAIN
        return self._loader(self.data.rows["train"], batches)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return a few batches of the validation."""
        return self._loader(self.data.rows["validation"], self._held_out) if self._held_out else []

    def _loader(self, rows: Any, batches: list[Ints]) -> DataLoader[Any]:
        trainer: Any = self.trainer
        return DataLoader(
            rows,
            batch_sampler=[batch.tolist() for batch in batches],
            num_workers=self.data.loaders.num_workers,
            collate_fn=self.data.collate,
            pin_memory=trainer.strategy.root_device.type == "cuda",
        )

    def rows_to_cache(self) -> Dataset:
        """Return the rows that are tried; from now on the teacher is asked."""
        trainer: Any = self.trainer
        parts = {"train": self._batches, "validation": self._held_out}
        rows = concatenate_datasets(
            [self.data.rows[split].select(np.unique(np.concatenate(some))) for split, some in parts.items() if some]
        )
        teacher = trainer.lightning_module.teacher_handle.model
        self._tried, self._began = lengths_of(rows).astype(np.int64), self._now()
        self._passes = None if teacher is None else Passes(teacher, self._now)
        return rows

    def use_batch_columns(self, columns: BatchColumns | None) -> None:
        """Let batches carry what the teacher has said; where it was asked for this, say what that took."""
        self.data.use_batch_columns(columns)
        if columns is not None and self._passes is not None:
            work, took = teaching(self._tried), self._now() - self._began
            self.prices.cache = rate_of(*self._passes.end(work.passes, self._now()))
            self.prices.cache_once += max(took - self.prices.cache.seconds(work), 0.0)

    def rows_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Return the tokenizer of the rows."""
        return self.data.rows_tokenizer()

    def longest_prompt(self) -> int:
        """Return the most tokens that a prompt may have."""
        return self.data.longest_prompt()

    def rows_per_batch(self) -> int:
        """Return the rows of a batch."""
        return self.data.rows_per_batch()

    def padded_to(self) -> int:
        """Return of what number the length of a batch is a multiple."""
        return self.data.padded_to()

    def check_replay(self, cached: bool) -> None:
        """Refuse where there will be no answers."""
        self.data.check_replay(cached)

    def replay(self, steps: IsReplayed | None) -> None:
        """Try rows with their responses: answers are not there yet."""


def _shapes(callback: Callback) -> bool:
    """Return whether a callback changes what a step computes."""
    return isinstance(callback, HyperparameterScheduler)
