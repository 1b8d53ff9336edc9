"""The criterion that asks the teacher as well."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from srd_lightning.criteria.base import Criterion
from srd_lightning.criteria.batch import Reflected
from srd_lightning.errors import ModelError
from srd_lightning.losses import divergences
from srd_lightning.losses.base import log_probabilities
from srd_lightning.models.pretrained import Pretrained


class TeacherKL(Criterion):
    """Mean KL(teacher ‖ student) over the true response's tokens, in nats: how much the teacher would have to say.

    Args:
        teacher: The teacher; loaded when it is first needed and freed afterwards. Its scores are kept under its name
            and revision: a teacher that changes under the same name needs another folder of scores.
        weight: As in `Criterion`.
    """

    column, higher_is_easier = "teacher_kl", False

    def __init__(self, teacher: Pretrained | nn.Module, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.teacher = teacher
        self._loaded: nn.Module | None = None

    def scores(self, reflected: Reflected) -> Sequence[float]:
        if self._loaded is None:
            self._loaded = self.teacher.model() if isinstance(self.teacher, Pretrained) else self.teacher
        self._loaded.to(reflected.device)
        return reflected.row_means(reflected.per_token(_kl, self._loaded, reflected.model))

    def finish(self) -> None:
        """Free the teacher if it was loaded here."""
        self._loaded = None


def _kl(_: Tensor, teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    if teacher_logits.shape != student_logits.shape:
        raise ModelError(
            f"student and teacher give logits of {student_logits.shape[1]} and {teacher_logits.shape[1]} tokens; "
            "TeacherKL needs two models with the same vocabulary"
        )
    return divergences.forward_kl(log_probabilities(teacher_logits, 1.0), log_probabilities(student_logits, 1.0))
