"""What a run will do, looked at before it runs: rows that lack scores, stages, the teacher's cache, validation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from lightning import Trainer

from srd_lightning.curation.curator import StagedRows
from srd_lightning.curation.reflection import Known, RowNumbers, fixed_batches
from srd_lightning.curation.result import CurationResult
from srd_lightning.curation.student_source import ReflectingStudent
from srd_lightning.curriculum.curriculum import Curriculum
from srd_lightning.data.tokenization import ids_of
from srd_lightning.datamodule import SRDDataModule
from srd_lightning.module import KDLightningModule
from srd_lightning.planning.clock import Clock, Prices
from srd_lightning.planning.cost import NOTHING, Ints, Work, added
from srd_lightning.planning.counting import Rows, lengths_in, stages_of, teaching, validation_of
from srd_lightning.planning.reflecting import Tried, expected_order, expected_work
from srd_lightning.planning.schedule import Stage
from srd_lightning.teacher.precompute import width_of

Try = Callable[[Known, ReflectingStudent], Tried]
"""Lets the student reflect on a few batches of those that lack scores."""


@dataclass
class Reflection:
    """What the student will be asked.

    Args:
        rows: That lack scores.
        work: That this is.
        prompt_tokens: Of the prompts.
        answer_tokens: That are expected of the answers; without a calibration as many as they may have.
        most_answer_tokens: That they may have.
        refreshes: Rows that are reflected on again, by first epoch.
        refresh_work: That this is.
    """

    rows: int = 0
    work: Work = NOTHING
    prompt_tokens: int = 0
    answer_tokens: int = 0
    most_answer_tokens: int = 0
    refreshes: dict[int, int] = field(default_factory=dict)
    refresh_work: Work = NOTHING


@dataclass
class Caching:
    """What the teacher will be asked before training.

    Args:
        kind: What is kept.
        rows: That its cache lacks.
        tokens: Of their responses.
        bytes: That these take on disk; nothing where the width of the teacher is not known.
        work: Of its passes.
    """

    kind: str
    rows: int
    tokens: int
    bytes: int | None
    work: Work


@dataclass
class Seen:
    """What a run will do.

    Args:
        reports: What the reader says of each split: rows, those that were dropped, by reason, and cut ones.
        rows: That are ranked.
        kept: Of these.
        exact: Whether all scores are there, so that it is known which rows each stage has.
        stages: That the run reaches.
        reflection: That comes before.
        caching: That comes before, if the teacher is to be cached.
        validation: The work of one.
        sanity: Batches of a validation that try it before training.
        all_data: The work of as many epochs on all rows.
        all_steps: Their steps.
        all_caching: The work of the teacher that is cached on all rows.
        largest: Positions of the largest batch.
        batches: Row numbers of those from which a calibration chooses, shortest first.
        held_out: Row numbers of the batches of the validation.
    """

    reports: dict[str, dict[str, object]]
    rows: int
    kept: int
    exact: bool
    stages: list[Stage]
    reflection: Reflection
    caching: Caching | None
    validation: Work
    sanity: int
    all_data: Work
    all_steps: int
    all_caching: Work
    largest: int
    batches: list[Ints]
    held_out: list[Ints]


def survey(
    data: SRDDataModule, module: KDLightningModule, trainer: Trainer, now: Clock, prices: Prices, try_out: Try | None
) -> Seen:
    """Read the rows of a run and count what it will do.

    Args:
        data: Of the run; staged as far as its order is known.
        module: Of the run.
        trainer: Of the run.
        now: Tells the time.
        prices: Get what the reflection costs, and what is done once.
        try_out: Lets the student reflect on a few batches; nothing where nothing is measured.
    """
    root = data.read_for(module, trainer)
    data.find_leaks()
    curator, student = data.curator, data.reflecting(module, trainer)
    start = now()
    known = curator.look(data.rows["train"], student, root)
    prices.reflect_once = now() - start if known.unscored else 0.0
    rows, columns = Rows(data), dict(known.columns)
    again = fixed_batches(rows.rows, curator.reflector.tokens_per_batch, data.decoding) if curator.refresh else []
    shares = [1.0]
    if try_out is not None and (known.unscored or again):
        tried = try_out(known if known.unscored else known._replace(unscored=list(enumerate(again))), student)
        prices.reflect, shares = tried.rate, tried.shares
        columns = dict(tried.scores) if known.unscored else columns
    curriculum = _stage(rows, student, root, columns)
    stages, epochs, by_length = stages_of(rows, curriculum, trainer)
    validation, sanity, held_out = validation_of(data, trainer)
    reflection = _reflection(rows, [batch for _, batch in known.unscored], shares)
    if again:
        later = {first: len(rows) - curriculum.size(first - 1) for first in curator.refresh if first < len(epochs)}
        whole, share = _reflection(rows, again, shares).work, sum(later.values()) / len(rows)
        reflection.refreshes = later
        reflection.refresh_work = Work(round(whole.passes * share), round(whole.positions * share))
    all_data, all_steps = rows.all_data(epochs, trainer)
    taught = [lengths_in(data.rows[split], "length") for split in ("train", "validation") if split in data.rows]
    _, positions = rows.sizes(np.concatenate(by_length), data.batch_size)
    return Seen(
        reports={
            split: {"rows": report.rows, "dropped": dict(report.dropped), "cut": report.cut}
            for split, report in data.reports.items()
        },
        rows=len(rows),
        kept=curriculum.kept,
        exact=not known.unscored and not curator.refresh,
        stages=stages,
        reflection=reflection,
        caching=None if module.teacher_handle.cache is None else _caching(data, module, trainer, now, prices),
        validation=validation,
        sanity=sanity,
        all_data=all_data,
        all_steps=all_steps,
        all_caching=teaching(np.concatenate(taught)),
        largest=int(positions.max()),
        batches=by_length,
        held_out=held_out,
    )


def _stage(rows: Rows, student: ReflectingStudent, root: Path, columns: dict[str, np.ndarray]) -> Curriculum:
    """Stage the rows of a data module, in the order of the run as far as it is known."""
    data, curator = rows.data, rows.data.curator
    order = torch.arange(len(rows))
    if curator.ranks:
        order = torch.as_tensor(expected_order(curator, rows.rows, rows.lengths, columns))
    curriculum = curator.staged(order)
    dropped = data.reports["train"].dropped
    result = CurationResult(ids_of(rows.rows), columns, {}, order, curriculum, dropped, seconds=0.0, scored=0)
    data.staged = StagedRows(curator, rows.rows, student, root, result)
    return curriculum


def _reflection(rows: Rows, batches: list[RowNumbers], shares: list[float]) -> Reflection:
    if not batches:
        return Reflection()
    decoding, numbers = rows.data.decoding, np.concatenate(batches)
    work, answer_tokens = expected_work(batches, rows.prompts, rows.lengths, decoding, shares)
    limits = decoding.limits((rows.lengths - rows.prompts)[numbers].tolist())
    most = sum(limits) if shares else 0
    return Reflection(len(numbers), added(work), int(rows.prompts[numbers].sum()), answer_tokens, most)


def _caching(data: SRDDataModule, module: KDLightningModule, trainer: Trainer, now: Clock, prices: Prices) -> Caching:
    """Look which rows the teacher's cache lacks; where it lacks some, load the teacher."""
    handle, rows, start = module.teacher_handle, data.rows_to_cache(), now()
    assert handle.cache is not None
    assert handle.given is not None
    kind, missing = handle.cache.format, handle.missing(rows, trainer)
    if len(missing) == 0:
        return Caching(repr(kind), 0, 0, 0, Work(0, 0))
    handle.load()
    prices.cache_once = now() - start
    lacking, width = rows.select(missing), width_of(handle.given)
    lengths = lengths_in(lacking, "length")
    tokens = int(lengths.sum() - lengths_in(lacking, "prompt_length").sum())
    size = None if width is None else tokens * kind.bytes_per_token(width)
    return Caching(repr(kind), len(missing), tokens, size, teaching(lengths))
