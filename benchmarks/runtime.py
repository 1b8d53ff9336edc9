"""What the curriculum saves: one recipe as it stands and on all data, same epochs, same module, one after the other.

    python benchmarks/runtime.py --config configs/debug.yaml --json runtime.json

prints and writes seconds (reflection included), steps and tokens that were trained on, and the ratios. Times are noisy:
quote the ratio of one run, with the machine it was made on. Arguments that are not listed here go to both runs.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from record import record

from srd_lightning.callbacks.runtime import RuntimeBenchmark
from srd_lightning.cli import run


def measure(arguments: list[str]) -> dict[str, float]:
    """Fit once; return total seconds without set-up, and what was done in them."""
    trainer = run(["fit", *arguments]).trainer
    callbacks: list[Any] = trainer.callbacks
    report = next(callback.report for callback in callbacks if isinstance(callback, RuntimeBenchmark))
    curation = report["curation"]["seconds"] + report["refresh_seconds"]
    training = sum(stage["seconds"] for stage in report["stages"])
    return {
        "seconds": curation + training,
        "curation_seconds": curation,
        "steps": sum(stage["steps"] for stage in report["stages"]),
        "tokens": sum(stage["tokens"] for stage in report["stages"]),
    }


def main() -> None:
    """Run both, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="recipe, with a RuntimeBenchmark among its callbacks")
    parser.add_argument("--json", type=Path, help="file to write")
    known, others = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scores:  # fresh, so that the reflection is paid for
        curriculum = measure(["--config", known.config, *others, f"--data.scores={scores}/scores"])
    everything = measure(["--config", known.config, *others, "--data.schedule={0: 1.0}"])
    result = {
        "curriculum": curriculum,
        "all_data": everything,
        "ratio": {name: curriculum[name] / everything[name] for name in ("seconds", "steps", "tokens")},
        "config": known.config,
        "arguments": others,
    }
    print(record(result, known.json))


if __name__ == "__main__":
    main()
