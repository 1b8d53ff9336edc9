"""Checks before work: whoever can know early that a run will fail says so before rows are read and models loaded.

Lightning sets up the data module first, and curation is part of that; so a callback that refuses in its own ``setup``
does so after the student has answered every prompt. `run_preflight` is therefore the first thing that `SRDDataModule`
does; a callback or module calls its own check from ``setup`` too, for runs with other data modules. A check
only looks, so that it may be made twice.
"""

from __future__ import annotations

import sys
from typing import Any, Protocol, cast, runtime_checkable

from lightning import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from srd_lightning.errors import SettingError

TWIN = "pytorch_lightning"
"""The other package of the same code: its classes are not those of `lightning`, which this library is made of."""
IN_ITS_PLACE = f"write `import lightning.pytorch as pl` in place of `import {TWIN} as pl`, everywhere"


@runtime_checkable
class Preflight(Protocol):
    """Something that can tell before a run whether it will fail: a module, or a callback."""

    def preflight(self, trainer: Trainer) -> None:
        """Raise an `srd_lightning.errors.SRDError` where the run cannot end well; change nothing.

        Args:
            trainer: Of the run, with its strategy in place; what it does is ``trainer.state.fn``.
        """


def run_preflight(trainer: Trainer, module: object) -> None:
    """Let a module and all callbacks of a trainer check, in this order.

    Args:
        trainer: Of the run that begins.
        module: That is trained, or is to be.

    Raises:
        SRDError: Of the first check that fails.
    """
    for holder in (module, *callbacks_of(trainer)):
        if isinstance(holder, Preflight):
            holder.preflight(trainer)


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Return the callbacks of a trainer, which has them without saying so."""
    return cast(list[Callback], cast(Any, trainer).callbacks)


def warn_of_twin(ours: object) -> None:
    """Warn where the other package is imported: its Trainer refuses what is ours before anything of ours is asked.

    Args:
        ours: That is made.
    """
    if TWIN in sys.modules:
        rank_zero_warn(
            f"{TWIN} is imported in this program, and {type(ours).__name__} is made of lightning, which does not go "
            f"with it: {IN_ITS_PLACE}"
        )


def check_no_twin(other: object, ours: object) -> None:
    """Refuse an object of the other package, with which Lightning would say `Expected a parent`.

    Args:
        other: A trainer or data module, or nothing.
        ours: With which it is to go.

    Raises:
        SettingError: It is of the other package.
    """
    if any(base.__module__.partition(".")[0] == TWIN for base in type(other).__mro__):
        raise SettingError(
            f"the {type(other).__name__} is made of {TWIN}, and {type(ours).__name__} of lightning, which are two "
            f"packages with classes of their own: {IN_ITS_PLACE}"
        )
