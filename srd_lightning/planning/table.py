"""A plan as tables."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group
from rich.table import Table

from srd_lightning.planning.plan import Plan

UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def tables(plan: Plan) -> Group:
    """Return what a run will do, and what it will cost."""
    return Group(_rows(plan), _stages(plan), _costs(plan), *_notes(plan))


def _rows(plan: Plan) -> Table:
    table = Table("split", "rows read", "dropped", "responses cut", title="rows")
    for split, report in plan.seen.reports.items():
        dropped: dict[str, int] = report["dropped"]  # type: ignore[assignment]
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items()) or "none"
        table.add_row(split, f"{report['rows']:,}", reasons, f"{report['cut']:,}")
    return table


def _stages(plan: Plan) -> Table:
    title = (
        "stages" if plan.seen.exact else "stages (tokens as expected: which rows they have, the reflection will say)"
    )
    table = Table("from epoch", "epochs", "rows", "steps", "tokens", "with padding", "time", title=title)
    for column in table.columns:
        column.justify = "right"
    for stage in plan.seen.stages:
        numbers = (stage.first_epoch, stage.epochs, stage.rows, stage.steps, stage.tokens, stage.positions)
        table.add_row(*(f"{number:,}" for number in numbers), duration(stage.seconds))
    sums = [sum(getattr(stage, name) for stage in plan.seen.stages) for name in ("steps", "tokens", "positions")]
    table.add_section()
    table.add_row("all", "", "", *(f"{number:,}" for number in sums), duration(plan.seconds.training))
    return table


def _costs(plan: Plan) -> Table:
    table = Table("", "", "time", title=f"cost, on {plan.devices} device{'s' * (plan.devices > 1)}")
    seen, seconds, memory = plan.seen, plan.seconds, plan.memory
    reflection = seen.reflection
    if reflection.rows:
        asked = (
            f"{reflection.rows:,} rows, {reflection.prompt_tokens:,} tokens of prompts, at most "
            f"{reflection.most_answer_tokens:,} of answers"
        )
        table.add_row("curation", asked, duration(seconds.curation))
    else:
        table.add_row("curation", "nothing: all scores are there, or none are needed", duration(seconds.curation))
    for first, rows in reflection.refreshes.items():
        table.add_row(f"refresh at epoch {first}", f"{rows:,} rows", "")
    if reflection.refreshes:
        table.add_row("refreshes", "", duration(seconds.refresh))
    if seen.caching is not None:
        size = "of unknown size" if seen.caching.bytes is None else readable(seen.caching.bytes)
        said = f"{seen.caching.rows:,} rows, {seen.caching.tokens:,} tokens, {size} on disk, {seen.caching.kind}"
        table.add_row("teacher's cache", said if seen.caching.rows else "nothing: it is there", duration(seconds.cache))
    table.add_row("training", f"{plan.steps:,} steps", duration(seconds.training))
    validations = sum(stage.validations for stage in seen.stages)
    table.add_row("validation", f"{validations:,} times", duration(seconds.validation))
    table.add_row("[bold]all", "", f"[bold]{duration(seconds.total)}")
    ratio = "" if plan.ratio is None else f"; the run takes {plan.ratio:.2f} of it"
    table.add_row("all data, as many epochs", f"{seen.all_steps:,} steps{ratio}", duration(plan.all_data.total))
    table.add_section()
    for name in ("parameters", "gradients", "optimizer", "teacher", "activations", "logits"):
        table.add_row(f"memory: {name}", readable(getattr(memory, name)), "")
    table.add_row("[bold]memory of a device", f"[bold]{readable(memory.total)}", "")
    if plan.measured_bytes is not None:
        table.add_row("held by the calibration", readable(plan.measured_bytes), "")
    return table


def _notes(plan: Plan) -> Iterator[str]:
    if plan.clock is None:
        yield "times are those of the throughput that was given; what is loaded and saved is not in them"
    else:
        yield f"times are those of the {plan.clock} clock on this machine; checkpoints and export are not in them"


def duration(seconds: float) -> str:
    """Return seconds as one reads them.

    Example:
        >>> duration(0.25), duration(75), duration(7380)
        ('0.25 s', '1 min 15 s', '2 h 03 min')
    """
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60:,} h {minutes % 60:02} min"


def readable(size: float) -> str:
    """Return a number of bytes as one reads it.

    Example:
        >>> readable(512), readable(2_500_000)
        ('512 B', '2.5 MB')
    """
    return next((f"{size / factor:,.3g} {unit}" for unit, factor in UNITS if size >= factor), f"{size:.0f} B")
