"""Every method on one student, one teacher and the same rows: a sign of life for each, not evidence which is better.

    python benchmarks/methods.py --data FOLDER --json benchmarks/results/methods-smollm2-cpu.json

The teacher is SmolLM2-135M-Instruct, the student 24 of its 30 layers (`configs/quickstart.yaml`), unless others are
named; the folder has rows to train on, ``train*.jsonl``, and held-out ones, ``dev.jsonl``. Of both those that fit into
``--max-length`` are taken, evenly spaced. The student reflects once; then each arm trains in a process of its own, in
fp32, with the same scores, stages ``{0: 0.5, 1: 0.75}``, batches, seed and AdamW, on one thread. Methods that train
with the student's own text write it at temperature 1. So does the teacher for SeqKD, which is fine-tuning on its
responses to all rows, written as ``srd generate`` does it: of at most ``--max-length`` tokens, and the others left out.

Reported of each are, of the training with all texts that it writes, rows per second and seconds of the processor per
row; and, of held-out rows, the forward KL to the teacher, the loss of the reference response (NLL) and ROUGE-L of
greedy answers. Rows per second are comparable only where as much runs beside: ``load`` is the machine's load average
before and after an arm's training. So the table has the processor's seconds. Every arm is in the file as soon as it is
there, and a second call goes on with those that are missing.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from arms import in_own_process
from lightning import Callback, Trainer, seed_everything
from random_model import SHAPES, write_model, write_rows
from record import record, surroundings
from torch.optim import AdamW

from srd_lightning import (
    ALPACA,
    GKD,
    TAID,
    AdaptiveKL,
    AlphaBeta,
    ChatTemplate,
    ContrastivePair,
    Decoding,
    DistiLLM,
    ForwardKL,
    Hellinger,
    HiddenStateCosine,
    HiddenStateMSE,
    JensenShannon,
    KDLightningModule,
    LayerMapMSE,
    LossDrivenShare,
    MiniLLM,
    Pretrained,
    ReflectionReplay,
    ReverseKL,
    RuntimeBenchmark,
    Selected,
    SkewForwardKL,
    SkewReverseKL,
    SRDDataModule,
    StudentEntropy,
    TAIDSchedule,
    TokenTemperature,
    TotalVariation,
)
from srd_lightning.curation.responses import ResponseWriter
from srd_lightning.data.row_reader import load_rows
from srd_lightning.data.tokenization import row_ids, tokenize
from srd_lightning.digests import digest
from srd_lightning.storage import write_atomically

SCHEDULE = {0: 0.5, 1: 0.75}
LEARNING_RATE = 2e-4
TINY = SHAPES["cpu"]._replace(layers=3)
MEASURES = {"kl": "KL to the teacher", "nll": "NLL", "rouge_l": "ROUGE-L"}


def methods(width: int, layers: dict[int, int], new_tokens: int) -> dict[str, dict[str, Any]]:
    """Return what each arm gives the module, the trainer's callbacks where it needs any, and who writes before.

    Args:
        width: Of the hidden states of both models.
        layers: Of the student, with the teacher's which each is a copy of.
        new_tokens: Longest text that is written in training.
    """
    sampled = Decoding(max_new_tokens=new_tokens, temperature=1.0)
    return {
        "fine-tuning": {"kd_weight": 0.0},
        "SeqKD": {"kd_weight": 0.0, "teacher_writes": True},
        "ForwardKL": {"loss": ForwardKL()},
        "ReverseKL": {"loss": ReverseKL()},
        "JensenShannon": {"loss": JensenShannon()},
        "TotalVariation": {"loss": TotalVariation()},
        "SkewForwardKL": {"loss": SkewForwardKL()},
        "SkewReverseKL": {"loss": SkewReverseKL()},
        "AlphaBeta": {"loss": AlphaBeta()},
        "AdaptiveKL": {"loss": AdaptiveKL()},
        "TAID": {"loss": TAID(ForwardKL()), "callbacks": [TAIDSchedule()]},
        "Selected": {"loss": Selected(ForwardKL(), StudentEntropy())},
        "AdaKD": {
            "loss": Selected(TokenTemperature(ForwardKL(), strength=0.5), Hellinger(), share=1.0),
            "callbacks": [LossDrivenShare()],
        },
        "ContrastivePair": {"loss": ContrastivePair()},
        "HiddenStateMSE": {"auxiliary": [HiddenStateMSE(width, width, weight=0.1)]},
        "HiddenStateCosine": {"auxiliary": [HiddenStateCosine(width, width, weight=0.1)]},
        "LayerMapMSE": {"auxiliary": [LayerMapMSE(width, width, layers, weight=0.1)]},
        "GKD": {"loss": JensenShannon(), "rollouts": GKD(share=0.5, decoding=sampled)},
        "GKD, ContrastivePair": {"loss": ContrastivePair(), "rollouts": GKD(share=0.5, decoding=sampled)},
        "DistiLLM": {"loss": SkewReverseKL(), "rollouts": DistiLLM(share=0.5, rise=0.0, decoding=sampled)},
        "MiniLLM": {"rollouts": MiniLLM(max_new_tokens=new_tokens), "chunk": None},
        "ReflectionReplay": {"loss": SkewReverseKL(), "rollouts": ReflectionReplay(share=0.5)},
    }


ARMS = list(methods(width=1, layers={1: 1}, new_tokens=1))


@dataclass(frozen=True)
class Task:
    """What all arms share.

    Args:
        teacher: Folder of the teacher.
        keep_layers: Of it, those of the student.
        train: Rows to train on.
        heldout: Rows to measure on.
        scores: Folder of what the student scored when it reflected.
        batch: Rows of a step.
        max_length: Longest row, in tokens.
        new_tokens: Longest answer, and text that is written in training.
    """

    teacher: str
    keep_layers: list[int]
    train: list[dict[str, Any]]
    heldout: list[dict[str, Any]]
    scores: str
    batch: int
    max_length: int
    new_tokens: int

    def settings(self) -> dict[str, Any]:
        """Return on what all arms depend, without folders of this machine."""
        return {
            "teacher": Path(self.teacher).name,
            "keep_layers": self.keep_layers,
            "rows": len(self.train),
            "heldout_rows": len(self.heldout),
            "digest_of_rows": digest({"train": json.dumps(self.train), "heldout": json.dumps(self.heldout)}),
            "batch": self.batch,
            "max_length": self.max_length,
            "new_tokens": self.new_tokens,
        }

    @property
    def student(self) -> Pretrained:
        """The student before any training."""
        return Pretrained(self.teacher, keep_layers=self.keep_layers)

    @property
    def greedy(self) -> Decoding:
        """How answers are generated that are scored."""
        return Decoding(max_new_tokens=self.new_tokens)

    def methods(self) -> dict[str, dict[str, Any]]:
        """Return what each arm gives, of objects that no other arm has."""
        middle = max(len(self.keep_layers) // 2, 1)
        layers = {middle: self.keep_layers[middle - 1] + 1, -1: -1}
        return methods(Pretrained(self.teacher).config().hidden_size, layers, self.new_tokens)

    def module(self, **settings: Any) -> KDLightningModule:
        """Return what trains the student, or measures it."""
        return KDLightningModule(
            self.student,
            Pretrained(self.teacher),
            optimizer=lambda parameters: AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.01, fused=True),
            decoding=self.greedy,
            **settings,
        )

    def data(self, student: Pretrained | None = None) -> SRDDataModule:
        """Return the rows; a student, else that of the module, reflects where there are no scores yet."""
        return SRDDataModule(
            {"train": self.train, "test": self.heldout},
            tokenizer=self.teacher,
            student=student,
            template=template_of(self.student.tokenizer()),
            schedule=SCHEDULE,
            scores=self.scores,
            batch_size=self.batch,
            max_length=self.max_length,
            max_prompt_length=self.max_length - 1,
            decoding=self.greedy,
        )


def template_of(tokenizer: Any) -> Any:
    """Return the chat format where the tokenizer has one, as in the quickstart, else the paper's template."""
    return ChatTemplate(system="You are a helpful assistant.") if tokenizer.chat_template else ALPACA


