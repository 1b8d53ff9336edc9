"""Reflection: the student answers every prompt, and its answer and its loss say how hard the row is for it.

Fixed batches are dealt to the processes, so a score does not depend on how many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedTokenizerBase

from srd_lightning.criteria.base import Criterion, score_batch
from srd_lightning.criteria.batch import Reflected
from srd_lightning.curation.score_store import ScoreStore
from srd_lightning.data.rows import ids_of
from srd_lightning.models.generation import Decoding
from srd_lightning.progress import progress_bar

SCORING_VERSION = "2"
"""Rises when the same inputs would give other scores."""
Batch = NDArray[np.int64]


def fixed_batches(rows: Dataset, tokens_per_batch: int, decoding: Decoding) -> list[Batch]:
    """Deal rows into batches that pad little and end together, the same for the same rows in any order.

    Args:
        rows: Tokenised rows.
        tokens_per_batch: Most tokens of a batch: its rows times the longest prompt and the longest answer or response;
            a row that is longer is a batch of its own.
        decoding: How long answers may be.

    Returns:
        Row numbers of each batch.
    """
    ids, prompts, lengths = (np.array(rows[name]) for name in ("id", "prompt_length", "length"))
    limits = np.array(decoding.limits((lengths - prompts).tolist()))
    order = np.lexsort((ids, prompts, limits, np.ceil(np.log2(prompts))))
    batches, first = [], 0
    longest_prompt = longest_rest = 0
    rests = np.maximum(limits, lengths - prompts)
    for position, row in enumerate(order):
        longest_prompt, longest_rest = max(longest_prompt, prompts[row]), max(longest_rest, rests[row])
        if position > first and (position + 1 - first) * (longest_prompt + longest_rest) > tokens_per_batch:
            batches.append(order[first:position])
            first, longest_prompt, longest_rest = position, prompts[row], rests[row]
    return [*batches, order[first:]]


def reflect(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    store: ScoreStore,
    criteria: Sequence[Criterion],
    decoding: Decoding,
    batches: Sequence[tuple[int, Batch]],
    check: Callable[[], None] = lambda: None,
    show_progress: bool = True,
) -> None:
    """Score batches and store each as soon as it is scored.

    Args:
        model: The student.
        tokenizer: Its tokenizer.
        rows: Tokenised rows, see `data.tokenization.tokenize`.
        store: Takes the scores.
        criteria: What to score.
        decoding: How the student answers.
        batches: Number and row numbers of each batch; the number is added to the seed of the sampling.
        check: Called before each batch; may raise to end the work.
        show_progress: Show a progress bar.
    """
    mine = np.concatenate([batch for _, batch in batches]) if batches else np.array([], dtype=np.int64)
    known = store.answers(ids_of(rows.select(mine))) if len(mine) else {}
    progress = progress_bar(len(mine), "reflection", show_progress and len(batches) > 0)
    try:
        for number, batch in batches:
            check()
            chosen = rows.select(batch).to_list()
            answers = [known[row["id"]] for row in chosen if row["id"] in known]
            given = answers if len(answers) == len(chosen) else None
            store.append(
                score_batch(Reflected(model, tokenizer, chosen, decoding, decoding.seed + number, given), criteria)
            )
            progress.update(len(batch))
    finally:
        progress.close()
        for criterion in criteria:
            criterion.finish()
