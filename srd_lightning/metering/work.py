"""What was done in an epoch, or in a stage of epochs, and how long each part of it took."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from srd_lightning.metering.operations import Parameters

PARTS = (
    "curation",
    "teacher_cache",
    "refresh",
    "data",
    "generation",
    "forward",
    "teacher",
    "backward",
    "optimizer",
    "validation",
    "checkpoints",
    "rest",
)
"""All parts of the time of a run, in the order in which they are shown."""
BESIDE_TRAINING = frozenset({"curation", "teacher_cache", "refresh", "validation", "checkpoints"})
"""Parts that are not among the seconds of a stage, by which its speed is reckoned."""


COUNTED = ("steps", "rows", "tokens", "responses", "positions", "taught")
"""What is counted of batches, as `Work` calls it."""


def added(some: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Add up seconds by part, in the order of `PARTS`.

    Example:
        >>> added([{"forward": 1.0, "data": 0.5}, {"forward": 2.0}])
        {'data': 0.5, 'forward': 3.0}
    """
    sums: dict[str, float] = {}
    for parts in some:
        for name, seconds in parts.items():
            sums[name] = sums.get(name, 0.0) + seconds
    return {name: sums[name] for name in PARTS if name in sums}


@dataclass
class Work:
    """What one rank did in an epoch, or in several.

    Args:
        epoch: The first.
        stage: Of the curriculum; 0 without one.
        pool: Rows that the loaders held.
        steps: Of the optimizers.
        rows: That were trained on; of a batch that is the length of its first tensor.
        tokens: That were trained on, prompts included, without padding.
        responses: Tokens among them that have a label.
        positions: Of the batches, with what pads them.
        taught: Tokens that a teacher has seen that is run beside the student.
        parts: Seconds by part, see `PARTS`.
    """

    epoch: int
    stage: int
    pool: int
    steps: int = 0
    rows: int = 0
    tokens: int = 0
    responses: int = 0
    positions: int = 0
    taught: int = 0
    parts: dict[str, float] = field(default_factory=dict)

    def count(self, counts: Mapping[str, int]) -> None:
        """Add what batches held, by `COUNTED`."""
        for name, number in counts.items():
            setattr(self, name, getattr(self, name) + number)

    @property
    def seconds(self) -> float:
        """Of training: of all parts but `BESIDE_TRAINING`."""
        return sum(seconds for name, seconds in self.parts.items() if name not in BESIDE_TRAINING)

    @property
    def padding(self) -> float:
        """Share of the positions."""
        return 1 - self.tokens / self.positions if self.positions else 0.0

    def speed(self, parameters: Parameters | None, peak: float | None) -> dict[str, float]:
        """Return what was done in a second, and how much of the machine that is, as far as it is known.

        Args:
            parameters: Of the models.
            peak: Operations per second of the machine.

        Returns:
            ``rows_per_second``, ``response_tokens_per_second``, ``positions_per_second``; ``model_flops``, see
            `Parameters`, and ``mfu``, the share of them in what the machine could have done in the seconds.
        """
        counted = {"rows": self.rows, "response_tokens": self.responses, "positions": self.positions}
        found: dict[str, float] = {
            f"{name}_per_second": count / self.seconds for name, count in counted.items() if count and self.seconds > 0
        }
        if parameters is not None and self.tokens:
            found["model_flops"] = parameters.operations(self.tokens, self.taught)
            if peak is not None and self.seconds > 0:
                found["mfu"] = found["model_flops"] / (peak * self.seconds)
        return found

    def numbers(self, parameters: Parameters | None, peak: float | None) -> dict[str, Any]:
        """Return all of it as a report says it, without its epochs.

        Args:
            parameters: See `speed`.
            peak: See `speed`.
        """
        return {
            "rows": self.pool,
            "steps": self.steps,
            "tokens": self.tokens,
            "positions": self.positions,
            "padding": self.padding,
            "seconds": self.seconds,
            "waiting_seconds": self.parts.get("data", 0.0),
            "generation_seconds": self.parts.get("generation", 0.0),
            "trained_rows": self.rows,
            "response_tokens": self.responses,
            "parts": added([self.parts]),
            **self.speed(parameters, peak),
        }


def stages_of(epochs: Iterable[Work]) -> dict[int, Work]:
    """Return the sums of epochs by stage.

    Example:
        >>> epochs = [Work(0, 0, 8, steps=2), Work(1, 0, 8, steps=2), Work(2, 1, 12, steps=3)]
        >>> [(stage.epoch, stage.pool, stage.steps) for stage in stages_of(epochs).values()]
        [(0, 8, 4), (2, 12, 3)]
    """
    sums: dict[int, Work] = {}
    for one in epochs:
        whole = sums.setdefault(one.stage, Work(one.epoch, one.stage, one.pool))
        whole.count({name: getattr(one, name) for name in COUNTED})
        whole.parts = added([whole.parts, one.parts])
    return sums
