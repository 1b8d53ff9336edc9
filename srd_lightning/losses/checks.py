"""What is checked of a distillation loss, so that one that is not what it seems never trains a student."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from srd_lightning.errors import SettingError


def check_temperature(temperature: float) -> float:
    """Return a temperature that a loss can have.

    Raises:
        SettingError: It is not a positive, finite number.
    """
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or not 0 < temperature < math.inf:
        raise SettingError(f"temperature must be positive and finite, but is {temperature!r}")
    return temperature


def share(name: str, allowed: Callable[[float], bool], where: str, advice: str = "") -> Any:
    """Return an attribute of a loss, a share of a mixture, that is checked also where it is set later.

    Args:
        name: Of the attribute.
        allowed: Tells whether it can have a value.
        where: The values lie that it can have, for the message.
        advice: What to do instead.
    """

    def check(loss: Any, value: float) -> None:
        if not isinstance(value, (int, float)) or not allowed(value):
            raise SettingError(f"{name} must lie {where}, but is {value!r}{advice}")
        vars(loss)[f"_{name}"] = value

    return property(lambda loss: getattr(loss, f"_{name}"), check)


def check_values(loss: object, values: Tensor, tokens: int, differentiable: bool) -> Tensor:
    """Return what a loss's ``divergence`` gave, if that is one value of each token.

    Args:
        loss: Named in the message.
        values: What it gave.
        tokens: For so many tokens.
        differentiable: Whether they must have a gradient.

    Raises:
        SettingError: They are anything else, such as a mean over tokens: it would be averaged once more.

    Example:
        >>> check_values(torch.nn.Identity(), torch.zeros(3), tokens=3, differentiable=False)
        tensor([0., 0., 0.])
    """
    name = f"{type(loss).__name__}.divergence"
    if not isinstance(values, Tensor) or values.shape != (tokens,) or not values.is_floating_point():
        found = f"{values.dtype} of shape {list(values.shape)}" if isinstance(values, Tensor) else repr(values)
        raise SettingError(
            f"{name} must return one floating-point value per token, of shape [{tokens}] for {tokens} tokens, but "
            f"returned {found}; sum over the vocabulary with .sum(-1), the mean over tokens comes after"
        )
    if differentiable and not values.requires_grad:
        raise SettingError(
            f"{name} returned values without a gradient; compute them from student_logp by operations of torch, "
            "without detach(), item() or torch.no_grad()"
        )
    return values


def check_gradient(loss: object, values: Tensor, gradient: Tensor, logp: Tensor) -> None:
    """Check the shapes of what a loss's ``value_and_gradient`` gave, where it is one's own.

    Raises:
        SettingError: The gradient has not the shape of the log-probabilities, or values are not one per token.
    """
    check_values(loss, values, len(logp), differentiable=False)
    if gradient.shape != logp.shape:
        raise SettingError(
            f"{type(loss).__name__}.value_and_gradient must return a gradient of shape {list(logp.shape)}, as the "
            f"student's log-probabilities have, but returned {list(gradient.shape)}"
        )


def check_scalar(loss: object, value: Tensor) -> Tensor:
    """Return what a loss's own ``forward`` gave, if that is the mean over tokens.

    Raises:
        SettingError: It is anything else.
    """
    if isinstance(value, Tensor) and value.ndim == 0 and value.is_floating_point():
        return value
    found = f"{value.dtype} of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
    raise SettingError(
        f"{type(loss).__name__}.forward must return one floating-point number, the mean over response tokens, but "
        f"returned {found}"
    )


def check_loss(loss: Any) -> None:
    """Try a loss on two ordinary distributions, before anything is loaded; it must not fail on these.

    Raises:
        SettingError: It gives no divergence, not one value per token, or values or gradients that are no numbers.
    """
    generator = torch.Generator().manual_seed(0)
    teacher_logp, student_logp = torch.randn(2, 3, 7, generator=generator).log_softmax(-1)
    given = student_logp.clone()
    try:
        values, gradient = loss.value_and_gradient(teacher_logp, given)
    except NotImplementedError as error:
        raise SettingError(str(error)) from error
    except SettingError:
        raise
    except (RuntimeError, IndexError, ValueError):  # made for one vocabulary or device: the first batch will tell
        return
    check_gradient(loss, values, gradient, student_logp)
    if not torch.equal(given, student_logp):
        raise SettingError(
            f"{type(loss).__name__}.value_and_gradient must not change student_logp, which is used after it"
        )
    for name, found in (("values", values), ("gradients", gradient)):
        if not bool(found.isfinite().all()):
            raise SettingError(
                f"{type(loss).__name__} gives {name} that are NaN or infinite for two ordinary distributions, of which "
                "no probability is 0: correct its divergence"
            )
