"""TAID: the student learns from a target that moves from itself to the teacher."""

from __future__ import annotations

from torch import Tensor

from srd_lightning.losses.around import Around
from srd_lightning.losses.base import FLOOR, DistillationLoss
from srd_lightning.losses.checks import share
from srd_lightning.losses.standard import ForwardKL


class TAID(Around):
    r"""A loss against a target between student and teacher (TAID, arXiv 2501.16937).

    It is :math:`\operatorname{softmax}((1 - t) \, z_\text{student} + t \, z_\text{teacher})`, without a gradient. Where
    t is 1 it is the teacher, and the loss is the one around which this stands.

    Args:
        loss: Between the target and the student; the authors' is `ForwardKL`, the default.
        t: How far the target has come, in [0, 1]. Staged by epoch with ``HyperparameterScheduler({"loss.t": …})``, or
            by step with ``TAIDSchedule()``, which also lets it hurry while the loss falls.

    Example:
        >>> import torch
        >>> teacher, student = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
        >>> TAID(t=0.5).divergence(teacher, student)  # from (0.75, 0.25)
        tensor([0.0923])
    """

    t: float = share("t", lambda t: 0 <= t <= 1, "in [0, 1]")
    numbers = ("t",)

    def __init__(self, loss: DistillationLoss | None = None, t: float = 0.4) -> None:
        super().__init__(ForwardKL() if loss is None else loss)
        self.t = t

    def _target(self, teacher_logp: Tensor, student_logp: Tensor) -> Tensor:
        """Return its log-probabilities; what normalises either model's does not change the mixture's."""
        mixed = student_logp.detach().lerp(teacher_logp, self.t)
        return mixed.log_softmax(-1).clamp_(min=FLOOR)

    def divergence(self, teacher_logp: Tensor, student_logp: Tensor) -> Tensor:
        """See `DistillationLoss.divergence`."""
        return self.loss.divergence(self._target(teacher_logp, student_logp), student_logp)

    def value_and_gradient(self, teacher_logp: Tensor, student_logp: Tensor) -> tuple[Tensor, Tensor]:
        """See `DistillationLoss.value_and_gradient`."""
        return self.loss.value_and_gradient(self._target(teacher_logp, student_logp), student_logp)
