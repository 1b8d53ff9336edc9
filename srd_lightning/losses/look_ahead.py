"""What a loss that chooses among tokens must see of all of them, made chunk by chunk and without gradients.

It costs one product of the student's head, and one of the teacher's where a score needs that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from srd_lightning.losses.base import log_probabilities, upcast
from srd_lightning.losses.by_token import ByToken, TokenPlan
from srd_lightning.losses.head import Head
from srd_lightning.losses.pieces import TEACHER_TOKENS, Logits, size_of_piece, slices, some_of
from srd_lightning.losses.token_loss import teacher_log_probabilities
from srd_lightning.losses.top_k import TopKTeacher


@torch.no_grad()
def look_ahead(
    loss: ByToken, hidden: Tensor, head: Head, teacher_logits: Logits, rows: Sequence[int], chunk: int
) -> TokenPlan:
    """Return what counts of N tokens.

    Args:
        loss: Plans it.
        hidden: Of the student, ``[N, d]``, in the type of the products.
        head: Of the student.
        teacher_logits: Of the teacher.
        rows: How many tokens each row has.
        chunk: Tokens whose logits exist at a time, where these are not more than `TEACHER_TOKENS`.
    """
    head, scores = head.to(hidden.dtype), []
    for tokens in slices(len(hidden), min(chunk, TEACHER_TOKENS)):  # nothing is held from one to the next
        scores += _scores(loss, head(hidden[tokens]), teacher_logits(tokens) if loss.needs_teacher else None)
    empty = upcast(hidden.new_zeros(len(loss.scorers()), 0))
    return loss.plan(torch.cat([empty, *scores], 1), rows)


def _scores(loss: ByToken, logits: Tensor, teacher: Tensor | TopKTeacher | None) -> list[Tensor]:
    """Return scores ``[S, n]``, a few tokens at a time."""
    scores = []
    for piece in slices(len(logits), size_of_piece(logits)):
        student_logp, known = log_probabilities(logits[piece], loss.temperature), some_of(teacher, piece)
        teacher_logp = None if known is None else teacher_log_probabilities(known, loss.temperature, student_logp)
        scores.append(loss.scores(teacher_logp, student_logp))
    return scores


def of_places(teacher_logits: Logits, places: Tensor) -> Logits:
    """Return what gives a teacher's logits of tokens that stand in another order.

    Args:
        teacher_logits: Of the tokens as they stood.
        places: Where each stood.
    """
    return lambda tokens: teacher_logits(places[tokens])
