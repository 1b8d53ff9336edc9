"""Selective Reflection Distillation (arXiv 2508.06135) as PyTorch Lightning modules.

Names are loaded when they are first used, so the pure parts (templates, ranking, curriculum, divergences, losses) work
where Lightning and transformers are not installed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from srd_lightning.callbacks import (
        AnswerWriter,
        CurriculumCallback,
        HuggingFaceExport,
        HyperparameterScheduler,
    )
    from srd_lightning.checkpoint import ResumeCheckpoint
    from srd_lightning.curriculum import Curriculum
    from srd_lightning.data import SRDDataModule
    from srd_lightning.generation import Decoding
    from srd_lightning.losses import (
        DistillationLoss,
        ForwardKL,
        JensenShannon,
        ReverseKL,
        SkewForwardKL,
        SkewReverseKL,
        TotalVariation,
    )
    from srd_lightning.models import Pretrained
    from srd_lightning.module import KDLightningModule
    from srd_lightning.objective import Head, chunked_objective
    from srd_lightning.ranking import reciprocal_rank_fusion
    from srd_lightning.runtime import RuntimeBenchmark
    from srd_lightning.sampling import LengthGrouped
    from srd_lightning.strategy import FSDP2
    from srd_lightning.templates import ALPACA, ChatTemplate, Example, PromptTemplate

_HOME = {
    "ALPACA": "templates",
    "AnswerWriter": "callbacks",
    "ChatTemplate": "templates",
    "Curriculum": "curriculum",
    "CurriculumCallback": "callbacks",
    "Decoding": "generation",
    "DistillationLoss": "losses",
    "Example": "templates",
    "FSDP2": "strategy",
    "ForwardKL": "losses",
    "Head": "objective",
    "HuggingFaceExport": "callbacks",
    "HyperparameterScheduler": "callbacks",
    "JensenShannon": "losses",
    "KDLightningModule": "module",
    "LengthGrouped": "sampling",
    "Pretrained": "models",
    "PromptTemplate": "templates",
    "ResumeCheckpoint": "checkpoint",
    "ReverseKL": "losses",
    "RuntimeBenchmark": "runtime",
    "SRDDataModule": "data",
    "SkewForwardKL": "losses",
    "SkewReverseKL": "losses",
    "TotalVariation": "losses",
    "chunked_objective": "objective",
    "reciprocal_rank_fusion": "ranking",
}

__all__ = [
    "ALPACA",
    "FSDP2",
    "AnswerWriter",
    "ChatTemplate",
    "Curriculum",
    "CurriculumCallback",
    "Decoding",
    "DistillationLoss",
    "Example",
    "ForwardKL",
    "Head",
    "HuggingFaceExport",
    "HyperparameterScheduler",
    "JensenShannon",
    "KDLightningModule",
    "LengthGrouped",
    "Pretrained",
    "PromptTemplate",
    "ResumeCheckpoint",
    "ReverseKL",
    "RuntimeBenchmark",
    "SRDDataModule",
    "SkewForwardKL",
    "SkewReverseKL",
    "TotalVariation",
    "chunked_objective",
    "reciprocal_rank_fusion",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
