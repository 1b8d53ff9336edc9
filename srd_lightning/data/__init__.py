"""Data: files become rows of text, rows of tokens, and batches.

Imports `losses`. Begin with `templates`, which are pure: a row becomes a prompt and a response.
"""

from __future__ import annotations

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    if name == "SRDDataModule":  # which was here when this was a file
        return importlib.import_module("srd_lightning.datamodule").SRDDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
