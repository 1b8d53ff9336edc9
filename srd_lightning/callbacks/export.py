"""`HuggingFaceExport`: the trained student as a folder that others load."""

from __future__ import annotations

import copy
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from srd_lightning.callbacks import export_folder
from srd_lightning.callbacks.hub_target import HubTarget
from srd_lightning.callbacks.model_card import model_card
from srd_lightning.callbacks.run_facts import measures_of, run_facts
from srd_lightning.distributed.placement import shards_student
from srd_lightning.errors import ModelError, SettingError, StorageError, in_one_line
from srd_lightning.protocols import GathersStudent
from srd_lightning.storage import check_folder, check_room

SETTING = "HuggingFaceExport(dirpath=...)"


class HuggingFaceExport(Callback):
    """Saves the trained student as a Hugging Face folder: safetensors, configuration, tokenizer, model card.

    It comes after all other callbacks, wherever it is listed, so that it saves what weight averaging makes of the
    student. Where it cannot write when training has ended, or another callback fails then, the student goes to a folder
    ``NAME-rescued-…`` that the message names. A run with ``fast_dev_run`` saves nothing.

    ``README.md`` says what the student came of (`model_card`), and ``generation_config.json`` has the student's own
    settings with the end token of training (`generation_settings`), not the decoding of the run.

    Args:
        dirpath: The folder; by default ``student`` in the trainer's ``default_root_dir``. Replaced as a whole when
            training ends. LoRA adapters are merged into the weights; of weights that are quantised, only the adapters
            are saved.
        push_to: A repository on the hub to which the folder goes as well; whether it may is asked before rows are read.
            Where that fails when training has ended, a warning names the command that does it later.

    Raises:
        SettingError: The module has no student, the folder is one that the run itself needs, or the hub takes nothing.
        ModelError: The student cannot be saved.
        StorageError: The folder cannot be written, or holds what no export has written; said before rows are read.
    """

    def __init__(self, dirpath: str | None = None, push_to: HubTarget | None = None) -> None:
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.push_to = push_to
        self._saved = False
        self._may_push = False
        self._measures: dict[str, Any] = {}

    def _given(self, trainer: Trainer) -> Path:
        return self.dirpath or Path(trainer.default_root_dir, "student")

    def folder(self, trainer: Trainer) -> Path:
        """Return where the student of a run goes: the folder without links and ``~``."""
        return self._given(trainer).expanduser().resolve()

    def preflight(self, trainer: Trainer) -> None:
        """Refuse what could not be saved, or only at the cost of something else."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        module = trainer.lightning_module
        if not hasattr(module, "student"):
            raise SettingError(f"HuggingFaceExport saves `student`, which {type(module).__name__} does not have")
        if trainer.is_global_zero:
            folder = self.folder(trainer)
            export_folder.check(folder, _needed_by(trainer, self))
            check_folder(folder.parent, SETTING)
            _check_student(module.student, folder)
            if self.push_to is not None and not self._may_push and not trainer.fast_dev_run:  # type: ignore[attr-defined]
                self.push_to.check()
                self._may_push = True  # the hub is asked once

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Come last, and clear away what a run left that was killed while it saved."""
        self.preflight(trainer)
        if stage == "fit":
            self._saved, self._measures = False, {}
            others = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
            trainer.callbacks = [*others, self]  # type: ignore[attr-defined]
            if trainer.is_global_zero:
                export_folder.clear_away(self.folder(trainer))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the student also where it has only now been loaded."""
        if trainer.is_global_zero:
            _check_student(pl_module.student, self.folder(trainer))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep what was measured, and when; on all ranks, for to read a measure they may have to meet."""
        self._measures = {} if trainer.sanity_checking else measures_of(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the student."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_info(f"fast_dev_run: nothing is saved to {self._given(trainer)}")
            return
        module: Any = pl_module
        student = module.whole_student(only_first=True) if isinstance(module, GathersStudent) else module.student
        self._saved = True
        if trainer.is_global_zero:
            student, tokenizer, folder = _merged(student), _tokenizer(trainer), self.folder(trainer)
            try:
                export_folder.check(folder, _needed_by(trainer, self))
                export_folder.replace(folder, student, tokenizer, self._card(trainer, student))
            except Exception as error:
                where = self._rescue(trainer, student, tokenizer)
                raise StorageError(f"the trained student could not be saved to {folder} ({error}); {where}") from error
            rank_zero_info(f"student saved to {self._given(trainer)}")
            self._push(folder)

    def _card(self, trainer: Trainer, student: Any) -> ModelCard | None:
        """Return the model card; a student is not lost for it."""
        name = self.folder(trainer).name if self.push_to is None else self.push_to.repo
        try:
            return model_card(run_facts(trainer, student, name, self._measures))
        except Exception as error:
            rank_zero_warn(f"the student has no model card ({type(error).__name__}: {in_one_line(error)})")
            return None

    def _push(self, folder: Path) -> None:
        """Upload the folder, or say how that is done later; a run is not lost for it."""
        if self.push_to is None:
            return
        try:
            address = self.push_to.upload(folder, leave_out=export_folder.CONTENTS)
        except Exception as error:
            rank_zero_warn(
                f"the student is in {folder}, but could not be uploaded ({in_one_line(error)}); to do so later: "
                f"{self.push_to.command(folder, leave_out=export_folder.CONTENTS)}"
            )
        else:
            rank_zero_info(f"student uploaded to {address}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save the student also where another callback fails after the last step."""
        ended = trainer.state.fn == TrainerFn.FITTING and isinstance(exception, Exception) and trainer.fit_loop.done
        if self._saved or not ended or not trainer.is_global_zero or shards_student(trainer):
            return
        where = self._rescue(trainer, _merged(pl_module.student), _tokenizer(trainer))
        rank_zero_warn(f"training had ended when the error came, so the student is saved as it was then: {where}")

    def _rescue(self, trainer: Trainer, student: Any, tokenizer: Any) -> str:
        """Write to the first place that takes it, and say which."""
        folder, card = self.folder(trainer), self._card(trainer, student)
        for parent in (folder.parent, Path(trainer.default_root_dir), Path(tempfile.gettempdir())):
            with suppress(Exception):  # what went wrong first is what is told
                place = export_folder.write_beside(parent, folder.name, student, tokenizer, card)
                return f"it is in {place}; move it to where it is to be"
        callback: Any = trainer.checkpoint_callback
        if checkpoint := callback and (callback.last_model_path or callback.best_model_path):
            return f"its weights are in the checkpoint {checkpoint}"
        return "its weights are lost, since no other place took them and this run has saved no checkpoint"


def _needed_by(trainer: Trainer, own: Callback) -> list[tuple[str, Path]]:
    """Return the places that a run reads or writes, which an export may not replace, and what they are."""
    data, module = getattr(trainer, "datamodule", None), trainer.lightning_module
    found: list[tuple[str, Any]] = [
        ("the current folder", Path.cwd()),
        ("your home", Path.home()),
        ("default_root_dir of the trainer", trainer.default_root_dir),
        ("the scores", getattr(data, "scores", None)),
        ("the teacher's cache", getattr(module, "teacher_cache_dir", None)),
        *((f"what {type(logger).__name__} writes", logger.save_dir) for logger in trainer.loggers),
    ]
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        if other is not own:
            paths = (getattr(other, "dirpath", None), getattr(other, "path", None))
            found += [(f"what {type(other).__name__} writes", path) for path in paths]
    return [(name, Path(path).expanduser().resolve()) for name, path in found if isinstance(path, (str, Path))]


def _check_student(student: Any, folder: Path) -> None:
    """Refuse a student that cannot be saved, or is too large for the disk; nothing is known before it is loaded."""
    if student is None:
        return
    if not hasattr(student, "save_pretrained"):
        raise ModelError(
            f"HuggingFaceExport needs a student with save_pretrained, as transformers' models have, but it is a "
            f"{type(student).__name__}; leave HuggingFaceExport out, and use a checkpoint"
        )
    if (generation := getattr(student, "generation_config", None)) is not None:
        with tempfile.TemporaryDirectory() as scratch:
            try:
                generation.save_pretrained(scratch)
            except ValueError as error:
                raise ModelError(
                    f"the generation_config of the student cannot be saved, so neither could the student: {error}"
                ) from error
    check_room(sum(weight.numel() * weight.element_size() for weight in student.parameters()), folder, SETTING)


def _merged(student: Any) -> Any:
    """Return the student with LoRA adapters merged into its weights, as a copy on the CPU; without, itself.

    So is one with quantised weights, of which then only the adapters are saved: merged, they would be rounded.
    """
    if not hasattr(student, "merge_and_unload") or getattr(student.get_base_model(), "is_quantized", False):
        return student
    weights = {id(weight): nn.Parameter(weight.detach().cpu().clone(), False) for weight in student.parameters()}
    buffers = {id(buffer): buffer.detach().cpu().clone() for buffer in student.buffers()}
    return copy.deepcopy(student, {**weights, **buffers}).merge_and_unload()


def _tokenizer(trainer: Trainer) -> Any:
    known: Any = (trainer.lightning_module, getattr(trainer, "datamodule", None))
    found = (getattr(holder, "tokenizer", None) for holder in known)
    return next((tokenizer for tokenizer in found if hasattr(tokenizer, "save_pretrained")), None)
