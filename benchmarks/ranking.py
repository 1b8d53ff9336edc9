"""How long ranking takes and how much memory it needs, by number of rows.

    python benchmarks/ranking.py --rows 1000000 10000000 100000000 --json ranking.json

prints and writes, for each number of rows, the seconds of fusing two criteria, of building the curriculum of the paper
and of slicing its three stages, and the peak memory of the process. The criteria lie on disk, 16 bytes per row: ROUGE-L
with three decimals, 31 % of it zero, and a continuous negative log-likelihood.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from record import record

from srd_lightning.curriculum import PAPER_SCHEDULE, Curriculum
from srd_lightning.curriculum.ranking import reciprocal_rank_fusion

CHUNK = 1_000_000
SHARE_OF_ZEROS = 0.31


def make_criteria(folder: Path, rows: int) -> None:
    """Write ``rouge_l.npy`` and ``nll.npy``, float64 ``[rows]``, a chunk at a time."""
    generator = np.random.default_rng(0)
    rouge_l, nll = (
        np.lib.format.open_memmap(folder / name, mode="w+", dtype=np.float64, shape=(rows,))
        for name in ("rouge_l.npy", "nll.npy")
    )
    for start in range(0, rows, CHUNK):
        length = min(CHUNK, rows - start)
        chunk = generator.beta(2, 5, length).round(3)
        chunk[generator.random(length) < SHARE_OF_ZEROS] = 0
        rouge_l[start : start + length] = chunk
        nll[start : start + length] = generator.gamma(4, 0.5, length)


def measure(folder: Path) -> dict[str, float]:
    """Rank once; return the seconds of each step and the peak memory of this process."""
    before = peak_gigabytes()
    start = time.perf_counter()
    rouge_l = np.load(folder / "rouge_l.npy", mmap_mode="r")
    order = reciprocal_rank_fusion(rouge_l, -np.load(folder / "nll.npy", mmap_mode="r"))
    ranked = time.perf_counter()
    curriculum = Curriculum(order, PAPER_SCHEDULE)
    for epoch in PAPER_SCHEDULE:
        curriculum.rows(epoch)
    done = time.perf_counter()
    return {
        "rows": len(order),
        "seconds": done - start,
        "fusion_seconds": ranked - start,
        "curriculum_seconds": done - ranked,
        "peak_gigabytes": peak_gigabytes(),
        "peak_gigabytes_of_imports": before,
    }


def peak_gigabytes() -> float:
    """Return the peak resident memory of this process so far, mapped files included."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what the function returns in a new interpreter."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def measure_rows(rows: int) -> dict[str, float]:
    """Make the criteria in one process and rank them in another."""
    with tempfile.TemporaryDirectory() as folder:
        in_fresh_process(make_criteria, Path(folder), rows)
        result: dict[str, float] = in_fresh_process(measure, Path(folder))
    return result


def main() -> None:
    """Measure each number of rows, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 10_000_000], help="numbers of rows")
    parser.add_argument("--json", type=Path, help="file to write")
    known = parser.parse_args()
    columns = ("rows", "seconds", "fusion_seconds", "curriculum_seconds", "peak_gigabytes")
    print(*(f"{column:>18}" for column in columns))
    results = []
    for rows in known.rows:
        results.append(measure_rows(rows))
        numbers = [f"{results[-1][column]:.2f}" for column in columns[1:]]
        print(*(f"{cell:>18}" for cell in (f"{rows:,}", *numbers)), flush=True)
    record({"results": results}, known.json)


if __name__ == "__main__":
    main()
