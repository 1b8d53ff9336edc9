"""A training step against the cost structure of the paper's loop: same models, rows, batch, loss and optimizer.

    python benchmarks/step.py --data train.jsonl --json step.json

- ``paper``: every row padded to 512 tokens, full logits of student and teacher, the teacher run at every step, fp32.
- ``paper_dynamic``: the same, padded to the longest row of the batch.
- ``live_fp32``, ``live_bf16``: this library with a teacher that is run at every step; bf16 is ``bf16-mixed`` with a
  teacher in bf16.
- ``cached_fp32``, ``cached_bf16``: the same with the teacher's hidden states cached.

The teacher is SmolLM2-135M-Instruct, the student 15 of its layers, unless others are named. Every variant runs in a
process of its own. Two epochs over the rows warm up (the paper's: a step), of which the first fills the cache where
there is one; the next is timed, loading and optimizer included. Reported are rows per second, seconds of the first
epoch, peak memory of the process (of the GPU where there is one), and the arithmetic that must be done against what the
machine reaches in large products: the student's body on real tokens forward and backward, the heads on response tokens,
the live teacher's body on real tokens. Times are noisy: quote the ratio of one run, with the machine it was made on,
and let nothing else run beside it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arms import MAX_PROMPT_LENGTH, Clock, attempt, in_own_process, run_ours
from record import record, told

VARIANTS = ("paper", "paper_dynamic", "live_fp32", "cached_fp32", "live_bf16", "cached_bf16")
STUDENT_LAYERS = [0, 1, 2, 8, 9, 10, 11, 13, 18, 22, 23, 24, 27, 28, 29]
KD_WEIGHT, TEMPERATURE = 0.8, 1.5


def choose_rows(options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return rows, evenly spaced, as they are read and as they are tokenised."""
    from srd_lightning import ALPACA, Pretrained
    from srd_lightning.data.row_reader import load_rows
    from srd_lightning.data.tokenization import row_ids, tokenize

    rows = load_rows(options.data)
    tokens, _ = tokenize(rows, Pretrained(options.model).tokenizer(), ALPACA, options.max_length, MAX_PROMPT_LENGTH)
    tokens = tokens.select(np.linspace(0, len(tokens) - 1, options.rows).astype(int))
    chosen = set(tokens["id"])
    return rows.select([place for place, row in enumerate(row_ids(rows)) if row in chosen]).to_list(), tokens.to_list()


def run_paper(tokens: Sequence[dict[str, Any]], options: argparse.Namespace, length: int | None) -> Clock:
    """Train as the paper's code does."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from references import paper_step
    from torch.optim import AdamW

    from srd_lightning import Pretrained

    device = "cuda" if torch.cuda.is_available() else "cpu"
    student: Any = Pretrained(options.model, keep_layers=options.keep_layers).model().train().to(device)
    teacher: Any = Pretrained(options.model).model().requires_grad_(False).to(device)
    optimizer = AdamW(student.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
    clock = Clock()
    clock.begin()
    batches = [tokens[first : first + options.batch] for first in range(0, len(tokens), options.batch)]
    for batch in [batches[0], *batches]:  # the first one warms up
        optimizer.zero_grad()
        loss = paper_step(student, teacher, batch, 0, TEMPERATURE, KD_WEIGHT, length)
        loss.backward()
        optimizer.step()
        clock.losses.append(loss.item())
        clock.end_step()
    return clock


def run_variant(
    name: str, rows: Sequence[dict[str, Any]], tokens: Sequence[dict[str, Any]], options: argparse.Namespace
) -> dict[str, float]:
    """Run one variant in this process."""
    if name.startswith("paper"):
        clock = run_paper(tokens, options, options.max_length if name == "paper" else None)
    else:
        from srd_lightning import ForwardKL

        clock = run_ours(
            rows,
            options,
            bf16=name.endswith("bf16"),
            cached=name.startswith("cached"),
            loss=ForwardKL(TEMPERATURE),
            kd_weight=KD_WEIGHT,
        )
    result = clock.result(options)
    return {
        "rows_per_second": result["rows_per_second"],
        "peak_memory_bytes": round(result["peak_gb"] * 1e9),
        "first_epoch_seconds": result["first_epoch_seconds"],
        "first_loss": result["first_loss"],
        "last_loss": result["last_loss"],
    }


def needed_flops(tokens: Sequence[dict[str, Any]], options: argparse.Namespace) -> dict[str, float]:
    """Return what a row must cost, live and cached: two operations per weight and token, attention left out."""
    from srd_lightning import Pretrained

    body, head = {}, 0
    for name, layers in (("student", options.keep_layers), ("teacher", None)):
        model: Any = Pretrained(options.model, keep_layers=layers).model()
        head = model.get_output_embeddings().weight.numel()
        body[name] = sum(part.numel() for part in model.parameters()) - head
    all_tokens = sum(row["length"] for row in tokens) / len(tokens)
    response = all_tokens - sum(row["prompt_length"] for row in tokens) / len(tokens)
    cached = 6 * body["student"] * all_tokens + (6 + 2) * head * response
    return {"live": cached + 2 * body["teacher"] * all_tokens, "cached": cached}


def matmul_flops_per_second(dtype: torch.dtype) -> float:
    """Return what this machine reaches in a large product of matrices."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        (a @ b)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    return float(2 * size**3 / np.median(seconds[2:]))


