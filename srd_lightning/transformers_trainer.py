"""A curriculum in `transformers.Trainer`, and in those that derive from it, such as TRL's: checked, with staged values.

Imports `curriculum`. The rows come from a `WholeRunSampler`, which the trainer's ``_get_train_sampler`` returns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from srd_lightning.curriculum.curriculum import value_at
from srd_lightning.curriculum.samplers import WholeRunSampler
from srd_lightning.curriculum.staged_values import assign, check_values, try_values
from srd_lightning.errors import SettingError


class CurriculumTrainerCallback(TrainerCallback):
    """Holds a `transformers.Trainer` to the rows and steps of a `WholeRunSampler`, and stages values with its epochs.

    To the trainer the run is one epoch: its ``epoch`` goes from 0 to 1, and what it does by epoch comes once, at the
    end. So save and evaluate by steps; ``curriculum_epoch`` is printed, and kept in its
    history, beside what it logs.

    Args:
        run: Which the trainer's ``_get_train_sampler`` returns.
        holder: Of the values, such as a loss or the trainer itself.
        schedules: ``{attribute of the holder: {first epoch: value}}``; an attribute may be dotted.

    Raises:
        SettingError: A schedule that does not begin at epoch 0, or whose values are no numbers or not taken by the
            holder; before the first step also a trainer that does not read the sampler, or plans other steps.

    Example:
        >>> from srd_lightning import Curriculum, CurriculumSampler, ForwardKL, WholeRunSampler
        >>> curriculum = Curriculum(range(8), {0: 0.5, 1: 1.0})
        >>> run = WholeRunSampler(CurriculumSampler(curriculum), max_epochs=2, rows_per_step=4)
        >>> callback = CurriculumTrainerCallback(run, ForwardKL(), {"temperature": {0: 1.0, 1: 2.0}})
        >>> callback.values(step=0), callback.values(step=1)
        ({'temperature': 1.0}, {'temperature': 2.0})
    """

    def __init__(
        self, run: WholeRunSampler, holder: Any = None, schedules: Mapping[str, Mapping[Any, float]] | None = None
    ) -> None:
        self.run = run
        self.holder = holder
        self.schedules = check_values(schedules or {})
        for name, schedule in self.schedules.items():
            try_values(holder, name, schedule)

    def values(self, step: int) -> dict[str, float]:
        """Return the values that hold in a step, by how many were made before it."""
        epoch = self.run.epoch_of(step)
        return {name: value_at(schedule, epoch) for name, schedule in self.schedules.items()}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Check before the first step that the trainer does what was planned."""
        per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        if per_step != self.run.rows_per_step:
            raise SettingError(
                f"the trainer takes {per_step} rows a step (batch, ranks and accumulation), but the WholeRunSampler "
                f"was made for {self.run.rows_per_step}; set its rows_per_step to {per_step}"
            )
        if not _reads(others.get("train_dataloader"), self.run):
            raise SettingError(
                "the trainer does not read the rows of the WholeRunSampler; let its _get_train_sampler(self, "
                "train_dataset=None) return it, in a subclass"
            )
        if state.max_steps != self.run.steps:
            raise SettingError(
                f"the trainer plans {state.max_steps} steps, but the {self.run.max_epochs} epochs of the curriculum "
                f"are {self.run.steps}; to the trainer they are one epoch: set num_train_epochs to 1, without max_steps"
            )
        if state.global_step and args.ignore_data_skip:
            raise SettingError(
                "ignore_data_skip would begin the curriculum anew with its first rows; leave it out to go on"
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Give the values of the epoch that the step belongs to."""
        for name, value in self.values(state.global_step).items():
            assign(self.holder, name, value)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **others: Any,
    ) -> None:
        """Say to which epoch of the curriculum the last step belonged, in what is printed and in the history."""
        for line in ({} if logs is None else logs, *state.log_history[-1:]):
            line["curriculum_epoch"] = self.run.epoch_of(max(state.global_step - 1, 0))


def _reads(loader: Any, sampler: WholeRunSampler) -> bool:
    """Return whether a loader, or one that Accelerate has wrapped, gives the rows of a sampler."""
    around = getattr(loader, "batch_sampler", None)
    while around is not None:
        if getattr(around, "sampler", None) is sampler:
            return True
        around = getattr(around, "batch_sampler", None)
    return False
