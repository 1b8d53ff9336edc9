"""How well `srd plan` tells what `srd fit` takes: three recipes are planned, then run, each in a process of its own.

    python benchmarks/plan.py --data rows.jsonl --clock processor --json plan.json

prints seconds by part, planned and measured. ``--data`` are real rows for the recipes of a real student
(`srd_lightning.quickstart.fetch` has its weights); without, only the tiny one runs. On a busy machine take the
processor's clock: it counts what these processes did.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import record

PARTS = ("curation", "cache", "training", "validation", "total")
ROOT = Path(__file__).parents[1]


def tiny(folder: Path, _: Path | None) -> list[str]:
    """Return the settings of the debug recipe on more rows, for more epochs."""
    chance = random.Random(0)
    words = ("red", "blue", "river", "stone", "seven", "bees", "honey", "planet")
    rows = [
        {"instruction": f"Say {number}.", "output": " ".join(chance.choices(words, k=chance.randint(1, 24)))}
        for number in range(240)
    ]
    write(folder / "rows.jsonl", rows)
    write(folder / "held.jsonl", rows[:40])
    return [
        "--config",
        str(ROOT / "configs/debug.yaml"),
        f"--data.data={{train: {folder}/rows.jsonl, validation: {folder}/held.jsonl}}",
        "--data.batch_size=4",
        "--data.decoding.max_new_tokens=24",
        "--trainer.max_epochs=12",
    ]


def student(folder: Path, data: Path | None) -> list[str]:
    """Return the settings of a short run of 24 layers of SmolLM2-135M-Instruct, with its teacher's hidden states."""
    return [*real(folder, data, rows=32, held_out=8), "--model.teacher_cache=hidden", "--trainer.max_epochs=3"]


def live(folder: Path, data: Path | None) -> list[str]:
    """Return the settings of one with a teacher that is run at every step, and accumulated batches."""
    return [
        *real(folder, data, rows=32, held_out=8),
        "--model.teacher_cache=none",
        "--trainer.accumulate_grad_batches=2",
        "--data.batch_size=4",
        "--data.group_by_length=false",
        "--trainer.max_epochs=2",
    ]


RECIPES = {"tiny": tiny, "student": student, "live": live}


def real(folder: Path, data: Path | None, rows: int, held_out: int) -> list[str]:
    """Write some rows, evenly spaced in a file; return what recipes with a real student have in common."""
    from srd_lightning.quickstart.fetch import smollm2

    assert data is not None
    found = [json.loads(line) for line in data.read_text().splitlines()]
    chosen = [found[place * len(found) // (rows + held_out)] for place in range(rows + held_out)]
    random.Random(0).shuffle(chosen)
    write(folder / "rows.jsonl", chosen[:rows])
    write(folder / "held.jsonl", chosen[rows:])
    weights = smollm2()
    return [
        "--config",
        str(ROOT / "configs/quickstart.yaml"),
        f"--model.student.name={weights}",
        f"--model.teacher.name={weights}",
        f"--data.data={{train: {folder}/rows.jsonl, validation: {folder}/held.jsonl}}",
        "--data.max_length=128",
        "--data.max_prompt_length=96",
        "--data.decoding.max_new_tokens=16",
        "--data.eval_batch_size=8",
        "--data.reflection_threads=1",
        "--trainer.enable_checkpointing=false",
    ]


def write(path: Path, rows: list[Any]) -> None:
    """Write rows as lines of JSON."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def run_fit(arguments: list[str], file: Path) -> None:
    """Fit, in this process, and write how long each part took; its clock is whatever `time.perf_counter` is."""
    from srd_lightning.callbacks.runtime import RuntimeBenchmark
    from srd_lightning.cli import run

    callbacks: list[Any] = run(["fit", *arguments]).trainer.callbacks
    report = next(callback.report for callback in callbacks if isinstance(callback, RuntimeBenchmark))
    stages = [stage["seconds"] for stage in report["stages"]]
    found = {
        "curation": report["curation"]["seconds"],
        "cache": report["parts"].get("teacher_cache", 0.0),
        "training": sum(stages),
        "validation": report["validation_seconds"],
    }
    tokens = [stage["positions"] for stage in report["stages"]]
    file.write_text(json.dumps({**found, "total": sum(found.values()), "stages": stages, "positions": tokens}))


def child(*arguments: str) -> None:
    """Run this file in a process of its own."""
    subprocess.run([sys.executable, __file__, *arguments], check=True)


def compare(name: str, data: Path | None, clock: str, seconds: float) -> dict[str, Any]:
    """Plan a recipe, then run it; return both."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        arguments = [*RECIPES[name](folder, data), f"--trainer.default_root_dir={folder}/run"]
        arguments += ["--trainer.enable_progress_bar=false"]
        start = time.perf_counter()
        options = [f"--clock={clock}", f"--calibrate.seconds={seconds}", f"--json={folder}/plan.json"]
        child("--child", "plan", clock, "", json.dumps([*arguments, *options]))
        took = time.perf_counter() - start
        child("--child", "fit", clock, f"{folder}/fit.json", json.dumps(arguments))
        plan, fit = (json.loads((folder / f"{part}.json").read_text()) for part in ("plan", "fit"))
    planned = {**plan["seconds"], "curation": plan["seconds"]["curation"] + plan["seconds"]["refresh"]}
    parts = {
        part: {
            "planned": planned[part],
            "measured": fit[part],
            "ratio": planned[part] / fit[part] if fit[part] else None,
        }
        for part in PARTS
    }
    stages = [
        {"planned": stage["seconds"], "measured": seconds, "positions": stage["positions"], "had": had}
        for stage, seconds, had in zip(plan["stages"], fit["stages"], fit["positions"], strict=True)
    ]
    return {"parts": parts, "stages": stages, "plan_seconds": took, "prices": plan["prices"], "memory": plan["memory"]}


def table(found: dict[str, dict[str, Any]]) -> str:
    """Return seconds by recipe and part, as Markdown."""
    lines = ["| recipe | part | planned, s | measured, s | ratio |", "|---|---|--:|--:|--:|"]
    for name, result in found.items():
        for part, numbers in result["parts"].items():
            if numbers["measured"]:
                planned, measured, ratio = numbers["planned"], numbers["measured"], numbers["ratio"]
                lines.append(f"| {name} | {part} | {planned:.1f} | {measured:.1f} | {ratio:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Plan and run all recipes, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="rows, .jsonl, for the recipes of a real student")
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall", help="by which is measured")
    parser.add_argument("--seconds", type=float, default=60.0, help="that each plan may measure")
    parser.add_argument("--recipe", choices=RECIPES, action="append", help="only this one; may be repeated")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    known = parser.parse_args()
    if known.child:
        what, clock, file, arguments = known.child
        if what == "plan":
            from srd_lightning.cli import run

            run(["plan", *json.loads(arguments)])
            return
        if clock == "processor":
            time.perf_counter = time.process_time  # by which the parts of a run are timed
        run_fit(json.loads(arguments), Path(file))
        return
    names = known.recipe or [name for name in RECIPES if known.data is not None or name == "tiny"]
    found = {name: compare(name, known.data, known.clock, known.seconds) for name in names}
    result = {"clock": known.clock, "seconds_to_measure": known.seconds, "recipes": found}
    record(result, known.json)
    print(table(found))


if __name__ == "__main__":
    main()
