"""Tokens per second, share of the device's speed, and waits of a training step, for students and teachers of a size.

    python benchmarks/gpu/throughput.py small        # 0.1B learns from 1.5B
    python benchmarks/gpu/throughput.py large        # 1.5B learns from 7B

The models have Llama's structure and random weights, which are made where they are used; every row has the same number
of tokens. Precision is bf16-mixed with a teacher in bf16, the optimizer AdamW, gradients are clipped. Arms: ``live``,
the teacher is run in every step; ``hidden`` and ``topk``, it is cached. Of each:

- tokens per second, prompts included, over ``--steps`` steps, measured from the end of one to the end of the last;
- MFU, model FLOPs utilisation: the operations that these need (two for each weight and token, and thrice that where
  there are gradients; heads on response tokens only; attention to earlier tokens) over time, as a share of what large
  products reach here;
- waits: how often a step makes the host wait for the device, counted by the profiler in ``--profiled`` more steps; the
  calls of CUDA that wait, copies to the host, and values that are asked for.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from arms import peak_bytes  # noqa: E402
from loss import reset_peak  # noqa: E402
from random_model import tokenizer_of_words  # noqa: E402
from record import told  # noqa: E402
from step import matmul_flops_per_second  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


@dataclass(frozen=True)
class Size:
    """Of a model."""

    width: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    tied: bool = True


@dataclass(frozen=True)
class Pair:
    """A student, a teacher, their vocabulary, and rows of a step, each of so many tokens of prompt and response."""

    student: Size
    teacher: Size
    vocabulary: int
    batch: int
    prompt: int
    response: int


B0_1, B1_5 = Size(512, 2048, 12, 8, 8), Size(1536, 8960, 28, 12, 2)
B7 = Size(3584, 18944, 28, 28, 4, tied=False)
PAIRS = {
    "small": Pair(B0_1, B1_5, 151936, batch=32, prompt=128, response=384),
    "large": Pair(B1_5, B7, 151936, batch=16, prompt=128, response=384),
    "tiny": Pair(Size(16, 32, 1, 2, 2), Size(16, 32, 2, 2, 1), 128, batch=2, prompt=4, response=8),
}
ARMS = ("live", "hidden", "topk")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "Memcpy DtoH", "_local_scalar_dense")


def make_model(size: Size, vocabulary: int, dtype: torch.dtype) -> Any:
    """Return a model with random weights, made on the device."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_heads,
        tie_word_embeddings=size.tied,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=1,
    )
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def needed_flops(pair: Pair, live: bool, with_head: bool) -> float:
    """Return the operations that a step needs."""
    length, rows = pair.prompt + pair.response, pair.batch
    head = [size.width * pair.vocabulary for size in (pair.student, pair.teacher)]

    def body(size: Size) -> float:
        kept = size.key_heads / size.heads
        weights = size.layers * (size.width**2 * (2 + 2 * kept) + 3 * size.width * size.inner)
        attention = size.layers * 2 * length * size.width  # products of two matrices, over half of the pairs
        return 2 * weights + attention

    student = rows * (3 * body(pair.student) * length + 3 * 2 * head[0] * pair.response)
    return student + rows * (live * body(pair.teacher) * length + with_head * 2 * head[1] * pair.response)


