"""What losses that are made of another one have in common: its temperature, its scale and its divergence."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from srd_lightning.errors import SettingError
from srd_lightning.losses.base import DistillationLoss


def divergence_only(loss: DistillationLoss, user: str) -> DistillationLoss:
    """Return a loss, if it is no more than a divergence of each token, the same in every batch.

    Args:
        loss: Any.
        user: Whose part it is to be, for the message.

    Raises:
        SettingError: It is more, or no loss.
    """
    more = ("forward", "of_tokens", "for_batch")
    if isinstance(loss, DistillationLoss) and all(
        getattr(type(loss), name) is getattr(DistillationLoss, name) for name in more
    ):
        return loss
    given = type(loss).__name__ if isinstance(loss, DistillationLoss) else repr(loss)
    raise SettingError(
        f"{user} is made of losses that define divergence only, such as ForwardKL(), but is given {given}; one that "
        "chooses among tokens, or has another loss for own text, can only stand outside"
    )


class Around(DistillationLoss):
    """A loss around another one.

    Args:
        loss: The other; ``temperature`` is its own, so that ``loss.temperature`` is staged as ever.

    Raises:
        SettingError: It is no divergence of each token.
    """

    def __init__(self, loss: DistillationLoss) -> None:
        nn.Module.__init__(self)
        self.loss = self.inner(loss)
        self.scale_by_temperature = loss.scale_by_temperature
        self.ignore_index = loss.ignore_index

    def inner(self, loss: DistillationLoss) -> DistillationLoss:
        """Return the other loss, if it can be one."""
        return divergence_only(loss, type(self).__name__)

    @property
    def temperature(self) -> float:
        """That of the other."""
        return self.loss.temperature

    @temperature.setter
    def temperature(self, temperature: float) -> None:
        self.loss.temperature = temperature

    def scale_at(self, temperature: Any) -> Any:
        """See `DistillationLoss.scale_at`."""
        return self.loss.scale_at(temperature)

    def divergence(self, teacher_logp: Tensor, student_logp: Tensor) -> Tensor:
        """See `DistillationLoss.divergence`."""
        return self.loss.divergence(teacher_logp, student_logp)

    def value_and_gradient(self, teacher_logp: Tensor, student_logp: Tensor) -> tuple[Tensor, Tensor]:
        """See `DistillationLoss.value_and_gradient`."""
        return self.loss.value_and_gradient(teacher_logp, student_logp)
