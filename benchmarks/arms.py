"""What the benchmarks of a training step share: this library's arms, the clock, a process for each."""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from record import told

# Lightning and this library are imported where they are used, so that no arm holds the memory of another's.

MAX_PROMPT_LENGTH = 256


@dataclass
class Clock:
    """When training began, and when each step ended."""

    start: float = 0.0
    ends: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def begin(self, *_: Any, **__: Any) -> None:
        """Note the beginning."""
        self.start = time.perf_counter()

    def end_step(self) -> None:
        """Note the end of a step."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def result(self, options: argparse.Namespace) -> dict[str, float]:
        """Return what is reported of an arm."""
        per_epoch = options.rows // options.batch
        steps = np.diff(self.ends)[-per_epoch:].tolist()
        return {
            "first_loss": self.losses[0],
            "last_loss": self.losses[-1],
            "seconds_per_step": statistics.median(steps),
            "rows_per_second": options.batch * len(steps) / sum(steps),
            "first_epoch_seconds": self.ends[per_epoch - 1] - self.start,
            "peak_gb": peak_bytes() / 1e9,
        }


def peak_bytes() -> int:
    """Return the peak memory: of the GPU if there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_ours(
    rows: Sequence[dict[str, Any]], options: argparse.Namespace, bf16: bool, cached: bool, **settings: Any
) -> Clock:
    """Train with this library; settings go to the module."""
    from lightning.pytorch.callbacks import LambdaCallback

    from srd_lightning import KDLightningModule, Pretrained

    clock = Clock()
    module = KDLightningModule(
        Pretrained(options.model, keep_layers=options.keep_layers),
        Pretrained(options.model, dtype="bfloat16" if bf16 else "float32"),
        teacher_cache="hidden" if cached else "none",
        micro_batch_tokens=options.micro_batch_tokens,
        **settings,
    )

    def end_step(trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        clock.losses.append(outputs["loss"].item())
        clock.end_step()

    callback = LambdaCallback(setup=clock.begin, on_train_batch_end=end_step)
    with tempfile.TemporaryDirectory() as folder:
        fit(rows, options, module, folder, callbacks=[callback], precision="bf16-mixed" if bf16 else "32-true")
    return clock


def fit(rows: Sequence[dict[str, Any]], options: argparse.Namespace, module: Any, folder: str, **settings: Any) -> None:
    """Fit on all rows from the start."""
    from lightning import Trainer

    from srd_lightning import SRDDataModule

    data = SRDDataModule(
        list(rows),
        tokenizer=options.model,
        schedule={0: 1.0},
        batch_size=options.batch,
        max_length=options.max_length,
        max_prompt_length=MAX_PROMPT_LENGTH,
    )
    trainer = Trainer(
        max_epochs=options.epochs,
        devices=1,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(module, datamodule=data)


def attempt(arm: str, function: Any, *arguments: Any) -> Any | None:
    """Run an arm in a process of its own; if it fails, tell so and return nothing, so that the others are run."""
    try:
        return in_own_process(function, *arguments)
    except Exception as error:
        traceback.print_exc()
        print(told(arm, f"failed: {type(error).__name__}: {error}"[:500], outcome="failed"), flush=True)
        return None


def in_own_process(function: Any, *arguments: Any) -> Any:
    context = get_context("forkserver")  # whose server has imported what all arms use, and has done nothing
    context.set_forkserver_preload(["torch", "transformers.models.auto.modeling_auto"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()