def models_and_rows(description: str | None) -> argparse.ArgumentParser:
    """Return a parser that knows the models and the rows of a benchmark."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, nargs="+", help="files of rows")
    parser.add_argument("--model", help="folder or hub id of the teacher, which the student is cut from")
    parser.add_argument("--keep-layers", type=int, nargs="+", default=STUDENT_LAYERS, help="layers of the student")
    return parser


def choose_model(options: argparse.Namespace) -> None:
    """Take the model of the quickstart, and fetch it, where none is named."""
    if options.model is None:
        from srd_lightning.quickstart.fetch import smollm2

        options.model = str(smollm2())


def main() -> None:
    """Run the variants, print and write."""
    parser = models_and_rows(__doc__)
    parser.add_argument("--rows", type=int, default=32, help="rows to train on, evenly spaced; a multiple of --batch")
    parser.add_argument("--batch", type=int, default=8, help="rows per step")
    parser.add_argument("--max-length", type=int, default=512, help="longer rows are cut")
    parser.add_argument("--micro-batch-tokens", type=int, default=2048, help="of ours")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="which to run")
    parser.add_argument("--json", type=Path, help="file to write; a plot is put beside it")
    options = parser.parse_args()
    if options.rows % options.batch:
        parser.error("--rows must be a multiple of --batch")
    options.epochs = 3
    choose_model(options)
    rows, tokens = in_own_process(choose_rows, options)
    variants = {}
    for name in options.variants:
        if (variant := attempt(name, run_variant, name, rows, tokens, options)) is not None:
            variants[name] = variant
            says = f"{variant['rows_per_second']:.4g} rows/s, {variant['peak_memory_bytes'] / 1e9:.3g} GB"
            if "paper" in variants:
                says += f", {variant['rows_per_second'] / variants['paper']['rows_per_second']:.3g} x paper"
            print(told(name, says, **variant), flush=True)
    needed = in_own_process(needed_flops, tokens, options)
    types = {"fp32": torch.float32, "bf16": torch.bfloat16}
    used = {"bf16" if name.endswith("bf16") else "fp32" for name in variants}  # some CPUs take minutes in the other
    peak = {name: matmul_flops_per_second(types[name]) for name in sorted(used)}
    for name, variant in variants.items():
        kind, precision = name.split("_")[0], name.split("_")[-1]
        rate = needed["cached" if kind == "cached" else "live"] * variant["rows_per_second"]
        variant["share_of_matmul_speed"] = rate / peak["bf16" if precision == "bf16" else "fp32"]
        if "paper" in variants:
            variant["speed_over_paper"] = variant["rows_per_second"] / variants["paper"]["rows_per_second"]
            variant["memory_over_paper"] = variant["peak_memory_bytes"] / variants["paper"]["peak_memory_bytes"]
    result = {
        "variants": variants,
        "needed_flops_per_row": needed,
        "matmul_flops_per_second": peak,
        "tokens_per_row": sum(row["length"] for row in tokens) / len(tokens),
        "response_tokens_per_row": sum(row["length"] - row["prompt_length"] for row in tokens) / len(tokens),
        "options": {name: str(value) for name, value in vars(options).items()},
        "threads": torch.get_num_threads(),
    }
    print(record(result, options.json))
    if options.json:
        plot(variants, options.json.with_suffix(".png"))


def plot(variants: dict[str, dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    names = list(variants)
    for axis, label, values in (
        (axes[0], "rows per second", [variants[name]["rows_per_second"] for name in names]),
        (axes[1], "peak memory, GB", [variants[name]["peak_memory_bytes"] / 1e9 for name in names]),
    ):
        colours = ["#b0b0b0" if name.startswith("paper") else "#2f6fb0" for name in names]
        axis.bar_label(axis.barh(names, values, color=colours), fmt="%.2f", padding=3)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.set_xlabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
