"""What a run has taken so far: it goes into checkpoints, and becomes the report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from srd_lightning.metering.operations import Parameters
from srd_lightning.metering.work import Work, added, stages_of


@dataclass
class Record:
    """What a run has taken so far, before it was interrupted too.

    Args:
        before: Seconds by part before the first epoch.
        epochs: What was done in each.
        peaks: Most bytes, by ``host`` and ``device``.
        joules: By ``gpu`` and ``cpu``.
    """

    before: dict[str, float] = field(default_factory=dict)
    epochs: list[Work] = field(default_factory=list)
    peaks: dict[str, int] = field(default_factory=dict)
    joules: dict[str, float] = field(default_factory=dict)

    def with_machine(self, peaks: Mapping[str, int], joules: Mapping[str, float]) -> Record:
        """Return it with what this process has held and taken.

        Args:
            peaks: Bytes.
            joules: Of this process alone.
        """
        most = {name: max(self.peaks.get(name, 0), peaks.get(name, 0)) for name in {**self.peaks, **peaks}}
        sums = {name: self.joules.get(name, 0.0) + joules.get(name, 0.0) for name in {**self.joules, **joules}}
        return Record(self.before, self.epochs, most, sums)

    def report(self, parameters: Parameters | None, peak: float | None) -> dict[str, Any]:
        """Return what ``runtime.json`` holds, as far as it is known here.

        Args:
            parameters: Of the models.
            peak: Operations per second of the machine.
        """
        parts = added([self.before, *(work.parts for work in self.epochs)])
        stages = stages_of(self.epochs).values()
        return {
            "seconds": sum(parts.values()),
            "parts": parts,
            "refresh_seconds": parts.get("refresh", 0.0),
            "stages": [{"first_epoch": stage.epoch, **stage.numbers(parameters, peak)} for stage in stages],
            "validation_seconds": parts.get("validation", 0.0),
            "peak_memory_bytes": self.peaks.get("device", self.peaks["host"]),
            **{f"{name}_peak_memory_bytes": size for name, size in self.peaks.items()},
            **({"energy_joules": self.joules} if self.joules else {}),
            **({"parameters": parameters._asdict()} if parameters is not None else {}),
        }

    def lines(self, parameters: Parameters | None, peak: float | None) -> str:
        """Return what ``runtime.jsonl`` holds: a line for each epoch.

        Args:
            parameters: Of the models.
            peak: Operations per second of the machine.
        """
        numbers = ({"epoch": one.epoch, "stage": one.stage, **one.numbers(parameters, peak)} for one in self.epochs)
        return "".join(f"{json.dumps(line)}\n" for line in numbers)

    def state(self) -> dict[str, Any]:
        """Return it for a checkpoint."""
        return asdict(self)

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Record:
        """Return it from a checkpoint, of what an older version has written an empty one."""
        if "epochs" not in state:
            return cls()
        return cls(**{**state, "epochs": [Work(**work) for work in state["epochs"]]})


def is_report(path: Path) -> bool:
    """Return whether a file holds the report of a run."""
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        return False
    return isinstance(found, dict) and {"stages", "peak_memory_bytes"} <= found.keys()


def are_lines(path: Path) -> bool:
    """Return whether a file holds a line for each epoch of a run."""
    try:
        found = [json.loads(line) for line in path.read_bytes().splitlines()]
    except ValueError:
        return False
    return all(isinstance(line, dict) and {"epoch", "parts"} <= line.keys() for line in found)
