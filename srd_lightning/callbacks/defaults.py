"""`default_callbacks`: what a run of the whole method has, unless something else is given."""

from __future__ import annotations

from collections.abc import Iterable

from lightning import Callback

from srd_lightning.callbacks.curriculum_check import CurriculumCallback
from srd_lightning.callbacks.export import HuggingFaceExport
from srd_lightning.callbacks.hyperparameters import HyperparameterScheduler
from srd_lightning.callbacks.runtime import RuntimeBenchmark
from srd_lightning.checkpoints.resume_checkpoint import ResumeCheckpoint

DEFAULTS: tuple[type[Callback], ...] = (
    HyperparameterScheduler,
    CurriculumCallback,
    RuntimeBenchmark,
    ResumeCheckpoint,
    HuggingFaceExport,
)


def default_callbacks(*own: Callback) -> list[Callback]:
    """Return the callbacks of the whole method: stages, exact resume, runtime figures, export.

    Each writes below the trainer's ``default_root_dir``: ``checkpoints``, ``runtime.json``, ``student``.

    Args:
        *own: Callbacks besides; one of the same class as a default takes its place.

    Returns:
        The callbacks given, then `HyperparameterScheduler`, `CurriculumCallback`, `RuntimeBenchmark`,
        `ResumeCheckpoint` and `HuggingFaceExport`, as far as none given is one.

    Example:
        >>> [type(callback).__name__ for callback in default_callbacks(HuggingFaceExport("mine"), RuntimeBenchmark())]
        ['HuggingFaceExport', 'RuntimeBenchmark', 'HyperparameterScheduler', 'CurriculumCallback', 'ResumeCheckpoint']
    """
    return with_defaults(own, (kind() for kind in DEFAULTS))


def with_defaults(own: Iterable[Callback], defaults: Iterable[Callback]) -> list[Callback]:
    """Return callbacks and those defaults whose class none of them is of."""
    given = list(own)
    return [*given, *(default for default in defaults if not any(isinstance(one, type(default)) for one in given))]