class ProcessorSeconds(Callback):
    """Seconds of the processor, all threads together, that training took."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Note the beginning."""
        self.start = time.process_time()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Note the end."""
        self.seconds = time.process_time() - self.start


def quiet_trainer(folder: str, **settings: Any) -> Trainer:
    """Return a trainer that keeps nothing."""
    return Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def measure(trainer: Trainer, module: KDLightningModule, data: SRDDataModule) -> dict[str, float]:
    """Return the measures of held-out rows, those of a teacher where there is one."""
    (found,) = trainer.test(module, datamodule=data, verbose=False)
    return {name: found[f"test_{name}"] for name in MEASURES if f"test_{name}" in found}


def reflect(task: Task) -> dict[str, Any]:
    """Let the student reflect, where it has not; return how many rows are kept, and how long that took."""
    data = task.data(task.student)
    data.setup("fit")
    assert data.curation is not None
    return {"kept": data.curation.kept, "reflection_seconds": data.curation.seconds}


def run_untrained(task: Task) -> dict[str, Any]:
    """Return what the student and the teacher are before any training."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trainer = quiet_trainer(folder)
        student = measure(trainer, task.module(), task.data())
        alone = KDLightningModule(Pretrained(task.teacher), kd_weight=0.0, decoding=task.greedy)
        teacher = measure(trainer, alone, task.data())
    return {"student": student, "teacher": teacher}


