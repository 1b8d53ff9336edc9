"""Losses: what is minimised.

A pure room: torch, and nothing of Lightning or transformers. Imports no other room. Begin with `base`, which has the
class that a loss of one's own derives from, or with `auxiliary` for one of hidden states; `chunked` makes value and
gradient without ever holding all logits. Losses that are made of others stand in files of their own.
"""

from srd_lightning.losses.base import (
    FLOOR,
    IGNORE_INDEX,
    DistillationLoss,
    cross_entropy,
    log_probabilities,
    needs_all_logits,
    response_mask,
    upcast,
)
from srd_lightning.losses.blends import AdaptiveKL, AlphaBeta
from srd_lightning.losses.by_token import Hellinger, Selected, StudentEntropy, TokenScore, TokenTemperature
from srd_lightning.losses.contrastive import ContrastivePair
from srd_lightning.losses.hidden_states import HiddenStateCosine, LayerMapMSE
from srd_lightning.losses.moving_target import TAID
from srd_lightning.losses.paper import (
    PaperForwardKL,
    PaperJensenShannon,
    PaperReverseKL,
    PaperSkewForwardKL,
    PaperSkewReverseKL,
    PaperTotalVariation,
)
from srd_lightning.losses.standard import (
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
)

__all__ = [
    "FLOOR",
    "IGNORE_INDEX",
    "TAID",
    "AdaptiveKL",
    "AlphaBeta",
    "ContrastivePair",
    "DistillationLoss",
    "ForwardKL",
    "Hellinger",
    "HiddenStateCosine",
    "JensenShannon",
    "LayerMapMSE",
    "PaperForwardKL",
    "PaperJensenShannon",
    "PaperReverseKL",
    "PaperSkewForwardKL",
    "PaperSkewReverseKL",
    "PaperTotalVariation",
    "ReverseKL",
    "Selected",
    "SkewForwardKL",
    "SkewReverseKL",
    "StudentEntropy",
    "TokenScore",
    "TokenTemperature",
    "TotalVariation",
    "cross_entropy",
    "log_probabilities",
    "needs_all_logits",
    "response_mask",
    "upcast",
]
