"""A teacher of which only the likeliest tokens are known."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from srd_lightning.errors import SettingError
from srd_lightning.losses.base import FLOOR


class TopKTeacher(NamedTuple):
    """What is known of a teacher by its k likeliest tokens; all others are one, whose mass is split as by the student.

    Every divergence that is a sum of ``q f(p / q)``, as all six are, then has value and gradient of distributions over
    these k + 1.

    Args:
        logp: Log-probabilities of the k, ``[n, k]``.
        ids: Which they are, ``[n, k]``.
        rest: Log of the sum of the others' probabilities to each of the powers `POWERS`, ``[n, G]``.
    """

    logp: Tensor
    ids: Tensor
    rest: Tensor

    def at(self, temperature: float, student_logp: Tensor) -> Tensor:
        """Return log-probabilities at a temperature, ``[n, V]``, given the student's.

        Raises:
            SettingError: The temperature lies outside those that are kept.
        """
        return spread(self.and_others(temperature), self.ids, student_logp)

    def and_others(self, temperature: float) -> Tensor:
        """Return log-probabilities of the k at a temperature and, last, of all others together, ``[n, k + 1]``.

        Raises:
            SettingError: The temperature lies outside those that are kept.
        """
        rest = self.rest @ _shares(1 / temperature, self.rest.dtype, self.rest.device)
        return torch.cat([self.logp / temperature, rest[:, None]], 1).log_softmax(-1)


def spread(known: Tensor, ids: Tensor, student_logp: Tensor) -> Tensor:
    """Return log-probabilities, ``[n, V]``, of which k are known, and all others split as the student does it.

    Args:
        known: Log-probabilities of the k and of all others together, ``[n, k + 1]``.
        ids: Which the k are, ``[n, k]``.
        student_logp: The student's, ``[n, V]``.
    """
    others = student_logp.scatter(1, ids, -torch.inf).log_softmax(-1)  # a distribution, however unlikely
    return others.add_(known[:, -1:]).scatter_(1, ids, known[:, :-1]).clamp_(min=FLOOR)


POWERS = (2.0, 1.0, 0.8, 2 / 3, 0.5, 1 / 3, 0.25)
"""Inverse temperatures at which the mass of the unlikely tokens is kept; between them its logarithm is interpolated."""


@functools.lru_cache  # a device waits only for the first
def _shares(power: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return by what to weigh what is kept at `POWERS`, for another inverse temperature: a polynomial of its log."""
    if not POWERS[-1] <= power <= POWERS[0]:
        raise SettingError(
            f"teacher_cache topk knows temperatures from {1 / POWERS[0]:g} to {1 / POWERS[-1]:g}, but the loss is at "
            f"{1 / power:g}; use such a temperature, or teacher_cache hidden"
        )
    shares = [math.prod(math.log(power / other, own / other) for other in POWERS if other != own) for own in POWERS]
    return torch.tensor(shares, dtype=dtype, device=device)