def run_arm(name: str, task: Task) -> dict[str, Any]:
    """Train and measure one arm in this process."""
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    settings = task.methods()[name]
    runtime, processor = RuntimeBenchmark(), ProcessorSeconds()
    callbacks = [*settings.pop("callbacks", []), runtime, processor]
    with tempfile.TemporaryDirectory() as folder:
        written: dict[str, Any] = {"writing_seconds": 0.0, "writing_processor_seconds": 0.0}
        if settings.pop("teacher_writes", False):
            task, written = with_responses_of_teacher(task, Path(folder))
        module, data = task.module(**settings), task.data()
        trainer = quiet_trainer(folder, callbacks=callbacks, max_epochs=len(SCHEDULE), gradient_clip_val=1.0)
        load = [os.getloadavg()[0]]
        trainer.fit(module, datamodule=data)
        load.append(os.getloadavg()[0])
        measures = measure(trainer, module, data)
    columns = ("rows", "steps", "seconds", "generation_seconds")
    rows, steps, seconds, generation_seconds = (  # a stage is an epoch
        sum(stage[column] for stage in runtime.report["stages"]) for column in columns
    )
    seconds += written["writing_seconds"]
    assert data.curation is not None
    return {
        **measures,
        "rows": rows,
        "steps": steps,
        "seconds": seconds,
        "rows_per_second": rows / seconds,
        "processor_seconds_per_row": (processor.seconds + written["writing_processor_seconds"]) / rows,
        "generation_seconds": generation_seconds + written.pop("writing_seconds"),
        **written,
        "peak_memory_bytes": runtime.report["peak_memory_bytes"],
        "reflected_again": data.curation.scored,
        "load": load,
        **made_by(),
    }


def made_by() -> dict[str, Any]:
    """Return by what an arm was run: a later call may be another day's, of another commit, on another machine."""
    found = surroundings()
    parts = ("commit", "clean", "date", "versions")
    return {**{part: found[part] for part in parts}, "instructions": torch.backends.cpu.get_cpu_capability()}


def with_responses_of_teacher(task: Task, folder: Path) -> tuple[Task, dict[str, Any]]:
    """Return a task whose rows to train on have responses of the teacher, with scores by id, and what that has cost."""
    seconds, processor = time.perf_counter(), time.process_time()
    tokenizer = task.student.tokenizer()
    decoding = Decoding(max_new_tokens=task.max_length, temperature=1.0)
    template, file = template_of(tokenizer), folder / "written.jsonl"
    teacher = Pretrained(task.teacher)
    writer = ResponseWriter(teacher, "teacher", tokenizer, template, task.max_length - 1, decoding, 32768, 1)
    left_out = writer.write(load_rows(task.train), file, folder)
    written = [json.loads(line) for line in file.read_text().splitlines()]
    (scores,) = Path(task.scores).glob("part-*.parquet")  # which are of other responses, but order the same rows alike
    return replace(task, train=written, scores=str(scores)), {
        "writing_seconds": time.perf_counter() - seconds,
        "writing_processor_seconds": time.process_time() - processor,
        "written_rows": len(written),
        "left_out": dict(left_out),
    }


