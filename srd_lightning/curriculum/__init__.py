"""Curriculum: which rows come when.

A pure room: torch and numpy, and nothing of Lightning or transformers. Imports no other room. Scores become one order
in `ranking`, an `arrangement` may change it, and `curriculum` says which of its rows an epoch has.
"""

from srd_lightning.curriculum.arrangement import Arrangement, EasyToHard, HardToEasy, RandomOrder, RandomSubset
from srd_lightning.curriculum.curriculum import (
    PAPER_SCHEDULE,
    Curriculum,
    check_fractions,
    check_schedule,
    never_reached,
    value_at,
)

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
