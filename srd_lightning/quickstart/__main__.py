"""``make quickstart``: fetch, let the teacher write, evaluate, distil, evaluate again, and show the difference.

Everything that it does is `configs/quickstart.yaml`; this file adds the weights, the data and the tables.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.table import Table
from rich.text import Text

from srd_lightning.assessment.protocol import EvaluationProtocol
from srd_lightning.assessment.summary import table
from srd_lightning.callbacks import HyperparameterScheduler
from srd_lightning.callbacks.runtime import RuntimeBenchmark
from srd_lightning.cli import SRDCLI, find_config, parse
from srd_lightning.command.console import Ending
from srd_lightning.command.noise import quiet
from srd_lightning.command.trainer import SRDTrainer
from srd_lightning.evaluation.result_files import ANSWERS
from srd_lightning.quickstart import fetch
from srd_lightning.quickstart.prompts import prompts, write_prompts
from srd_lightning.storage import write_atomically

RUN = Path("runs/quickstart")
NUM_SHOWN = 3


def main() -> None:
    """Run the quickstart in the current folder; what the user can put right is said in one paragraph."""
    with Ending("quickstart") as ending:
        ending.begin_run(RUN)
        _run()


def _run() -> None:
    start = time.perf_counter()
    console = Console()
    quiet("quickstart")
    weights = str(fetch.smollm2())
    config, names = str(find_config("quickstart.yaml")), ("--model.student.name", "--model.teacher.name")
    settings = ["--config", config, *(f"{name}={weights}" for name in names)]
    _let_teacher_write(console, settings)
    cli = parse(settings)
    console.rule("before: the student as it was cut out of the teacher")
    before = _evaluate(settings, cli, "before")
    console.rule("distillation")
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    console.rule("curation: what the student made of the data before it was trained")
    cli.datamodule.report(console)
    console.rule("after")
    after = _evaluate(settings, cli, "after")
    summary = {**_stages(cli), "before": before, "after": after, "seconds_total": time.perf_counter() - start}
    write_atomically(RUN / "summary.json", json.dumps(summary, indent=2).encode())
    _show_numbers(console, summary)
    _show_answers(console)
    console.print(f"The student is in {RUN / 'student'}, these numbers are in {RUN / 'summary.json'}.")


def _let_teacher_write(console: Console, settings: list[str]) -> None:
    """Make the data files, as ``srd generate`` does, where they are not there yet."""
    write_prompts(RUN / "prompts")
    for split in prompts():
        path = RUN / "data" / f"{split}.jsonl"
        if not path.exists():
            console.rule(f"the teacher writes the responses to learn from: {split}")
            cli = parse([*settings, f"--data.data={RUN / 'prompts'}"])
            trainer = cast(SRDTrainer, cli.trainer)
            trainer.generate(cli.model, cli.datamodule, str(path), split, decoding=cli.model.decoding)


def _evaluate(settings: list[str], cli: SRDCLI, name: str) -> dict[str, Any]:
    """Let the student as it is now answer the held-out rows greedily; return what ``evaluation.json`` says."""
    protocol, folder = EvaluationProtocol(seeds=(), decoding=cli.model.decoding), str(RUN / "evaluation" / name)
    trainer = cast(SRDTrainer, parse(settings).trainer)  # one that trains keeps the callbacks of its module
    return trainer.evaluate(cli.model, cli.datamodule, protocol=protocol, path=folder)["test"]


def _stages(cli: SRDCLI) -> dict[str, Any]:
    """Return what `RuntimeBenchmark` measured, with the values that were scheduled for each stage."""
    callbacks: list[Any] = cli.trainer.callbacks  # type: ignore[attr-defined]
    report = next(callback.report for callback in callbacks if isinstance(callback, RuntimeBenchmark))
    scheduler = next(callback for callback in callbacks if isinstance(callback, HyperparameterScheduler))
    for stage in report["stages"]:
        values = scheduler.values(stage["first_epoch"])
        stage |= {"temperature": values["loss.temperature"], "kd_weight": values["kd_weight"]}
    return {name: report[name] for name in ("curation", "stages", "peak_memory_bytes")}


def _show_numbers(console: Console, summary: dict[str, Any]) -> None:
    curation = summary["curation"]
    stages = Table(title=f"{curation['kept']} of {curation['rows']} rows kept, curated in {curation['seconds']:.0f} s")
    columns = ("first_epoch", "rows", "steps", "seconds", "temperature", "kd_weight")
    for column in columns:
        stages.add_column(column, justify="right")
    for stage in summary["stages"]:
        stages.add_row(*(f"{stage[column]:.0f}" if column == "seconds" else str(stage[column]) for column in columns))
    console.print(stages)
    console.print(table({name: summary[name] for name in ("before", "after")}, "held-out rows"))
    console.print(
        f"{summary['seconds_total']:.0f} s in all, peak memory {summary['peak_memory_bytes'] / 2**30:.1f} GiB"
    )


def _show_answers(console: Console) -> None:
    files = [(RUN / "evaluation" / name / ANSWERS).read_text().splitlines() for name in ("before", "after")]
    for lines in list(zip(*files, strict=True))[:NUM_SHOWN]:
        before, after = map(json.loads, lines)
        shown = Table(title=after["prompt"].split("user\n")[-1].split("<")[0], show_header=False, show_lines=True)
        answers = {"before": before["answer"], "after": after["answer"], "teacher": after["reference"]}
        for label, text in answers.items():
            shown.add_row(label, Text(text))
        console.print(shown)


if __name__ == "__main__":
    main()
