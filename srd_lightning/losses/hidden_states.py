"""Losses of hidden states beside `HiddenStateMSE`: their direction, and several layers at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from srd_lightning.errors import SettingError
from srd_lightning.losses.auxiliary import AuxiliaryLoss
from srd_lightning.losses.base import upcast


class HiddenStateCosine(AuxiliaryLoss):
    r"""One minus the cosine between the teacher's final hidden states and a learnt projection of the student's.

    DistilBERT's (arXiv 1910.01108) is that of models of one width. It sees directions and no lengths, so the few
    units in which states are very large do not decide it alone.

    Args:
        student_width: Of the student's hidden states.
        teacher_width: Of the teacher's hidden states.
        weight: As in `AuxiliaryLoss`.

    Example:
        >>> loss = HiddenStateCosine(student_width=2, teacher_width=2)
        >>> with torch.no_grad():
        ...     _ = loss.projection.weight.copy_(torch.eye(2))
        >>> loss.token_losses([torch.tensor([[3.0, 4.0]])], [torch.tensor([[1.0, 0.0]])]).item()  # 1 - 3/5
        0.3999999761581421
    """

    def __init__(self, student_width: int, teacher_width: int, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.projection = nn.Linear(student_width, teacher_width, bias=False)

    def token_losses(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """See `AuxiliaryLoss.token_losses`."""
        return 1 - torch.cosine_similarity(upcast(self.projection(student[0])), upcast(teacher[0]), dim=-1)


class LayerMapMSE(AuxiliaryLoss):
    r"""Mean squared difference of mapped layers, the student's projected by a matrix of each pair, averaged over pairs.

    TinyBERT's hidden states loss (arXiv 1909.10351, eq. 8).

    Args:
        student_width: Of the student's hidden states.
        teacher_width: Of the teacher's hidden states.
        layers: ``{layer of the student: layer of the teacher}``: 0 is the embedding, n the output of block n, -1 the
            final states.
        weight: As in `AuxiliaryLoss`.

    Raises:
        SettingError: No layers are mapped.

    Example:
        >>> loss = LayerMapMSE(2, 2, layers={1: 2, -1: -1})
        >>> loss.student_layers, loss.teacher_layers, len(loss.projections)
        ((1, -1), (2, -1), 2)
    """

    def __init__(self, student_width: int, teacher_width: int, layers: Mapping[int, int], weight: float = 1.0) -> None:
        if not isinstance(layers, Mapping):
            raise SettingError(f"layers must be {{layer of the student: of the teacher}}, but is {layers!r}")
        super().__init__(weight, tuple(layers), tuple(layers.values()))
        self.projections = nn.ModuleList(nn.Linear(student_width, teacher_width, bias=False) for _ in layers)

    def token_losses(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """See `AuxiliaryLoss.token_losses`."""
        pairs = zip(self.projections, student, teacher, strict=True)
        missed = [(upcast(project(own)) - upcast(other)).square().mean(-1) for project, own, other in pairs]
        return torch.stack(missed).mean(0)
