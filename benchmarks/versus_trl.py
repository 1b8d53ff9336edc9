"""A training step against the one of TRL's `GKDTrainer`: same models, batches, tokens, loss and optimizer.

    python benchmarks/versus_trl.py --model TEACHER --keep-layers 0 1 2 … --data train.jsonl --json versus_trl.json

needs ``trl`` besides this library (made with 1.16.0). The student is the teacher without the layers that are not kept.

- ``trl_fp32``, ``trl_bf16``: `GKDTrainer` with ``lmbda=0`` (the rows' own responses) and ``beta=0`` (forward KL); in
  bf16 it autocasts the student, and gets its teacher in bf16 by ``teacher_model_init_kwargs``.
- ``ours_live_fp32``, ``ours_live_bf16``: `KDLightningModule` with ``kd_weight=1``; in bf16 with
  ``precision="bf16-mixed"`` and a teacher in bf16.
- ``ours_cached_fp32``, ``ours_cached_bf16``: the same with ``teacher_cache="hidden"``, made during the first epoch or
  before it.

TRL trains on the very batches that `SRDDataModule` makes: they are recorded first, and given to TRL as token ids with a
completion mask, which its own collator takes as they are. (It pads them on the left, we on the right.) With
``--shuffled`` TRL puts rows together as it does by default. Rows over ``--max-length`` tokens are left out, so that
nobody cuts or refuses one. Two of TRL's defaults are off, as we have nothing of the kind: clipping of gradients, and
gradient checkpointing, which costs it time and saves it memory; ``--checkpointing`` turns the latter on again.

Every arm runs in a process of its own. Prints and writes, per arm: the losses of the first and the last step, which
agree to rounding where the precision is the same (in bf16, rounding depends on the side that is padded); the median
seconds of a step and the rows per second of the last epoch, where a step lasts from the end of the one before to its
own end, loading of the batch included (of a single epoch, all steps but the first); the seconds of the first epoch,
which a cache is paid for in; and the peak memory of the process (of the GPU where there is one). Then the ratios of
ours to TRL's. Times are noisy: quote the ratio of one run, with the machine it was made on, and let nothing else run
beside it.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arms import MAX_PROMPT_LENGTH, Clock, attempt, fit, in_own_process, run_ours
from record import record, told

# Trainers are imported where they are used, so that no arm holds the memory of the other's.

ARMS = [f"{arm}_{precision}" for precision in ("fp32", "bf16") for arm in ("trl", "ours_live", "ours_cached")]
COLUMNS = ("first_loss", "last_loss", "seconds_per_step", "rows_per_second", "first_epoch_seconds", "peak_gb")


@dataclass(frozen=True)
class Task:
    """What all arms do; ``tokens`` are the rows of all epochs, tokenised, in the order of our batches."""

    options: argparse.Namespace
    rows: list[dict[str, Any]]
    tokens: list[dict[str, Any]]


def run_trl(task: Task, bf16: bool) -> Clock:
    """Train with TRL."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from datasets import Dataset
    from torch.optim import AdamW
    from transformers import TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    from srd_lightning import Pretrained

    options, clock = task.options, Clock()

    class Times(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end_step()

    source = Pretrained(options.model, keep_layers=options.keep_layers)
    student: Any = source.model()
    with tempfile.TemporaryDirectory() as folder:
        trainer = GKDTrainer(
            student,
            options.model,
            GKDConfig(folder, bf16=bf16, **trl_settings(options, bf16)),
            train_dataset=Dataset.from_list(task.tokens),
            processing_class=source.tokenizer(),
            callbacks=[Times()],
            optimizers=(AdamW(student.parameters(), lr=1e-4, weight_decay=0.01, fused=True), None),  # ours by default
        )
        trainer.train()
    clock.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return clock


def trl_settings(options: argparse.Namespace, bf16: bool) -> dict[str, Any]:
    return {
        "lmbda": 0.0,  # no step on answers of the student
        # `generalized_jsd_loss` has a branch for beta == 0: F.kl_div(student_log_probs, teacher_log_probs,
        # log_target=True), which is KL(teacher ‖ student), forward KL. beta == 1 is reverse KL.
        "beta": 0.0,
        "teacher_model_init_kwargs": {"dtype": "bfloat16" if bf16 else "float32"},
        "per_device_train_batch_size": options.batch,
        "num_train_epochs": 1,  # the rows are those of all epochs
        "train_sampling_strategy": "random" if options.shuffled else "sequential",
        "max_length": options.max_length,
        "max_grad_norm": 0.0,
        "gradient_checkpointing": options.checkpointing,
        "lr_scheduler_type": "constant",
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def our_batches(rows: list[dict[str, Any]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of all epochs as TRL's collator takes them, in the order of our batches."""
    from lightning import LightningModule

    tokens: list[dict[str, Any]] = []

    class Recorder(LightningModule):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            columns = (batch[name] for name in ("input_ids", "attention_mask", "labels"))
            for ids, mask, labels in zip(*columns, strict=True):
                real = mask.bool()
                response = (labels[real] != -100).long()
                tokens.append({"prompt": "", "input_ids": ids[real].tolist(), "completion_mask": response.tolist()})

        def configure_optimizers(self) -> None:
            return None

    with tempfile.TemporaryDirectory() as folder:
        fit(rows, options, Recorder(), folder)
    return tokens


def rows_that_fit(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return rows, evenly spaced, of those that need not be cut."""
    from srd_lightning import ALPACA, Pretrained
    from srd_lightning.data.row_reader import load_rows
    from srd_lightning.data.tokenization import row_ids, tokenize

    rows = load_rows(options.data)
    whole, _ = tokenize(rows, Pretrained(options.model).tokenizer(), ALPACA, 2**31 - 1, MAX_PROMPT_LENGTH)
    lengths = zip(whole["id"], whole["length"], strict=True)
    fitting = {row for row, length in lengths if length <= options.max_length}
    places = [place for place, row in enumerate(row_ids(rows)) if row in fitting]
    chosen = np.linspace(0, len(places) - 1, options.rows).astype(int)
    return rows.select([places[place] for place in chosen]).to_list()


def run_arm(task: Task, name: str) -> dict[str, float]:
    """Run one arm in this process."""
    arm, precision = name.rsplit("_", 1)
    bf16 = precision == "bf16"
    if arm == "trl":
        return run_trl(task, bf16).result(task.options)
    clock = run_ours(task.rows, task.options, bf16, cached=arm == "ours_cached", kd_weight=1.0)
    return clock.result(task.options)


def ratios(arms: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Compare our arms with TRL's of the same precision: speed and memory, and by how much the first loss differs."""
    found = {}
    for name, ours in arms.items():
        trl = arms.get(f"trl_{name.rsplit('_', 1)[1]}")
        if trl is not None and ours is not trl:
            found[name] = {
                "rows_per_second": ours["rows_per_second"] / trl["rows_per_second"],
                "first_epoch_seconds": ours["first_epoch_seconds"] / trl["first_epoch_seconds"],
                "peak_gb": ours["peak_gb"] / trl["peak_gb"],
                "first_loss_difference": abs(ours["first_loss"] - trl["first_loss"]),
            }
    return found


def table(arms: dict[str, dict[str, float]], ratio: dict[str, dict[str, float]]) -> str:
    lines = [" " * 17 + "".join(f"{column.replace('_', ' '):>20}" for column in COLUMNS) + f"{'speed / TRL':>13}"]
    for name, arm in arms.items():
        speed = f"{ratio[name]['rows_per_second']:>13.2f}" if name in ratio else ""
        lines.append(f"{name:<17}" + "".join(f"{arm[column]:>20.5g}" for column in COLUMNS) + speed)
    return "\n".join(lines)


def main() -> None:
    """Run the arms, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id of the teacher, which the student is cut from")
    parser.add_argument("--keep-layers", type=int, nargs="+", help="layers that the student keeps")
    parser.add_argument("--data", required=True, nargs="+", help="files of rows")
    parser.add_argument("--rows", type=int, default=32, help="rows to train on, evenly spaced; a multiple of --batch")
    parser.add_argument("--batch", type=int, default=8, help="rows per step")
    parser.add_argument("--epochs", type=int, default=2, help="epochs; the last is timed")
    parser.add_argument("--max-length", type=int, default=512, help="longer rows are left out")
    parser.add_argument("--shuffled", action="store_true", help="let TRL put rows together itself")
    parser.add_argument("--checkpointing", action="store_true", help="let TRL recompute activations, its default")
    parser.add_argument("--micro-batch-tokens", type=int, default=2048, help="of ours")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, help="which to run")
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    if options.rows % options.batch:
        parser.error("--rows must be a multiple of --batch")
    rows = in_own_process(rows_that_fit, options)
    task = Task(options, rows, in_own_process(our_batches, rows, options))
    arms = {}
    for name in options.arms:
        if (arm := attempt(name, run_arm, task, name)) is not None:
            arms[name] = arm
            says = f"{arm['rows_per_second']:.4g} rows/s, {arm['peak_gb']:.3g} GB, first loss {arm['first_loss']:.5g}"
            print(told(name, says, **arm), flush=True)
    settings = {name: str(value) for name, value in vars(options).items()}
    threads = {"threads": torch.get_num_threads(), "trl": version("trl")}
    print(record({"arms": arms, "ratio": ratios(arms), "options": settings, **threads}, options.json))
    print(table(arms, ratios(arms)))


if __name__ == "__main__":
    main()
