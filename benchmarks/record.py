"""What every benchmark says besides its numbers: where, with which versions and when they were made."""

from __future__ import annotations

import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("numpy", "torch", "lightning", "transformers")


def record(result: dict[str, Any], path: Path | None) -> str:
    """Add device, versions and date to a result, write it if there is a path, and return it as text."""
    on_gpu = torch.cuda.is_available()
    text = json.dumps(
        {
            **result,
            "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "versions": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
            "date": time.strftime("%Y-%m-%d"),
        },
        indent=2,
    )
    if path:
        path.write_text(text)
    return text
