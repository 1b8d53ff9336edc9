"""Rows of a data module: read, tokenised, reflected on, ranked, and put in a new order while the student trains."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from srd_lightning.arrangement import Arrangement, EasyToHard
from srd_lightning.criteria import Criterion, NegativeLogLikelihood, RougeL, check_criteria
from srd_lightning.curated import Curated
from srd_lightning.curation import Reflector, Scores, rank, read_scores
from srd_lightning.curriculum import Curriculum, check_fractions
from srd_lightning.fingerprint import digest
from srd_lightning.generation import Decoding
from srd_lightning.hygiene import inspect
from srd_lightning.models import Pretrained
from srd_lightning.refresh import Refresher, rearrange
from srd_lightning.rows import ids_of, load_splits
from srd_lightning.students import find_tokenizer, fresh_student, trained_student
from srd_lightning.templates import ChatTemplate, PromptTemplate
from srd_lightning.tokenised import Report, tokenize


class CuratedRows(LightningDataModule):
    """Has rows, and a curriculum of those that are trained on. Arguments are those of `SRDDataModule`."""

    def __init__(
        self,
        data: str | list[Any] | dict[str, Any],
        tokenizer: str | PreTrainedTokenizerBase | None,
        student: Pretrained | nn.Module | None,
        template: PromptTemplate | ChatTemplate,
        schedule: dict[int, float],
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
        self.scores = scores
        self.decontaminate = decontaminate
        self.near_duplicates = near_duplicates
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
        self.found: Scores | None = None
        self.refresh_seconds = 0.0

    def read_rows(self) -> None:
        """Read and tokenise all splits."""
        self.tokenizer = find_tokenizer(self.tokenizer, self.student, self._module())
        template = self.template.bind(self.tokenizer)
        for split, rows in load_splits(self.data).items():
            self.rows[split], self.reports[split] = tokenize(
                rows, self.tokenizer, template, self.max_length, self.max_prompt_length, split
            )
            rank_zero_info(f"{split}: {self.reports[split]}")

    def curate(self) -> Curated:
        """Look for leaks, let the student reflect where scores are missing, rank the rows and stage them.

        Returns:
            What came of it, also kept as ``self.curation``; its curriculum is ``self.curriculum``.
        """
        start = time.perf_counter()
        if "train" not in self.rows:
            raise ValueError(f"training needs the split 'train', but `data` has {', '.join(self.rows)}")
        self._clean()
        rows = self.rows["train"]
        order, columns = torch.arange(len(rows)), {}
        if set(self.schedule.values()) != {1.0}:
            self.found = self._find_scores(rows)
            order, columns = self._order(rows, self.found), self.found.columns
        kept = Curriculum(order, self.schedule).kept
        self.curriculum = Curriculum(self.arrangement(order, kept), self.schedule)
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
        for first, size in self.curation.sizes.items():
            rank_zero_info(f"from epoch {first}: {size} of {len(rows)} rows")
        return self.curation

    def report(self, console: Console) -> None:
        """Show what came of the curation, and write it, with plots, into the folder of the scores."""
        from srd_lightning.report import extremes, present  # matplotlib, which training does not need

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
            self.rows["train"] = self.rows["train"].select(kept)

    def _find_scores(self, rows: Dataset) -> Scores:
        if self.scores is not None and self.scores.endswith(".parquet"):
            return read_scores(Path(self.scores), rows, self.criteria, self.tokenizer)
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
        return root / "scores" / digest(made_of) if self.scores is None else Path(self.scores)

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
        return self.arrangement(self._order(rows, scores), kept)

    def _reflect_again(self, rows: Dataset, folder: Callable[[Mapping[str, str]], Path]) -> Scores:
        return self._reflect(rows, trained_student(self.student, self._module()), folder)

    def _module(self) -> Any:
        return self.trainer and self.trainer.lightning_module
