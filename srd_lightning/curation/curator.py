"""`Curator`: tokenised rows are scored by the student that is to learn from them, ranked and staged.

`StagedRows` are what a run has of it: the rows of each epoch, in an order that a refresh changes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, concatenate_datasets
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Subset

from srd_lightning.checkpoints.refusals import check_refresh_is_known
from srd_lightning.criteria.base import Column, Criterion, check_criteria
from srd_lightning.criteria.standard import NegativeLogLikelihood, RougeL
from srd_lightning.curation.answered_rows import AnsweredRows
from srd_lightning.curation.external_scores import check_scores_file, read_scores
from srd_lightning.curation.reflection import Known, Reflector
from srd_lightning.curation.result import CurationResult
from srd_lightning.curation.score_store import Scores, stored_scores
from srd_lightning.curation.student_source import ReflectingStudent
from srd_lightning.curriculum.curriculum import Curriculum, check_fractions
from srd_lightning.curriculum.ranking import Arrangement, EasyToHard, Floats, arranged, reciprocal_rank_fusion
from srd_lightning.data.readers import form_of, names_in
from srd_lightning.data.samplers import Lengths
from srd_lightning.data.tokenization import ids_of, lengths_of
from srd_lightning.digests import digest
from srd_lightning.errors import DataError, ModelError, SettingError
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
        refresh: First epochs of stages at which the student, as trained so far, reflects again; see `StagedRows`.
        scores: Folder of the scores, or a file of them that something else made; by default a folder below the root.
        ties: How equal scores are ranked; see `reciprocal_rank_fusion`.
        decoding: How the student answers.
        reflection_tokens: Most tokens in a batch of the reflection.
        reflection_threads: Of a CPU while the student reflects.

    Raises:
        SettingError: A schedule without epoch 0, two criteria of one column, other ties, or a refresh at an epoch that
            is not the first of a later stage.
    """

    def __init__(
        self,
        schedule: Mapping[Any, float],
        criteria: list[Criterion] | None = None,
        arrangement: Arrangement | None = None,
        refresh: Sequence[int] = (),
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
        later = [epoch for epoch in self.schedule if epoch > 0]
        if refresh and not self.ranks:
            raise SettingError("refresh needs a schedule that ranks rows, but this one trains on all from the start")
        if wrong := sorted(set(refresh) - set(later)):
            raise SettingError(f"refresh must name first epochs of later stages, which are {later}, but names {wrong}")
        self.refresh = sorted(set(refresh))
        self.reflector = Reflector(self.criteria, decoding, reflection_tokens, reflection_threads)

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

    def check_replay(self, cached: bool) -> None:
        """Check that there will be answers to the rows.

        Args:
            cached: Whether the teacher is cached before training.

        Raises:
            SettingError: There will be none, or they are renewed when the teacher is gone.
        """
        needed = "ReflectionReplay trains on the student's answers"
        if not self.ranks:
            raise SettingError(
                f"{needed}, but schedule {self.schedule} trains on all rows from the start, and the student is asked "
                "for none; give a schedule that ranks rows, such as {0: 0.25, 8: 0.5, 16: 0.75}"
            )
        if self.scores_file is not None and "answer" not in names_in(self.scores_file):
            raise SettingError(f"{needed}, but {self.scores_file} has no column answer; add it, or use a folder")
        if cached and self.refresh:
            raise SettingError(
                f"{needed}, which refresh {self.refresh} renews when the teacher's cache is complete; leave refresh "
                "out, or set teacher_cache to none"
            )

    def limits(self, rows: Dataset, scores: Scores) -> list[float]:
        """Return from how many tokens on the answers to rows have no end token, ``[N]``.

        Where scores say whether an answer was cut that is 0 or infinity, else what `decoding` allowed.
        """
        lengths = np.array(rows["length"]) - np.array(rows["prompt_length"])
        allowed = self.reflector.decoding.limits(lengths.tolist())
        cut = scores.cut(ids_of(rows))
        return np.select([cut == 1, cut == 0], [0.0, np.inf], allowed).tolist()  # type: ignore[no-any-return]

    def curate(
        self, rows: Dataset, student: ReflectingStudent, root: Path, dropped: Mapping[str, int]
    ) -> CurationResult:
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
        result = CurationResult(
            ids=ids_of(rows),
            columns={} if scores is None else scores.columns,
            higher_is_easier={criterion.column: criterion.higher_is_easier for criterion in self.criteria},
            order=order,
            curriculum=self.staged(order),
            dropped=dropped,
            seconds=time.perf_counter() - start,
            scored=0 if scores is None else scores.scored,
            scores=scores,
        )
        for first, size in result.sizes.items():
            rank_zero_info(f"from epoch {first}: {size} of {len(rows)} rows")
        return result

    def _scores(self, rows: Dataset, student: ReflectingStudent, root: Path) -> Scores:
        if self.scores_file is not None:
            return read_scores(self.scores_file, rows, self.criteria, student.tokenizer)
        check_room(BYTES_PER_ROW * len(rows), self._folder(root, {}), self._setting)
        model = student.untrained()
        fingerprint = self.reflector.fingerprint(rows, model, student)
        return self.reflector.scores(rows, model, student, self._folder(root, fingerprint), fingerprint)

    def look(self, rows: Dataset, student: ReflectingStudent, root: Path) -> Known:
        """Return the scores that there are already; nothing is written, and nobody reflects.

        Args:
            rows: Tokenised.
            student: Who would reflect.
            root: Folder of the run.

        Raises:
            StorageError: The folder holds scores that were made of something else.
        """
        if not self.ranks:
            return Known({}, [])
        if self.scores_file is not None:
            return Known(read_scores(self.scores_file, rows, self.criteria, student.tokenizer).columns, [])
        fingerprint = self.reflector.fingerprint(rows, student.untrained(), student)
        return self.reflector.look(rows, self._folder(root, fingerprint), fingerprint)

    def scores_again(self, rows: Dataset, student: ReflectingStudent, root: Path, first: int) -> Scores:
        """Let the student, as trained so far, reflect on rows.

        Args:
            rows: Those still to come.
            student: Who reflects.
            root: Folder of the first reflection; the scores are in it, in a folder named after the epoch.
            first: The epoch that begins.
        """
        model = student.as_trained()
        fingerprint = self.reflector.fingerprint(rows, model, student)
        folder = root / f"epoch-{first}-{digest(fingerprint)}"
        return self.reflector.scores(rows, model, student, folder, fingerprint)

    def staged(self, order: Tensor) -> Curriculum:
        """Return the curriculum of ranked rows, ``[N]``, easiest first."""
        kept = Curriculum(order, self.schedule).kept
        return Curriculum(arranged(self.arrangement, order, kept), self.schedule)

    def order(self, rows: Dataset, scores: Scores) -> Tensor:
        """Return row numbers, ``[N]``, easiest first."""
        return rank(scores.columns, self.criteria, ids_of(rows), self.ties)


class StagedRows:
    """The training rows of one run, in the stages of their curriculum, which a refresh changes.

    A refresh lets the student, as trained so far, reflect again on the rows still to come, where a stage begins.

    Args:
        curator: That made the curriculum, and makes it again.
        rows: Tokenised.
        student: Who reflects.
        root: Folder of the run.
        result: Of the curation of these rows.

    Attributes:
        curriculum: As it is now.
        generations: Name of the folder of the scores by first epoch of each refresh; kept in checkpoints, because a run
            that is resumed later has no student any more that could make them again.
        seconds: That refreshes have taken.
        answered: Rows with the student's latest answers, where `replay` was called.
    """

    def __init__(
        self, curator: Curator, rows: Dataset, student: ReflectingStudent, root: Path, result: CurationResult
    ) -> None:
        self.curator = curator
        self.rows = rows
        self.student = student
        self.root = root
        self.result = result
        self.curriculum = result.curriculum
        self.generations: dict[int, str] = {}
        self.seconds = 0.0
        self.answered: AnsweredRows | None = None
        self._done: set[int] = set()

    def replay(self, max_length: int) -> None:
        """Have the student's answers beside the rows, from now on those of each refresh too.

        Args:
            max_length: Tokens of prompt and answer.

        Raises:
            SettingError: No row has an answer.
        """
        assert self.result.scores is not None, "check_replay() comes first"
        numbers = np.arange(len(self.rows)) if self.curator.refresh else self._ever_trained_on()
        self.answered = AnsweredRows(len(self.rows), self.student.tokenizer, max_length)
        self._renew_answers(numbers, self.result.scores)
        if self.answered.rows is None:
            columns = ", ".join(criterion.column for criterion in self.curator.criteria)
            raise SettingError(
                f"ReflectionReplay trains on the student's answers, but criteria {columns} have asked for none, or all "
                "are empty; add a criterion that does, such as RougeL"
            )

    def _renew_answers(self, numbers: NDArray[np.int64], scores: Scores) -> None:
        if self.answered is not None:
            rows = self.rows.select(numbers)
            self.answered.renew(numbers, rows, scores.answers(ids_of(rows)), self.curator.limits(rows, scores))

    def resume(self, generations: Mapping[int, str]) -> None:
        """Go on with the refreshes of an earlier part of the run, instead of making them again."""
        self.generations = dict(generations)

    def refresh(self, epoch: int) -> None:
        """Put the rows still to come in a new order, once for each refresh that is due at an epoch.

        Raises:
            ResumeError: A refresh was made in a run that this one does not know.
        """
        start, scores = time.perf_counter(), self.result.scores
        for first in self.curator.refresh:
            if first > epoch or first in self._done or scores is None:
                continue
            entered, later = self.curriculum.order.tensor_split([self.curriculum.size(first - 1)])
            to_come = self.rows.select(later.numpy())
            if first in self.generations:
                again = stored_scores(scores.folder / self.generations[first], to_come, self.curator.criteria)
            else:
                check_refresh_is_known(first, epoch)
                again = self.curator.scores_again(to_come, self.student, scores.folder, first)
                self.generations[first] = again.folder.name
            order = self.curator.order(to_come, again)
            order = arranged(self.curator.arrangement, order, self.curriculum.kept - len(entered))
            self.curriculum = Curriculum(torch.cat([entered, later[order]]), self.curriculum.schedule)
            self._renew_answers(later.numpy(), again)
            self._done.add(first)
            rank_zero_info(f"rows still to come are in the order of {self.generations[first]}")
        self.seconds += time.perf_counter() - start

    def of_epoch(self, epoch: int) -> tuple[Subset[Any], Lengths]:
        """Return the rows of an epoch, ``N``, and their lengths in tokens, ``[N]``."""
        lengths = lengths_of(self.rows)[self.curriculum.rows(epoch).numpy()]
        return self.curriculum.subset(self.rows, epoch), lengths

    def ever_trained_on(self) -> Dataset:
        """Return the rows that are kept, or all where a refresh may let in others; and those with answers."""
        rows = self.rows if self.curator.refresh else self.rows.select(self._ever_trained_on())
        answered = None if self.answered is None else self.answered.rows
        return rows if answered is None else concatenate_datasets([rows, answered])

    def _ever_trained_on(self) -> NDArray[np.int64]:
        kept: NDArray[np.int64] = self.curriculum.order[: self.curriculum.kept].sort().values.numpy()
        return kept


def rank(
    columns: Mapping[str, Floats], criteria: Sequence[Criterion], ids: pa.Array, ties: Literal["average", "order"]
) -> Tensor:
    """Order rows by their scores, easiest first.

    Args:
        columns: Scores by column, ``[N]``.
        criteria: Their directions and weights.
        ids: ``[N]``; rows that no score can tell apart stand in the order of their ids, not of the file.
        ties: See `reciprocal_rank_fusion`; with ``"order"`` the order of the file decides, as in the paper's code.

    Returns:
        Row numbers ``[N]``, int64.
    """
    for criterion in criteria:
        missing = np.flatnonzero(np.isnan(columns[criterion.column]))
        if len(missing) == len(ids):
            raise ModelError(
                f"{criterion.column} is NaN for all {len(ids)} rows, so it is not the rows but the student that gives "
                f"NaN, or {type(criterion).__name__}; look at its weights"
            )
        if len(missing):
            raise DataError(
                f"{criterion.column} is NaN for {len(missing)} of {len(ids)} rows, {ids[int(missing[0])].as_py()!r} "
                "among them; leave the rows or the criterion out"
            )
    ease = [
        columns[criterion.column] if criterion.higher_is_easier else -columns[criterion.column]
        for criterion in criteria
    ]
    order = reciprocal_rank_fusion(*ease, ties=ties, weights=[criterion.weight for criterion in criteria])
    return order if ties == "order" else _settle_by_id(order, ease, ids)


def _settle_by_id(order: Tensor, ease: Sequence[Floats], ids: pa.Array) -> Tensor:
    rows = order.numpy()
    as_before = np.ones(max(len(rows) - 1, 0), dtype=bool)
    for values in ease:
        in_order = values[rows]
        as_before &= in_order[1:] == in_order[:-1]
    places = np.flatnonzero(np.append(as_before, False) | np.insert(as_before, 0, False))
    if len(places):
        group = np.cumsum(~np.insert(as_before, 0, False)[places])
        names = np.array(ids.take(pa.array(rows[places])).to_pylist())
        rows[places] = rows[places][np.lexsort((names, group))]
    return order
