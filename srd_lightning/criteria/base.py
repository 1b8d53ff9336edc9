"""What makes a row hard: criteria, each a column of scores and the direction in which it is easy.

A criterion of one's own is two attributes and one method, which is given a `ReflectionBatch`::

    class Shouting(Criterion):
        column, higher_is_easier = "shouting", False

        def scores(self, reflected):
            return [answer.count("!") for answer in reflected.answers]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from srd_lightning.data.layout import lay_out, predicting
from srd_lightning.data.samplers import batches_by_token_budget
from srd_lightning.data.tokenization import response_lengths
from srd_lightning.digests import weights_digest
from srd_lightning.errors import SettingError
from srd_lightning.losses.base import upcast
from srd_lightning.models.calling import eval_mode, inputs_of
from srd_lightning.models.family import family_of
from srd_lightning.models.generation import Decoding, end_tokens, generate_ids, texts

SCORED_AT_ONCE = 2048
"""Tokens, with padding, that go through a model at one time where responses are scored; logits are freed between."""
CUT = "cut"
"""Column that says whether an answer was cut, 1 or 0; without a value where it was not generated for these scores."""
TAKEN = ("id", "answer", CUT)
"""Columns that are no criterion's."""


class Criterion:
    """One measure of how hard a row is; the rows' order is fused from the ranks by each of them.

    Args:
        weight: Of this criterion's reciprocal rank in the fusion.

    Attributes:
        column: Name of its scores.
        higher_is_easier: Whether a row with a higher score is easier.
        from_answers: Whether rows and answers are all that it looks at, so that answers from elsewhere will do.
    """

    column: str
    higher_is_easier: bool
    from_answers: bool = False

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight

    def scores(self, reflected: ReflectionBatch) -> Sequence[float]:
        """Return one score per row of a batch; the one method that a new criterion must write.

        Args:
            reflected: Rows, the student's answers to them, and its logits where responses are predicted. Each part is
                computed when it is first asked for: a criterion that does not look at answers costs no generation.

        Returns:
            ``[B]``
        """
        raise NotImplementedError(f"{type(self).__name__} must define scores(reflected)")

    def settings(self) -> str:
        """Return what its scores depend on, as text; scores made with other settings are not used.

        By default all attributes, models by their weights, but ``weight`` and those that begin with ``_``.
        """
        settings = {name: value for name, value in sorted(vars(self).items()) if name != "weight" and name[0] != "_"}
        digests = {name: weights_digest(value) for name, value in settings.items() if isinstance(value, nn.Module)}
        text = f"{type(self).__name__} {settings | digests}"
        if " at 0x" in text:
            raise SettingError(f"{text} holds an object that is another in every run; define settings() for it")
        return text

    def finish(self) -> None:
        """Free what the scoring needed."""


def check_criteria(criteria: Sequence[Criterion]) -> list[Criterion]:
    """Return the criteria.

    Raises:
        SettingError: Two have one column, a name is taken, or a weight is not positive.
    """
    columns = [criterion.column for criterion in criteria]
    if wrong := sorted({column for column in columns if columns.count(column) > 1 or column in TAKEN}):
        raise SettingError(
            f"every criterion needs a column of its own that is not called {', '.join(TAKEN)}, but {', '.join(wrong)} "
            f"stands in {columns}; give one another column: criterion.column = …"
        )
    if wrong := [criterion.column for criterion in criteria if not criterion.weight > 0]:
        raise SettingError(f"weights of criteria must be positive, but those of {', '.join(wrong)} are not")
    return list(criteria)


