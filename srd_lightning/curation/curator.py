"""Rows of a data module: read, tokenised, reflected on, ranked, and put in a new order while the student trains."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from srd_lightning.criteria.answers import RougeL
from srd_lightning.criteria.base import Column, Criterion, check_criteria
from srd_lightning.criteria.likelihood import NegativeLogLikelihood
from srd_lightning.curation.external_scores import check_scores_file, read_scores
from srd_lightning.curation.order import rank
from srd_lightning.curation.reflector import Reflector
from srd_lightning.curation.refresh import Refresher, rearrange
from srd_lightning.curation.result import Curated
from srd_lightning.curation.score_store import Scores
from srd_lightning.curation.student_source import find_tokenizer, fresh_student, trained_student
from srd_lightning.curriculum.arrangement import Arrangement, EasyToHard, arranged
from srd_lightning.curriculum.curriculum import Curriculum, check_fractions, never_reached
from srd_lightning.data.contamination import check_near, inspect
from srd_lightning.data.formats import form_of
from srd_lightning.data.rows import ids_of
from srd_lightning.data.splits import load_splits
from srd_lightning.data.templates import ChatTemplate, PromptTemplate
from srd_lightning.data.tokenization import Report, check_first_rows, tokenize
from srd_lightning.digests import digest
from srd_lightning.errors import DataError, SettingError
from srd_lightning.models.generation import Decoding
from srd_lightning.models.positions import check_positions
from srd_lightning.models.pretrained import Pretrained
from srd_lightning.protocols import HasStudent
from srd_lightning.storage import check_folder, check_room

NEEDED = {
    "fit": ("training", ("train",)),
    "validate": ("validation", ("validation",)),
    "test": ("testing", ("test",)),
    "predict": ("prediction", ("predict", "test")),
}
"""What a stage does, and the splits of which it needs one."""
BYTES_PER_ROW = 1024
"""That the scores of a row and the answer to it may take; more than they take as a rule."""


class CuratedRows(LightningDataModule):
    """Has rows, and a curriculum of those that are trained on. Arguments are those of `SRDDataModule`."""

    def __init__(
        self,
        data: str | list[Any] | dict[str, Any],
        tokenizer: str | PreTrainedTokenizerBase | None,
        student: Pretrained | nn.Module | None,
        template: PromptTemplate | ChatTemplate,
        schedule: dict[Any, float],
        criteria: list[Criterion] | None,
        arrangement: Arrangement | None,
        refresh: list[int] | None,
        scores: str | None,
        decontaminate: bool,
        near_duplicates: float | None,
        max_length: int,
        max_prompt_length: int,
        decoding: Decoding,
        reflection_tokens: int,
        reflection_threads: int,
        ties: Literal["average", "order"],
    ) -> None:
        super().__init__()
        self.data = data
        self.tokenizer: Any = tokenizer
        self.student = student
        self.template = template
        self.schedule = check_fractions(schedule)
        self.criteria = check_criteria(criteria or [RougeL(), NegativeLogLikelihood()])
        self.arrangement = arrangement or EasyToHard()
        self.refresher = Refresher(refresh or [], self.schedule)
        self.scores = None if scores is None else Path(scores)
        self.decontaminate = decontaminate
        self.near_duplicates = near_duplicates
        if near_duplicates is not None:
            check_near(near_duplicates)
        if ties not in ("average", "order"):
            raise SettingError(f"ties must be 'average' or 'order', but is {ties!r}")
        self.max_length = max_length
        self.max_prompt_length = max_prompt_length
        self.decoding = decoding
        self.reflection_tokens = reflection_tokens
        self.reflection_threads = reflection_threads
        self.ties = ties
        self.rows: dict[str, Dataset] = {}
        self.reports: dict[str, Report] = {}
        self.curriculum: Curriculum | None = None
        self.curation: Curated | None = None
        self._curated_for: Any = None
        self.found: Scores | None = None
        self.refresh_seconds = 0.0

    def read_rows(self, stage: str) -> None:
        """Read and tokenise all splits, once it is seen that a stage can do with them.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``.
        """
        self.tokenizer = find_tokenizer(self.tokenizer, self.student, self._module())
        template = self.template.bind(self.tokenizer)
        splits = load_splits(self.data)
        self._check_splits(splits, stage)
        for split, rows in splits.items():
            check_first_rows(rows, template, split)
        for split, rows in splits.items():
            self.rows[split], self.reports[split] = tokenize(
                rows, self.tokenizer, template, self.max_length, self.max_prompt_length, split
            )
            rank_zero_info(f"{split}: {self.reports[split]}")

    def _check_splits(self, splits: Iterable[str], stage: str) -> None:
        """Check that there is something to run on."""
        (work, needed), there = NEEDED[stage], list(splits)
        if not set(needed).intersection(there):
            names = " or ".join(repr(split) for split in needed)
            raise DataError(f"{work} needs the split {names}, but `data` has {', '.join(there)}")

    def _check_settings(self, stage: str) -> None:
        """Check what can be known before rows are read."""
        if isinstance(self.data, Mapping) and not self.rows:  # later runs may bring loaders of their own
            self._check_splits(self.data, stage)
        models: dict[str, Any] = (
            dict(module.models_by_name()) if isinstance(module := self._module(), HasStudent) else {}
        )
        if self.student is not None:
            models["student"] = self.student
        check_positions(models, {"max_length": self.max_length})
        if stage != "fit":
            return
        if self.trainer is not None and (late := never_reached(self.schedule, self.trainer.max_epochs)):
            rank_zero_warn(
                f"schedule has a stage from epoch {late[0]} on, but the run ends with trainer.max_epochs "
                f"{self.trainer.max_epochs}, so its rows are never trained on; raise max_epochs, or leave the stage out"
            )
        if not self._ranks:
            return
        if self._scores_file is not None:
            check_scores_file(self._scores_file, self.criteria)
            return
        if named := [criterion.column for criterion in self.criteria if isinstance(criterion, Column)]:
            raise SettingError(f"the column {named[0]!r} is read from a file, but `scores` names none")
        answers = self.max_prompt_length + self.decoding.max_new_tokens
        check_positions({"student": models.get("student")}, {"max_prompt_length with decoding.max_new_tokens": answers})
        check_folder(self._folder({}), self._place_of_scores)

    @property
    def _place_of_scores(self) -> str:
        return "scores" if self.scores else "trainer.default_root_dir"

    @property
    def _ranks(self) -> bool:
        """Whether rows are ranked, and not all trained on from the start."""
        return set(self.schedule.values()) != {1.0}

    @property
    def _scores_file(self) -> Path | None:
        """The file of scores that something else has made, if one was named."""
        scores = self.scores
        return scores if scores is not None and (form_of(scores) or scores.is_file()) else None

    def curate(self) -> Curated:
        """Look for leaks, let the student reflect where scores are missing, rank the rows and stage them.

        Returns:
            What came of it, also kept as ``self.curation``; its curriculum is ``self.curriculum``.
        """
        start = time.perf_counter()
        self._check_splits(self.rows, "fit")
        self._clean()
        rows = self.rows["train"]
        order, columns = torch.arange(len(rows)), {}
        self.found = None
        if self._ranks:
            self.found = self._find_scores(rows)
            order, columns = self._order(rows, self.found), self.found.columns
        kept = Curriculum(order, self.schedule).kept
        self.curriculum = Curriculum(arranged(self.arrangement, order, kept), self.schedule)
        self.curation = Curated(
            ids=ids_of(rows),
            columns=columns,
            higher_is_easier={criterion.column: criterion.higher_is_easier for criterion in self.criteria},
            order=order,
            curriculum=self.curriculum,
            dropped=self.reports["train"].dropped,
            seconds=time.perf_counter() - start,
            scored=self.found.scored if self.found else 0,
        )
        self._curated_for = self._module()
        for first, size in self.curation.sizes.items():
            rank_zero_info(f"from epoch {first}: {size} of {len(rows)} rows")
        return self.curation

    def report(self, console: Console) -> None:
        """Show what came of the curation, and write it, with plots, into the folder of the scores."""
        from srd_lightning.curation.report import extremes, present  # matplotlib, which training does not need

        assert self.curation is not None, "curate() comes first"
        if self.found is None:
            console.print(f"all {self.curation.rows:,} rows are trained on from the start; nothing was ranked")
            return
        shown = self.rows["train"].select(np.concatenate(extremes(self.curation)))
        answers = self.found.answers(ids_of(shown))
        present(self.curation, self.rows["train"], answers, self.found.folder, console)

    def _clean(self) -> None:
        """Report training rows that stand twice or in another split, and drop the latter if that is wanted."""
        hygiene = inspect(self.rows, self.near_duplicates)
        rank_zero_info(str(hygiene))
        if self.decontaminate:
            reasons = hygiene.reasons()
            self.reports["train"].dropped.update(reasons.values())
            kept = [row for row in range(len(self.rows["train"])) if row not in reasons]
            if not kept:
                raise DataError(
                    f"decontaminate leaves no row: each of the {len(reasons)} prompts of train stands in another "
                    "split; train on other rows, or set decontaminate to false"
                )
            self.rows["train"] = self.rows["train"].select(kept)

    def _find_scores(self, rows: Dataset) -> Scores:
        if self._scores_file is not None:
            return read_scores(self._scores_file, rows, self.criteria, self.tokenizer)
        check_room(BYTES_PER_ROW * len(rows), self._folder({}), self._place_of_scores)
        return self._reflect(rows, fresh_student(self.student, self._module()), self._folder)

    def _reflect(self, rows: Dataset, student: nn.Module, folder: Callable[[Mapping[str, str]], Path]) -> Scores:
        reflector = Reflector(
            self.tokenizer,
            self.template,
            self.criteria,
            self.decoding,
            self.reflection_tokens,
            self.reflection_threads,
        )
        device = next(student.parameters()).device if self.trainer is None else self.trainer.strategy.root_device
        return reflector.scores(rows, student, folder, device)

    def _order(self, rows: Dataset, scores: Scores) -> Tensor:
        return rank(scores.columns, self.criteria, ids_of(rows), self.ties)

    def _folder(self, made_of: Mapping[str, str]) -> Path:
        root = Path.cwd() if self.trainer is None else Path(self.trainer.default_root_dir)
        return root / "scores" / digest(made_of) if self.scores is None else self.scores

    def refresh_rows(self, epoch: int) -> None:
        """Let the student, as trained so far, put the rows still to come in a new order, where that is due."""
        start = time.perf_counter()
        for first in self.refresher.due(epoch):
            assert self.curriculum is not None
            self.curriculum = rearrange(
                self.curriculum, first, self.rows["train"], functools.partial(self._order_again, first, epoch)
            )
            rank_zero_info(f"rows still to come are in the order of {self.refresher.generations[first]}")
        self.refresh_seconds += time.perf_counter() - start

    def _order_again(self, first: int, epoch: int, rows: Dataset, kept: int) -> Tensor:
        assert self.found is not None
        scores = self.refresher.scores(first, epoch, self.found.folder, rows, self.criteria, self._reflect_again)
        return arranged(self.arrangement, self._order(rows, scores), kept)

    def _reflect_again(self, rows: Dataset, folder: Callable[[Mapping[str, str]], Path]) -> Scores:
        return self._reflect(rows, trained_student(self.student, self._module()), folder)

    def _module(self) -> Any:
        return self.trainer and self.trainer.lightning_module
