"""Selective Reflection Distillation (arXiv 2508.06135) as PyTorch Lightning modules.

Names are loaded when they are first used, so the pure parts (templates, ranking, curriculum, divergences, losses) work
where Lightning and transformers are not installed.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from srd_lightning._moved import Moved

if TYPE_CHECKING:
    from srd_lightning.callbacks import (
        AnswerScores,
        AnswerWriter,
        CurriculumCallback,
        HubTarget,
        HuggingFaceExport,
        HyperparameterScheduler,
        LossDrivenShare,
        NewOptimizerEachStage,
        TAIDSchedule,
        TrainingClock,
        default_callbacks,
    )
    from srd_lightning.callbacks.runtime import RuntimeBenchmark
    from srd_lightning.checkpoints.resume_checkpoint import ResumeCheckpoint
    from srd_lightning.curriculum.curriculum import Curriculum
    from srd_lightning.curriculum.ranking import order_by_id, reciprocal_rank_fusion
    from srd_lightning.curriculum.samplers import CurriculumSampler, WholeRunSampler
    from srd_lightning.data.samplers import LengthGrouped
    from srd_lightning.data.templates import ALPACA, ChatTemplate, Example, PromptTemplate
    from srd_lightning.datamodule import SRDDataModule
    from srd_lightning.distributed.fsdp2 import FSDP2
    from srd_lightning.evaluation.answer_scores import AnswerScore
    from srd_lightning.evaluation.rouge_metric import RougeL
    from srd_lightning.losses.auxiliary import AuxiliaryLoss, HiddenStateMSE
    from srd_lightning.losses.base import DistillationLoss
    from srd_lightning.losses.blends import AdaptiveKL, AlphaBeta
    from srd_lightning.losses.by_token import Hellinger, Selected, StudentEntropy, TokenScore, TokenTemperature
    from srd_lightning.losses.chunked import chunked_objective
    from srd_lightning.losses.contrastive import ContrastivePair
    from srd_lightning.losses.head import Head
    from srd_lightning.losses.hidden_states import HiddenStateCosine, LayerMapMSE
    from srd_lightning.losses.moving_target import TAID
    from srd_lightning.losses.standard import (
        ForwardKL,
        JensenShannon,
        ReverseKL,
        SkewForwardKL,
        SkewReverseKL,
        TotalVariation,
    )
    from srd_lightning.models.generation import Decoding
    from srd_lightning.models.pretrained import Pretrained
    from srd_lightning.module import KDLightningModule
    from srd_lightning.rollouts import GKD, DistiLLM, MiniLLM, ReflectionReplay, Rollouts
    from srd_lightning.teacher.handle import CacheSettings
    from srd_lightning.transformers_trainer import CurriculumTrainerCallback

_HOME = {
    "ALPACA": "data.templates",
    "AdaptiveKL": "losses",
    "AlphaBeta": "losses",
    "AnswerScore": "evaluation.answer_scores",
    "AnswerScores": "callbacks",
    "AnswerWriter": "callbacks",
    "AuxiliaryLoss": "losses.auxiliary",
    "CacheSettings": "teacher.handle",
    "ChatTemplate": "data.templates",
    "ContrastivePair": "losses",
    "Curriculum": "curriculum",
    "CurriculumCallback": "callbacks",
    "CurriculumSampler": "curriculum",
    "CurriculumTrainerCallback": "transformers_trainer",
    "Decoding": "models.generation",
    "DistiLLM": "rollouts",
    "DistillationLoss": "losses",
    "Example": "data.templates",
    "FSDP2": "distributed.fsdp2",
    "ForwardKL": "losses",
    "GKD": "rollouts",
    "Head": "losses.head",
    "Hellinger": "losses",
    "HiddenStateCosine": "losses",
    "HiddenStateMSE": "losses.auxiliary",
    "HubTarget": "callbacks",
    "HuggingFaceExport": "callbacks",
    "HyperparameterScheduler": "callbacks",
    "JensenShannon": "losses",
    "KDLightningModule": "module",
    "LayerMapMSE": "losses",
    "LengthGrouped": "data.samplers",
    "LossDrivenShare": "callbacks",
    "NewOptimizerEachStage": "callbacks",
    "MiniLLM": "rollouts",
    "Pretrained": "models.pretrained",
    "PromptTemplate": "data.templates",
    "ReflectionReplay": "rollouts",
    "ResumeCheckpoint": "checkpoints.resume_checkpoint",
    "ReverseKL": "losses",
    "Rollouts": "rollouts",
    "RougeL": "evaluation.rouge_metric",
    "RuntimeBenchmark": "callbacks.runtime",
    "SRDDataModule": "datamodule",
    "Selected": "losses",
    "SkewForwardKL": "losses",
    "SkewReverseKL": "losses",
    "StudentEntropy": "losses",
    "TAID": "losses",
    "TAIDSchedule": "callbacks",
    "TokenScore": "losses",
    "TokenTemperature": "losses",
    "TotalVariation": "losses",
    "TrainingClock": "callbacks",
    "WholeRunSampler": "curriculum",
    "chunked_objective": "losses.chunked",
    "default_callbacks": "callbacks",
    "order_by_id": "curriculum",
    "reciprocal_rank_fusion": "curriculum.ranking",
}

__all__ = [
    "ALPACA",
    "FSDP2",
    "GKD",
    "TAID",
    "AdaptiveKL",
    "AlphaBeta",
    "AnswerScore",
    "AnswerScores",
    "AnswerWriter",
    "AuxiliaryLoss",
    "CacheSettings",
    "ChatTemplate",
    "ContrastivePair",
    "Curriculum",
    "CurriculumCallback",
    "CurriculumSampler",
    "CurriculumTrainerCallback",
    "Decoding",
    "DistiLLM",
    "DistillationLoss",
    "Example",
    "ForwardKL",
    "Head",
    "Hellinger",
    "HiddenStateCosine",
    "HiddenStateMSE",
    "HubTarget",
    "HuggingFaceExport",
    "HyperparameterScheduler",
    "JensenShannon",
    "KDLightningModule",
    "LayerMapMSE",
    "LengthGrouped",
    "LossDrivenShare",
    "MiniLLM",
    "NewOptimizerEachStage",
    "Pretrained",
    "PromptTemplate",
    "ReflectionReplay",
    "ResumeCheckpoint",
    "ReverseKL",
    "Rollouts",
    "RougeL",
    "RuntimeBenchmark",
    "SRDDataModule",
    "Selected",
    "SkewForwardKL",
    "SkewReverseKL",
    "StudentEntropy",
    "TAIDSchedule",
    "TokenScore",
    "TokenTemperature",
    "TotalVariation",
    "TrainingClock",
    "WholeRunSampler",
    "chunked_objective",
    "default_callbacks",
    "order_by_id",
    "reciprocal_rank_fusion",
]

sys.meta_path.append(Moved())


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
