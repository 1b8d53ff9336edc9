"""What a study is made of: arms times seeds on one base, each a cell with a folder and commands."""

from __future__ import annotations

import re
import shlex
from argparse import ArgumentError
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml
from jsonargparse import ArgumentParser

from srd_lightning.digests import digest
from srd_lightning.errors import MissingDataError, SettingError, in_one_line
from srd_lightning.studies.moved_config import moved, root_of

FIT = (
    "fit --ckpt_path=last --trainer.logger=CSVLogger --trainer.logger.save_dir={run} --trainer.callbacks+=TrainingClock"
)
EVALUATE = (
    "evaluate --model.student=srd_lightning.Pretrained --model.student.name={run}/student "
    "--model.student.keep_layers=null --model.student.lora=null"  # the export is cut, and has its adapters merged
)


@dataclass(frozen=True)
class Study:
    """Arms times seeds on one base.

    Args:
        arms: Settings of each arm by its name: ``--key=value``, or paths of configurations, one over the other. In all
            settings and commands ``{run}`` is the folder of the cell, ``{study}`` that of the study, and ``{seed}`` the
            seed.
        base: Settings of all arms, which come before their own.
        seeds: Of each arm, ``seed_everything``.
        baseline: The arm that the others are compared with; by default the first.
        commands: What a cell does, one after the other: subcommands of ``srd`` with settings of their own.
        reach: Values of measures, by the names under which they are logged; the summary says after how many seconds of
            training each arm gets there. By default where the baseline ends.

    Raises:
        SettingError: There is no arm or seed, a name cannot be that of a folder, or the baseline is none of the arms.

    Example:
        >>> study = Study(arms={"fkl": [], "rkl": ["--model.loss=ReverseKL"]}, seeds=[0, 1])
        >>> [f"{cell.arm} {cell.seed}" for cell in study.cells(Path("runs/losses"))]
        ['fkl 0', 'rkl 0', 'fkl 1', 'rkl 1']
    """

    arms: dict[str, list[str]]
    base: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    baseline: str | None = None
    commands: list[str] = field(default_factory=lambda: [FIT, EVALUATE])
    reach: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check what does not go together."""
        if not self.arms or not self.seeds or not self.commands:
            raise SettingError("a study needs at least one arm, one seed and one command")
        for arm in self.arms:
            if not re.fullmatch(r"[\w+=,-][\w.+=,-]*", arm):
                raise SettingError(f"arms are folders, so a name has letters, digits and . _ + - = only, not {arm!r}")
        if self.baseline is not None and self.baseline not in self.arms:
            raise SettingError(f"baseline must be one of the arms ({', '.join(self.arms)}), but is {self.baseline!r}")

    @property
    def baseline_arm(self) -> str:
        """The arm that the others are compared with."""
        return self.baseline or next(iter(self.arms))

    def cells(self, folder: Path) -> Iterator[Cell]:
        """Yield all cells, one seed of all arms after the other, so that a study that is cut short can be compared.

        Args:
            folder: Of the study.
        """
        for seed in self.seeds:
            for arm, settings in self.arms.items():
                own = folder / "cells" / arm / f"seed-{seed}"
                yield Cell(arm, seed, folder, own, [*self.base, *settings], self.commands)


@dataclass(frozen=True)
class Cell:
    """One arm with one seed.

    Args:
        arm: Its name.
        seed: For everything.
        study: Folder of the study.
        folder: The ``default_root_dir`` of its runs.
        settings: ``--key=value``, or paths of configurations.
        commands: Subcommands of ``srd`` with settings of their own.
    """

    arm: str
    seed: int
    study: Path
    folder: Path
    settings: list[str]
    commands: list[str]

    def __str__(self) -> str:
        """Return what it is called in messages."""
        return f"{self.arm}, seed {self.seed}"

    def configs(self) -> dict[Path, str]:
        """Return the configurations as this cell is given them: where each is written, and its text.

        What a trainer writes below its ``default_root_dir`` is written below the folder of the cell.

        Raises:
            MissingDataError: A configuration is not there.
            SettingError: One is not YAML.
        """
        texts = {}
        for place, item in enumerate(item for item in self.settings if not item.startswith("--")):
            path = Path(item).expanduser()
            if not path.is_file():
                raise MissingDataError(
                    f"settings are --key=value or the path of a configuration, but there is no file {item}"
                )
            texts[self.folder / "settings" / f"{place}-{path.name}"] = path.read_text()
        roots = [root for root in map(root_of, texts.values()) if root is not None]
        return {path: moved(text, roots[-1], self.folder) if roots else text for path, text in texts.items()}

    def arguments(self) -> list[list[str]]:
        """Return the arguments of ``srd``, for each command."""
        configs = iter(self.configs())
        settings = [item if item.startswith("--") else f"--config={next(configs)}" for item in self.settings]
        own = [f"--trainer.default_root_dir={self.folder}", f"--seed_everything={self.seed}"]
        found = []
        for command in self.commands:
            name, *of_command = shlex.split(command)
            found.append([name, *map(self._filled_in, [*settings, *of_command]), *own])
        return found

    def _filled_in(self, text: str) -> str:
        """Return a setting for this cell."""
        for name, value in (("{run}", self.folder), ("{study}", self.study), ("{seed}", self.seed)):
            text = text.replace(name, str(value))
        return text

    def made_of(self) -> str:
        """Return a digest of all that a user has settled for this cell, wherever its folder is."""
        anywhere = replace(self, study=Path("study"), folder=Path("run"))
        texts = {str(path): text for path, text in anywhere.configs().items()}
        return digest({"arguments": repr(anywhere.arguments()), **texts})


def read_study(path: Path) -> Study:
    """Read the file of a study.

    Raises:
        MissingDataError: It is not there.
        SettingError: It is not a study.
    """
    if not path.is_file():
        raise MissingDataError(f"there is no file {path}; name the YAML file of a study")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Study, "study")
    try:
        tree = yaml.safe_load(path.read_text())
        found = parser.parse_object({"study": tree})
        return Study(**found.study.as_dict())
    except SettingError as error:
        raise SettingError(f"{path}: {error}") from error
    except (ArgumentError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingError(f"{path} is not a study: {in_one_line(error)}") from error
