"""What a person looks at after the curation: numbers, a plot, and the easiest and hardest rows as text."""

from __future__ import annotations

import io
import itertools
import json
import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from srd_lightning.curation.result import CurationResult
from srd_lightning.curriculum.ranking import Floats
from srd_lightning.storage import write_atomically

QUANTILES = {"min": 0.0, "5 %": 0.05, "25 %": 0.25, "50 %": 0.5, "75 %": 0.75, "95 %": 0.95, "max": 1.0}


def _spearman(ranks: Floats, others: Floats) -> float | None:
    """Return the Pearson correlation of average ranks, undefined where all rows share one."""
    return float(np.corrcoef(ranks, others)[0, 1]) if np.ptp(ranks) and np.ptp(others) else None


def summarize(result: CurationResult) -> dict[str, Any]:
    """Put the curation into numbers.

    Args:
        result: What the curation made.

    Returns:
        What JSON can hold: ``rows`` (that were ranked), ``kept``, ``left_out``, ``dropped`` (before the ranking, by
        reason), ``seconds``, ``scored``, ``rows_per_second``, ``stages`` (``first_epoch``, ``rows`` trained on)
        and ``criteria`` by name: ``easier`` (``higher`` or ``lower``), ``mean``, ``quantiles``, ``largest_tie``
        (``value``, ``share`` of the rows), ``agreement`` about ease with each other criterion and
        ``agreement_with_order``, both as Spearman correlation, None where a criterion is constant.
    """
    return {
        "rows": result.rows,
        "kept": result.kept,
        "left_out": result.rows - result.kept,
        "dropped": dict(result.dropped),
        "seconds": result.seconds,
        "scored": result.scored,
        "rows_per_second": result.scored / result.seconds,
        "stages": [{"first_epoch": first_epoch, "rows": size} for first_epoch, size in result.sizes.items()],
        "criteria": {name: _criterion(result, name) for name in result.columns},
    }


def _criterion(result: CurationResult, name: str) -> dict[str, Any]:
    values, ranks = result.columns[name], result.ranks[name]
    distinct, counts = np.unique(values, return_counts=True)
    tied = counts.argmax()
    return {
        "easier": "higher" if result.higher_is_easier[name] else "lower",
        "mean": float(values.mean()),
        "quantiles": dict(zip(QUANTILES, np.quantile(values, list(QUANTILES.values())).tolist(), strict=True)),
        "largest_tie": {"value": float(distinct[tied]), "share": float(counts[tied] / len(values))},
        "agreement": {other: _spearman(ranks, result.ranks[other]) for other in result.columns if other != name},
        "agreement_with_order": _spearman(ranks, result.places.astype(np.float64)),
    }


def tables(summary: Mapping[str, Any]) -> list[Table]:
    """Return the numbers of `summarize` as tables for a terminal: the stages, then the criteria."""
    return [_table_of_stages(summary), _table_of_criteria(summary["criteria"])]


def _table_of_stages(summary: Mapping[str, Any]) -> Table:
    table = Table(
        *("", Column("rows", justify="right"), Column("of the ranked", justify="right")),
        title=f"{summary['kept']:,} of {summary['rows']:,} ranked rows kept",
        caption="{seconds:,.1f} s; {scored:,} rows scored, {rows_per_second:,.1f} per second".format(**summary),
    )
    lines = {f"trained on from epoch {stage['first_epoch']}": stage["rows"] for stage in summary["stages"]}
    for label, rows in {**lines, "dropped": summary["left_out"]}.items():
        table.add_row(label, f"{rows:,}", f"{rows / summary['rows']:.0%}")
    for reason, rows in summary["dropped"].items():
        table.add_row(f"not ranked: {reason}", f"{rows:,}")
    return table


def _table_of_criteria(criteria: Mapping[str, Any]) -> Table:
    headers = [Column(), *(Column(name, justify="right") for name in criteria)]
    table = Table(*headers, title="criteria", caption="agreement: Spearman correlation of ease")
    columns = criteria.values()
    table.add_row("easier", *(column["easier"] for column in columns))
    for quantile in QUANTILES:
        table.add_row(quantile, *(f"{column['quantiles'][quantile]:.4g}" for column in columns))
    table.add_row("mean", *(f"{column['mean']:.4g}" for column in columns))
    table.add_row("most frequent", *("{value:.4g} ({share:.1%})".format(**column["largest_tie"]) for column in columns))
    table.add_section()
    for name in criteria:
        table.add_row(f"agreement, {name}", *(_correlation(column["agreement"].get(name, 1.0)) for column in columns))
    table.add_row("agreement, final order", *(_correlation(column["agreement_with_order"]) for column in columns))
    return table


