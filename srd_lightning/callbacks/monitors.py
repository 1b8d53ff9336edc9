"""What Lightning's own callbacks watch: named before training, where it can never come."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from srd_lightning.errors import SettingError


def check_monitors(
    trainer: Trainer, has_teacher: bool, has_auxiliary: bool = False, kd_weights: Collection[float] = (0.5,)
) -> None:
    """Refuse what is watched, or stands in the name of a checkpoint, but is never logged, and losses to be maximised.

    Nothing is refused by name where another callback than Lightning's and ours might log it. Ours say so in ``logged``.

    Args:
        trainer: Of a run that fits a `KDLightningModule`.
        has_teacher: Whether the module has one.
        has_auxiliary: Whether the module has auxiliary losses.
        kd_weights: Shares of the distillation loss that its steps may have: what never has one is never logged.

    Raises:
        SettingError: A name that never comes, with those that do; or ``mode="max"`` of a loss.
    """
    logged = _logged(trainer, has_teacher, kd_weights) | ({"train_auxiliary"} if has_auxiliary else set())
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    known = logged.union(*(getattr(callback, "logged", ()) for callback in callbacks))
    may_log = [callback for callback in callbacks if type(callback).__module__.partition(".")[0] not in OURS]
    for callback in callbacks:
        if not isinstance(callback, (EarlyStopping, ModelCheckpoint)):
            continue
        name = type(callback).__name__
        if callback.monitor in logged and callback.mode == "max":
            raise SettingError(
                f"{name}(monitor={callback.monitor!r}, mode='max') would look for the highest loss; set mode to 'min'"
            )
        for setting, key in () if may_log else _watched(callback):
            if key not in known and key.partition("/dataloader_idx_")[0] not in known and not key.startswith("lr-"):
                raise SettingError(
                    f"{name}({setting}) waits for {key!r}, which is never logged in this run; there are "
                    f"{', '.join(sorted(known))}"
                )


def _logged(trainer: Trainer, has_teacher: bool, kd_weights: Collection[float]) -> set[str]:
    """Return what the module itself logs, losses all of them."""
    found = {"train_loss", "val_nll"} | ({"val_kl"} if has_teacher else set())
    found |= {"train_ce"} if min(kd_weights) < 1 else set()
    found |= {"train_kd"} if has_teacher and max(kd_weights) > 0 else set()
    sources = getattr(getattr(trainer, "datamodule", None), "data", None)
    if trainer.limit_val_batches == 0 or (isinstance(sources, dict) and "validation" not in sources):
        found -= {"val_nll", "val_kl"}
    return found


OURS = ("lightning", "srd_lightning")


def _watched(callback: Any) -> list[tuple[str, str]]:
    """Return settings of a callback with the names in them."""
    found = [] if callback.monitor in (None, "step", "epoch") else [(f"monitor={callback.monitor!r}", callback.monitor)]
    if getattr(callback, "strict", True) is False:  # the user expects that it may never come
        return []
    in_name = re.findall(r"\{([^{}:]+)", getattr(callback, "filename", None) or "")
    return found + [(f"filename={callback.filename!r}", key) for key in in_name if key not in ("step", "epoch")]
