"""Numbers of any object, such as a module or a loss, that change with the epoch."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from numbers import Real
from operator import attrgetter
from typing import Any

from torch import Tensor

from srd_lightning.curriculum.curriculum import check_schedule
from srd_lightning.errors import SettingError


def check_values(schedules: Mapping[str, Mapping[Any, float]]) -> dict[str, dict[int, float]]:
    """Return schedules of attributes, each sorted by epoch.

    Args:
        schedules: ``{attribute: {first epoch: value}}``.

    Raises:
        SettingError: One does not begin at epoch 0, or its values are no numbers.

    Example:
        >>> check_values({"temperature": {"8": 1.5, 0: 1.0}})
        {'temperature': {0: 1.0, 8: 1.5}}
    """
    checked = {name: check_schedule(schedule, name) for name, schedule in schedules.items()}
    for name, schedule in checked.items():
        if wrong := [value for value in schedule.values() if not isinstance(value, Real) or not isfinite(value)]:
            raise SettingError(f"the values of {name} must be numbers, but one is {wrong[0]!r}")
    return checked


def assign(holder: Any, name: str, value: float) -> None:
    """Give an attribute of an object, which may be dotted, a value."""
    owner, _, attribute = name.rpartition(".")
    setattr(attrgetter(owner)(holder) if owner else holder, attribute, value)


def try_values(holder: Any, name: str, schedule: Mapping[int, float]) -> None:
    """Give an attribute every value of a schedule once, and then the one that it had.

    Raises:
        SettingError: It is not there, is not a number, or does not take a value.
    """
    path, _, attribute = name.rpartition(".")
    try:
        owner = attrgetter(path)(holder) if path else holder
        former = getattr(owner, attribute)
    except AttributeError as error:
        raise SettingError(f"{type(holder).__name__} has no attribute {name!r} to schedule: {error}") from error
    if former is not None and not isinstance(former, (int, float, Tensor)):
        raise SettingError(
            f"{name} of {type(holder).__name__} is a {type(former).__name__}, not a number that can be scheduled"
        )
    for epoch, value in schedule.items():
        try:
            setattr(owner, attribute, value)
        except (ValueError, TypeError, AttributeError) as error:
            raise SettingError(f"the schedule of {name} cannot begin {value} at epoch {epoch}: {error}") from error
        setattr(owner, attribute, former)
