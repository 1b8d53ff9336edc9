"""Distillation losses: a divergence between teacher and student, averaged over the tokens of the response.

Shift, mask, temperature and mean are written once, in `DistillationLoss`; a loss of one's own is one method::

    class SquaredLogits(DistillationLoss):
        def divergence(self, teacher_logp, student_logp):
            return (teacher_logp - student_logp).square().mean(-1)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from srd_lightning.errors import ModelError
from srd_lightning.losses.checks import check_temperature, check_values

IGNORE_INDEX = -100
FLOOR = -1e4
"""Least log-probability: a token that a model forbids, with a logit of -inf, counts as likely as e^-10000."""


def response_mask(labels: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Return which positions predict a token of the response.

    Args:
        labels: ``[B, T]``, unshifted, ``ignore_index`` where no loss is wanted.
        ignore_index: The label that masks.

    Returns:
        ``[B, T - 1]``, bool; position t predicts the token at t + 1.

    Example:
        >>> response_mask(torch.tensor([[-100, -100, 7, 8]]))
        tensor([[False,  True,  True]])
    """
    return labels[:, 1:] != ignore_index


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Return the mean negative log-likelihood of the response's tokens, the loss of plain fine-tuning.

    Args:
        logits: ``[B, T, V]``.
        labels: ``[B, T]``, unshifted, ``ignore_index`` where no loss is wanted.
        ignore_index: The label that masks.

    Returns:
        A scalar in fp32; a zero that is connected to the graph if there is no response token.
    """
    mask = response_mask(labels, ignore_index)
    selected = upcast(logits[:, :-1][mask])
    return nn.functional.cross_entropy(selected, labels[:, 1:][mask].long(), reduction="sum") / mask.sum().clamp(min=1)


def upcast(logits: Tensor) -> Tensor:
    """Return at least fp32: sums over a vocabulary lose too much in bf16."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def log_probabilities(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """Return log-softmax of ``logits / temperature``, ``[N, V]``, at least `FLOOR`, so finite where a logit is -inf.

    Args:
        logits: ``[N, V]``.
        temperature: One for all tokens, or one for each, ``[N, 1]``.

    Example:
        >>> log_probabilities(torch.tensor([[0.0, 0.0, -torch.inf]]), temperature=1.0)
        tensor([[-6.9315e-01, -6.9315e-01, -1.0000e+04]])
    """
    logits = upcast(logits)
    whole = not isinstance(temperature, Tensor) and temperature == 1
    logp = (logits if whole else logits / temperature).log_softmax(-1)
    # the backward pass of log-softmax needs its output; where there is none, no second copy is made
    return logp.clamp(min=FLOOR) if logp.requires_grad else logp.clamp_(min=FLOOR)


class DistillationLoss(nn.Module):
    r"""Mean over response tokens of :math:`T^2 \, D_T(\text{teacher} \| \text{student})`.

    Args:
        temperature: Divides the logits of both models. Staged by ``HyperparameterScheduler({"loss.temperature": …})``.
        scale_by_temperature: Multiply by temperature squared, so that the size of the gradient does not fall as the
            temperature rises (Hinton et al., arXiv 1503.02531). The authors' code does so for forward KL, JSD and skew
            reverse KL only; ``False`` reproduces it for the other three.
        ignore_index: The label that masks a position.

    Raises:
        SettingError: The temperature is not positive.

    Example:
        >>> from srd_lightning import ForwardKL
        >>> teacher = torch.tensor([[[0.0, 2.0], [1.0, 1.0], [0.0, 0.0]]])
        >>> loss = ForwardKL(temperature=2.0)
        >>> loss(torch.zeros(1, 3, 2), teacher, labels=torch.tensor([[-100, 1, 0]]))
        tensor(0.2219)
    """

    numbers: tuple[str, ...] = ()
    """Attributes that `divergence` and `value_and_gradient` take as scalar tensors too: a compiled step with these is
    not compiled again where they are staged."""

    def __init__(
        self, temperature: float = 1.0, scale_by_temperature: bool = True, ignore_index: int = IGNORE_INDEX
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.scale_by_temperature = scale_by_temperature
        self.ignore_index = ignore_index

    def divergence(self, teacher_logp: Tensor, student_logp: Tensor) -> Tensor:
        """Return the divergence of each token; the one method that a new loss must write.

        Args:
            teacher_logp: Log-probabilities at the temperature, ``[N, V]``, finite, fp32 or wider.
            student_logp: The same of the student; only this one has a gradient.

        Returns:
            ``[N]``
        """
        raise NotImplementedError(f"{type(self).__name__} must define divergence(teacher_logp, student_logp)")

    def value_and_gradient(self, teacher_logp: Tensor, student_logp: Tensor) -> tuple[Tensor, Tensor]:
        """Return the divergence of each token, and its gradient; by default by autograd of `divergence`.

        Args:
            teacher_logp: As in `divergence`.
            student_logp: As in `divergence`.

        Returns:
            ``[N]``, and ``[N, V]``, by the student's logits divided by the temperature.
        """
        with torch.enable_grad():
            logits = student_logp.detach().requires_grad_()
            value = check_values(self, self.divergence(teacher_logp, logits.log_softmax(-1)), len(logits), True)
            (gradient,) = torch.autograd.grad(value.sum(), logits)
        return value.detach(), gradient

    def __init_subclass__(cls) -> None:
        """Let a new divergence have its own gradient, not the one of the loss that it is derived from."""
        super().__init_subclass__()
        if "divergence" in vars(cls) and "value_and_gradient" not in vars(cls):
            cls.value_and_gradient = DistillationLoss.value_and_gradient  # type: ignore[method-assign]

    @property
    def temperature(self) -> float:
        """What divides the logits of both models; checked also where it is set later."""
        return self._temperature

    @temperature.setter
    def temperature(self, temperature: float) -> None:
        self._temperature = check_temperature(temperature)

    @property
    def scale(self) -> float:
        """What the mean divergence is multiplied by: temperature squared, or 1."""
        return float(self.scale_at(self.temperature))

    def scale_at(self, temperature: Any) -> Any:
        """Return what divergences at a temperature, or at one of each token ``[N]``, are multiplied by."""
        return temperature**2 if self.scale_by_temperature else 1.0

    @property
    def why_all_logits(self) -> str:
        """What is said where batches need all logits because of it: who, why, and what to do."""
        return (
            f"{type(self).__name__}: it defines forward, has parameters, or has an ignore_index of its own; set chunk "
            "to null to have it so without being told"
        )

    def for_batch(self, own_text: bool) -> DistillationLoss:
        """Return the loss of a batch; itself, unless text that the student wrote has another.

        Args:
            own_text: Whether the student wrote the responses of the batch.
        """
        return self

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean over the tokens of the response.

        Args:
            student_logits: ``[B, T, V]``.
            teacher_logits: ``[B, T, V]``.
            labels: ``[B, T]``, unshifted, ``ignore_index`` where no loss is wanted.

        Returns:
            A scalar in fp32; a zero that is connected to the graph if there is no response token.

        Raises:
            ModelError: The two vocabularies have different sizes.
        """
        if student_logits.shape != teacher_logits.shape:
            raise ModelError(
                f"student and teacher logits must have one shape, but have {list(student_logits.shape)} and "
                f"{list(teacher_logits.shape)}; distillation needs two models with the same vocabulary"
            )
        mask = response_mask(labels, self.ignore_index)
        rows = mask.sum(1).tolist()
        return self.of_tokens(student_logits[:, :-1][mask], teacher_logits[:, :-1][mask], mask.sum().clamp(min=1), rows)

    def of_tokens(
        self, student_logits: Tensor, teacher_logits: Tensor, num_tokens: Tensor, rows: Sequence[int] | None = None
    ) -> Tensor:
        """Return the mean over tokens whose logits were taken out already: what `forward` does after that.

        Args:
            student_logits: ``[N, V]``.
            teacher_logits: ``[N, V]``.
            num_tokens: What the sum over them is divided by.
            rows: How many of the tokens each row has; asked for by losses that choose among them.
        """
        student_logp = log_probabilities(student_logits, self.temperature)
        teacher_logp = log_probabilities(teacher_logits, self.temperature)
        values = self.divergence(teacher_logp, student_logp)
        values = check_values(self, values, len(student_logp), torch.is_grad_enabled() and student_logp.requires_grad)
        return self.scale * upcast(values).sum() / num_tokens


def needs_all_logits(loss: DistillationLoss) -> bool:
    """Return whether a loss is more than a divergence of each token: then it gets what it asks for."""
    changed = type(loss).forward is not DistillationLoss.forward
    return changed or loss.ignore_index != IGNORE_INDEX or any(True for _ in loss.parameters())
