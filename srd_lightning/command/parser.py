"""`SRDParser`: a parser that names what it does not know, and what comes nearest to it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, NoReturn, cast

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from srd_lightning.command.parse_errors import plain, unknown
from srd_lightning.command.settings_help import AllHelp, first_help
from srd_lightning.errors import SettingError, in_one_line


def namespace(settings: Mapping[str, Any]) -> Namespace:
    """Return settings, and the groups within them, as they are parsed."""
    made = {key: namespace(value) if isinstance(value, dict) else value for key, value in settings.items()}
    return Namespace(**made)  # type: ignore[no-untyped-call]


class SRDParser(LightningArgumentParser):
    """Takes no abbreviations, and raises `SettingError` with a sentence instead of printing its usage."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what was wrong."""
        types = {action.dest: getattr(action, "_typehint", None) for action in self._actions}
        sentence = plain(message, types, self.names_of_settings())
        if not self.exit_on_error:  # of the settings of a class: perhaps they are those of another one
            raise argparse.ArgumentError(None, sentence) from ex
        raise SettingError(sentence) from ex

    def parse_path(self, path: Any, *args: Any, **options: Any) -> Namespace:
        """Say also in which file it stands."""
        try:
            return cast(Namespace, super().parse_path(path, *args, **options))
        except SettingError as error:
            raise SettingError(f"{path}: {error}") from error
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise SettingError(f"{path} is not UTF-8 (byte {byte:#x}); save it as UTF-8") from error

    def _apply_actions(self, cfg: Namespace | dict[str, Any], parent_key: str = "", *args: Any, **options: Any) -> Any:
        """Check the keys of a tree from a YAML file before its values, some of which are taken for keys."""
        if isinstance(cfg, dict) and self.exit_on_error:
            self.check_keys(cfg, f"{parent_key}." if parent_key else "")
        return super()._apply_actions(cfg, parent_key, *args, **options)

    def check_keys(self, tree: Mapping[Any, Any], prefix: str = "") -> None:
        """Refuse keys that are no settings.

        Args:
            tree: Settings as they stand in a file.
            prefix: Of their names: ``"data."`` for what stands under ``data``.
        """
        names = self.names_of_settings() | {"subcommand"}
        branches = {name[:place] for name in names for place, sign in enumerate(name) if sign == "."}
        subcommands = getattr(self._subcommands_action, "choices", {})
        for key, value in tree.items():
            name = f"{prefix}{key}".removesuffix("+")
            if name in subcommands and isinstance(value, Mapping):
                subcommands[name].check_keys(value)
            elif name == "config" and isinstance(value, Mapping):
                raise SettingError(f"config: expected the path of a recipe, but got {in_one_line(value)}")
            elif name in branches and isinstance(value, Mapping):
                self.check_keys(value, f"{name}.")
            elif name in branches and value is not None and not isinstance(value, str):
                raise SettingError(f"{name}: expected settings by name, but got {value}")
            elif name not in names and not any(name.startswith(f"{other}.") for other in names - branches):
                raise SettingError(unknown(name, names | branches))

    def names_of_settings(self) -> set[str]:
        """Return the names of all settings, as they are written: ``data.schedule``."""
        names = (option.removeprefix("--") for option in self._option_string_actions if option.startswith("--"))
        return {name for name in names if "help" not in name.split(".")}

    def print_help(self, *args: Any, **options: Any) -> None:
        """Print the help of a subcommand in a screenful, and any other one as it is."""
        if AllHelp.OPTION in self._option_string_actions:
            print(first_help(self, self.get_defaults(skip_validation=True)), end="")
        else:
            super().print_help(*args, **options)

    def print_all_help(self) -> None:
        """Print the help of all settings."""
        super().print_help()
