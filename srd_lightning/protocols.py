"""What module, data module, trainer and callbacks ask of each other, so that each may be of the user's own.

Only methods, so that ``isinstance`` looks and nothing is loaded by looking.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from datasets import Dataset
from lightning import Trainer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

BatchColumns = Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]
"""Takes the tokenised rows of a batch; returns what the batch carries besides, by name."""
IsReplayed = Callable[[int, int], bool]
"""Takes an epoch and the number of a batch within it; returns whether all ranks see the student's answers in it."""

Around = Callable[[str], AbstractContextManager[None]]
"""Takes the name of a part of a run, such as ``refresh``; returns what is to stand around it while it is at work."""


def unwatched(part: str) -> AbstractContextManager[None]:
    """Let a part go by; an `Around` that nobody asked for."""
    return nullcontext()


@runtime_checkable
class TellsParts(Protocol):
    """A module, data module or callback that tells when something begins and ends for which there is no hook."""

    def watch(self, around: Around) -> None:
        """Put ``around(part)`` around each part from now on.

        Args:
            around: Of whoever measures it, or `unwatched`.
        """


@runtime_checkable
class RunsTeacher(Protocol):
    """A module with a teacher beside what it trains."""

    def run_teacher(self) -> nn.Module | None:
        """Return the teacher that is run on every batch, nothing where what it says is known already."""


@runtime_checkable
class GathersStudent(Protocol):
    """A module that can give its student as trained so far, however it is spread over ranks."""

    def whole_student(self, only_first: bool = False) -> nn.Module | None:
        """Return the student with all of its weights; all ranks must ask.

        Args:
            only_first: Other ranks than the first get nothing.
        """


@runtime_checkable
class HasStudent(GathersStudent, Protocol):
    """A module whose student can reflect before training. One with a model as ``student`` needs none of this."""

    def build_student(self, trainer: Trainer | None = None) -> nn.Module:
        """Load the student if it is not there yet, and return it.

        Args:
            trainer: Of a run whose strategy may shard it, so that it reflects sharded.
        """

    def student_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Return the tokenizer of the student, or nothing where only the data module knows it."""

    def models_by_name(self) -> Mapping[str, Any]:
        """Return student and teacher, as models or `Pretrained`, without loading them; nothing for one that lacks."""


@runtime_checkable
class HasCuratedRows(Protocol):
    """A data module whose batches can carry what a cached teacher says to their rows."""

    def rows_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Return the tokenizer of the rows, before or after set-up; nothing where it is that of the module."""

    def rows_to_cache(self) -> Dataset:
        """Return the tokenised rows to which the teacher is asked in ``fit``, after ``setup("fit")``."""

    def use_batch_columns(self, columns: BatchColumns | None) -> None:
        """Let the batches of loaders made from now on carry these columns besides.

        Args:
            columns: Nothing takes away those that were given before.
        """


@runtime_checkable
class KnowsPrompts(Protocol):
    """A data module that says how long its prompts may be, before it has read them."""

    def longest_prompt(self) -> int:
        """Return the most tokens that a prompt may have."""


@runtime_checkable
class ShapesBatches(Protocol):
    """A data module that says of what shape its training batches are."""

    def rows_per_batch(self) -> int:
        """Return the most rows that a training batch of one rank has."""

    def padded_to(self) -> int:
        """Return of what number the length of every batch is a multiple, in tokens."""


@runtime_checkable
class ReplaysAnswers(Protocol):
    """A data module that knows what the student has answered to its prompts, and can train on that."""

    def check_replay(self, cached: bool) -> None:
        """Refuse where there will be no answers; before rows are read.

        Args:
            cached: Whether the teacher is cached before training.
        """

    def replay(self, steps: IsReplayed | None) -> None:
        """Let rows of epochs to come have the student's answer in place of the response.

        Args:
            steps: Says whether those of a batch have, from epoch and number of the batch within it; nothing lets all
                rows be as they were read.
        """


@runtime_checkable
class HasResumeState(Protocol):
    """A data module that knows which rows a run has still to see, so that a resumed run sees just these."""

    def resume_state(self) -> dict[str, Any]:
        """Return what a checkpoint shall keep: ``rows``, by name what must be as it was, and ``generations``."""

    def go_on_with(self, refreshments: Mapping[int, str]) -> None:
        """Go on with the refreshments of the run that is resumed, which it kept as ``generations``."""


@runtime_checkable
class KnowsStepLoss(Protocol):
    """A module that knows the distillation loss of the step that was made last."""

    def step_kd(self) -> float | None:
        """Return the mean over its tokens and all ranks; nothing where the loss had no share in it."""


@runtime_checkable
class FindsLast(Protocol):
    """A callback that knows which checkpoint ``ckpt_path="last"`` is before Lightning reads it."""

    def found_last(self) -> Path | None:
        """Return it, or nothing where there is none, or where no run goes on from it."""
