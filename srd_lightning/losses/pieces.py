"""Tokens are taken a few at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from srd_lightning.losses.top_k import TopKTeacher

Logits = Callable[[slice | Tensor], Tensor | TopKTeacher]
"""Gives a teacher's logits ``[n, V]``, or its likeliest tokens, of a slice of N tokens, or of some places in them."""
TEACHER_TOKENS = 2048
"""Tokens whose teacher's logits exist at a time: enough for a product at full speed."""
PIECE = 16
"""Tokens whose logits are worked on at a time on a CPU: few enough to stay in its cache."""
PIECE_LOGITS = 2**25
"""Logits that are worked on at a time on other devices, where no kernel does it: 128 MiB a tensor."""


def size_of_piece(logits: Tensor) -> int:
    """Return how many tokens are worked on at a time, where operations of torch do it.

    Args:
        logits: ``[n, V]``.
    """
    return PIECE if logits.device.type == "cpu" else max(1, PIECE_LOGITS // logits.shape[1])


def slices(length: int, size: int, border: int = 0) -> Iterator[slice]:
    """Yield slices of a size, none of which goes over a border.

    Example:
        >>> [(some.start, some.stop) for some in slices(10, size=4, border=5)]
        [(0, 4), (4, 5), (5, 9), (9, 10)]
    """
    border = min(max(border, 0), length)
    for start, end in ((0, border), (border, length)):
        yield from (slice(first, min(first + size, end)) for first in range(start, end, size))


def some_of(teacher: Tensor | TopKTeacher | None, tokens: slice) -> Tensor | TopKTeacher | None:
    """Return what is known of a teacher at some tokens."""
    if isinstance(teacher, TopKTeacher):
        return TopKTeacher(*(values[tokens] for values in teacher))
    return None if teacher is None else teacher[tokens]
