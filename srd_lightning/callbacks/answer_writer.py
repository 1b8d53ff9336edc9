"""`AnswerWriter`: what ``predict`` answers, as a file."""

from __future__ import annotations

import glob
import json
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from srd_lightning.errors import SettingError, StorageError
from srd_lightning.storage import check_file, write_atomically


class AnswerWriter(BasePredictionWriter):
    """Writes what ``predict`` answers, one JSON object with prompt, response and answer a line.

    Args:
        path: The file; answers of an earlier run are replaced when the first batch comes. With several ranks each
            writes its own, ``NAME.RANK.jsonl``.

    Raises:
        StorageError: The file cannot be written, or holds something else than answers.
        SettingError: What ``predict_step`` returns is no list that JSON can hold.
    """

    def __init__(self, path: str) -> None:
        super().__init__("batch")
        self.path = Path(path).expanduser()

    def file(self, trainer: Trainer) -> Path:
        """Return the file of this rank.

        Args:
            trainer: Of the run.
        """
        return self._of_rank(trainer.global_rank) if trainer.world_size > 1 else self.path

    def _of_rank(self, rank: int) -> Path:
        return self.path.with_name(f"{self.path.stem}.{rank}{self.path.suffix}")

    def preflight(self, trainer: Trainer) -> None:
        """Refuse a file that cannot be written, or that is something else, before models are loaded."""
        if trainer.state.fn == TrainerFn.PREDICTING:
            check_file(self.file(trainer), "AnswerWriter(path=...)", "the answers of an earlier run", _are_answers)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check here too: other data modules than `SRDDataModule` do not ask for it."""
        self.preflight(trainer)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a new file; not before, since ``srd curate`` predicts nothing."""
        write_atomically(self.file(trainer), b"")
        if trainer.is_global_zero and (others := self._of_other_runs(trainer.world_size)):
            rank_zero_warn(
                f"{', '.join(others)} in {self.path.parent} hold answers of an earlier run with another number of "
                "processes, not of this one; do not read them together"
            )

    def _of_other_runs(self, world_size: int) -> list[str]:
        own = {self.path.name} if world_size == 1 else {self._of_rank(rank).name for rank in range(world_size)}
        found = [self.path, *self.path.parent.glob(f"{glob.escape(self.path.stem)}.[0-9]*{self.path.suffix}")]
        return sorted(path.name for path in found if path.name not in own and path.is_file() and _are_answers(path))

    def write_on_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, prediction: Any, *_: Any, **__: Any
    ) -> None:
        """Append the answers of a batch, all of them or none."""
        try:
            if not isinstance(prediction, (list, tuple)):
                raise TypeError("no list")
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in prediction)
        except TypeError as error:
            raise SettingError(
                f"AnswerWriter writes lists of what JSON can hold, but predict_step of {type(pl_module).__name__} "
                f"returned a {type(prediction).__name__} ({error}); return a list of dicts, one for each row"
            ) from error
        _append(self.file(trainer), text.encode("utf-8", errors="backslashreplace"))


def _append(path: Path, lines: bytes) -> None:
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        try:
            if file.write(lines) < len(lines):
                raise OSError("the disk is full")
        except OSError as error:
            file.truncate(end)
            raise StorageError(
                f"answers can no longer be written to {path} ({error.strerror or error}); those of the batches before "
                "are there"
            ) from error


def _are_answers(path: Path) -> bool:
    """Return whether a file begins as one that was written here does."""
    with path.open("rb") as file:
        try:
            first = json.loads(file.readline())
        except ValueError:
            return False
    return isinstance(first, dict) and "answer" in first
