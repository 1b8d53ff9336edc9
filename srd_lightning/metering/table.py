"""The report of a run as a table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Column, Table

from srd_lightning.metering.work import PARTS, added

LABELS = {
    "curation": "curation",
    "teacher_cache": "cache of the teacher",
    "refresh": "refreshes",
    "data": "waiting for data",
    "generation": "writing of texts",
    "forward": "forward",
    "teacher": "teacher",
    "backward": "backward",
    "optimizer": "optimizer, clipping",
    "validation": "validation",
    "checkpoints": "checkpoints",
    "rest": "the rest",
}
"""What the table says of `PARTS`."""
SPEEDS = {
    "rows_per_second": "rows/s",
    "response_tokens_per_second": "response tokens/s",
    "positions_per_second": "positions/s",
}
MOST_STAGES = 6
"""With more, only their sums are shown: a terminal is not that wide."""


def table_of(report: Mapping[str, Any]) -> Table:
    """Return the report of `RuntimeBenchmark` as a table: seconds of each part by stage, and what came of them.

    Args:
        report: See there.
    """
    stages: Sequence[Mapping[str, Any]] = report["stages"] if len(report["stages"]) <= MOST_STAGES else ()
    whole, seconds = report["parts"], report["seconds"]
    headers = [f"epoch {stage['first_epoch']} on" for stage in stages]
    headers = [*headers, *(["before"] if stages else []), "all", "share"]
    table = Table(
        Column("seconds"),
        *(Column(header, justify="right") for header in headers),
        title=f"where {seconds:,.1f} s went",
        caption=_caption(report),
    )
    of_stages = [stage["parts"] for stage in stages]
    inside = added(of_stages)
    before = {part: whole[part] - inside.get(part, 0.0) for part in whole}
    columns = [*of_stages, *([before] if stages else []), whole]
    for part in (part for part in PARTS if _seconds(whole.get(part))):
        share = whole[part] / seconds
        table.add_row(LABELS[part], *(_seconds(column.get(part)) for column in columns), f"{share:.1%}")
    table.add_section()
    table.add_row("sum", *(_seconds(sum(column.values())) for column in columns), "")
    blank = [""] * (len(headers) - len(stages))
    if any("rows_per_second" in stage for stage in stages):
        table.add_section()
    for name, label in SPEEDS.items():
        if any(name in stage for stage in stages):
            table.add_row(label, *(f"{stage[name]:,.1f}" if name in stage else "" for stage in stages), *blank)
    for name, label in {"padding": "padding", "mfu": "model FLOPs used"}.items():
        if any(stage.get(name) for stage in stages):
            table.add_row(label, *(f"{stage[name]:.1%}" if name in stage else "" for stage in stages), *blank)
    return table


def _seconds(value: float | None) -> str:
    return "" if value is None or round(value, 2) == 0 else f"{value:,.2f}"


def _caption(report: Mapping[str, Any]) -> str:
    parts = [f"host memory {report['host_peak_memory_bytes'] / 2**30:.2f} GiB at most"]
    if "device_peak_memory_bytes" in report:
        parts.append(f"device memory {report['device_peak_memory_bytes'] / 2**30:.2f} GiB at most")
    parts += [f"{name} {joules:,.0f} J" for name, joules in report.get("energy_joules", {}).items()]
    machine = report["machine"]
    if "peak_flops_per_second" in machine:
        parts.append(f"products of {machine['dtype']}: {machine['peak_flops_per_second'] / 1e9:,.0f} GFLOP/s")
    return "; ".join(parts)
