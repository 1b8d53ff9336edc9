"""Rollouts: training with the student's own text.

Imports `checkpoints`, `data`, `distributed`, `losses` and `models`. Begin with `base`, which says what a method is, and
with `gkd`, the shortest one; `handle` lets a module use one.
"""

from srd_lightning.rollouts.base import Rollouts
from srd_lightning.rollouts.distillm import DistiLLM
from srd_lightning.rollouts.gkd import GKD
from srd_lightning.rollouts.minillm import MiniLLM
from srd_lightning.rollouts.replay import ReflectionReplay

__all__ = ["GKD", "DistiLLM", "MiniLLM", "ReflectionReplay", "Rollouts"]
