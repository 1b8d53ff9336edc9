"""Losses: what is minimised.

A pure room: torch, and nothing of Lightning or transformers. Imports no other room. Begin with `base`, which has the
class that a loss of one's own derives from, or with `auxiliary` for one of hidden states; `chunked` makes value and
gradient without ever holding all logits.
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
    "DistillationLoss",
    "ForwardKL",
    "JensenShannon",
    "ReverseKL",
    "SkewForwardKL",
    "SkewReverseKL",
    "TotalVariation",
    "cross_entropy",
    "log_probabilities",
    "needs_all_logits",
    "response_mask",
    "upcast",
]