class Column(Criterion):
    """Scores that were made elsewhere and stand in the file that `SRDDataModule(scores=...)` names.

    Args:
        column: Name of the column.
        higher_is_easier: Whether a row with a higher score is easier.
        weight: As in `Criterion`.
    """

    def __init__(self, column: str, higher_is_easier: bool, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.column = column
        self.higher_is_easier = higher_is_easier

    def scores(self, reflected: ReflectionBatch) -> Sequence[float]:
        """Refuse: there is nothing to compute."""
        raise SettingError(f"scores of {self.column!r} are read from a file: SRDDataModule(scores='….parquet')")


class ReflectionBatch:
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
        self.known_answers = None if answers is None else list(answers)
        """The answers, ``[B]``, where they are known, or have been asked for."""

    @property
    def answers(self) -> list[str]:
        """The student's answers, ``[B]``."""
        if self.known_answers is None:
            self.known_answers = texts(self.model, self.tokenizer, self.answer_ids)
        return self.known_answers

    @cached_property
    def cut(self) -> list[bool]:
        """Whether each answer was cut at its limit, ``[B]``; where only their texts are known, they are made again."""
        ends = end_tokens(self.model, self.tokenizer)
        return [ids[-1] not in ends for ids in self.answer_ids]

    @property
    def generated(self) -> bool:
        """Whether the answers were generated for this batch, so that `cut` costs nothing."""
        return "answer_ids" in vars(self)

    @cached_property
    def answer_ids(self) -> list[list[int]]:
        """Tokens of the answers, ``[B]``, with the end token where it came; made again where only texts are known."""
        prompts = [row["input_ids"][: row["prompt_length"]] for row in self.rows]
        limits = self.decoding.limits(response_lengths(self.rows))
        return generate_ids(self.model, self.tokenizer, prompts, self.decoding, self.seed, limits)

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
        rows, family = self.rows if rows is None else rows, family_of(getattr(self.model, "config", None))
        parts: dict[int, Tensor] = {}
        for chosen in batches_by_token_budget(np.array([len(row["input_ids"]) for row in rows]), SCORED_AT_ONCE):
            some = [rows[row] for row in chosen]
            batch = {name: values.to(self.device) for name, values in family.collate(some, pad_token_id=0).items()}
            tokens = lay_out(batch).targets
            values = measure(tokens, *(_logits(model, batch) for model in models))
            lengths = response_lengths(some)
            parts |= zip(chosen, torch.split(values, lengths), strict=True)
        return torch.cat([parts[row] for row in range(len(rows))])

    @property
    def device(self) -> torch.device:
        """Where the student is."""
        return next(self.model.parameters()).device

    def row_means(self, values: Tensor) -> list[float]:
        """Return the mean of each row's tokens, ``[B]``, from ``[N]`` values."""
        lengths = response_lengths(self.rows)
        return [float(part.mean()) for part in torch.split(values.cpu(), lengths)]


Reflected = ReflectionBatch
"""Its former name."""


def score_batch(reflected: ReflectionBatch, criteria: Sequence[Criterion]) -> list[dict[str, Any]]:
    """Return ``id``, a column per criterion, and ``answer`` and ``cut`` where a criterion looked at these, by row."""
    columns: dict[str, Sequence[Any]] = {"id": [row["id"] for row in reflected.rows]}
    with torch.no_grad():
        for criterion in criteria:
            columns[criterion.column] = [float(score) for score in criterion.scores(reflected)]
    if reflected.known_answers is not None:
        columns["answer"] = reflected.known_answers
    if reflected.generated:
        columns[CUT] = [float(was_cut) for was_cut in reflected.cut]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


@torch.no_grad()
def response_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the logits that predict the responses; no other position goes through the output head.

    What a model does to its logits (scaling, soft-capping) is done to these.

    Args:
        model: A language model with transformers' ``get_output_embeddings``.
        batch: See `check_batch`.

    Returns:
        ``[N, V]``, for the N response tokens of all rows, in their order.
    """
    mask, _ = predicting(batch)
    head: nn.Module = cast(Any, model).get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, hidden: (hidden[0][mask][None],))
    try:
        return cast(Tensor, model(**inputs_of(model, batch)).logits[0])
    finally:
        hook.remove()


def _logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    with eval_mode(model):
        return response_logits(model, batch)


def _losses(tokens: Tensor, logits: Tensor) -> Tensor:
    return nn.functional.cross_entropy(upcast(logits), tokens, reduction="none")


def _ranks(tokens: Tensor, logits: Tensor) -> Tensor:
    return (logits > logits.gather(1, tokens[:, None])).sum(dim=1) + 1
