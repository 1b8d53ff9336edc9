"""Through which files of the library a row, a batch and a checkpoint pass, seen by tracing tiny runs.

    PYTHONPATH=CHECKOUT python benchmarks/house_runs.py

prints JSON for the library that is imported. `benchmarks/house.py` runs this for each revision. It uses public names
only, so it runs on other revisions too. Module code, which runs at import, does not count.

- **row**: one of 409 rows in a jsonl file is followed through curation, a cached teacher and one batch of all rows, to
  the first optimizer step. A function passes the row if, when it returns or yields, its value or one of its local
  variables (``self`` aside) holds the row's text, tokens, id or place in the file, or an entry for each of the rows.
  ``run`` are all files that have a function called in that time, whatever it holds.
- **batch**: the frames of the library on the stack from ``training_step`` down to the loss's ``value_and_gradient``,
  both counted, at their deepest, with the teacher asked in every step and with a cached one. ``run`` are all files
  that have a function called within ``training_step``.
- **checkpoint**: of a run that saves and one that resumes. A file writes or reads something of a checkpoint if a
  function of it is a hook by which Lightning asks for or gives back a state; if it holds, when it returns, the
  checkpoint or a dict or list within it; or if it opens, renames or removes files in the folder of checkpoints.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import datasets
import numpy as np
import pyarrow as pa
import torch
from lightning import Trainer
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import LambdaCallback
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

import srd_lightning
from srd_lightning import Decoding, HyperparameterScheduler, KDLightningModule, ResumeCheckpoint, SRDDataModule

PACKAGE = Path(srd_lightning.__file__).resolve().parent
SOURCE = f"{PACKAGE}{os.sep}"

ROWS, PLACE = 409, 397
"""How many rows there are, and which one is followed: numbers that are no token, length or size here."""
SIGN = "¤§"
SIGN_IN_BYTES = SIGN.encode()
SIGN_IN_TOKENS = tuple(byte + 3 for byte in SIGN_IN_BYTES[:2])
HOOKS = {"state_dict", "load_state_dict", "on_save_checkpoint", "on_load_checkpoint"}


class Trace:
    """Calls of functions of the library, and their files, while it is on."""

    def __init__(self, on_call: Callable[[FrameType], None], on_return: Callable[[FrameType, Any], None]) -> None:
        self.on_call, self.on_return = on_call, on_return

    @contextmanager
    def on(self) -> Iterator[None]:
        """Trace in this thread and in those that begin meanwhile."""
        threading.settrace(self._called)
        sys.settrace(self._called)
        try:
            yield
        finally:
            self.off()

    @staticmethod
    def off() -> None:
        """Trace no longer."""
        sys.settrace(None)
        threading.settrace(None)

    def _called(self, frame: FrameType, event: str, value: Any) -> Any:
        if not of_library(frame) or frame.f_code.co_name == "<module>":
            return None
        frame.f_trace_lines = False
        self.on_call(frame)
        return self._returned

    def _returned(self, frame: FrameType, event: str, value: Any) -> Any:
        if event == "return":
            self.on_return(frame, value)
        return self._returned


def of_library(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(SOURCE)


def file_of(frame: FrameType) -> str:
    return frame.f_code.co_filename.removeprefix(SOURCE)


def stack_of(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def values_of(frame: FrameType, value: Any) -> Iterator[Any]:
    yield value
    yield from (local for name, local in frame.f_locals.items() if name != "self")


# A row


def holds_row(value: Any, depth: int = 4) -> bool:
    """Say whether a value is, or contains, the followed row or something for each row."""
    if isinstance(value, str):
        return SIGN in value
    if isinstance(value, bytes):
        return SIGN_IN_BYTES in value
    if isinstance(value, (int, np.integer)):
        return value == PLACE
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return array_holds_row(value)
    if isinstance(value, (pa.Table, pa.Array, pa.ChunkedArray)):
        return len(value) == ROWS or (depth > 0 and holds_row(value.to_pylist(), depth - 1))
    if isinstance(value, datasets.Dataset):
        return len(value) == ROWS or holds_row(value[:], depth)
    if isinstance(value, (range, list, tuple, set, frozenset, Mapping)):
        return len(value) == ROWS or (depth > 0 and any(holds_row(entry, depth - 1) for entry in entries_of(value)))
    return False


def entries_of(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    entries = list(value)
    if all(type(entry) is int for entry in entries):
        return [*entries, *(SIGN for pair in itertools.pairwise(entries) if pair == SIGN_IN_TOKENS)]
    return entries


def array_holds_row(value: Any) -> bool:
    if not len(value.shape):
        return False
    if value.shape[0] == ROWS:
        return True
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() or value.is_meta:
            return False
        value = value.detach().numpy()
    if value.dtype.kind in "OSU":
        return any(map(holds_row, value.tolist()))
    tokens = value[..., :-1] == SIGN_IN_TOKENS[0]
    return bool((value == PLACE).any() or (tokens & (value[..., 1:] == SIGN_IN_TOKENS[1])).any())


def follow_row(folder: Path) -> dict[str, Any]:
    """Return the files that the row passes, and those that run meanwhile."""
    holders: set[str] = set()
    ran: set[str] = set()

    def called(frame: FrameType) -> None:
        ran.add(file_of(frame))

    def returned(frame: FrameType, value: Any) -> None:
        if file_of(frame) not in holders and any(map(holds_row, values_of(frame, value))):
            holders.add(file_of(frame))

    trace = Trace(called, returned)
    stop = LambdaCallback(on_train_batch_end=lambda *_: trace.off())
    source = write_rows(folder / "rows.jsonl", ROWS)
    with trace.on():
        data = data_of(str(source), batch_size=ROWS, schedule={0: 0.999, 1: 1.0})
        fit(module_of(teacher_cache="hidden"), data, folder, [stop], max_steps=1)
    return {"files": sorted(holders), "run": sorted(ran)}


# A batch


def follow_batch(folder: Path) -> dict[str, Any]:
    """Return the deepest stack of a training step, and the files that run within one."""
    deepest: list[str] = []
    on_stacks: set[str] = set()
    ran: set[str] = set()

    def called(frame: FrameType) -> None:
        names = [entry for entry in stack_of(frame) if of_library(entry)]
        steps = [place for place, entry in enumerate(names) if entry.f_code.co_name == "training_step"]
        if not steps:
            return
        ran.add(file_of(frame))
        stack = names[: steps[0] + 1]
        if [entry.f_code.co_name for entry in stack].count("value_and_gradient") != 1:
            return
        if frame.f_code.co_name == "value_and_gradient":
            on_stacks.update(map(file_of, stack))
            frames = [f"{file_of(entry)}: {entry.f_code.co_name}" for entry in stack[::-1]]
            if len(frames) > len(deepest):
                deepest[:] = frames

    for cached in ("none", "hidden"):
        source = write_rows(folder / f"{cached}.jsonl", 8)
        module, data = module_of(teacher_cache=cached), data_of(str(source), batch_size=2)
        with Trace(called, lambda *_: None).on():
            fit(module, data, folder / cached, [], max_steps=2)
    return {"frames": deepest, "files": sorted(on_stacks), "run": sorted(ran)}


# A checkpoint


class Checkpoints:
    """Which files write or read something of the checkpoints in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        self.hooks: set[str] = set()
        self.holders: set[str] = set()
        self.disk: set[str] = set()
        self._parts: dict[int, Any] = {}
        self._on = True

    def called(self, frame: FrameType) -> None:
        """Learn the parts that a hook is given."""
        if self.is_hook(frame):
            self.hooks.add(file_of(frame))
            for name, value in list(frame.f_locals.items()):
                if name != "self":
                    self.learn(value)

    def returned(self, frame: FrameType, value: Any) -> None:
        """Learn what a hook returns; see who holds a part."""
        if self.is_hook(frame):
            self.learn(value)
        for held in values_of(frame, value):
            if isinstance(held, dict) and "pytorch-lightning_version" in held:
                self.learn(held)
            if id(held) in self._parts:
                self.holders.add(file_of(frame))

    @staticmethod
    def is_hook(frame: FrameType) -> bool:
        """Say whether Lightning, or torch, has called a hook for states."""
        caller = frame.f_back
        return frame.f_code.co_name in HOOKS and caller is not None and not of_library(caller)

    def learn(self, value: Any, depth: int = 4) -> None:
        """Know a dict or list, and those in it; an empty one may be a constant."""
        if isinstance(value, (dict, list)) and value and depth and id(value) not in self._parts:
            self._parts[id(value)] = value
            for entry in value.values() if isinstance(value, dict) else value:
                self.learn(entry, depth - 1)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Note who opens, renames or removes files of the folder."""
        if not self._on or event not in ("open", "os.rename", "os.remove", "shutil.rmtree", "shutil.copyfile"):
            return
        if any(isinstance(path, (str, os.PathLike)) and str(path).startswith(self.folder) for path in arguments[:2]):
            frame = next(filter(of_library, stack_of(sys._getframe())), None)
            if frame is not None:
                self.disk.add(file_of(frame))

    def off(self) -> None:
        """Note nothing more: a hook of the interpreter cannot be taken away."""
        self._on = False


def follow_checkpoint(folder: Path) -> dict[str, Any]:
    """Return the files that write or read something of a checkpoint."""
    found = Checkpoints(folder / "checkpoints")
    sys.addaudithook(found.audit)
    source = write_rows(folder / "rows.jsonl", 8)
    with Trace(found.called, found.returned).on():
        for epochs in (1, 2):
            saved = ResumeCheckpoint(folder / "checkpoints")
            schedules = HyperparameterScheduler({"loss.temperature": {0: 1.0, 1: 2.0}})
            fit(module_of(), data_of(str(source)), folder, [saved, schedules], max_epochs=epochs, ckpt_path="last")
    found.off()
    files = found.hooks | found.holders | found.disk
    return {
        "files": sorted(files),
        "hooks": sorted(found.hooks),
        "hold it": sorted(found.holders),
        "on disk": sorted(found.disk),
    }


# Tiny runs


def write_rows(path: Path, rows: int) -> Path:
    lines = [{"id": f"r{row}", "instruction": f"Say {row % 7}.", "output": f"It is {row % 5}."} for row in range(rows)]
    marked = min(PLACE, rows - 1)
    lines[marked] = {"id": f"r{SIGN}", "instruction": f"Say {SIGN}.", "output": f"It is {SIGN}."}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    return path


def tiny_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=1,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def module_of(**settings: Any) -> KDLightningModule:
    seed_everything(0, verbose=False)
    return KDLightningModule(tiny_model(), tiny_model(), kd_weight=0.8, **settings)


def data_of(source: str, **settings: Any) -> SRDDataModule:
    decoding = Decoding(max_new_tokens=4)
    settings = {"schedule": {0: 0.5, 1: 1.0}, **settings}
    return SRDDataModule({"train": source}, tokenizer=ByT5Tokenizer(), decoding=decoding, **settings)


def fit(
    module: Any, data: Any, folder: Path, callbacks: list[Any], ckpt_path: str | None = None, **limits: Any
) -> None:
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(ckpt_path),
        gradient_clip_val=1.0,
        default_root_dir=folder,
        callbacks=callbacks,
        **limits,
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)


def main() -> None:
    """Make all runs and print what was seen."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        datasets.config.HF_DATASETS_CACHE = folder / "datasets"
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        parts = {"row": follow_row, "batch": follow_batch, "checkpoint": follow_checkpoint}
        found: dict[str, Any] = {part: follow(folder / part) for part, follow in parts.items()}
    found["package"] = str(PACKAGE)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
