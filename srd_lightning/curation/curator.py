"""`Curator`: tokenised rows are scored by the student that is to learn from them, ranked, and staged."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from srd_lightning.criteria.answers import RougeL
from srd_lightning.criteria.base import Column, Criterion, check_criteria
from srd_lightning.criteria.likelihood import NegativeLogLikelihood
from srd_lightning.curation.external_scores import check_scores_file, read_scores
from srd_lightning.curation.order import rank
from srd_lightning.curation.reflection import Reflector
from srd_lightning.curation.result import Curated
from srd_lightning.curation.score_store import Scores
from srd_lightning.curation.student_source import ReflectingStudent
from srd_lightning.curriculum.arrangement import Arrangement, EasyToHard, arranged
from srd_lightning.curriculum.curriculum import Curriculum, check_fractions
from srd_lightning.data.formats import form_of
from srd_lightning.data.rows import ids_of
from srd_lightning.digests import digest
from srd_lightning.errors import SettingError
from srd_lightning.models.generation import Decoding
from srd_lightning.storage import check_folder, check_room

BYTES_PER_ROW = 1024
"""That the scores of a row and the answer to it may take; more than they take as a rule."""


class Curator:
    """Lets a student reflect on rows, and makes a curriculum of them; needs no Trainer.

    Args:
        schedule: ``{first epoch: share of the rows}``.
        criteria: What makes a row hard; by default the paper's, `RougeL` and `NegativeLogLikelihood`.
        arrangement: How the ranked rows enter; `EasyToHard` by default.
        scores: Folder of the scores, or a file of them that something else made; by default a folder below the root.
        ties: How equal scores are ranked; see `reciprocal_rank_fusion`.
        decoding: How the student answers.
        reflection_tokens: Most tokens in a batch of the reflection.
        reflection_threads: Of a CPU while the student reflects.

    Raises:
        SettingError: A schedule without epoch 0, two criteria of one column, or other ties.
    """

    def __init__(
        self,
        schedule: Mapping[Any, float],
        criteria: list[Criterion] | None = None,
        arrangement: Arrangement | None = None,
        scores: str | None = None,
        ties: Literal["average", "order"] = "average",
        decoding: Decoding = Decoding(),  # noqa: B008 (frozen)
        reflection_tokens: int = 32768,
        reflection_threads: int = 1,
    ) -> None:
        self.schedule = check_fractions(schedule)
        self.criteria = check_criteria(criteria or [RougeL(), NegativeLogLikelihood()])
        self.arrangement = arrangement or EasyToHard()
        self.scores = None if scores is None else Path(scores)
        if ties not in ("average", "order"):
            raise SettingError(f"ties must be 'average' or 'order', but is {ties!r}")
        self.ties = ties
        self.decoding = decoding
        self.reflection_tokens = reflection_tokens
        self.reflection_threads = reflection_threads

    @property
    def ranks(self) -> bool:
        """Whether rows are ranked, and not all trained on from the start."""
        return set(self.schedule.values()) != {1.0}

    @property
    def scores_file(self) -> Path | None:
        """The file of scores that something else has made, if one was named."""
        scores = self.scores
        return scores if scores is not None and (form_of(scores) or scores.is_file()) else None

    @property
    def reflects(self) -> bool:
        """Whether a student has to reflect, unless its scores are there already."""
        return self.ranks and self.scores_file is None

    @property
    def _setting(self) -> str:
        return "scores" if self.scores else "trainer.default_root_dir"

    def _folder(self, root: Path, fingerprint: Mapping[str, str]) -> Path:
        return root / "scores" / digest(fingerprint) if self.scores is None else self.scores

    def check(self, root: Path) -> None:
        """Check what can be known of the scores before there are rows.

        Args:
            root: Folder of the run.

        Raises:
            SRDError: Scores could not be read, or not be written.
        """
        if self.ranks and self.scores_file is not None:
            check_scores_file(self.scores_file, self.criteria)
        elif self.ranks:
            if named := [criterion.column for criterion in self.criteria if isinstance(criterion, Column)]:
                raise SettingError(f"the column {named[0]!r} is read from a file, but `scores` names none")
            check_folder(self._folder(root, {}), self._setting)

    def curate(self, rows: Dataset, student: ReflectingStudent, root: Path, dropped: Mapping[str, int]) -> Curated:
        """Let the student reflect where scores are missing, rank the rows and stage them, on all ranks at once.

        Args:
            rows: Tokenised.
            student: Who reflects.
            root: Folder of the run; the scores are in it unless `scores` names another place.
            dropped: Rows that were left out before, by reason.

        Returns:
            What came of it, the same on all ranks.
        """
        start = time.perf_counter()
        scores = self._scores(rows, student, root) if self.ranks else None
        order = torch.arange(len(rows)) if scores is None else self.order(rows, scores)
        kept = Curriculum(order, self.schedule).kept
        curated = Curated(
            ids=ids_of(rows),
            columns={} if scores is None else scores.columns,
            higher_is_easier={criterion.column: criterion.higher_is_easier for criterion in self.criteria},
            order=order,
            curriculum=Curriculum(arranged(self.arrangement, order, kept), self.schedule),
            dropped=dropped,
            seconds=time.perf_counter() - start,
            scored=0 if scores is None else scores.scored,
            scores=scores,
        )
        for first, size in curated.sizes.items():
            rank_zero_info(f"from epoch {first}: {size} of {len(rows)} rows")
        return curated

    def _scores(self, rows: Dataset, student: ReflectingStudent, root: Path) -> Scores:
        if self.scores_file is not None:
            return read_scores(self.scores_file, rows, self.criteria, student.tokenizer)
        check_room(BYTES_PER_ROW * len(rows), self._folder(root, {}), self._setting)
        model, reflector = student.untrained(), self.reflector(student)
        fingerprint = reflector.fingerprint(rows, model)
        return reflector.scores(rows, model, self._folder(root, fingerprint), fingerprint)

    def reflector(self, student: ReflectingStudent) -> Reflector:
        """Return what lets a student reflect by the settings of this curator."""
        return Reflector(
            student.tokenizer,
            student.template,
            self.criteria,
            self.decoding,
            self.reflection_tokens,
            self.reflection_threads,
            student.device,
        )

    def order(self, rows: Dataset, scores: Scores) -> Tensor:
        """Return row numbers, ``[N]``, easiest first."""
        return rank(scores.columns, self.criteria, ids_of(rows), self.ties)
