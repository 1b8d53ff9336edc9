"""What logits say of the tokens that they predict: how likely each is, and how near a teacher is."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from srd_lightning.losses.base import log_probabilities, upcast
from srd_lightning.losses.divergences import forward_kl


def likelihood(tokens: Tensor, logits: Tensor) -> Tensor:
    """Return how a model predicts tokens, ``[N, 3]``.

    Args:
        tokens: That stand there, ``[N]``.
        logits: That predict them, ``[N, V]``.

    Returns:
        The loss of each in nats, whether the likeliest token is the one that stands there, and its probability.

    Example:
        >>> likelihood(torch.tensor([0, 1]), torch.tensor([[0.0, 0.0], [1.0, 0.0]])).round(decimals=2)
        tensor([[0.6900, 1.0000, 0.5000],
                [1.3100, 0.0000, 0.7300]])
    """
    logits = upcast(logits)
    confidence, likeliest = logits.softmax(-1).max(-1)
    loss = cross_entropy(logits, tokens, reduction="none")
    return torch.stack([loss, (likeliest == tokens).to(loss), confidence], dim=1)


def agreement(teacher_logits: Tensor, student_logits: Tensor, vocabulary: int | None = None) -> Tensor:
    """Return how near a student is to its teacher at each position, ``[N, 2]``.

    Args:
        teacher_logits: ``[N, V]``
        student_logits: ``[N, V]``
        vocabulary: Tokens that both know, where one has more; see `shared_vocabulary`.

    Returns:
        KL(teacher ‖ student) in nats, and whether both find the same token likeliest.

    Example:
        >>> agreement(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])).round(decimals=4)
        tensor([[0.4621, 0.0000]])
    """
    teacher, student = upcast(teacher_logits[:, :vocabulary]), upcast(student_logits[:, :vocabulary])
    distance = forward_kl(log_probabilities(teacher, 1.0), log_probabilities(student, 1.0))
    return torch.stack([distance, (teacher.argmax(-1) == student.argmax(-1)).to(distance)], dim=1)
