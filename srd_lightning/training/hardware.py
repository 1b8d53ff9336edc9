"""What a machine is slow at, said before the work begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from srd_lightning.models.pretrained import Pretrained

BF16_UNITS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Flags of a processor that multiplies bfloat16: of x86, and the last one of ARM."""
CPUINFO = Path("/proc/cpuinfo")


class Hardware(Callback):
    """Warns of settings that the processor can follow only slowly; comes with the module."""

    def __init__(self) -> None:
        self._said = False

    def preflight(self, trainer: Trainer) -> None:
        """Warn once where bfloat16 is computed on a CPU without units for it."""
        if self._said or trainer.strategy.root_device.type != "cpu" or has_bf16_units(CPUINFO) is not False:
            return
        names = settings_in_bf16(trainer)
        if names:
            rank_zero_warn(
                f"{' and '.join(names)}: this CPU has no bfloat16 units ({', '.join(sorted(BF16_UNITS))}), so products "
                "of bfloat16 take over thirty times as long as those of float32; leave float32, or take a GPU"
            )
        self._said = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Do so also for runs with other data modules."""
        self.preflight(trainer)


def has_bf16_units(cpuinfo: Path) -> bool | None:
    """Return whether the processor multiplies bfloat16, or nothing where it does not say.

    Args:
        cpuinfo: ``/proc/cpuinfo``, or a file like it.
    """
    if not cpuinfo.exists():
        return None
    lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
    flags = {flag for name, _, values in lines if name.strip() in ("flags", "Features") for flag in values.split()}
    return bool(flags & BF16_UNITS) if flags else None


def settings_in_bf16(trainer: Trainer) -> list[str]:
    """Return the settings of a run, as they are written in a recipe, that ask for bfloat16."""
    module: Any = trainer.lightning_module
    data: Any = getattr(trainer, "datamodule", None)
    asked = {"trainer.precision": str(trainer.precision).startswith("bf16")}
    for part, source in module.models_by_name().items():
        asked[f"model.{part}.dtype"] = isinstance(source, Pretrained) and source.dtype == "bfloat16"
    for owner, of in (("data", data), ("model", module)):
        asked[f"{owner}.decoding.bf16"] = bool(getattr(getattr(of, "decoding", None), "bf16", False))
    return [name for name, is_asked in asked.items() if is_asked]
