"""The energy that a run takes, where the machine counts it."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from pathlib import Path

import torch

POWERCAP = Path("/sys/class/powercap")
GOES_ROUND = 60.0
"""Seconds in which no counter goes round: that of a processor takes minutes."""


class Counter:
    """Counts on from a counter of the machine that begins anew at some value.

    Args:
        read: Returns what it stands at, in joules.
        wraps_at: Where it begins anew, if it does.

    Attributes:
        joules: Since it was made, as far as it was last read.

    Example:
        >>> stands_at = iter([90.0, 95.0, 3.0])
        >>> counter = Counter(lambda: next(stands_at), wraps_at=100.0)
        >>> counter.read(), counter.read(), counter.joules
        (None, None, 13.0)
    """

    def __init__(self, read: Callable[[], float], wraps_at: float | None = None) -> None:
        self._read, self._wraps_at = read, wraps_at
        self._last = read()
        self.joules = 0.0

    def read(self) -> None:
        """Look at the counter; to be called before it can have gone round twice."""
        now = self._read()
        gone = now - self._last
        self.joules += gone + self._wraps_at if gone < 0 and self._wraps_at is not None else gone
        self._last = now


class EnergyMeter:
    """Counts joules of the GPU (by NVML, where ``pynvml`` is installed) and of the host's processors (by RAPL).

    Those of the processors are of the whole host, whatever else runs there, and may need the right to read them.

    Args:
        device: On which the run computes.
        powercap: Folder of the processors' counters.
    """

    def __init__(self, device: torch.device, powercap: Path = POWERCAP) -> None:
        self._counters = {"gpu": _of_gpu(device), "cpu": _of_processors(powercap)}
        self._read_at = time.monotonic()

    def keep_up(self) -> None:
        """Look at all counters where that was long ago; to be called often, as after each batch."""
        if time.monotonic() - self._read_at > GOES_ROUND:
            self._read()

    def _read(self) -> None:
        self._read_at = time.monotonic()
        for counter in (one for counters in self._counters.values() for one in counters):
            counter.read()

    def joules(self) -> dict[str, float]:
        """Return the joules since it was made by ``gpu`` and ``cpu``, of which one that nobody counts is not there."""
        self._read()
        return {name: sum(one.joules for one in counters) for name, counters in self._counters.items() if counters}


def _of_processors(powercap: Path) -> list[Counter]:
    """Return a counter for each processor, none where they are not told or may not be read."""
    try:
        zones = sorted(powercap.glob("*-rapl:[0-9]*"))
        packages = [zone for zone in zones if (zone / "name").read_text().startswith("package")]
        return [_of_package(zone) for zone in packages]
    except (OSError, ValueError):
        return []


def _of_package(zone: Path) -> Counter:
    wraps_at = float((zone / "max_energy_range_uj").read_text()) / 1e6
    return Counter(lambda: float((zone / "energy_uj").read_text()) / 1e6, wraps_at)


def _of_gpu(device: torch.device) -> list[Counter]:
    """Return a counter for the GPU, none where the driver does not tell or cannot be asked."""
    if device.type != "cuda":
        return []
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        # not by number: a process may see fewer GPUs than the driver
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        return [Counter(lambda: float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000)]
    except Exception:  # no module, no driver, an older GPU: whatever it is, a run goes on without
        return []
