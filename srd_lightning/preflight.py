"""Checks before work: whoever can know early that a run will fail says so before rows are read and models loaded.

Lightning sets up the data module first, and curation is part of that; so a callback that refuses in its own ``setup``
does so after the student has answered every prompt. `run_preflight` is therefore the first thing that `SRDDataModule`
does; a callback or module calls its own check from ``setup`` too, for runs with other data modules. A check
only looks, so that it may be made twice.
"""

from __future__ import annotations

from typing import Any, Protocol, cast, runtime_checkable

from lightning import Callback, Trainer


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
