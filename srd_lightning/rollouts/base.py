"""What a method is that trains with the student's own text: which batches have it, who writes it, what is learnt of it.

A method of one's own is two methods, as in `GKD`: `is_own` says which batches are the student's, `texts` writes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from srd_lightning.checkpoints.resume_state import batch_seed
from srd_lightning.digests import uniform
from srd_lightning.errors import DataError, SettingError
from srd_lightning.losses.base import DistillationLoss
from srd_lightning.models.generation import Changes, Decoding, generate_ids

Engine = Callable[[list[list[int]], Decoding, int], list[list[int]]]
"""Answers prompts: takes their tokens, `Decoding` and a seed; returns the tokens of one answer each, of which the last
is the end token, unless the answer was cut. The student itself by default; one of your own, such as vLLM's, has to be
given the student's weights as they are now, by a callback of yours."""
SAMPLED = Decoding(temperature=1.0)
"""By default texts are samples of what the student says: at temperature 1, of all tokens, at most 256."""


class SharedTokens(LogitsProcessor):
    """Lets only tokens be chosen that both models know: of a head that has more rows the others mean nothing.

    Args:
        vocabulary: How many, the first.
    """

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores ``[B, V]``, -inf beyond these tokens."""
        return scores.masked_fill(torch.arange(scores.shape[1], device=scores.device) >= self.vocabulary, -torch.inf)


class Text(NamedTuple):
    """A row without padding.

    Attributes:
        prompt: Its tokens.
        response: Its tokens, the end token included unless it was cut; none where nothing of the row is learnt.
    """

    prompt: list[int]
    response: list[int]


@dataclass(frozen=True)
class Moment:
    """Where a run is when a batch comes, the same on all ranks but for the rank.

    Args:
        epoch: Number of the epoch.
        batch_idx: Number of the batch within it.
        batch: How many batches of the run came before.
        rank: Of the process.
        progress: Returns the share of the planned steps that was made, in [0, 1).
    """

    epoch: int
    batch_idx: int
    batch: int
    rank: int
    progress: Callable[[], float]

    def draw(self, seed: int) -> float:
        """Return a number in [0, 1) that is the same on all ranks.

        Example:
            >>> Moment(epoch=0, batch_idx=3, batch=3, rank=1, progress=lambda: 0.0).draw(seed=0)
            0.12146621579554195
        """
        return uniform(seed, self.batch)

    def seed(self, seed: int) -> int:
        """Return what the sampling of this rank is seeded with; nothing before it matters."""
        return batch_seed(seed, self.batch, self.rank) >> 1  # which 64 bits with a sign hold


@dataclass(frozen=True)
class Models:
    """What writes texts.

    Args:
        student: Returns the student as `generate_ids` takes it; all ranks must ask together, also for no prompt.
        teacher: Whole, on the device.
        vocabulary: Tokens that both share, where their heads differ.
        tokenizer: Of the rows.
        moment: Where the run is.
    """

    student: Callable[[], nn.Module]
    teacher: nn.Module
    vocabulary: int | None
    tokenizer: PreTrainedTokenizerBase
    moment: Moment

    def answer(
        self,
        rows: Sequence[Text],
        decoding: Decoding,
        engine: Engine | None = None,
        changes: Changes | None = None,
    ) -> list[Text]:
        """Return rows with responses that are written now; a row of which nothing is learnt stays as it is.

        Args:
            rows: Of this rank.
            decoding: How texts are generated; its seed, the batch and the rank decide what is sampled.
            engine: Who writes; by default the student.
            changes: As `generate_ids` takes it; by default texts are of tokens that both models know.

        Raises:
            DataError: An engine gives something else than tokens for each prompt.
        """
        prompts = [list(row.prompt) for row in rows if row.response]
        seed = self.moment.seed(decoding.seed)
        shared = self.vocabulary
        changes = changes or (None if shared is None else lambda _: SharedTokens(shared))
        if engine is None:
            answers = generate_ids(self.student(), self.tokenizer, prompts, decoding, seed, None, changes)
        else:
            answers = check_answers(engine(prompts, decoding, seed) if prompts else [], len(prompts), decoding)
        written = iter(answers)
        return [Text(row.prompt, next(written)) if row.response else row for row in rows]


class Rollouts:
    """A method that trains with the student's own text; see `GKD`, `DistiLLM`, `ReflectionReplay`, `MiniLLM`.

    Whether a batch is the student's own follows from the settings and from where the run is, so all ranks agree and a
    resumed run does as the whole one. On such a batch the objective is the distillation loss alone, whatever
    ``kd_weight`` is: cross-entropy on its own text would only teach a student what it says anyway.
    """

    share: float = 0.0
    """Least share of the batches that are the student's own, as far as it is known when a run begins."""
    decoding: Decoding = SAMPLED
    writes = True
    """Whether texts are written in training, so that rows are not those of which a teacher's cache knows."""

    def check(self, module: Any, trainer: Any, data: object) -> None:
        """Refuse what does not go together, before rows are read.

        Args:
            module: A `KDLightningModule`.
            trainer: That is to train it.
            data: The data module, if there is one.

        Raises:
            SettingError: It does not.
        """

    def begin(self, data: object) -> None:
        """Begin a run anew.

        Args:
            data: The data module, set up for ``fit``.
        """

    def started(self, validates: bool) -> None:
        """Take note that training begins.

        Args:
            validates: Whether there is something to validate.
        """

    def is_own(self, moment: Moment) -> bool:
        """Return whether a batch is the student's own text, the same on all ranks."""
        raise NotImplementedError(f"{type(self).__name__} must define is_own(moment)")

    def texts(self, rows: list[Text], models: Models) -> list[Text] | None:
        """Return the texts that take the place of the rows of a batch; nothing where these are the student's already.

        Args:
            rows: Of this rank.
            models: Who writes.
        """

    def loss(self, loss: DistillationLoss) -> DistillationLoss:
        """Return by which loss own text is distilled; by default that of the module."""
        return loss

    def validated(self, measures: dict[str, Any]) -> None:
        """Take note of what a validation has measured, by name."""

    def measures(self) -> dict[str, float]:
        """Return what is to be logged at the end of an epoch, by name."""
        return {}

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint shall keep of this rank; nothing where all follows from where the run is."""
        return {}

    def load(self, states: list[dict[str, Any]], rank: int, size: int) -> None:
        """Go on as a run that is resumed.

        Args:
            states: Of its ranks.
            rank: This one.
            size: How many there are now.
        """


def check_share(name: str, share: float) -> float:
    """Return a share.

    Raises:
        SettingError: It is none.
    """
    if not 0 <= share <= 1:
        raise SettingError(f"{name} must lie in [0, 1], but is {share}")
    return share


def check_decoding(decoding: Decoding) -> Decoding:
    """Return how texts are written.

    Raises:
        SettingError: It would copy the student in every batch, or look at responses that are replaced.
    """
    if decoding.bf16:
        raise SettingError(
            "decoding.bf16 would copy the student for every batch that it writes; leave it out, and set precision of "
            "the trainer to bf16-mixed"
        )
    if decoding.max_length_ratio is not None:
        raise SettingError(
            "decoding.max_length_ratio is for the reflection, which has reference responses; texts of rollouts end at "
            "max_new_tokens"
        )
    return decoding


def check_answers(answers: Any, number: int, decoding: Decoding) -> list[list[int]]:
    """Return what an engine of the user's has answered.

    Raises:
        DataError: It is not a list of tokens for each prompt.
    """
    asked = f"the engine of rollouts must return a list of 1 to {decoding.max_new_tokens} token ids for each prompt"
    if not isinstance(answers, (list, tuple)) or len(answers) != number:
        found = f"{len(answers)} for {number}" if isinstance(answers, (list, tuple)) else type(answers).__name__
        raise DataError(f"{asked}, but returned {found}")
    for ids in answers:
        whole = isinstance(ids, (list, tuple)) and all(isinstance(token, int) for token in ids)
        if not whole or not 1 <= len(ids) <= decoding.max_new_tokens:
            raise DataError(f"{asked}, but returned {ids!r} for one")
    return [list(ids) for ids in answers]
