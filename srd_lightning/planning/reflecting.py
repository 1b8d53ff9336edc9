"""What the reflection will cost: which rows lack scores, and what a few of them take and say."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor, nn

from srd_lightning.criteria.base import SCORED_AT_ONCE, ReflectionBatch, score_batch
from srd_lightning.curation.curator import Curator, rank
from srd_lightning.curation.reflection import Known, RowNumbers
from srd_lightning.curation.student_source import ReflectingStudent
from srd_lightning.data.samplers import batches_by_token_budget
from srd_lightning.data.tokenization import ids_of, response_lengths
from srd_lightning.models.generation import ROUND, Decoding
from srd_lightning.planning.clock import Clock
from srd_lightning.planning.cost import (
    Ints,
    Rate,
    Work,
    added,
    answering,
    correlated_order,
    evenly,
    rank_correlation,
    rate_of,
)
from srd_lightning.progress import progress_bar

AT_FIRST = 4
"""Rows of the first batch that is measured; each next one has four times as many, until the time is up: small batches
alone do not tell what large ones take."""
MOST = 12
"""Batches that are measured."""


@dataclass
class Tried:
    """What a few batches of a reflection showed.

    Args:
        rate: What passes and positions cost.
        shares: Length of each answer by the most that it could have had; none where no criterion asks for answers.
        scores: Of the rows that were tried, by column, NaN elsewhere, ``[N]`` each.
        rows: That were tried.
    """

    rate: Rate
    shares: list[float]
    scores: Mapping[str, NDArray[np.float64]]
    rows: int = 0
    seconds: float = field(default=0.0)


def try_reflection(
    curator: Curator,
    rows: Dataset,
    known: Known,
    model: nn.Module,
    student: ReflectingStudent,
    now: Clock,
    seconds: float,
) -> Tried:
    """Let the student reflect on parts of a few batches; what it says is not kept.

    Args:
        curator: Of the run.
        rows: Tokenised.
        known: Which batches lack scores, at least one.
        model: The student.
        student: By which tokenizer it reflects, and where.
        now: Tells the time.
        seconds: After which no other batch begins.
    """
    reflector, batches = curator.reflector, [batch for _, batch in known.unscored]
    scores = {name: values.copy() for name, values in known.columns.items()}
    pieces, took, shares = list[Work](), list[float](), list[float]()
    tried, size = set[int](), AT_FIRST
    progress = progress_bar(MOST, "calibration: reflection", student.trainer is None or student.trainer.is_global_zero)
    with reflector.ready(model, student):
        numbers = itertools.islice(itertools.cycle(evenly(MOST, len(batches))), MOST)
        for first, number in itertools.chain([(True, len(batches) // 2)], ((False, number) for number in numbers)):
            chosen = _spread(batches[number], 2 if first else size)
            some, start = rows.select(chosen).to_list(), now()
            reflected = ReflectionBatch(model, student.tokenizer, some, reflector.decoding, reflector.decoding.seed)
            found = score_batch(reflected, reflector.criteria)
            last = now() - start
            progress.update(1)
            if first:  # whatever is made once is not counted
                continue
            answers = list(map(len, reflected.answer_ids)) if reflected.generated else []
            limits = reflector.decoding.limits(response_lengths(some))
            shares += [answer / limit for answer, limit in zip(answers, limits, strict=bool(answers))]
            pieces.append(work_of([row["prompt_length"] for row in some], [row["length"] for row in some], answers))
            took.append(last)
            tried.update(int(row) for row in chosen)
            for name, values in scores.items():
                values[chosen] = [row[name] for row in found]
            size *= 4
            if sum(took) + 2 * last > seconds and len(took) > 1:
                break
    progress.close()
    for criterion in reflector.criteria:
        criterion.finish()
    return Tried(rate_of(pieces, took), shares, scores, len(tried), sum(took))


def _spread(batch: RowNumbers, size: int) -> RowNumbers:
    """Return so many rows of a batch, from its beginning to its end."""
    places = np.linspace(0, len(batch) - 1, min(size, len(batch))).round().astype(np.int64)
    return np.asarray(batch[places])


def work_of(prompts: Sequence[int], lengths: Sequence[int], answers: Sequence[int]) -> Work:
    """Return the work of a batch of the reflection: prompts are read, answers written, and responses read.

    Args:
        prompts: Lengths of the prompts, ``[B]``.
        lengths: Of prompts and responses, ``[B]``.
        answers: Of the answers, ``[B]``; none where nobody asks for them.
    """
    read = [Work(1, len(prompts) * max(prompts))] if len(answers) else []
    wholes = np.array(lengths)
    scored = [Work(1, len(some) * int(wholes[some].max())) for some in batches_by_token_budget(wholes, SCORED_AT_ONCE)]
    return added([*read, answering(answers, ROUND), *scored])


def expected_work(
    batches: Sequence[RowNumbers], prompts: Ints, lengths: Ints, decoding: Decoding, shares: Sequence[float]
) -> tuple[list[Work], int]:
    """Return the work of batches whose answers are as long, for their limits, as those that were seen.

    Args:
        batches: Row numbers of each.
        prompts: Of all rows, ``[N]``.
        lengths: Of all rows, prompt and response, ``[N]``.
        decoding: Limits answers.
        shares: Of the limits that answers had.

    Returns:
        The work of each batch, and the tokens of all answers.
    """
    turns, pieces, tokens = itertools.cycle(shares or [0.0]), list[Work](), 0
    for batch in batches:
        limits = decoding.limits((lengths[batch] - prompts[batch]).tolist())
        answers = [max(1, round(share * limit)) for limit, share in zip(limits, turns, strict=False)] if shares else []
        tokens += sum(answers)
        pieces.append(work_of(prompts[batch].tolist(), lengths[batch].tolist(), answers))
    return pieces, tokens


def expected_order(curator: Curator, rows: Dataset, lengths: Ints, columns: Mapping[str, Any]) -> Tensor | Ints:
    """Return the order of rows of which only some have scores, as far as lengths tell it.

    Args:
        curator: Of the run.
        rows: Tokenised.
        lengths: Theirs, ``[N]``.
        columns: Scores by column, NaN where there is none.

    Returns:
        Row numbers, ``[N]``, easiest first: where all rows have scores, the order of the run; else one in which length
        and ease agree as much as on the rows that have scores.
    """
    scored = np.flatnonzero(~np.any([np.isnan(values) for values in columns.values()], axis=0))
    some = {name: values[scored] for name, values in columns.items()}
    if len(scored) == 0:
        return correlated_order(lengths, 0.0)
    order = rank(some, curator.criteria, ids_of(rows.select(scored)), curator.ties)
    if len(scored) == len(rows):
        return order
    places = np.empty(len(scored))
    places[order.numpy()] = np.arange(len(scored))
    return correlated_order(lengths, rank_correlation(lengths[scored], places))
