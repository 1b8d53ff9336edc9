"""Progress bars of long work."""

from __future__ import annotations

import sys

from tqdm import tqdm

SECONDS_APART = 10.0


def progress_bar(total: int, name: str, show: bool = True) -> tqdm[None]:
    """Return a bar that counts rows: on a terminal it moves, in a file it is a line now and then.

    Args:
        total: Rows.
        name: What is done to them.
        show: Whether to show it.
    """
    seconds = 0.1 if sys.stderr.isatty() else SECONDS_APART
    return tqdm(total=total, desc=name, unit="row", disable=not show, mininterval=seconds)
