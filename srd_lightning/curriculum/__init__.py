"""Curriculum: which rows come when.

A pure room: torch and numpy, and nothing of Lightning or transformers. Imports no other room. Scores become one order
in `ranking`, which an arrangement may change, `curriculum` says which of its rows an epoch has, `samplers` deals them
to loops and trainers that are not Lightning's, and `staged_values` changes numbers with the epochs.
"""

from srd_lightning.curriculum.curriculum import (
    PAPER_SCHEDULE,
    Curriculum,
    check_fractions,
    check_schedule,
    never_reached,
    value_at,
)
from srd_lightning.curriculum.ranking import Arrangement, EasyToHard, HardToEasy, RandomOrder, RandomSubset, order_by_id
from srd_lightning.curriculum.samplers import CurriculumSampler, WholeRunSampler

__all__ = [
    "PAPER_SCHEDULE",
    "Arrangement",
    "Curriculum",
    "CurriculumSampler",
    "EasyToHard",
    "HardToEasy",
    "RandomOrder",
    "RandomSubset",
    "WholeRunSampler",
    "check_fractions",
    "check_schedule",
    "never_reached",
    "order_by_id",
    "value_at",
]
