"""Losses of hidden states, added to the objective: a loss of one's own derives from `AuxiliaryLoss`.

One method says the value of each response token; where the states come from, the mean over tokens and the training of
parameters are the module's concern::

    class Cosine(AuxiliaryLoss):
        def token_losses(self, student, teacher):
            return 1 - torch.cosine_similarity(student[0], teacher[0], dim=-1)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from srd_lightning.errors import SettingError
from srd_lightning.losses.base import upcast

LAST = -1
"""The final hidden states, behind the norm: those that the head is applied to."""


class AuxiliaryLoss(nn.Module):
    """A loss of the hidden states of student and teacher where they predict the response.

    Its parameters are trained, clipped, sharded and saved with the student's.

    Args:
        weight: What it is multiplied by. Staged by ``HyperparameterScheduler({"auxiliary.0.weight": …})``.
        student_layers: Whose states it is given: 0 is the embedding, n the output of block n, -1 the final states.
        teacher_layers: The same of the teacher; of one that is cached (kind hidden) there is only -1.

    Raises:
        SettingError: No layer is named, or one that is no whole number of at least -1.
    """

    def __init__(
        self, weight: float = 1.0, student_layers: Sequence[int] = (LAST,), teacher_layers: Sequence[int] = (LAST,)
    ) -> None:
        super().__init__()
        self.weight = weight
        for name, layers in (("student_layers", student_layers), ("teacher_layers", teacher_layers)):
            if not layers or not all(isinstance(layer, int) and layer >= LAST for layer in layers):
                raise SettingError(f"{name} must name layers by whole numbers of at least -1, but is {layers!r}")
        self.student_layers = tuple(student_layers)
        self.teacher_layers = tuple(teacher_layers)

    def token_losses(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Return the loss of each token; the one method that a new loss must write.

        Args:
            student: ``[N, d]`` of each of the ``student_layers``, for the N response tokens of a batch or a part of it.
            teacher: ``[N, d]`` of each of the ``teacher_layers``, without a gradient.

        Returns:
            ``[N]``
        """
        raise NotImplementedError(f"{type(self).__name__} must define token_losses(student, teacher)")

    def forward(self, student: Mapping[int, Tensor], teacher: Mapping[int, Tensor]) -> Tensor:
        """Return the weighted sum over tokens, a scalar in at least fp32.

        Args:
            student: ``[N, d]`` by number of the layer.
            teacher: ``[N, d]`` by number of the layer.

        Raises:
            SettingError: `token_losses` gives anything but one value per token.
        """
        own = [student[layer] for layer in self.student_layers]
        values = self.token_losses(own, [teacher[layer] for layer in self.teacher_layers])
        if not isinstance(values, Tensor) or values.shape != own[0].shape[:1] or not values.is_floating_point():
            found = f"shape {list(values.shape)}" if isinstance(values, Tensor) else repr(values)
            raise SettingError(
                f"{type(self).__name__}.token_losses must return one floating-point value per token, of shape "
                f"[{len(own[0])}], but returned {found}; the mean over tokens comes after"
            )
        return self.weight * upcast(values).sum()


class HiddenStateMSE(AuxiliaryLoss):
    """Mean squared difference between the teacher's final hidden states and a learnt projection of the student's.

    Args:
        student_width: Of the student's hidden states.
        teacher_width: Of the teacher's hidden states.
        weight: As in `AuxiliaryLoss`.

    Example:
        >>> loss = HiddenStateMSE(student_width=2, teacher_width=2)
        >>> with torch.no_grad():
        ...     _ = loss.projection.weight.copy_(torch.eye(2))
        >>> loss.token_losses([torch.tensor([[1.0, 2.0]])], [torch.tensor([[1.0, 0.0]])]).tolist()
        [2.0]
    """

    def __init__(self, student_width: int, teacher_width: int, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.projection = nn.Linear(student_width, teacher_width, bias=False)

    def token_losses(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """See `AuxiliaryLoss.token_losses`."""
        return (upcast(self.projection(student[0])) - upcast(teacher[0])).square().mean(-1)


def check_auxiliary(loss: AuxiliaryLoss, student_width: int, teacher_width: int) -> None:
    """Try a loss on states of the widths that the models have, before anything is loaded.

    Args:
        loss: Which may have parameters.
        student_width: Of the student's hidden states.
        teacher_width: Of the teacher's hidden states.

    Raises:
        SettingError: It does not take them, or gives not one value per token.
    """
    given = next((weight for weight in loss.parameters()), torch.zeros(()))
    if not given.is_floating_point() or given.is_meta:
        return
    states = [
        {layer: torch.zeros(2, width, dtype=given.dtype, device=given.device) for layer in layers}
        for layers, width in ((loss.student_layers, student_width), (loss.teacher_layers, teacher_width))
    ]
    try:
        with torch.no_grad():
            loss(*states)
    except NotImplementedError as error:
        raise SettingError(str(error)) from error
    except (RuntimeError, IndexError) as error:
        raise SettingError(
            f"{type(loss).__name__} does not take hidden states of widths {student_width} (student) and "
            f"{teacher_width} (teacher): {error}; give it these widths"
        ) from error
