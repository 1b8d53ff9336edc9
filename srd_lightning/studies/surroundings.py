"""On what a result depends besides its settings: versions, the commit, the machine."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).parents[2]
PACKAGES = ("srd-lightning", "torch", "lightning", "transformers", "datasets", "numpy")


def surroundings() -> dict[str, Any]:
    """Return ``versions`` (with the ``commit`` in a checkout of this library) and ``hardware``."""
    versions = {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}
    git = ("git", "-C", str(CHECKOUT), "rev-parse", "--short=12", "HEAD")
    if (CHECKOUT / ".git").exists() and (commit := _said_by(*git)):
        versions["commit"] = commit
    hardware: dict[str, Any] = {"machine": platform.node(), "processor": _processor(), "cores": os.cpu_count()}
    if gpus := _said_by("nvidia-smi", "--query-gpu=name", "--format=csv,noheader"):
        hardware["gpus"] = gpus.splitlines()
    return {"versions": versions, "hardware": hardware}


def _processor() -> str:
    """Return the name of the processor, as Linux tells it, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _said_by(*command: str) -> str | None:
    """Return what a program writes, or nothing where it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
