"""A batch as the student sees it: what criteria are given, each part made when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from srd_lightning.data.batches import collate
from srd_lightning.data.rows import response_lengths
from srd_lightning.data.samplers import of_like_length
from srd_lightning.evaluation.response_logits import response_logits
from srd_lightning.losses.base import IGNORE_INDEX, upcast
from srd_lightning.models.generation import Decoding, eval_mode, generate

SCORED_AT_ONCE = 2048
"""Tokens, with padding, that go through a model at one time where responses are scored; logits are freed between."""


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
        limits = self.decoding.limits(response_lengths(self.rows))
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


def _logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    with eval_mode(model):
        return response_logits(model, batch)


def _losses(tokens: Tensor, logits: Tensor) -> Tensor:
    return nn.functional.cross_entropy(upcast(logits), tokens, reduction="none")


def _ranks(tokens: Tensor, logits: Tensor) -> Tensor:
    return (logits > logits.gather(1, tokens[:, None])).sum(dim=1) + 1
