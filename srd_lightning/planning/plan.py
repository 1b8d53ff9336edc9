"""`Plan`: what a run will do and what that will cost, put together from what was seen and what was measured."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from srd_lightning.errors import SettingError
from srd_lightning.planning.clock import ClockName, Prices, Throughput
from srd_lightning.planning.cost import Rate, Work
from srd_lightning.planning.memory import Memory
from srd_lightning.planning.survey import Seen


@dataclass
class Seconds:
    """What the parts of a run take.

    Args:
        curation: Reflection, and to load the student for it.
        refresh: Reflection on rows that are still to come.
        cache: To ask the teacher, and to load it for that.
        training: All stages.
        validation: All of them.
    """

    curation: float
    refresh: float
    cache: float
    training: float
    validation: float

    @property
    def total(self) -> float:
        """Sum of all."""
        return self.curation + self.refresh + self.cache + self.training + self.validation


@dataclass
class Plan:
    """What a run will do, and what that will cost.

    Args:
        seen: What it will do.
        seconds: That it will take.
        all_data: Seconds of as many epochs on all rows, without a curation.
        memory: Of each device, by a formula.
        measured_bytes: The most that the calibration has held, on a device or in the process; nothing without one.
        devices: That share the rows.
        clock: By which was measured; nothing where a throughput was given.
        prices: That were measured or given.
    """

    seen: Seen
    seconds: Seconds
    all_data: Seconds
    memory: Memory
    measured_bytes: int | None
    devices: int
    clock: ClockName | None
    prices: Prices

    @property
    def steps(self) -> int:
        """Of the optimizer."""
        return sum(stage.steps for stage in self.seen.stages)

    def as_json(self) -> str:
        """Return all of it as text."""
        seen = self.seen
        cache = seen.caching
        found: dict[str, Any] = {
            "splits": seen.reports,
            "rows": seen.rows,
            "kept": seen.kept,
            "left_out": seen.rows - seen.kept,
            "exact": seen.exact,
            "stages": [asdict(stage) for stage in seen.stages],
            "steps": self.steps,
            "tokens": sum(stage.tokens for stage in seen.stages),
            "positions": sum(stage.positions for stage in seen.stages),
            "reflection": {
                "rows": seen.reflection.rows,
                "prompt_tokens": seen.reflection.prompt_tokens,
                "answer_tokens": seen.reflection.answer_tokens,
                "most_answer_tokens": seen.reflection.most_answer_tokens,
                "refreshes": seen.reflection.refreshes,
            },
            "cache": cache and {name: getattr(cache, name) for name in ("kind", "rows", "tokens", "bytes")},
            "memory": {**asdict(self.memory), "total": self.memory.total, "measured": self.measured_bytes},
            "devices": self.devices,
            "seconds": {**asdict(self.seconds), "total": self.seconds.total},
            "all_data": {"steps": seen.all_steps, **asdict(self.all_data), "total": self.all_data.total},
            "ratio": self.ratio,
            "clock": self.clock,
            "prices": asdict(self.prices),
        }
        return json.dumps(found, indent=2)

    @property
    def ratio(self) -> float | None:
        """Seconds of the run by those of as many epochs on all rows."""
        return self.seconds.total / self.all_data.total if self.all_data.total else None


def known_prices(seen: Seen, given: Throughput) -> Prices:
    """Return prices from what a device is known to do in a second.

    Raises:
        SettingError: Something that the run does is not among it.
    """
    reflection = seen.reflection
    needs = {"reflect": reflection.rows or reflection.refreshes, "cache": seen.caching and seen.caching.rows}
    for name, needed in needs.items():
        if needed and getattr(given, name) is None:
            raise SettingError(
                f"throughput says nothing of {name}, which this run needs; add it: {{train: {given.train:g}, "
                f"{name}: …}}"
            )
    answers = reflection.most_answer_tokens / reflection.work.positions if reflection.work.positions else 1.0
    return Prices(
        reflect=Rate(0.0, answers / given.reflect if given.reflect else 0.0),
        cache=Rate(0.0, 1 / given.cache if given.cache else 0.0),
        batch=Rate(0.0, 1 / given.train),
        validate=Rate(0.0, 1 / (given.validate or 3 * given.train)),
    )


def plan_of(
    seen: Seen, prices: Prices, memory: Memory, measured_bytes: int | None, devices: int, clock: ClockName | None
) -> Plan:
    """Put a plan together.

    Args:
        seen: What the run will do; its stages get their seconds.
        prices: What that costs.
        memory: Of each device.
        measured_bytes: As in `Plan`.
        devices: As in `Plan`.
        clock: As in `Plan`.
    """
    for stage in seen.stages:
        stage.seconds = training_seconds(prices, stage.epochs, Work(stage.batches, stage.positions), stage.steps)
    validation = validation_seconds(seen, prices)
    cached = all_cached = 0.0
    if seen.caching is not None:
        all_cached = prices.cache_once + prices.cache.seconds(seen.all_caching) / devices
        if seen.caching.rows:
            cached = prices.cache_once + prices.cache.seconds(seen.caching.work) / devices
    seconds = Seconds(
        curation=prices.reflect_once + prices.reflect.seconds(seen.reflection.work) / devices,
        refresh=prices.reflect.seconds(seen.reflection.refresh_work) / devices,
        cache=cached,
        training=sum(stage.seconds for stage in seen.stages),
        validation=validation,
    )
    epochs = sum(stage.epochs for stage in seen.stages)
    all_trained = training_seconds(prices, epochs, seen.all_data, seen.all_steps)
    all_data = Seconds(0.0, 0.0, all_cached, all_trained, validation)
    return Plan(seen, seconds, all_data, memory, measured_bytes, devices, clock, prices)


def training_seconds(prices: Prices, epochs: int, work: Work, steps: int) -> float:
    """Return what training takes, validation left out."""
    return prices.epoch * epochs + prices.batch.seconds(work) + prices.step * steps


def validation_seconds(seen: Seen, prices: Prices) -> float:
    """Return what all validations take, with the batches that try it before training."""
    one = prices.validation + prices.validate.seconds(seen.validation)
    seconds = sum(stage.validations for stage in seen.stages) * one
    if seen.sanity and seen.validation.passes:
        seconds += prices.validation + (one - prices.validation) * seen.sanity / seen.validation.passes
    return seconds
