"""Folders of results that later runs use again: each says what it was made of, and one run at a time writes to it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from srd_lightning.errors import StorageError
from srd_lightning.storage import take, write_atomically

MANIFEST = "manifest.json"
PATIENCE = 10.0
"""Seconds to wait for a run that holds the lock."""


@dataclass(frozen=True)
class ResultsFolder:
    """A folder with a manifest and a lock.

    Args:
        folder: Made by `locked`, and by whoever writes to it.
        holds: What is in it, for messages, such as ``scores``.
        setting: By which the user names it.
    """

    folder: Path
    holds: str
    setting: str

    def manifest(self, **parts: type) -> dict[str, Any] | None:
        """Return what the manifest says, which must have these parts of these types; nothing where there is none.

        Raises:
            StorageError: It cannot be read, or lacks a part.
        """
        path = self.folder / MANIFEST
        if not path.exists():
            return None
        try:
            found = json.loads(path.read_text())
            if not isinstance(found, dict) or any(type(found.get(name)) is not kind for name, kind in parts.items()):
                raise ValueError("it is not a manifest")
        except (OSError, ValueError, RecursionError) as error:  # what JSON and UTF-8 raise are the second
            raise StorageError(
                f"{path} cannot be read ({error}), so nobody knows what the {self.holds} beside it were made of; "
                f"delete the folder, or point `{self.setting}` to another one"
            ) from error
        return found

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Say from now on what the folder was made of."""
        write_atomically(self.folder / MANIFEST, json.dumps(dict(manifest), indent=2).encode())

    def refuse(self, different: Sequence[str]) -> None:
        """Raise a `StorageError` where parts of what the folder was made of are different ones in this run."""
        if different:
            raise StorageError(
                f"{self.folder} holds {self.holds} that were made with another {', '.join(different)}; point "
                f"`{self.setting}` to a new folder, or delete this one, to make them again"
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs from writing until this rank has done so, or has ended.

        Raises:
            StorageError: Another run holds the lock, for longer than one needs to look; or the folder cannot be made.
        """
        lock, elsewhere = filelock.FileLock(self.folder / ".lock"), f"point `{self.setting}` to another folder"
        take(
            lock,
            self.folder,
            PATIENCE,
            busy=f"another run is writing {self.holds} to {self.folder}; wait until it has ended, or {elsewhere}",
            unwritable=lambda reason: f"{self.holds} cannot be written to {self.folder}: {reason}; {elsewhere}",
        )
        try:
            yield
        finally:
            lock.release()
