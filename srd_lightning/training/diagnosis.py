"""Which model it comes from, when a loss is NaN or infinite: looked at only then."""

from __future__ import annotations

import torch
from torch import Tensor

from srd_lightning.losses.chunked import CHUNK
from srd_lightning.losses.pieces import Logits
from srd_lightning.losses.top_k import TopKTeacher

WEIGHTS = "check its weights, and load it in float32 or bfloat16, for float16 overflows"


@torch.no_grad()
def cause_of(student: Logits, teacher: Logits | None, targets: Tensor, trained: bool) -> str | None:
    """Return where a loss of a batch that is NaN or infinite comes from, and what to do, if one model is to blame.

    Args:
        student: Gives its logits of a slice of the response tokens.
        teacher: The same, where there is one.
        targets: The tokens of the response, ``[N]``.
        trained: Whether the student has made a step in this run.

    Example:
        >>> fine, nan = (torch.full((1, 2), value) for value in (0.0, torch.nan))
        >>> cause_of(fine.__getitem__, nan.__getitem__, torch.tensor([0]), trained=False).split(":")[0]
        "the teacher's logits are NaN or infinite"
    """
    for tokens in (slice(first, first + CHUNK) for first in range(0, len(targets), CHUNK)):
        logits = _values(student(tokens))
        if _broken(logits):
            if trained:
                return None  # by training: the usual advice holds
            return f"the student's logits are NaN or infinite before its first step: {WEIGHTS}"
        if teacher is not None and _broken(_values(teacher(tokens))):
            return f"the teacher's logits are NaN or infinite: {WEIGHTS}"
        forbidden = logits.gather(1, targets[tokens, None]).isneginf()[:, 0]
        if bool(forbidden.any()):
            return (
                f"the student can never say token {int(targets[tokens][forbidden][0])} of these rows, whose logit is "
                "-inf: leave out rows with this token, or take a model that does not forbid it"
            )
    return None


def _values(found: Tensor | TopKTeacher) -> Tensor:
    return found.logp if isinstance(found, TopKTeacher) else found


def _broken(logits: Tensor) -> bool:
    return bool((logits.isnan() | logits.isposinf()).any())
