"""How a training step and the teacher's cache grow: with sequence length, vocabulary and rows.

    python benchmarks/scaling.py --json scaling.json

- Steps: forward and backward of a batch of 8 random rows on a random Llama of width 256 and 4 layers, half of each row
  being response; the teacher is as large and live. In chunks, and with all logits. Seconds per row and peak memory,
  each in a process of its own.
- Order: seconds to make the order of an epoch in batches of like length.
- Cache: bytes on disk per response token, as reckoned and as written, and tokens per second read in random order.

Times are noisy: let nothing else run beside it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arms import in_own_process, peak_bytes
from record import record

ROWS, WIDTH, LAYERS = 8, 256, 4


def model(vocabulary: int, seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_hidden_layers": LAYERS}
    config = LlamaConfig(vocab_size=vocabulary, num_attention_heads=4, max_position_embeddings=1024, **sizes)
    return LlamaForCausalLM(config)


def measure_step(length: int, vocabulary: int, chunk: int | None) -> dict[str, float]:
    """Return seconds and peak memory per row of one kind of step."""
    from srd_lightning import ForwardKL
    from srd_lightning.step import Step

    student, teacher = model(vocabulary, 0).train(), model(vocabulary, 1).requires_grad_(False).eval()
    ids = torch.randint(vocabulary, (ROWS, length))
    labels = ids.masked_fill(torch.arange(length) < length // 2, -100)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    step, before, seconds = Step(student, teacher, chunk=chunk), peak_bytes(), []
    for _ in range(3):
        start = time.perf_counter()
        step.objective(batch, ForwardKL(1.5), 0.8).loss.backward()
        seconds.append(time.perf_counter() - start)
        student.zero_grad()
    return {
        "length": length,
        "vocabulary": vocabulary,
        "seconds_per_row": statistics.median(seconds[1:]) / ROWS,
        "peak_gb_above_models": (peak_bytes() - before) / 1e9,
    }


def measure_order(rows: int) -> dict[str, float]:
    """Return the seconds to put so many rows in the order of an epoch."""
    from srd_lightning.sampling import length_grouped_order

    lengths = np.random.default_rng(0).integers(20, 512, rows)
    start = time.perf_counter()
    length_grouped_order(lengths, group=64, seed=0, epoch=1)
    return {"rows": rows, "seconds": time.perf_counter() - start}


def measure_cache(name: str, width: int, k: int | None, dtype: torch.dtype) -> dict[str, Any]:
    """Return what the cache of some random rows takes on disk, and how fast it is read."""
    from srd_lightning.objective import Head
    from srd_lightning.teacher import HiddenStates, TopK
    from srd_lightning.teacher_cache import TeacherCache

    kind = HiddenStates(dtype) if k is None else TopK(k)
    rows = [{"id": str(row), "input_ids": [row] * 96, "prompt_length": 32} for row in range(256)]
    head = Head(torch.randn(8192, width))
    with tempfile.TemporaryDirectory() as folder:
        cache = TeacherCache(Path(folder), kind, {"made of": name})
        for row in rows:
            cache.append([row], kind.observe(torch.randn(64, width), head))
        cache.flush()
        written = sum(path.stat().st_size for path in Path(folder).glob("part-*"))
        order = np.random.default_rng(0).permutation(len(rows)).reshape(-1, 8)
        start = time.perf_counter()
        for batch in order:
            cache.batch([rows[row] for row in batch])
        seconds = time.perf_counter() - start
    tokens = 64 * len(rows)
    return {
        "kind": name,
        "width": width,
        "bytes_per_token": kind.bytes_per_token(width),
        "bytes_per_token_on_disk": written / tokens,
        "tokens_read_per_second": tokens / seconds,
    }


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6), layout="constrained")
    for axis, by in ((axes[0, 0], "length"), (axes[0, 1], "vocabulary")):
        for kind, style in (("chunked", "o-"), ("all logits", "s--")):
            steps = result["steps"][by][kind]
            axis.plot([step[by] for step in steps], [step["peak_gb_above_models"] for step in steps], style, label=kind)
        axis.set(xlabel=by, ylabel="peak memory above the models, GB")
        axis.legend()
    for kind, style in (("chunked", "o-"), ("all logits", "s--")):
        steps = result["steps"]["length"][kind]
        axes[1, 0].plot(
            [step["length"] for step in steps], [step["seconds_per_row"] for step in steps], style, label=kind
        )
    axes[1, 0].set(xlabel="length", ylabel="seconds per row")
    axes[1, 0].legend()
    names = [f"{cache['kind']}, width {cache['width']}" for cache in result["cache"]]
    bars = axes[1, 1].barh(names, [cache["bytes_per_token_on_disk"] / 1e3 for cache in result["cache"]])
    axes[1, 1].bar_label(bars, fmt="%.2f", padding=3)
    axes[1, 1].invert_yaxis()
    axes[1, 1].margins(x=0.15)
    axes[1, 1].set_xlabel("cache, GB per million response tokens")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def steps_by(by: str, values: Sequence[int], chunk: int | None) -> list[dict[str, float]]:
    sizes = [(value, 32768) if by == "length" else (128, value) for value in values]
    return [in_own_process(measure_step, *size, chunk) for size in sizes]


def main() -> None:
    """Measure, print, write and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[8192, 32768, 65536])
    parser.add_argument("--rows", type=int, nargs="+", default=[10**4, 10**5, 10**6])
    parser.add_argument("--json", type=Path, help="file to write; a plot is put beside it")
    options = parser.parse_args()
    values = {"length": options.lengths, "vocabulary": options.vocabularies}
    kinds = {"chunked": 256, "all logits": None}
    caches = [(f"hidden {dtype}", width, None, getattr(torch, dtype)) for width in (576, 2048, 4096)
              for dtype in ("bfloat16", "float32")]  # fmt: skip
    caches += [(f"topk {k}", 4096, k, torch.float32) for k in (16, 64, 256)]
    result = {
        "steps": {by: {kind: steps_by(by, values[by], chunk) for kind, chunk in kinds.items()} for by in values},
        "order": [measure_order(rows) for rows in options.rows],
        "cache": [measure_cache(*cache) for cache in caches],
        "threads": torch.get_num_threads(),
    }
    print(record(result, options.json))
    if options.json:
        plot(result, options.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
