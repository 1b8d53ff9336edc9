"""What training and validation cost, by the clock, on a few batches of a run that then ends."""

from __future__ import annotations

from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer

from srd_lightning.planning.clock import Clock, Prices
from srd_lightning.planning.cost import Work, rate_of

WARM_UP = 2
"""Batches, in an epoch of their own, that are not counted."""
FEWEST = 3
"""Batches that are measured however long they take."""


class Passes:
    """When a model is passed through, and by how many positions.

    Args:
        model: With an embedding, through which each pass goes once.
        now: Tells the time.
    """

    def __init__(self, model: nn.Module, now: Clock) -> None:
        self.starts: list[float] = []
        self.positions: list[int] = []
        self._now = now
        embedding = next(module for module in model.modules() if isinstance(module, nn.Embedding))
        self._hook = embedding.register_forward_pre_hook(self._note)

    def _note(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.starts.append(self._now())
        self.positions.append(int(inputs[0].numel()))

    def end(self, last: int, end: float) -> tuple[list[Work], list[float]]:
        """Return what the last passes took, each until the next one begins; look no longer.

        Args:
            last: How many of them.
            end: When the last one had ended, with what came after it.

        Returns:
            Work and seconds; without the first and the last of many, which are not as the others.
        """
        self._hook.remove()
        starts, positions = self.starts[-last:], self.positions[-last:]
        took = [after - before for before, after in zip(starts, [*starts[1:], end], strict=True)]
        pieces = [Work(1, number) for number in positions]
        if len(took) > 1:
            took, pieces = took[:-1], pieces[:-1]
        if len(took) > 1:
            took, pieces = took[1:], pieces[1:]
        return pieces, took


class Trial(Callback):
    """Trains for an epoch that is not counted and one that is, validates once, and says what each took.

    Args:
        now: Tells the time.
        seconds: Of the epoch that counts, after which no other batch begins.
        prices: That are learnt.
    """

    def __init__(self, now: Clock, seconds: float, prices: Prices) -> None:
        self.now = now
        self.seconds = seconds
        self.prices = prices
        self._batches: list[tuple[Work, float]] = []
        self._steps: list[float] = []
        self._validated: list[tuple[Work, float]] = []
        self._begun = self._last = self._since = self._step_from = self._validating = 0.0
        self._validation = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the run end after two epochs, whatever it was told."""
        loop: Any = trainer.fit_loop
        loop.min_epochs, loop.max_epochs = 0, 2
        loop.epoch_loop.min_steps, loop.epoch_loop.max_steps = None, -1

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._batches, self._steps = [], []
        self._begun = self._last = self.now()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Tell the step of the optimizer from the batch."""
        self._step_from = self.now()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the clock of the batch, and end where the time is up."""
        now = self.now()
        if self._step_from:
            self._steps.append(now - self._step_from)
        took = (self._step_from or now) - self._last
        self._batches.append((Work(1, positions_in(batch)), took))
        self._step_from, self._last = 0.0, now
        if trainer.current_epoch and len(self._batches) > FEWEST:
            up = now - self._begun > self.seconds
            trainer.should_stop = trainer.strategy.reduce_boolean_decision(up, all=False)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of the validation."""
        self._validated = []
        self._validating = self._since = self.now()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Stop the clock of a batch."""
        now = self.now()
        self._validated.append((Work(1, positions_in(batch)), now - self._since))
        self._since = now

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock of the validation."""
        self._validation = self.now() - self._validating
        pieces, took = zip(*(self._validated[1:] or self._validated), strict=True)
        self.prices.validate = rate_of(pieces, took)
        batches = sum(self.prices.validate.seconds(work) for work, _ in self._validated)
        self.prices.validation = max(self._validation - batches, 0.0)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the prices, of the epoch that counts."""
        if trainer.current_epoch == 0:
            return
        (first, until_first), *counted = self._batches
        pieces, took = zip(*(counted or self._batches), strict=True)
        self.prices.batch = rate_of(pieces, took)
        self.prices.step = sum(self._steps) / max(len(self._steps), 1)
        beginning = until_first - self.prices.batch.seconds(first)
        ending = self.now() - self._last - self._validation
        self.prices.epoch = max(beginning, 0.0) + max(ending, 0.0)


class NoTrial(Callback):
    """Ends a run before its first step."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the run be over, whatever it was told."""
        loop: Any = trainer.fit_loop
        loop.min_epochs, loop.epoch_loop.min_steps = 0, None
        trainer.should_stop = True


def positions_in(batch: Any) -> int:
    """Return the positions of a batch, of an encoder-decoder those of both texts."""
    own = int(batch["attention_mask"].numel())
    return own + int(batch["labels"].numel()) if "decoder_input_ids" in batch else own
