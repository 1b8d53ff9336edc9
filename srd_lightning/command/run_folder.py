"""`RunFolder`: where a run goes that names no folder. The same settings find it again, others do not."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from srd_lightning.digests import bytes_digest, file_digest
from srd_lightning.storage import write_atomically

RUNS = Path("runs")
COMMON = RUNS / ".shared"
"""Where what runs have in common is."""
FINISHED = "finished.json"
SHARED = ("scores", "teacher")
"""Folders that all runs have in common: what is in them has a name that says what it was made of."""


class RunFolder:
    """The folder of a run, ``runs/STUDENT_TEACHER_DATA_FINGERPRINT``.

    Scores and the teacher's cache are kept once for all runs, in ``runs/.shared``, to which the folder has links.

    Args:
        model: Settings of the module, as they were parsed.
        data: Where the rows are read from.
        said: All settings as text. The fingerprint is that of this text, and of the bytes of the data files.
    """

    def __init__(self, model: Namespace, data: Any, said: str) -> None:
        sources = _sources(data)
        files = [path for path in (Path(source).expanduser() for source in sources) if path.is_file()]
        fingerprint = bytes_digest([said.encode(), *(file_digest(path, "").encode() for path in files)])[:8]
        name = [*(_name(one) for one in (model.student, model.teacher) if one is not None), _stem(sources), fingerprint]
        self.path = RUNS / "_".join(name)

    def make(self) -> None:
        """Make the folder, and its links to what runs have in common."""
        self.path.mkdir(parents=True, exist_ok=True)
        for name in SHARED:
            (COMMON / name).mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):  # of an earlier run, or another rank
                (self.path / name).symlink_to(Path("..", ".shared", name))

    def finished(self) -> str | None:
        """Return when the run was finished, if it was."""
        file = self.path / FINISHED
        return json.loads(file.read_text())["finished"] if file.exists() else None

    def finish(self) -> None:
        """Say from now on that the run is finished."""
        now = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        write_atomically(self.path / FINISHED, json.dumps({"finished": now}).encode())


def _name(model: Namespace) -> str:
    """Return what a model is called: the last part of its name, else its class."""
    name = model.get("init_args", {}).get("name") or model["class_path"].rpartition(".")[2]
    return _plain(Path(name).name)


def _stem(sources: list[str]) -> str:
    """Return what the training data are called."""
    return _plain(Path(sources[0]).name.partition(".")[0]) if sources else "rows"


def _plain(name: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", name) or "model"


def _sources(data: Any) -> list[str]:
    """Return the data sources that are named, those of training first."""
    by_split = dict(data.items()) if isinstance(data, (Mapping, Namespace)) else {"train": data}
    parts = [by_split.pop("train", None), *by_split.values()]
    named = (source for part in parts for source in (part if isinstance(part, list) else [part]))
    return [source for source in named if isinstance(source, str)]
