"""What an evaluation comes to: means with intervals, lines for each row and answer, and a table that reads well."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from rich.table import Table

from srd_lightning.assessment.evaluator import Evaluated
from srd_lightning.assessment.measures import AGREEMENT, BINNED, LIKELIHOOD, OWN
from srd_lightning.criteria.base import CUT
from srd_lightning.evaluation.bootstrap import CONFIDENCE, RESAMPLES, bootstrap_interval, bounds, resampled_sums
from srd_lightning.evaluation.calibration import BINS, Floats, calibration_error

OF_ANSWERS = ("rouge_l", "tokens", CUT)
"""Measures of an answer."""
LABELS = {
    "rouge_l": "ROUGE-L, sampled",
    "greedy_rouge_l": "ROUGE-L, greedy",
    "tokens": "tokens of an answer, sampled",
    "greedy_tokens": "tokens of an answer, greedy",
    "cut": "cut at the limit, sampled",
    "greedy_cut": "cut at the limit, greedy",
    "nll": "NLL of the reference",
    "accuracy": "next token right",
    "ece": "calibration error",
    "kl": "KL to the teacher",
    "top1": "same top-1 as the teacher",
    "own_kl": "KL on own answers",
    "own_top1": "same top-1 on own answers",
}
"""What the table says, in its order."""


def metrics(found: Evaluated) -> dict[str, dict[str, Any]]:
    """Return mean, ``sd`` over the seeds (``None`` with fewer than two), and the interval over rows, by measure.

    Measures of answers are means over rows; those of tokens (nll, accuracy, ece, kl, top1, own_kl, own_top1) are means
    over the tokens of all rows.
    """
    of_rows, own_tokens = _columns(found), found.answers[None].columns["tokens"]
    weights = {name: of_rows["response_tokens"] for name in (*LIKELIHOOD, *AGREEMENT)}
    weights |= dict.fromkeys(OWN, own_tokens)
    means: dict[str, dict[str, Any]] = {"ece": {**_ece(found), "sd": None}}
    for name in LABELS.keys() & of_rows.keys():
        interval = bootstrap_interval(of_rows[name], weights.get(name))
        means[name] = {**interval._asdict(), **_over_seeds(found, name)}
    return {name: means[name] for name in LABELS if name in means}


def calibration(found: Evaluated) -> list[dict[str, float]]:
    """Return of each bin that holds a prediction: its upper bound, tokens, mean confidence and accuracy."""
    bins = _bins(found).sum(0)
    return [
        {"up_to": (number + 1) / BINS, "tokens": tokens, "confidence": confidence / tokens, "accuracy": right / tokens}
        for number, (tokens, confidence, right) in enumerate(bins.tolist())
        if tokens
    ]


def numbers(found: Evaluated, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``evaluation.json`` holds.

    Args:
        found: What was measured.
        settings: What it depends on, in words; digests are added.
    """
    return {
        "rows": len(found.rows),
        "metrics": metrics(found),
        "calibration": calibration(found),
        "settings": {**settings, "confidence": CONFIDENCE, "resamples": RESAMPLES, "made_of": dict(found.made_of)},
    }


def answer_lines(found: Evaluated) -> Iterator[dict[str, Any]]:
    """Yield a line for each answer, those to a row one after the other, the greedy one first."""
    for place, row in enumerate(found.rows.select_columns(["id", "prompt", "response"])):
        for seed, answers in found.answers.items():
            rouge_l, tokens, cut = (float(answers.columns[column][place]) for column in OF_ANSWERS)
            yield {
                "id": row["id"],
                "seed": seed,
                "prompt": row["prompt"],
                "reference": row["response"],
                "answer": answers.texts[row["id"]],
                "rouge_l": rouge_l,
                "tokens": int(tokens),
                "cut": bool(cut),
            }


def row_lines(found: Evaluated) -> Iterator[dict[str, Any]]:
    """Yield a line for each row: means over its answers, and over the tokens of its reference response."""
    columns = _columns(found)
    for place, row_id in enumerate(found.rows["id"]):
        yield {"id": row_id, **{name: float(values[place]) for name, values in columns.items()}}


def table(found: Mapping[str, Mapping[str, Any]], title: str) -> Table:
    """Return a table with a column for each set of rows.

    Args:
        found: What ``evaluation.json`` holds, by set.
        title: Above it.
    """
    shown = Table(title=title, caption=f"mean ({CONFIDENCE:.0%} of {RESAMPLES} resamples of the rows)")
    shown.add_column("")
    for name, numbers_of_set in found.items():
        shown.add_column(f"{name}: {numbers_of_set['rows']} rows", justify="right")
    of_sets = [numbers_of_set["metrics"] for numbers_of_set in found.values()]
    for measure, label in LABELS.items():
        if measure in of_sets[0]:
            shown.add_row(label, *(_mean(of_set[measure]) for of_set in of_sets))
            if of_sets[0][measure]["sd"] is not None:
                seeds = len(of_sets[0][measure]["by_seed"])
                shown.add_row(f"  sd over {seeds} seeds", *(f"{of_set[measure]['sd']:.3f}" for of_set in of_sets))
    return shown


def _mean(measure: Mapping[str, Any]) -> str:
    digits = 1 if measure["mean"] >= 10 else 3
    mean, low, high = (f"{measure[part]:.{digits}f}" for part in ("mean", "low", "high"))
    return f"{mean} ({low}–{high})"


def _columns(found: Evaluated) -> dict[str, Floats]:
    """Return all that is known of each row, ``[N]`` by name."""
    greedy, sampled = found.answers[None], [answers for seed, answers in found.answers.items() if seed is not None]
    columns = {"response_tokens": np.array(found.rows["length"]) - np.array(found.rows["prompt_length"], np.float64)}
    for name in OF_ANSWERS:
        if sampled:
            columns[name] = np.mean([answers.columns[name] for answers in sampled], axis=0)
        columns[f"greedy_{name}"] = greedy.columns[name]
    kept = (name for name in (*LIKELIHOOD, *AGREEMENT, *OWN) if name in greedy.columns)
    return columns | {name: greedy.columns[name] for name in kept}


def _over_seeds(found: Evaluated, name: str) -> dict[str, Any]:
    means = {
        str(seed): float(np.mean(answers.columns[name]))
        for seed, answers in found.answers.items()
        if name in OF_ANSWERS and seed is not None
    }
    if not means:
        return {"sd": None}
    return {"sd": float(np.std(list(means.values()), ddof=1)) if len(means) > 1 else None, "by_seed": means}


def _bins(found: Evaluated) -> Floats:
    """Return the predictions of each row by confidence, ``[N, M, 3]``, see `binned`."""
    columns = found.answers[None].columns
    return np.stack([columns[name] for name in BINNED], axis=1).reshape(-1, BINS, 3)


def _ece(found: Evaluated) -> dict[str, float]:
    bins = _bins(found)
    resampled = calibration_error(resampled_sums(bins.reshape(len(bins), -1)).reshape(-1, BINS, 3))
    low, high = bounds(resampled)
    return {"mean": float(calibration_error(bins.sum(0))), "low": low, "high": high}