def _correlation(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}"


def table_of_ends(result: CurationResult, rows: Dataset, answers: Mapping[str, str], count: int = 3) -> Table:
    """Return the easiest and the hardest rows in a few words each; see `rows_as_text` for more of them."""
    headers = [
        Column("place", justify="right"),
        *map(Column, ("prompt", "reference", "answer", *result.columns)),
    ]
    table = Table(*headers, title="easiest and hardest rows", show_lines=True)
    for numbers in extremes(result, count):
        for number, row in zip(numbers, rows.select(numbers).to_list(), strict=True):
            texts = (row["prompt"], row["response"], answers.get(row["id"], "–"))
            scores = (f"{values[number]:.3g}" for values in result.columns.values())
            table.add_row(f"{result.places[number] + 1:,}", *(Text(_shorten(text, 90)) for text in texts), *scores)
        table.add_section()
    return table


def _shorten(text: str, length: int) -> str:
    """Return a text on one line, without its middle if it is long; prompts of one template differ at the end."""
    words = " ".join(text.split())
    return words if len(words) <= length else f"{words[: length // 3]} … {words[-2 * length // 3 :]}"


def plot(result: CurationResult, path: Path) -> None:
    """Draw each criterion by stage, and how the first three criteria agree, as a PNG."""
    names = list(result.columns)
    pairs = list(itertools.combinations(names[:3], 2))
    across = min(len(names) + len(pairs), 4 if len(names) > 3 else 3)
    down = math.ceil((len(names) + len(pairs)) / across)
    figure = Figure(figsize=(max(4.2 * across, 6.5), 3.9 * down + 0.6), dpi=120)
    figure.set_layout_engine("constrained", h_pad=0.1)
    axes = [figure.add_subplot(down, across, number + 1) for number in range(len(names) + len(pairs))]
    for name, axis in zip(names, axes, strict=False):
        _draw_histogram(axis, result, name)
    for pair, axis in zip(pairs, axes[len(names) :], strict=True):
        _draw_ranks(axis, result, *pair)
    for axis in axes:
        axis.yaxis.set_major_formatter("{x:,.0f}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=across + 1, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(path, buffer.getvalue())


def _colours(result: CurationResult) -> Floats:
    """Return red, green and blue ``[stages + 1, 3]``: dark to light blue, and last, at -1, the dropped rows'."""
    blues = mpl.colormaps["Blues_r"](np.linspace(0.05, 0.6, len(result.sizes)))[:, :3]
    return np.vstack([blues, mpl.colors.to_rgb("#d55e00")])  # Okabe and Ito's: no colour blindness takes it for blue


def _draw_histogram(axis: Axes, result: CurationResult, name: str) -> None:
    values, stages = result.columns[name], result.stages
    values = np.clip(values, *np.quantile(values, [0.005, 0.995]))
    groups = [values[stages == stage] for stage in (*range(len(result.sizes)), -1)]
    periods = [*(f"stage {stage} (epoch {first_epoch})" for stage, first_epoch in enumerate(result.sizes)), "dropped"]
    labels = [f"{period}: {len(group):,} rows" for period, group in zip(periods, groups, strict=True)]
    axis.hist(groups, bins=25, stacked=True, color=list(_colours(result)), label=labels)
    direction = "easier →" if result.higher_is_easier[name] else "← easier"
    axis.set(title=name, ylabel="rows", xlabel=f"{direction}   (clipped to 0.5 – 99.5 % quantile)")
    axis.locator_params(axis="y", integer=True)


def _draw_ranks(axis: Axes, result: CurationResult, x: str, y: str) -> None:
    rows, ranks = result.rows, result.ranks
    shown = np.random.default_rng(0).permutation(rows)[:20_000]
    colours, size = _colours(result)[result.stages[shown]], float(np.clip(4000 / len(shown), 2, 14))
    axis.scatter(ranks[x][shown], ranks[y][shown], s=size, c=colours, alpha=0.8, linewidths=0)
    axis.set(xlabel=f"rank by {x}", xlim=(-0.02 * rows, 1.02 * rows), box_aspect=1)
    axis.set(ylabel=f"rank by {y}", ylim=(-0.02 * rows, 1.02 * rows))
    axis.set_title(f"Spearman {_correlation(_spearman(ranks[x], ranks[y]))} (rank 1 = easiest)")
    axis.locator_params(nbins=4, integer=True)
    axis.xaxis.set_major_formatter("{x:,.0f}")


def extremes(result: CurationResult, count: int = 3) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the row numbers of the easiest rows, easiest first, and of the hardest, hardest first."""
    order = result.order.numpy()
    return order[:count], order[::-1][:count]


def rows_as_text(result: CurationResult, rows: Dataset, answers: Mapping[str, str], count: int = 3) -> str:
    """Show the easiest and the hardest rows, and what they were judged by.

    Args:
        result: What the curation made.
        rows: Tokenised rows, in the order of its ``ids``.
        answers: The student's answers by row id; rows without one are shown without.
        count: Rows of each kind.

    Returns:
        Markdown.
    """
    texts = rows.select_columns(["id", "prompt", "response"])
    easiest, hardest = (
        [_row_as_text(result, number, texts[number], answers) for number in numbers.tolist()]
        for numbers in extremes(result, count)
    )
    return "\n\n".join(["## Easiest rows", *easiest, "## Hardest rows", *hardest]) + "\n"


def _row_as_text(result: CurationResult, number: int, row: Mapping[str, str], answers: Mapping[str, str]) -> str:
    place, total = result.places[number], result.rows
    stage = int(result.stages[number])
    entry = "dropped" if stage < 0 else f"trained on from epoch {list(result.sizes)[stage]}"
    lines = [f"### `{row['id']}`: place {place + 1:,} of {total:,}, {entry}", ""]
    for name, values in result.columns.items():
        ties = f", shared by {shared:,} rows" if (shared := np.count_nonzero(values == values[number])) > 1 else ""
        lines.append(f"- {name} {values[number]:.4g} (rank {result.ranks[name][number]:,.10g} of {total:,}{ties})")
    texts = {"Prompt": row["prompt"], "Reference response": row["response"], "Student's answer": answers.get(row["id"])}
    shown = (f"\n\n{label}:\n\n{_quote(text)}" for label, text in texts.items() if text is not None)
    return "\n".join(lines) + "".join(shown)


def _quote(text: str) -> str:
    """Return the text as an indented block, where nothing in it is taken for Markdown; the middle of long ones cut."""
    shown = text if len(text) <= 300 else f"{text[:220]} […] {text[-80:]}"
    lines = [part for line in shown.strip("\n").splitlines() for part in textwrap.wrap(line, 96) or [""]]
    return textwrap.indent("\n".join(lines), " " * 4) if text.strip() else "*(empty)*"


def write(result: CurationResult, rows: Dataset, answers: Mapping[str, str], folder: Path) -> dict[str, Any]:
    """Write ``curation.json``, ``curation.png``, ``curation.md`` and, for each row, ``ranking.parquet``.

    Args:
        result: What the curation made.
        rows: Tokenised rows, in the order of its ``ids``.
        answers: The student's answers by row id.
        folder: Made if it does not exist.

    Returns:
        The numbers in ``curation.json``.
    """
    summary = summarize(result)
    write_atomically(folder / "curation.json", json.dumps(summary, indent=2).encode())
    plot(result, folder / "curation.png")
    text = f"# Curation\n\n![](curation.png)\n\n{rows_as_text(result, rows, answers)}"
    write_atomically(folder / "curation.md", text.encode())
    table = pa.table({"id": result.ids, "stage": result.stages, "position": result.places, **result.columns})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    write_atomically(folder / "ranking.parquet", buffer.getvalue())
    return summary


def present(result: CurationResult, rows: Dataset, answers: Mapping[str, str], folder: Path, console: Console) -> None:
    """Write everything and show the tables; arguments as for `write`."""
    summary = write(result, rows, answers, folder)
    console.print(table_of_ends(result, rows, answers), *reversed(tables(summary)))
    console.print(f"Plots, these rows in full and the place of every row: {folder}/curation.* and ranking.parquet")
