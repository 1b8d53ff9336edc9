"""`SRDCLI`: LightningCLI of the module and the data module, with five subcommands more."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from typing import Any, cast

from jsonargparse import Namespace
from lightning import Callback
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info

import srd_lightning.callbacks
import srd_lightning.checkpoints.resume_checkpoint
import srd_lightning.criteria
import srd_lightning.curriculum
import srd_lightning.distributed.fsdp2
import srd_lightning.rollouts  # noqa: F401 (short names on the command line)
from srd_lightning.callbacks.defaults import DEFAULTS, with_defaults
from srd_lightning.callbacks.settings_file import SettingsFile
from srd_lightning.command.console import Ending
from srd_lightning.command.noise import OneLineSummary
from srd_lightning.command.parse_errors import of_value
from srd_lightning.command.parser import SRDParser, namespace
from srd_lightning.command.run_folder import COMMON, RunFolder
from srd_lightning.command.settings_help import AllHelp
from srd_lightning.command.subcommands import SUBCOMMANDS
from srd_lightning.command.trainer import SRDTrainer
from srd_lightning.command.unsaid import BATCH_SIZE, csv_logger, of_a_run, of_the_device
from srd_lightning.datamodule import SRDDataModule
from srd_lightning.errors import SettingError, SRDError, in_one_line
from srd_lightning.module import KDLightningModule

OF_A_RUN = ("fit", "curate", "cache-teacher")
"""What belongs to a run of the method, and so to its folder; the others measure, or write, where they are told."""
ONLY_SHOWN = {"logger", "log_every_n_steps", "enable_progress_bar", "enable_model_summary", "profiler"}
"""Settings of the trainer that change nothing but what is seen of a run."""
OWN = {"model", "datamodule"}
"""Arguments of our own methods of the trainer that are no settings."""


class SRDCLI(LightningCLI):
    """LightningCLI of `KDLightningModule` and `SRDDataModule`.

    Args:
        args: Arguments; by default those of the process.
        run: Whether the first of them is a subcommand, which is then run.
        ending: Is told when work begins, and where.
    """

    def __init__(self, args: ArgsType = None, run: bool = True, ending: Ending | None = None) -> None:
        self._ending = ending
        self.folder: RunFolder | None = None
        """Where the run goes, if that was left to us."""
        self._wanted = _subcommands_wanted(sys.argv[1:] if args is None else args)
        super().__init__(
            KDLightningModule,
            SRDDataModule,
            trainer_class=SRDTrainer,
            trainer_defaults={"enable_model_summary": False, "callbacks": [OneLineSummary()]},
            parser_class=SRDParser,
            parser_kwargs={"prog": "srd", **{name: {"description": SUBCOMMANDS[name]} for name in self._wanted}},
            save_config_callback=SettingsFile,
            save_config_kwargs={"overwrite": True},
            args=args,
            run=run,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return those whose parsers are needed, and the arguments of the trainer's methods that are no settings."""
        ours = dict.fromkeys(("curate", "cache-teacher", "generate", "evaluate", "plan"), OWN)
        of_all = {**LightningCLI.subcommands(), **ours}
        return {name: of_all[name] for name in self._wanted}

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; without Lightning's warning that the process has arguments of its own."""
        parsed = parser.parse_object(args) if isinstance(args, Mapping | Namespace) else parser.parse_args(args)
        self.config = parsed

    def _parse_ckpt_path(self) -> None:
        """Leave the checkpoint to the trainer: Lightning would read it here to look for settings, and holds none."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Split the help: what is needed first, and everything. Have callbacks that every run of ``fit`` has."""
        parser.add_argument(AllHelp.OPTION, action=AllHelp, help="Show all settings, and exit.")
        parser.add_argument(
            "--defaults",
            type=list[Callback] | None,
            default=[{"class_path": f"srd_lightning.{kind.__name__}"} for kind in DEFAULTS],
            help="Callbacks of fit, each unless trainer.callbacks has one of its class.",
        )
        parser.set_defaults({"data.batch_size": BATCH_SIZE})

    def _dump_config(self) -> None:
        """Make none of what `save_hyperparameters` would keep: neither class calls it, and it takes its time."""
        self.config_dump: dict[str, Any] = {}

    def before_instantiate_classes(self) -> None:
        """Settle what a run leaves unsaid, and where it goes; from now on a traceback is kept."""
        trainer = self._settings.trainer
        self._add(of_the_device(trainer))
        if self.subcommand == "plan":
            self._add(of_a_run(trainer, self._settings.model))
            self._add({"trainer": {"logger": False, "default_root_dir": trainer.default_root_dir or str(COMMON)}})
        elif self.subcommand is None or self.subcommand in OF_A_RUN:
            self._add(of_a_run(trainer, self._settings.model))
            if self.subcommand is not None and trainer.default_root_dir is None:
                self.folder = RunFolder(self._settings.model, self._settings.data.data, self._said())
                self.folder.make()
                trainer.default_root_dir = str(self.folder.path)
            if trainer.logger is None:
                self._add({"trainer": {"logger": csv_logger(trainer.default_root_dir)}})
        if self._ending is not None:
            kept = tempfile.gettempdir() if self.subcommand == "plan" else trainer.default_root_dir
            self._ending.begin_run(kept or ".")

    @property
    def _settings(self) -> Namespace:
        return cast(Namespace, self.config if self.subcommand is None else self.config[self.subcommand])

    def _add(self, settings: dict[str, Any]) -> None:
        """Add settings, by group and name, to those that were parsed."""
        for group, values in settings.items():
            self._settings[group].update(namespace(values))

    def _said(self) -> str:
        """Return all settings that make a difference to what comes of a run."""
        parts = {name: self._settings[name] for name in ("model", "data", "defaults", "seed_everything")}
        parts["trainer"] = {name: value for name, value in self._settings.trainer.items() if name not in ONLY_SHOWN}
        return str(self._parser(self.subcommand).dump(namespace(parts), skip_unset=False, skip_validation=True))

    def instantiate_classes(self) -> None:
        """Make what the settings describe; what their classes refuse is a setting that cannot be.

        Raises:
            SettingError: A class, perhaps of another library, refuses its settings.
        """
        try:
            super().instantiate_classes()
        except SRDError:
            raise
        except (ValueError, TypeError, ImportError, MisconfigurationException) as error:
            raise SettingError(of_value(str(error))) from error

    def instantiate_trainer(self, **options: Any) -> SRDTrainer:
        """Make the trainer, and say of what is refused that it is one of its settings."""
        if self.subcommand in (None, "fit", "plan"):
            options["callbacks"] = self._callbacks()
        try:
            return cast(SRDTrainer, super().instantiate_trainer(**options))
        except (ValueError, TypeError, MisconfigurationException) as error:
            raise SettingError(f"trainer: {in_one_line(error)}") from error

    def _callbacks(self) -> list[Callback]:
        """Return the callbacks of ``fit``; without checkpoints, Lightning refuses callbacks that save any."""
        trainer, defaults = (self._get(self.config_init, name) for name in ("trainer", "defaults"))
        own = trainer["callbacks"] or []
        saves = trainer["enable_checkpointing"] is not False
        kept = [one for one in defaults or () if saves or not isinstance(one, Checkpoint)]
        return with_defaults(own if isinstance(own, list) else [own], kept)

    def fit(self, ckpt_path: Any = None, **options: Any) -> None:
        """Train; in a folder of ours go on where an earlier run has stopped, unless it was finished."""
        root = self.trainer.default_root_dir
        if self.folder is not None and (when := self.folder.finished()):
            rank_zero_info(f"{root} was finished on {when}; delete the folder to do it again, or change a setting")
            return
        rank_zero_info(f"run: {root}")
        self.trainer.fit(ckpt_path="last" if self.folder is not None and ckpt_path is None else ckpt_path, **options)
        if self.folder is not None and self.trainer.is_global_zero:
            self.folder.finish()
        rank_zero_info(f"finished: {root}")

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            raise SettingError(f"seed_everything: {error}") from error


def _subcommands_wanted(args: ArgsType) -> list[str]:
    """Return the subcommand that is asked for, where that is easily seen, else all: a parser takes its time."""
    if isinstance(args, list):
        return args[:1] if args[:1] and args[0] in SUBCOMMANDS else list(SUBCOMMANDS)
    return [name for name in SUBCOMMANDS if args is not None and name in args] or list(SUBCOMMANDS)
