"""The parser of a subcommand that is no run of Lightning's."""

from __future__ import annotations

import argparse
from typing import NoReturn

from srd_lightning.errors import SettingError


class ToolParser(argparse.ArgumentParser):
    """Raises `SettingError` with a sentence instead of printing its usage; takes no abbreviations.

    Args:
        name: Of the subcommand.
        description: For its help.
    """

    def __init__(self, name: str, description: str) -> None:
        super().__init__(f"srd {name}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise what was wrong."""
        raise SettingError(f"{message}; {self.prog} --help shows what there is")
