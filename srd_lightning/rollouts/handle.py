"""The rollouts of a module: they change a batch before it leaves the host, and say what is learnt of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from lightning import Trainer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from srd_lightning.data.batches import check_batch, collate, padding_of, prompts_and_responses
from srd_lightning.errors import DataError, SettingError
from srd_lightning.losses.base import DistillationLoss
from srd_lightning.models.positions import check_positions
from srd_lightning.protocols import Around, HasCuratedRows, KnowsPrompts, ShapesBatches, unwatched
from srd_lightning.rollouts.base import Models, Moment, Rollouts, Text


class RolloutsHandle:
    """What a module needs of its rollouts, or of none.

    Args:
        rollouts: Nothing leaves batches as they come.
        planned_steps: Returns the optimizer steps of each stage of a run.
    """

    def __init__(self, rollouts: Rollouts | None, planned_steps: Callable[[Trainer], list[int]]) -> None:
        self.rollouts = rollouts
        self.seconds = 0.0
        """That texts have taken to be written, in this process."""
        self.around: Around = unwatched
        self._planned_steps = planned_steps
        self._total: int | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._is_own = False

    def check(self, module: Any, trainer: Trainer, data: object) -> None:
        """Refuse what does not go together with the rollouts, before rows are read.

        Args:
            module: A `KDLightningModule`.
            trainer: That is to train it.
            data: The data module, if there is one.

        Raises:
            SettingError: It does not.
        """
        rollouts, name = self.rollouts, type(self.rollouts).__name__
        if rollouts is None:
            return
        if rollouts.writes:
            if module.teacher_handle.cache is not None:
                raise SettingError(
                    f"teacher_cache knows what the teacher says to the rows, but {name} trains on texts that nobody "
                    "knows yet; set teacher_cache to none"
                )
            if tokenizer_of(module, data) is None:
                raise SettingError(f"{name} writes texts and needs a tokenizer: give KDLightningModule(tokenizer=...)")
            if isinstance(data, KnowsPrompts):
                tokens = data.longest_prompt() + rollouts.decoding.max_new_tokens
                asked = {f"max_prompt_length with decoding.max_new_tokens of {name}": tokens}
                check_positions(module.models_by_name(), asked)
        rollouts.check(module, trainer, data)

    def begin(self, data: object) -> None:
        """Begin a run anew; see `Rollouts.begin`."""
        self.seconds, self._total, self._tokenizer, self._is_own = 0.0, None, None, False
        if self.rollouts is not None:
            self.rollouts.begin(data)

    def on_host(self, batch: Any, module: Any) -> Any:
        """Return a batch as it is to be trained on.

        Args:
            batch: As it came.
            module: A `KDLightningModule`.

        Raises:
            DataError: The batch is not what it must be.
        """
        self._is_own = False
        rollouts, trainer = self.rollouts, module._trainer
        if rollouts is None or trainer is None or not trainer.training:
            return batch
        moment = self.moment(trainer)
        self._is_own = rollouts.is_own(moment)
        if not self._is_own or not rollouts.writes:
            return batch
        check_batch(batch, name=f"training batch {moment.batch_idx}")
        start = time.perf_counter()
        self._tokenizer = tokenizer = self._tokenizer or tokenizer_of(module, trainer.datamodule)
        assert tokenizer is not None, "check() comes first"
        models = Models(module.student_to_ask, module.teacher, module.step.vocabulary, tokenizer, moment)
        rows = [Text(*row) for row in prompts_and_responses(batch)]
        if any(row.response and not row.prompt for row in rows):
            raise DataError(
                f"training batch {moment.batch_idx} has a row without a prompt, to which no text can be written; give "
                f"{type(rollouts).__name__} rows whose labels are -100 at the tokens of a prompt"
            )
        with self.around("generation"), trainer.precision_plugin.forward_context():
            texts = rollouts.texts(rows, models)
        self.seconds += time.perf_counter() - start
        multiple = trainer.datamodule.padded_to() if isinstance(trainer.datamodule, ShapesBatches) else 1
        return batch if texts is None else {**batch, **batch_of(texts, tokenizer, multiple)}

    def objective(self, loss: DistillationLoss, kd_weight: float) -> tuple[DistillationLoss, float]:
        """Return loss and share by which the batch that came last is distilled: of own text nothing else is learnt.

        Args:
            loss: Of the module.
            kd_weight: Of the module.
        """
        if self.rollouts is None or not self._is_own:
            return loss.for_batch(own_text=False), kd_weight
        return self.rollouts.loss(loss.for_batch(own_text=True)), 1.0

    def kd_weights(self, of_module: set[float]) -> set[float]:
        """Return the shares of the distillation loss that batches may have.

        Args:
            of_module: Those of batches that are not own text.
        """
        if self.rollouts is None:
            return of_module
        return {1.0} if self.rollouts.share == 1 else {*of_module, 1.0}

    def moment(self, trainer: Trainer) -> Moment:
        """Return where a run is when its next batch comes."""
        loop = trainer.fit_loop.epoch_loop
        rank = (trainer.distributed_sampler_kwargs or {"rank": 0})["rank"]

        def progress() -> float:
            if self._total is None:
                self._total = max(sum(self._planned_steps(trainer)), 1)
            return min(trainer.global_step / self._total, 1.0)

        # Lightning counts a batch when it is on its device
        return Moment(trainer.current_epoch, loop.batch_idx + 1, loop.total_batch_idx + 1, rank, progress)


def batch_of(texts: list[Text], tokenizer: PreTrainedTokenizerBase, pad_to_multiple_of: int = 1) -> dict[str, Tensor]:
    """Return texts as a batch: labels are -100 on prompts and padding, end tokens are learnt.

    Args:
        texts: One for each row.
        tokenizer: Of the rows.
        pad_to_multiple_of: As in `collate`.

    Example:
        >>> from transformers import ByT5Tokenizer
        >>> batch = batch_of([Text([5, 6], [7, 1]), Text([5], [8])], ByT5Tokenizer())
        >>> batch["labels"].tolist(), batch["attention_mask"].tolist()
        ([[-100, -100, 7, 1], [-100, 8, -100, -100]], [[1, 1, 1, 1], [1, 1, 0, 0]])
    """
    rows = [{"input_ids": [*prompt, *response], "prompt_length": len(prompt)} for prompt, response in texts]
    return collate(rows, padding_of(tokenizer), pad_to_multiple_of)


def tokenizer_of(module: Any, data: object) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of the rows, or that of the module."""
    of_rows = data.rows_tokenizer() if isinstance(data, HasCuratedRows) else None
    return module.tokenizer if of_rows is None else of_rows
