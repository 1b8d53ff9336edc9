"""Data: files become rows of text, rows of tokens, and batches.

Imports `losses` and `checkpoints`. Begin with `row_reader`, from files to tokenised rows, through `readers`,
`templates` and `tokenization`; `loaders` goes on from there to batches, and `samplers` says which rows make one.
"""

from __future__ import annotations

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    if name == "SRDDataModule":  # which was here when this was a file
        return importlib.import_module("srd_lightning.datamodule").SRDDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
