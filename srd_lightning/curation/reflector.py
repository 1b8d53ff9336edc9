"""Reflection by all processes: each scores its share of the batches, and all get all scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from srd_lightning.criteria.base import Criterion
from srd_lightning.curation.fingerprint import fingerprint
from srd_lightning.curation.reflection import SCORING_VERSION, Batch, fixed_batches, reflect
from srd_lightning.curation.score_store import Floats, Scores, ScoreStore
from srd_lightning.data.rows import ids_of
from srd_lightning.distributed.process_group import Team
from srd_lightning.errors import SettingError
from srd_lightning.models.generation import Decoding


@dataclass(frozen=True)
class Reflector:
    """Lets a student reflect, in all processes, and keeps the scores.

    Args:
        tokenizer: The student's.
        template: How rows became prompts.
        criteria: What to score.
        decoding: How the student answers.
        tokens_per_batch: See `fixed_batches`.
        threads: Of a CPU while it reflects: their number changes the last digits of scores.
    """

    tokenizer: PreTrainedTokenizerBase
    template: object
    criteria: Sequence[Criterion]
    decoding: Decoding
    tokens_per_batch: int
    threads: int

    def scores(
        self, rows: Dataset, model: nn.Module, folder: Callable[[Mapping[str, str]], Path], device: torch.device
    ) -> Scores:
        """Score every row that has no scores yet.

        Args:
            rows: Tokenised rows.
            model: The student; moved to the device while it reflects.
            folder: Says where scores are kept that were made of something, given as digests by part.
            device: Where to reflect.

        Returns:
            The scores, the same in all processes.

        Raises:
            StorageError: The folder holds scores made of something else, cannot be written, or another run has it.
            SettingError: The processes have different students.
            RankError: Another process has failed.
        """
        team, ids = Team(), ids_of(rows)
        made_of = _same_in_all(
            team.from_all(
                lambda: fingerprint(rows, model, self.tokenizer, self.template, self.decoding, SCORING_VERSION)
            )
        )
        names = [criterion.column for criterion in self.criteria]

        def begin() -> tuple[ScoreStore, dict[str, Floats], list[tuple[int, Batch]]]:
            settings = {criterion.column: criterion.settings() for criterion in self.criteria}
            store = stack.enter_context(ScoreStore.locked(folder(made_of), made_of, settings))
            columns = store.columns(ids, names)
            todo = self._unscored(rows, columns)
            if not todo and not store.is_tidy(len(ids)):  # a run was killed at its very end
                store.tidy()
            return store, columns, todo

        def finish() -> dict[str, Floats]:
            store.tidy()
            return store.columns(ids, names)

        with ExitStack() as stack:
            store, columns, todo = team.from_first(begin)
            if todo:
                with (
                    team.sharing(store.folder) as check,
                    _placed(model, device),
                    pinned_threads(self.threads, device),
                ):
                    share, first = todo[team.rank :: team.size], team.rank == 0
                    reflect(model, self.tokenizer, rows, store, self.criteria, self.decoding, share, check, first)
                columns = team.from_first(finish)
        return Scores(columns, store.folder, sum(len(batch) for _, batch in todo), store.answers)

    def _unscored(self, rows: Dataset, columns: Mapping[str, Floats]) -> list[tuple[int, Batch]]:
        missing = np.any([np.isnan(values) for values in columns.values()], axis=0)
        batches = enumerate(fixed_batches(rows, self.tokens_per_batch, self.decoding))
        return [(number, batch) for number, batch in batches if missing[batch].any()]


def _same_in_all(made_of: Sequence[Mapping[str, str]]) -> Mapping[str, str]:
    first = made_of[0]
    for rank, other in enumerate(made_of):
        if different := [part for part in first if other[part] != first[part]]:
            raise SettingError(
                f"process {rank} has another {', '.join(different)} than process 0; load the same files in all, and "
                "call seed_everything before a model is made from a configuration"
            )
    return first


@contextmanager
def _placed(model: nn.Module, device: torch.device) -> Iterator[None]:
    home = next(model.parameters()).device
    model.to(device)
    try:
        yield
    finally:
        model.to(home)


@contextmanager
def pinned_threads(number: int, device: torch.device) -> Iterator[None]:
    """Compute with a fixed number of threads on a CPU."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
