"""Criteria: what makes a row hard.

Imports `losses`, `data`, `models` and `evaluation`. Begin with `base`, which has the class that a criterion of one's
own derives from; `batch` is what it is given.
"""

from srd_lightning.criteria.base import (
    AnswerLength,
    Bleu,
    ChrF,
    Column,
    Criterion,
    ExactMatch,
    InstructionFollowingDifficulty,
    NegativeLogLikelihood,
    NumericAnswer,
    Perplexity,
    RankSurprisalRatio,
    ResponseLength,
    RougeL,
    TeacherKL,
    check_criteria,
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
