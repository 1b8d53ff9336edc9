"""`AnswerScores`: what the answers of a test are worth, as its task counts it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning import Callback, LightningModule, Trainer

from srd_lightning.distributed.process_group import Ranks
from srd_lightning.errors import SettingError
from srd_lightning.evaluation.answer_scores import AnswerScore, Row, check_scores
from srd_lightning.evaluation.code_tests import PassAtK

__all__ = ["AnswerScores", "PassAtK"]  # the latter for its short name on the command line


class AnswerScores(Callback):
    """Scores the answers of ``test`` and logs ``test_<name>`` of each score; in other stages it does nothing.

    The rows of all ranks are scored together, on the first.

    Args:
        scores: `NumericAccuracy`, `ExactAccuracy`, `CorpusBleu`, `CorpusChrF`, `PassAtK`, or an `AnswerScore` of one's
            own.

    Raises:
        SettingError: They are no scores, have one name, or ``test_step`` returns no ``answers``.
        DataError: The test rows cannot be scored so; said before they are answered.
    """

    def __init__(self, scores: list[AnswerScore]) -> None:
        check_scores(scores)
        self.scores = scores
        self._rows: list[Row] = []

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew, and see whether what is to come can be scored."""
        self._rows = []
        rows: Any = getattr(getattr(trainer, "datamodule", None), "rows", None)
        if isinstance(rows, Mapping) and "test" in rows:
            prompts = list(rows["test"]["prompt"])
            for score in self.scores:
                score.check(prompts)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the rows of a batch."""
        if not isinstance(outputs, Mapping) or not isinstance(outputs.get("answers"), Sequence):
            raise SettingError(
                "AnswerScores needs a test_step that returns {'answers': rows}, each with prompt, response and answer, "
                f"but that of {type(pl_module).__name__} returned a {type(outputs).__name__}"
            )
        self._rows += outputs["answers"]

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score the rows of all ranks."""
        team, own = Ranks(), self._rows
        rows = [row for of_rank in team.all_results(lambda: own) for row in of_rank]
        if not rows:
            return
        with team.work_then_wait():  # code may run for longer than a collective operation may take
            found = [score.score(rows) for score in self.scores] if team.rank == 0 else []
        for score, value in zip(self.scores, team.rank0_result(lambda: found), strict=True):
            pl_module.log(f"test_{score.name}", float(value))
