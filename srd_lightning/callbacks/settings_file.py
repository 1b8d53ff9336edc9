"""`SettingsFile`: the settings of a run, beside what it writes, and never in place of a file of the user's."""

from __future__ import annotations

from pathlib import Path

from lightning import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info

HEAD = b"# lightning.pytorch=="
"""How a file begins that Lightning has written."""


class SettingsFile(SaveConfigCallback):
    """Lightning's `SaveConfigCallback`, which takes another name where its own is that of a file it has not written.

    It would replace a recipe ``config.yaml`` in the folder of the run, comments and all. Arguments are those of
    `SaveConfigCallback`.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save the settings as ``config.yaml``, or as ``srd-config.yaml`` where the user has a file of that name."""
        folder = trainer.log_dir  # all ranks must ask
        if folder is not None and trainer.is_global_zero and _is_users(Path(folder) / self.config_filename):
            rank_zero_info(f"{Path(folder) / self.config_filename} is yours: settings go to srd-{self.config_filename}")
            self.config_filename = f"srd-{self.config_filename}"
        super().setup(trainer, pl_module, stage)


def _is_users(path: Path) -> bool:
    """Return whether a file is there that was not written by Lightning; what is in another storage is not looked at."""
    return path.is_file() and not path.read_bytes().startswith(HEAD)
