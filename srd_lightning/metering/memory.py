"""How much memory a run has held at most, on the host and on its GPU."""

from __future__ import annotations

import contextlib
import re
import resource
import sys
from pathlib import Path

import torch

PROCESS = Path("/proc/self")


def reset_peaks(device: torch.device, process: Path = PROCESS) -> None:
    """Let the peaks begin anew with what is held now; that of the host on Linux only.

    Args:
        device: On which the run computes.
        process: Folder of this process below ``/proc``.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):  # then it is that since the process was started
        (process / "clear_refs").write_text("5")  # proc(5): resets the peak of the resident set


def peak_memory(device: torch.device, process: Path = PROCESS) -> dict[str, int]:
    """Return the most bytes that were held: ``host`` (the resident set of this process), and ``device`` of a GPU.

    Args:
        device: On which the run computes.
        process: Folder of this process below ``/proc``.
    """
    peaks = {"host": _of_host(process)}
    if device.type == "cuda":
        peaks["device"] = torch.cuda.max_memory_allocated(device)
    return peaks


def _of_host(process: Path) -> int:
    try:
        found = re.search(r"^VmHWM:\s*(\d+) kB$", (process / "status").read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found is not None:
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
