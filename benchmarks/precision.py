"""How far the gradient of a training step is from float64, in each precision and with each cache, and what it takes.

    python benchmarks/precision.py --data train.jsonl --json precision.json

One batch, models as in `step.py`, forward KL at temperature 1.5 with weight 0.8. The reference is float64 with all
logits.

- ``fp32``; ``bf16-mixed`` (products in bf16, weights in fp32); ``bf16-true`` (weights in bf16): teacher and student so.
- ``hidden …``: fp32, with the teacher's hidden states from a cache in that type; ``topk …``: its likeliest tokens.

Reported are the difference of the loss over the loss, of the student's whole gradient (norm over norm), the angle
between the two in degrees, and the median seconds of forward and backward. Times are noisy: let nothing else run beside
it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from arms import in_own_process
from record import record
from step import KD_WEIGHT, TEMPERATURE, choose_model, choose_rows, models_and_rows

from srd_lightning import ForwardKL, Pretrained
from srd_lightning.data.batches import collate
from srd_lightning.data.layout import FIRST
from srd_lightning.models.split import SplitModel
from srd_lightning.teacher.live import CachedTeacher, HiddenStates, TopK
from srd_lightning.training.step import DistillationStep

REPEATS = 3


def gradient(step: DistillationStep, batch: Any, autocast: bool) -> tuple[float, torch.Tensor]:
    """Return the loss, and all gradients of the student as one vector in float64."""
    step.student.zero_grad()
    with torch.autocast(batch["labels"].device.type, torch.bfloat16, enabled=autocast):
        loss = step.objective(batch, ForwardKL(TEMPERATURE), KD_WEIGHT).loss
    loss.backward()
    parts = [parameter.grad.double().flatten() for parameter in step.student.parameters()]
    return float(loss), torch.cat(parts)


def cached(kind: HiddenStates | TopK, teacher: Any, batch: dict[str, Any]) -> tuple[CachedTeacher, dict[str, Any]]:
    """Return a teacher that is cached, and the batch with what it brings along."""
    parts = SplitModel(teacher)
    head = parts.head()
    with torch.no_grad():
        kept = kind.observe(parts.hidden(batch), head)
    counts = (batch["labels"] != -100).sum(1)
    first = counts.cumsum(0) - counts - (batch["labels"] != -100).int().argmax(1)
    return CachedTeacher(kind, head), {**batch, **kept, FIRST: first}


def arms(
    options: argparse.Namespace, batch: dict[str, Any]
) -> dict[str, Callable[[], tuple[DistillationStep, Any, bool]]]:
    """Return what makes each arm: a step, its batch, and whether to autocast."""
    device = batch["labels"].device

    def models(dtype: str) -> tuple[Any, Any]:
        student = Pretrained(options.model, dtype=dtype, keep_layers=options.keep_layers).model()
        teacher = Pretrained(options.model, dtype=dtype).model()
        return student.to(device).eval(), teacher.to(device).eval().requires_grad_(False)

    def with_cache(kind: HiddenStates | TopK) -> tuple[DistillationStep, Any, bool]:
        student, teacher = models("float32")
        known, more = cached(kind, teacher, batch)
        return DistillationStep().attach(student, known), more, False

    def mixed() -> tuple[DistillationStep, Any, bool]:
        return DistillationStep().attach(models("float32")[0], models("bfloat16")[1]), batch, True

    return {
        "fp32": lambda: (DistillationStep().attach(*models("float32")), batch, False),
        "fp32, all logits": lambda: (DistillationStep(None).attach(*models("float32")), batch, False),
        "bf16-mixed": mixed,
        "bf16-true": lambda: (DistillationStep().attach(*models("bfloat16")), batch, False),
        "hidden fp32": lambda: with_cache(HiddenStates(torch.float32)),
        "hidden bf16": lambda: with_cache(HiddenStates(torch.bfloat16)),
        "topk 16": lambda: with_cache(TopK(16)),
        "topk 64": lambda: with_cache(TopK(64)),
        "topk 256": lambda: with_cache(TopK(256)),
        "float64, all logits": lambda: (DistillationStep(None).attach(*models("float64")), batch, False),
    }


def measure(make: Callable[[], tuple[DistillationStep, Any, bool]], repeats: int) -> tuple[float, torch.Tensor, float]:
    """Return loss, gradient and median seconds of an arm."""
    step, batch, autocast = make()
    loss, found = gradient(step, batch, autocast)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        gradient(step, batch, autocast)[1].sum().item()
        seconds.append(time.perf_counter() - start)
    return loss, found, statistics.median(seconds) if seconds else float("nan")


def main() -> None:
    """Run the arms, print and write."""
    parser = models_and_rows(__doc__)
    parser.add_argument("--rows", type=int, default=8, help="rows of the batch")
    parser.add_argument("--max-length", type=int, default=256, help="longer rows are cut")
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    choose_model(options)
    _, rows = in_own_process(choose_rows, options)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch = {name: values.to(device) for name, values in collate(rows, pad_token_id=0).items()}
    every = arms(options, batch)
    exact_loss, exact, _ = measure(every.pop("float64, all logits"), repeats=0)
    results = {}
    for name, make in every.items():
        loss, found, seconds = measure(make, REPEATS)
        cosine = float(found @ exact / found.norm() / exact.norm())
        results[name] = {
            "loss_error": abs(loss - exact_loss) / exact_loss,
            "gradient_error": float((found - exact).norm() / exact.norm()),
            "angle_degrees": float(torch.rad2deg(torch.arccos(torch.tensor(min(cosine, 1.0), dtype=torch.float64)))),
            "seconds": seconds,
        }
    settings = {name: str(value) for name, value in vars(options).items()}
    tokens = {"tokens": int(batch["attention_mask"].sum()), "response_tokens": int((batch["labels"] != -100).sum())}
    print(record({"arms": results, "loss": exact_loss, **tokens, "options": settings}, options.json))


if __name__ == "__main__":
    main()
