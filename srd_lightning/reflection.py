"""Reflection: the student answers every prompt, and its answer and its loss say how hard the row is for it.

Fixed batches are dealt to the processes, so a score does not depend on how many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from srd_lightning.criteria import Criterion
from srd_lightning.evaluation import response_logits
from srd_lightning.generation import Decoding, eval_mode, generate
from srd_lightning.losses import IGNORE_INDEX, upcast
from srd_lightning.progress import progress_bar
from srd_lightning.rows import collate, ids_of
from srd_lightning.sampling import of_like_length
from srd_lightning.store import ScoreStore

SCORING_VERSION = "2"
"""Rises when the same inputs would give other scores."""
SCORED_AT_ONCE = 2048
"""Tokens, with padding, that go through a model at one time where responses are scored; logits are freed between."""
Batch = NDArray[np.int64]


class Reflected:
    """A batch of rows as the student sees them; each part is computed when a criterion first asks for it.

    Args:
        model: The student.
        tokenizer: Its tokenizer.
        rows: Tokenised rows, ``[B]``.
        decoding: How the student answers.
        seed: Of the sampling.
        answers: The answers, where they are known.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Mapping[str, Any]],
        decoding: Decoding,
        seed: int = 0,
        answers: Sequence[str] | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.rows = rows
        self.decoding = decoding
        self.seed = seed
        if answers is not None:
            self.__dict__["answers"] = list(answers)

    @cached_property
    def answers(self) -> list[str]:
        """The student's answers, ``[B]``."""
        prompts = [row["input_ids"][: row["prompt_length"]] for row in self.rows]
        limits = self.decoding.limits([len(row["input_ids"]) - row["prompt_length"] for row in self.rows])
        return generate(self.model, self.tokenizer, prompts, self.decoding, self.seed, limits)

    def pairs(self) -> Iterator[tuple[Mapping[str, Any], str]]:
        """Yield each row with the answer to it."""
        return zip(self.rows, self.answers, strict=True)

    @cached_property
    def token_losses(self) -> Tensor:
        """Loss of each response token, ``[N]``, in nats."""
        return self.per_token(_losses, self.model)

    @cached_property
    def token_losses_without_prompt(self) -> Tensor:
        """Loss of each response token where only a beginning token stands before the response, ``[N]``, in nats."""
        begin = self.tokenizer.bos_token_id
        first = self.tokenizer.eos_token_id if begin is None else begin
        responses = [row["input_ids"][row["prompt_length"] :] for row in self.rows]
        alone = [{"input_ids": [first, *response], "prompt_length": 1} for response in responses]
        return self.per_token(_losses, self.model, rows=alone)

    @cached_property
    def token_ranks(self) -> Tensor:
        """Place of each response token among all tokens, ``[N]``, from 1, the likeliest."""
        return self.per_token(_ranks, self.model)

    def per_token(
        self,
        measure: Callable[..., Tensor],
        *models: nn.Module,
        rows: Sequence[Mapping[str, Any]] | None = None,
    ) -> Tensor:
        """Measure each response token by the logits that predict it, a few rows at a time.

        Args:
            measure: Takes the tokens ``[n]`` and the logits ``[n, V]`` of each model; returns ``[n]``.
            models: Whose logits.
            rows: Other rows than those of the batch.

        Returns:
            ``[N]``, for the response tokens of all rows, row after row.
        """
        rows = self.rows if rows is None else rows
        parts: dict[int, Tensor] = {}
        for chosen in of_like_length(np.array([len(row["input_ids"]) for row in rows]), SCORED_AT_ONCE):
            some = [rows[row] for row in chosen]
            batch = {name: values.to(self.device) for name, values in collate(some, pad_token_id=0).items()}
            tokens = batch["labels"][batch["labels"] != IGNORE_INDEX]
            values = measure(tokens, *(_logits(model, batch) for model in models))
            lengths = [len(row["input_ids"]) - row["prompt_length"] for row in some]
            parts |= zip(chosen, torch.split(values, lengths), strict=True)
        return torch.cat([parts[row] for row in range(len(rows))])

    @property
    def device(self) -> torch.device:
        """Where the student is."""
        return next(self.model.parameters()).device

    def row_means(self, values: Tensor) -> list[float]:
        """Return the mean of each row's tokens, ``[B]``, from ``[N]`` values."""
        lengths = [len(row["input_ids"]) - row["prompt_length"] for row in self.rows]
        return [float(part.mean()) for part in torch.split(values.cpu(), lengths)]


def _logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    with eval_mode(model):
        return response_logits(model, batch)


def _losses(tokens: Tensor, logits: Tensor) -> Tensor:
    return nn.functional.cross_entropy(upcast(logits), tokens, reduction="none")


def _ranks(tokens: Tensor, logits: Tensor) -> Tensor:
    return (logits > logits.gather(1, tokens[:, None])).sum(dim=1) + 1


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
        rows: Tokenised rows, see `rows.tokenize`.
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


def score_batch(reflected: Reflected, criteria: Sequence[Criterion]) -> list[dict[str, Any]]:
    """Return ``id``, a column per criterion, and the ``answer`` where a criterion looked at it, for each row."""
    columns: dict[str, Sequence[Any]] = {"id": [row["id"] for row in reflected.rows]}
    with torch.no_grad():
        for criterion in criteria:
            columns[criterion.column] = [float(score) for score in criterion.scores(reflected)]
    if "answers" in vars(reflected):
        columns["answer"] = reflected.answers
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
