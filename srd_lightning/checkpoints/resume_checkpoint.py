"""`ResumeCheckpoint`: checkpoints that a run can be resumed from, whenever and however it ends."""

from __future__ import annotations

import signal
import threading
import weakref
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from srd_lightning.checkpoints import files
from srd_lightning.checkpoints.refusals import check_alike, check_found, check_intact
from srd_lightning.checkpoints.resume_state import ResumeState
from srd_lightning.checkpoints.run_folder import RunLock, clean, put_aside
from srd_lightning.distributed.launcher import TERMINATED, children_of
from srd_lightning.distributed.process_group import Ranks
from srd_lightning.errors import SettingError
from srd_lightning.protocols import Around, unwatched
from srd_lightning.storage import check_folder


class ResumeCheckpoint(ModelCheckpoint):
    """A `ModelCheckpoint` that a run can be resumed from at any moment, by ``ckpt_path="last"``.

    - A checkpoint has its name only when it is complete, and the older one goes after that: a run that is killed while
      it writes leaves one that can be read.
    - ``ckpt_path="last"`` is the newest complete one in the folder, whatever its name; where there is none, the run
      begins anew. It goes when the next one is there, if this callback has written it.
    - Nothing is saved while gradients are accumulated, which no checkpoint holds.
    - After SIGTERM to any process, all end the optimizer step, or the validation, that they are in, save, and exit
      without what follows on training. The exit code is 143: whoever started the run knows that it is not over.

    Args:
        dirpath: The folder; by default ``checkpoints`` in the trainer's ``default_root_dir``, whatever the logger.
        filename: As for `ModelCheckpoint`.
        **kwargs: As for `ModelCheckpoint`, such as ``every_n_train_steps``, ``train_time_interval`` or
            ``every_n_epochs`` (1 by default). By default the newest checkpoint is kept.

    Raises:
        SettingError: ``save_weights_only`` or ``save_on_exception``, which no run can be resumed from exactly, or a
            folder that is no folder of a file system. At set-up also `StorageError`, where another run saves to the
            folder, and `ResumeError`, where the checkpoint to go on from is damaged.

    Example:
        >>> ResumeCheckpoint("runs/1/checkpoints", every_n_train_steps=500).filename
        '{epoch}-{step}'
    """

    def __init__(self, dirpath: str | Path | None = None, filename: str = "{epoch}-{step}", **kwargs: Any) -> None:
        if wrong := [name for name in ("save_weights_only", "save_on_exception") if kwargs.get(name)]:
            raise SettingError(
                f"no run can be resumed exactly from what {' and '.join(wrong)} saves; leave that to another "
                "ModelCheckpoint, in another folder"
            )
        if "://" in str(dirpath):
            raise SettingError(
                f"ResumeCheckpoint renames what is complete, which {dirpath} cannot do; give it a folder of a file "
                "system, or use ModelCheckpoint"
            )
        super().__init__(dirpath, filename, **kwargs)
        self._steps_before = 0
        self._stepped = True
        self._terminated = False
        self._former_handler: Any = None
        self._lock: RunLock | None = None
        self._taken = False
        self._found: Path | None = None
        self._around: Around = unwatched

    def watch(self, around: Around) -> None:
        """Tell when a checkpoint is written; see `TellsParts`."""
        self._around = around

    def found_last(self) -> Path | None:
        """Return what ``ckpt_path="last"`` has found, see `FindsLast`."""
        return self._found

    def preflight(self, trainer: Trainer) -> None:
        """Refuse a plug-in that writes unseen, a folder to which another run saves, and a damaged checkpoint.

        Raises:
            SettingError: Checkpoints are written by a plug-in that does not tell when one is complete.
            StorageError: Another run saves to the folder, or nothing can be written there.
            ResumeError: The checkpoint that ``last`` has found is damaged.
        """
        if trainer.state.fn != "fit" or self._taken:
            return
        sharded = isinstance(trainer.strategy, ModelParallelStrategy)  # has no plug-in for files
        if not sharded and isinstance(trainer.strategy.checkpoint_io, AsyncCheckpointIO):
            raise SettingError(
                "ResumeCheckpoint must know when a checkpoint is complete, but AsyncCheckpointIO does not tell; leave "
                "that plug-in out"
            )
        folder, found = self._folder(trainer), self._found
        check_alike("from", str(found), folder)
        Ranks().rank0_result(RunLock(folder).check)
        check_folder(folder, "ResumeCheckpoint.dirpath")
        if found is not None:
            Ranks().rank0_result(lambda: check_intact(found))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the folder for this run, and clear away what a run that was killed has left half-written."""
        self.preflight(trainer)
        folder = self._folder(trainer)
        self.dirpath = str(folder)
        self._stepped, self._terminated = True, False
        if stage == "fit" and not trainer.fast_dev_run:  # type: ignore[attr-defined] # which saves nothing
            self._taken = True
            Ranks().rank0_result(lambda: self._take(folder))
        if stage == "fit":
            ResumeState.attach_to(trainer)
        super().setup(trainer, pl_module, stage)

    def _take(self, folder: Path) -> None:
        lock = RunLock(folder)
        lock.acquire()
        self._lock = lock
        clean(folder, self.FILE_EXTENSION)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let other runs have the folder."""
        super().teardown(trainer, pl_module, stage)
        self._let_go()

    def _let_go(self) -> None:
        if self._lock is not None:
            self._lock.release()
        self._lock = self._found = None
        self._taken = False

    def _folder(self, trainer: Trainer) -> Path:
        return Path(self.dirpath or Path(trainer.default_root_dir, "checkpoints")).expanduser().resolve()

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        """Return the newest complete checkpoint; Lightning asks for it where ``ckpt_path`` is ``last``."""
        newest = check_found(self._folder(trainer), self.FILE_EXTENSION, trainer)
        if newest is None:
            rank_zero_info(f"no checkpoint in {self._folder(trainer)} yet: the run begins anew")
        self._found = newest
        return {str(newest)} if newest else set()

    def _should_remove_checkpoint(self, trainer: Trainer, previous: str, current: str) -> bool:
        """Remove also what ``last`` has found, which Lightning keeps: a run often resumed would fill the disk."""
        removed = super()._should_remove_checkpoint(trainer, previous, current)
        return removed or previous == str(self._found) != current

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Write beside the place where the checkpoint belongs, and put it there when all ranks have written."""
        if trainer.is_global_zero:
            clean(Path(filepath).parent, self.FILE_EXTENSION)
        trainer.strategy.barrier("no partial checkpoints")
        with self._around("checkpoints"):
            files.write(trainer, Path(filepath), self.save_weights_only)
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath
        for logger in trainer.loggers if trainer.is_global_zero else ():
            logger.after_save_checkpoint(weakref.proxy(self))

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take note of SIGTERM from now on: Lightning would speak to the other ranks at once, and may hang."""
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) != self._note:
            self._former_handler = signal.signal(signal.SIGTERM, self._note)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take note of SIGTERM; see that all ranks begin with the same step; put aside what an earlier run has left.

        Raises:
            ResumeError: They do not.
        """
        check_alike("after steps", trainer.global_step, self._folder(trainer))
        if trainer.global_step == 0 and not trainer.ckpt_path and self._taken:
            Ranks().rank0_result(lambda: put_aside(self._folder(trainer), self.FILE_EXTENSION))
        super().on_train_start(trainer, pl_module)
        self.on_sanity_check_start(trainer, pl_module)

    def _note(self, *_: Any) -> None:
        self._terminated = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember the step, to see whether there is another after the batch."""
        self._steps_before = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if that is due, or if the run is to end, but not between optimizer steps."""
        self._stepped = trainer.global_step > self._steps_before
        if self._stepped:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            self._end_if_terminated(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if that is due, or if the run is to end, but not between optimizer steps."""
        if self._stepped and not trainer.sanity_checking:
            super().on_validation_end(trainer, pl_module)
            self._end_if_terminated(trainer)

    def _end_if_terminated(self, trainer: Trainer) -> None:
        """Ask all ranks, so that all save and end at the same step, whoever was told."""
        if not trainer.strategy.reduce_boolean_decision(self._terminated, all=False):
            return
        if not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            if self.monitor is None and self.save_top_k != 0:
                self._save_topk_checkpoint(trainer, candidates)
            else:
                self._save_checkpoint(trainer, self.format_checkpoint_name(candidates))
        rank_zero_info(
            f"SIGTERM: saved after step {trainer.global_step} as {self._last_checkpoint_saved}; the run goes on with "
            'ckpt_path="last"'
        )
        children_of(trainer)
        trainer.strategy.barrier("saved after SIGTERM")
        raise SIGTERMException(TERMINATED)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give SIGTERM back."""
        super().on_train_end(trainer, pl_module)
        self._give_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give SIGTERM back."""
        super().on_exception(trainer, pl_module, exception)
        self._give_back()
        self._let_go()

    def _give_back(self) -> None:
        if self._former_handler is not None:
            signal.signal(signal.SIGTERM, self._former_handler)
            self._former_handler = None
