"""What every benchmark says besides its numbers: where, with which versions and when they were made."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("numpy", "torch", "lightning", "transformers")
OPTIONAL = ("peft", "liger-kernel", "flash-attn")


def record(result: dict[str, Any], path: Path | None) -> str:
    """Add device, versions, commit and date to a result, write it if there is a path, and return it as text."""
    text = json.dumps({**result, **surroundings()}, indent=2)
    if path:
        path.write_text(text)
    return text


def told(arm: str, says: str, **numbers: Any) -> str:
    """Return the line that a benchmark prints of each arm as soon as it is known, which `gpu/run.py` looks for.

    Args:
        arm: Its name.
        says: What matters, in a few words.
        numbers: All of it.
    """
    return json.dumps({"arm": arm, "says": says, **numbers})


def surroundings() -> dict[str, Any]:
    """Return what a result depends on besides its settings."""
    on_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
        **({"gpus": gpus()} if on_gpu else {}),
        "cores": os.cpu_count(),
        "versions": versions(),
        **source(),
        "date": time.strftime("%Y-%m-%d"),
    }


def gpus() -> dict[str, Any]:
    """Return what is known of the GPUs and of what drives them."""
    return {
        "names": [torch.cuda.get_device_name(place) for place in range(torch.cuda.device_count())],
        "memory_bytes": [
            torch.cuda.get_device_properties(place).total_memory for place in range(torch.cuda.device_count())
        ],
        "driver": said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of packages; of some only where they are installed."""
    found = {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}
    for package in OPTIONAL:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def source() -> dict[str, Any]:
    """Return the commit of this library, and whether its files are as they were; outside a repository neither."""
    git = ("git", "-C", str(Path(__file__).parent))
    changes = said_by(*git, "status", "--porcelain", "--untracked-files=no")
    return {"commit": said_by(*git, "rev-parse", "HEAD"), "clean": None if changes is None else not changes}


def said_by(*command: str) -> str | None:
    """Return what a program writes, or nothing where it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
