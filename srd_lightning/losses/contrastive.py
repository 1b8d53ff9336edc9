"""DistiLLM-2: one loss on reference responses, another on what the student wrote."""

from __future__ import annotations

from typing import Any

from srd_lightning.losses.around import Around, divergence_only
from srd_lightning.losses.base import DistillationLoss
from srd_lightning.losses.checks import share
from srd_lightning.losses.standard import SkewForwardKL, SkewReverseKL


class Weighted(Around):
    """A loss times a number.

    Args:
        loss: Any that is a divergence of each token.
        weight: The number, at least 0.
    """

    weight: float = share("weight", lambda w: w >= 0, "at 0 or above")

    def __init__(self, loss: DistillationLoss, weight: float) -> None:
        super().__init__(loss)
        self.weight = weight

    def scale_at(self, temperature: Any) -> Any:
        """See `DistillationLoss.scale_at`."""
        return self.weight * self.loss.scale_at(temperature)


class ContrastivePair(Around):
    """(2 - b) times one loss on reference responses, b times another on the student's (DistiLLM-2, arXiv 2503.07067).

    Which of them a batch gets is asked with `for_batch`; all of it, where nobody asks, counts as references.

    Args:
        on_reference: On responses of the data or the teacher; the authors' is `SkewForwardKL`, the default.
        on_own: On responses that the student wrote; the authors' is `SkewReverseKL`, the default.
        b: Weight of the second, in [0, 2]; the authors let it rise from 1 to 1.5. Staged by
            ``HyperparameterScheduler({"loss.b": …})``. ``loss.temperature`` is that
            of both; at first that of ``on_reference``.

    Example:
        >>> pair = ContrastivePair(b=1.5)
        >>> [pair.for_batch(own_text).scale for own_text in (False, True)]
        [0.5, 1.5]
    """

    b: float = share("b", lambda b: 0 <= b <= 2, "in [0, 2]")

    def __init__(
        self, on_reference: DistillationLoss | None = None, on_own: DistillationLoss | None = None, b: float = 1.0
    ) -> None:
        super().__init__(SkewForwardKL() if on_reference is None else on_reference)
        self.on_own = divergence_only(SkewReverseKL() if on_own is None else on_own, "ContrastivePair")
        self.on_own.temperature = self.loss.temperature
        self.b = b

    @property
    def temperature(self) -> float:
        """That of both."""
        return self.loss.temperature

    @temperature.setter
    def temperature(self, temperature: float) -> None:
        self.loss.temperature = self.on_own.temperature = temperature

    def scale_at(self, temperature: Any) -> Any:
        """See `DistillationLoss.scale_at`."""
        return (2 - self.b) * self.loss.scale_at(temperature)

    def for_batch(self, own_text: bool) -> DistillationLoss:
        """See `DistillationLoss.for_batch`."""
        return Weighted(self.on_own, self.b) if own_text else self