def choose_rows(teacher: str, options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return rows to train on and held-out ones, evenly spaced among those that need not be cut."""
    folder = Path(options.data)
    train, heldout = sorted(map(str, folder.glob("train*.jsonl"))), [str(folder / "dev.jsonl")]
    return (
        evenly(train, options.rows, teacher, options.max_length),
        evenly(heldout, options.heldout_rows, teacher, options.max_length),
    )


def evenly(files: list[str], number: int, teacher: str, max_length: int) -> list[dict[str, Any]]:
    """Return so many rows of files that fit."""
    rows, tokenizer = load_rows(files), Pretrained(teacher).tokenizer()
    template = template_of(tokenizer).bind(tokenizer)
    whole, _ = tokenize(rows, tokenizer, template, 2**31 - 1, max_length - 1)
    lengths = zip(whole["id"], whole["length"], strict=True)
    fitting = {row for row, length in lengths if length <= max_length}
    places = [place for place, row in enumerate(row_ids(rows)) if row in fitting]
    chosen = np.linspace(0, len(places) - 1, number).astype(int)
    found: list[dict[str, Any]] = rows.select([places[place] for place in chosen]).to_list()
    return found


class Results:
    """The file of results, which holds every arm as soon as it is there.

    Args:
        path: Of the file; nothing is written without.
        settings: On which all arms depend.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.path = path
        self.found: dict[str, Any] = {"settings": settings, "arms": {}}
        if path is not None and path.exists():
            earlier = json.loads(path.read_text())
            if earlier["settings"] != settings:
                sys.exit(f"{path} has arms of other settings; name another file, or move this one away")
            self.found |= {name: earlier[name] for name in ("untrained", "arms") if name in earlier}

    def add(self, **found: Any) -> None:
        """Add what there is now, and write all of it."""
        self.found |= found
        self.found["command"] = command()
        if self.path is not None:
            write_atomically(self.path, record(self.found, None).encode())

    def add_arm(self, name: str, arm: dict[str, Any]) -> None:
        """Add an arm."""
        self.add(arms={**self.found["arms"], name: arm})


def command() -> str:
    """Return how this was called; of folders elsewhere on this machine the names."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return shlex.join(["python", f"benchmarks/{Path(__file__).name}", *words])


def table(found: dict[str, Any]) -> str:
    """Return the results in markdown."""
    arms, untrained = found["arms"], found["untrained"]
    lines = [["", "processor s/row", *MEASURES.values()], ["---", *["--:"] * 4]]
    for model in ("student", "teacher"):
        lines.append([f"the {model}, untrained", "", *measures_of(untrained[model])])
    for name in (name for name in ARMS if name in arms):
        lines.append([name, f"{arms[name]['processor_seconds_per_row']:.2f}", *measures_of(arms[name])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def measures_of(arm: dict[str, float]) -> list[str]:
    return [f"{arm[name]:.3f}" if name in arm else "" for name in MEASURES]


def quickstart_layers() -> list[int]:
    """Return the layers of the quickstart's student."""
    config = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
    layers: list[int] = yaml.safe_load(config.read_text())["model"]["student"]["keep_layers"]
    return layers


def default_teacher() -> str:
    from srd_lightning.quickstart.fetch import smollm2  # whose packages others can do without

    return str(smollm2())


def make_tiny(options: argparse.Namespace, folder: Path) -> None:
    """Let a random model and rows of its words take the place of what was named."""
    options.teacher, options.data = write_model(folder / "teacher", TINY), str(folder)
    options.keep_layers = [0, TINY.layers - 1]
    write_rows(folder / "train.jsonl", TINY)
    write_rows(folder / "dev.jsonl", TINY)
    options.rows, options.heldout_rows, options.batch, options.new_tokens = TINY.rows, 2, 4, 4
    options.work = folder


def run(options: argparse.Namespace) -> int:
    """Run the arms that are missing, print and write; return the exit code."""
    teacher = options.teacher or default_teacher()
    rows = in_own_process(choose_rows, teacher, options)
    sizes = {name: getattr(options, name) for name in ("batch", "max_length", "new_tokens")}
    task = Task(teacher, options.keep_layers or quickstart_layers(), *rows, str(options.work / "scores"), **sizes)
    results = Results(options.json, task.settings())
    reflection = in_own_process(reflect, task)
    if "untrained" not in results.found:
        results.add(untrained={**in_own_process(run_untrained, task), **reflection})
    missing = [name for name in options.arms if name not in results.found["arms"]]
    failed = False
    with ThreadPoolExecutor(options.at_once) as pool:
        running = {pool.submit(in_own_process, run_arm, name, task): name for name in missing}
        for done in as_completed(running):
            name, error = running[done], done.exception()
            if error is None:
                results.add_arm(name, {**done.result(), "at_once": options.at_once})
            failed |= error is not None
            print(f"{name}: {error or 'done'}", file=sys.stderr, flush=True)
    print(table(results.found))
    return int(failed)


def main() -> int:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with train*.jsonl and dev.jsonl")
    parser.add_argument("--teacher", help="folder or hub id of the teacher, which the student is cut from")
    parser.add_argument("--keep-layers", type=int, nargs="+", help="layers that the student keeps")
    parser.add_argument("--rows", type=int, default=64, help="rows to train on")
    parser.add_argument("--heldout-rows", type=int, default=24, help="rows to measure on")
    parser.add_argument("--batch", type=int, default=8, help="rows per step")
    parser.add_argument("--max-length", type=int, default=128, help="longer rows are left out")
    parser.add_argument("--new-tokens", type=int, default=32, help="longest answer, and text written in training")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, help="which to run")
    parser.add_argument("--at-once", type=int, default=2, help="arms that run side by side, of one thread each")
    parser.add_argument("--work", type=Path, default=Path("runs/methods"), help="folder of the reflection")
    parser.add_argument("--tiny", action="store_true", help="a random model and rows, to see that all of it runs")
    parser.add_argument("--json", type=Path, help="file to write, and to go on with")
    options = parser.parse_args()
    if not (options.data or options.tiny):
        parser.error("--data must name a folder")
    with tempfile.TemporaryDirectory() as folder:
        if options.tiny:
            make_tiny(options, Path(folder))
        return run(options)


if __name__ == "__main__":
    sys.exit(main())
