"""The folder of an export: replaced as a whole, and only where every file in it was written by an export."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers.utils import GENERATION_CONFIG_NAME

from srd_lightning.callbacks.generation_settings import generation_settings
from srd_lightning.errors import SettingError, StorageError
from srd_lightning.storage import older_of, put_in_place

CONTENTS = "srd_export.json"
"""Names of the files that an export has written, beside them: what stands in no such list is the user's."""
CARD = "README.md"
"""Name of the model card, by which the hub finds it."""


def check(folder: Path, needed: Iterable[tuple[str, Path]]) -> None:
    """Refuse a folder that cannot be replaced without loss.

    Args:
        folder: Absolute, without links.
        needed: What is to stay, and where it is.

    Raises:
        SettingError: It is one of them, or holds one.
        StorageError: It is a file, the root of a disk, or holds what no export has written.
    """
    for name, path in needed:
        if folder == path or folder in path.parents:
            raise SettingError(
                f"HuggingFaceExport replaces its dirpath as a whole, but {folder} is or holds {name}; give it a folder "
                f"of its own, such as {folder / 'student'}"
            )
    if os.path.ismount(folder):
        raise StorageError(
            f"HuggingFaceExport replaces its dirpath as a whole, which {folder}, the root of a disk, does not allow; "
            f"give it a folder in there, such as {folder / 'student'}"
        )
    for path in (folder, older_of(folder)):
        if path.exists() and not path.is_dir():
            raise StorageError(f"HuggingFaceExport needs a folder, but {path} is a file; name another dirpath")
        if found := sorted(itertools.islice(_strangers(path), 3)):
            raise StorageError(
                f"HuggingFaceExport replaces its dirpath as a whole, but {path} holds {', '.join(found)}, which no "
                "export has written; give it a folder of its own, or move this away"
            )


def replace(folder: Path, student: Any, tokenizer: Any, card: ModelCard | None = None) -> None:
    """Write an export to a folder beside it, which then takes its place."""
    temporary = _temporary(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    _write(temporary, student, tokenizer, card)
    put_in_place(temporary, folder)


def write_beside(parent: Path, name: str, student: Any, tokenizer: Any, card: ModelCard | None = None) -> Path:
    """Write an export to a new folder ``NAME-rescued-…`` and return it; nothing is left if that fails."""
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-rescued-", dir=parent))
    try:
        _write(folder, student, tokenizer, card)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def clear_away(folder: Path) -> None:
    """Remove what a run left that was killed while it replaced the folder; an older export gets its name back."""
    shutil.rmtree(_temporary(folder), ignore_errors=True)
    if (older := older_of(folder)).is_dir():
        if folder.exists():
            shutil.rmtree(older)
        else:
            older.rename(folder)


def _write(folder: Path, student: Any, tokenizer: Any, card: ModelCard | None) -> None:
    student.save_pretrained(folder)
    settings = generation_settings(student, tokenizer)
    if settings is not None and (folder / GENERATION_CONFIG_NAME).exists():
        settings.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if card is not None:  # in place of that of peft, which knows nothing of the run
        card.save(folder / CARD)
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    (folder / CONTENTS).write_text(json.dumps({"files": [*files, CONTENTS]}, indent=1))


def _strangers(folder: Path) -> Iterator[str]:
    """Yield the files in a folder that no export has written."""
    try:
        written = set(json.loads((folder / CONTENTS).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        written = set()
    found = (str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())
    return (name for name in found if name not in written)


def _temporary(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")
