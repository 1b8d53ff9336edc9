"""Criteria: what makes a row hard.

Imports `losses`, `data`, `models` and `evaluation`. Begin with `base`, which has the class that a criterion of one's
own derives from, and what it is given; `standard` are those that there are.
"""

from srd_lightning.criteria.base import Column, Criterion, check_criteria
from srd_lightning.criteria.standard import (
    AnswerLength,
    Bleu,
    ChrF,
    ExactMatch,
    InstructionFollowingDifficulty,
    NegativeLogLikelihood,
    NumericAnswer,
    Perplexity,
    RankSurprisalRatio,
    ResponseLength,
    RougeL,
    TeacherKL,
)

__all__ = [
    "AnswerLength",
    "Bleu",
    "ChrF",
    "Column",
    "Criterion",
    "ExactMatch",
    "InstructionFollowingDifficulty",
    "NegativeLogLikelihood",
    "NumericAnswer",
    "Perplexity",
    "RankSurprisalRatio",
    "ResponseLength",
    "RougeL",
    "TeacherKL",
    "check_criteria",
]
