"""Curriculum: which rows come when.

A pure room: torch and numpy, and nothing of Lightning or transformers. Imports no other room. Scores become one order
in `ranking`, which an arrangement may change, and `curriculum` says which of its rows an epoch has.
"""

from srd_lightning.curriculum.curriculum import (
    PAPER_SCHEDULE,
    Curriculum,
    check_fractions,
    check_schedule,
    never_reached,
    value_at,
)
from srd_lightning.curriculum.ranking import Arrangement, EasyToHard, HardToEasy, RandomOrder, RandomSubset

__all__ = [
    "PAPER_SCHEDULE",
    "Arrangement",
    "Curriculum",
    "EasyToHard",
    "HardToEasy",
    "RandomOrder",
    "RandomSubset",
    "check_fractions",
    "check_schedule",
    "never_reached",
    "value_at",
]
