"""Callbacks: what is staged, what is checked, what is written at the end. One idea a file.

Imports `curriculum`, `data`, `distributed`, `models`, `evaluation`, `checkpoints`, `training` and `metering`. What the
module itself needs done around its steps is in `training.hooks`, and the callback that saves is
`checkpoints.resume_checkpoint`.
"""

from srd_lightning.callbacks.answer_scores import AnswerScores
from srd_lightning.callbacks.answer_writer import AnswerWriter
from srd_lightning.callbacks.curriculum_check import CurriculumCallback
from srd_lightning.callbacks.defaults import default_callbacks
from srd_lightning.callbacks.export import HuggingFaceExport
from srd_lightning.callbacks.hub_target import HubTarget
from srd_lightning.callbacks.hyperparameters import HyperparameterScheduler
from srd_lightning.callbacks.loss_driven import LossDrivenShare, TAIDSchedule
from srd_lightning.callbacks.new_optimizer import NewOptimizerEachStage
from srd_lightning.callbacks.runtime import RuntimeBenchmark
from srd_lightning.callbacks.training_clock import TrainingClock

__all__ = [
    "AnswerScores",
    "AnswerWriter",
    "CurriculumCallback",
    "HubTarget",
    "HuggingFaceExport",
    "HyperparameterScheduler",
    "LossDrivenShare",
    "NewOptimizerEachStage",
    "RuntimeBenchmark",
    "TAIDSchedule",
    "TrainingClock",
    "default_callbacks",
]