class Watch:
    """Times some steps, then counts the waits of some more; to be held by a callback."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.begun = self.seconds = 0.0
        self.waits: Counter[str] = Counter()
        self.profiler: Any = None

    def end_step(self, trainer: Any, *_: Any) -> None:
        """Begin or end what is to be measured after so many steps."""
        first = self.options.warm_up
        last = first + self.options.steps
        if trainer.global_step in (first, last):
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            self.begun, before = time.perf_counter(), self.begun
            self.seconds = self.begun - before
        if trainer.global_step == last and self.options.profiled:
            cuda = [ProfilerActivity.CUDA] if DEVICE == "cuda" else []
            self.profiler = profile(activities=[ProfilerActivity.CPU, *cuda])
            self.profiler.__enter__()
        if trainer.global_step == last + self.options.profiled and self.profiler is not None:
            self.profiler.__exit__(None, None, None)
            names = [event.name for event in self.profiler.events()]
            self.waits.update(wait for name in names for wait in WAITS if wait in name)


def run(arm: str, pair: Pair, models: tuple[Any, Any], options: argparse.Namespace, folder: str) -> Watch:
    """Train some steps."""
    from lightning import Trainer
    from lightning.pytorch.callbacks import LambdaCallback

    from srd_lightning import KDLightningModule, PromptTemplate, SRDDataModule

    steps = options.warm_up + options.steps + options.profiled
    words = ["w2", "w3", "w4", "w5", "w6", "w7", "w8", "w9"]

    def text(length: int, shift: int) -> str:
        return " ".join(words[(place + shift) % len(words)] for place in range(length))

    rows = [
        {"id": row, "instruction": text(pair.prompt, row), "output": text(pair.response - 1, row)}
        for row in range(steps * pair.batch)
    ]
    data = SRDDataModule(
        rows,
        tokenizer=tokenizer_of_words(pair.vocabulary),
        template=PromptTemplate("{instruction} {input}", "{instruction}"),
        schedule={0: 1.0},
        batch_size=pair.batch,
        max_length=pair.prompt + pair.response,
        max_prompt_length=pair.prompt,
    )
    module = KDLightningModule(
        *models, kd_weight=0.8, compile=options.compile, teacher_cache="none" if arm == "live" else arm
    )
    watch = Watch(options)
    trainer = Trainer(
        max_epochs=1,
        devices=1,
        accelerator="auto",
        precision="bf16-mixed" if DEVICE == "cuda" else "32-true",
        gradient_clip_val=1.0,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[LambdaCallback(on_train_batch_end=watch.end_step)],
    )
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == steps, f"{trainer.global_step} steps were made instead of {steps}"
    return watch


def measure(arm: str, pair: Pair, teacher: Any, options: argparse.Namespace, speed: float) -> Iterator[str]:
    """Measure one arm, and tell of it."""
    student = make_model(pair.student, pair.vocabulary, torch.float32)
    reset_peak()
    with tempfile.TemporaryDirectory() as folder:
        watch = run(arm, pair, (student, teacher), options, folder)
    tokens = options.steps * pair.batch * (pair.prompt + pair.response)
    per_second = tokens / watch.seconds
    flops = options.steps * needed_flops(pair, live=arm == "live", with_head=arm != "topk") / watch.seconds
    waits = {name: count / options.profiled for name, count in watch.waits.items()} if options.profiled else {}
    says = (
        f"{per_second:,.0f} tokens/s, {1e3 * watch.seconds / options.steps:.1f} ms a step, MFU {flops / speed:.1%} of "
        f"{speed / 1e12:.4g} TFLOP/s, {peak_bytes() / 1e9:.2f} GB with the teacher, waits a step: "
        + (", ".join(f"{name} {count:g}" for name, count in waits.items()) or "none")
    )
    numbers = {"tokens_per_second": per_second, "flops_per_second": flops, "share_of_products": flops / speed}
    yield told(f"{options.pair} {arm}", says, **numbers, waits_per_step=waits, peak_bytes=peak_bytes())


def main() -> None:
    """Run the arms; one that fails does not keep the others from being run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", choices=PAIRS, help="sizes of student and teacher")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, help="which to run")
    parser.add_argument("--warm-up", type=int, default=4, help="steps before those that are timed")
    parser.add_argument("--steps", type=int, default=8, help="steps that are timed")
    parser.add_argument("--profiled", type=int, default=3, help="steps whose waits are counted")
    parser.add_argument("--compile", action="store_true", help="compile the bodies of both")
    options = parser.parse_args()
    pair, speed = PAIRS[options.pair], matmul_flops_per_second(TYPE)
    torch.manual_seed(0)
    teacher = make_model(pair.teacher, pair.vocabulary, TYPE)
    for arm in options.arms:
        try:
            for line in measure(arm, pair, teacher, options, speed):
                print(line, flush=True)
        except Exception as error:
            traceback.print_exc()
            name = f"{options.pair} {arm}"
            print(told(name, f"failed: {type(error).__name__}: {error}"[:500], outcome="failed"), flush=True)


if __name__ == "__main__":
    main()
