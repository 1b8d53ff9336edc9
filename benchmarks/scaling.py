"""How a training step, the order of an epoch and the teacher cache grow with what they are given.

    python benchmarks/scaling.py --json scaling.json

- Step: forward and backward of a random Llama as student, with another, twice as deep, as a teacher that is run at
  every step; ``chunked`` is this library's step, ``all logits`` the same with all logits made. One of sequence length,
  vocabulary and share of the response is changed at a time, the others keep their base. Seconds per row, and peak
  memory above what the models take, gradients included; every arm, at every size, in a process of its own.
- Order: seconds to build the length-grouped order of an epoch against rows.
- Cache: bytes per response token of each kind, as it is computed (`bytes_per_token`) and as it is found on disk after
  writing a small cache; and the tokens per second that are read back in batches of random rows. The files were just
  written, so this is the speed of a cache that fits into memory; a disk may be slower.

Times are noisy: quote ratios of one run, with the machine it was made on, and let nothing else run beside it.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arms import in_own_process
from loss import measure
from record import record

ARMS = ("chunked", "all logits")
COLOURS = {"chunked": "#2f6fb0", "all logits": "#c0504d"}
KD_WEIGHT, TEMPERATURE = 0.8, 1.5
ROWS_PER_STEP, TOKENS_PER_ROW = 32, 100


def make_model(vocabulary: int, layers: int, options: argparse.Namespace) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=options.width,
        intermediate_size=4 * options.width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def make_batch(length: int, vocabulary: int, share: float, options: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Return rows without padding, of which the last share is the response."""
    ids = torch.randint(vocabulary, (options.batch, length))
    prompt = length - max(1, round(share * length))
    labels = ids.clone()
    labels[:, :prompt] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def run_step(arm: str, size: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Measure a step in this process."""
    from srd_lightning.losses import ForwardKL
    from srd_lightning.losses.chunked import CHUNK
    from srd_lightning.training.step import DistillationStep

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student = make_model(size["vocabulary"], options.layers, options).train().to(device)
    teacher = make_model(size["vocabulary"], 2 * options.layers, options).eval().requires_grad_(False).to(device)
    batch = {name: values.to(device) for name, values in make_batch(**size, options=options).items()}
    step = DistillationStep(CHUNK if arm == "chunked" else None).attach(student, teacher)
    loss = ForwardKL(TEMPERATURE)

    def work() -> None:
        step.objective(batch, loss, KD_WEIGHT).loss.backward()
        student.zero_grad(set_to_none=True)

    result = measure(work, options.repeats)
    return {"seconds_per_row": result["seconds"] / options.batch, "peak_memory_bytes": result["peak_memory_bytes"]}


def run_steps(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure both arms at the base, and with one thing changed at a time."""
    base = {"length": options.length, "vocabulary": options.vocabulary, "share": options.share}
    changes = {"length": options.lengths, "vocabulary": options.vocabularies, "share": options.shares}
    results: list[dict[str, Any]] = []
    for changed, values in changes.items():
        for value in values:
            size = {**base, changed: value}
            for arm in ARMS:
                same = [result for result in results if result["arm"] == arm and result["size"] == size]
                found = same[0] if same else in_own_process(run_step, arm, size, options)
                results.append({**found, "arm": arm, "changed": changed, "size": size})
                print(f"{changed} {value}: {arm}", file=sys.stderr)
    return results


def run_orders(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time the order of an epoch."""
    from srd_lightning.data.samplers import length_grouped_order

    results = []
    for rows in options.rows:
        lengths = np.random.default_rng(0).integers(16, 512, rows)
        start = time.perf_counter()
        length_grouped_order(lengths, ROWS_PER_STEP, seed=0, epoch=0)
        results.append({"rows": rows, "seconds": time.perf_counter() - start})
    return results


def run_caches(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Write and read a small cache of each kind."""
    from srd_lightning.teacher.live import HiddenStates, TopK

    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    kinds: list[tuple[str, Any, int]] = [
        (f"hidden {width}, {name}", HiddenStates(dtype), width)
        for width in options.widths
        for name, dtype in dtypes.items()
    ]
    kinds += [(f"topk {k}", TopK(k), 8) for k in options.topk]
    return [run_cache(*kind, options) for kind in kinds]


def run_cache(name: str, kind: Any, width: int, options: argparse.Namespace) -> dict[str, Any]:
    from srd_lightning.losses.head import Head
    from srd_lightning.teacher.cache import TeacherCache

    generator = np.random.default_rng(0)
    count = options.cache_tokens // TOKENS_PER_ROW
    rows = [
        {"id": str(row), "input_ids": [row] * (50 + n), "prompt_length": 50}
        for row, n in enumerate(generator.integers(1, 2 * TOKENS_PER_ROW, count))
    ]
    tokens = sum(len(row["input_ids"]) - row["prompt_length"] for row in rows)
    head = Head(torch.randn(2 * max(options.topk), width))
    with tempfile.TemporaryDirectory() as folder:
        cache = TeacherCache(Path(folder), kind, {"benchmark": name})
        cache.append(rows, kind.observe(torch.randn(tokens, width), head))
        cache.flush()
        on_disk = sum(shard.stat().st_size for shard in Path(folder).glob("part-*.arrow"))
        order = generator.permutation(count)
        cache = TeacherCache(Path(folder), kind, {"benchmark": name})
        cache.batch(rows[:1])  # maps the shards
        start = time.perf_counter()
        for first in range(0, count, ROWS_PER_STEP):
            cache.batch([rows[row] for row in order[first : first + ROWS_PER_STEP]])
        seconds = time.perf_counter() - start
    return {
        "kind": name,
        "computed_bytes_per_token": kind.bytes_per_token(width),
        "bytes_per_token": on_disk / tokens,
        "read_tokens_per_second": tokens / seconds,
        "read_bytes_per_second": on_disk / seconds,
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=256, help="base: tokens per row")
    parser.add_argument("--vocabulary", type=int, default=32768, help="base: tokens of the vocabulary")
    parser.add_argument("--share", type=float, default=0.5, help="base: share of the response in a row")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.5, 0.9])
    parser.add_argument("--width", type=int, default=256, help="of both models")
    parser.add_argument("--layers", type=int, default=2, help="of the student; the teacher has twice as many")
    parser.add_argument("--batch", type=int, default=2, help="rows per step")
    parser.add_argument("--repeats", type=int, default=2, help="steps that are timed")
    parser.add_argument("--rows", type=int, nargs="+", default=[10**4, 10**5, 10**6, 10**7], help="of the order")
    parser.add_argument("--widths", type=int, nargs="+", default=[576, 2048, 4096], help="of cached hidden states")
    parser.add_argument("--topk", type=int, nargs="+", default=[16, 64, 256], help="cached tokens of the vocabulary")
    parser.add_argument("--cache-tokens", type=int, default=10_000, help="response tokens of the cache, about")
    parser.add_argument("--json", type=Path, help="file to write; a plot is put beside it")
    options = parser.parse_args()
    options.load_before = os.getloadavg()[0]
    result = {
        "steps": run_steps(options),
        "orders": in_own_process(run_orders, options),
        "caches": in_own_process(run_caches, options),
        "options": {name: str(value) for name, value in vars(options).items()},
        "threads": torch.get_num_threads(),
    }
    print(record(result, options.json))
    if options.json:
        plot(result, options.json.with_suffix(".png"))


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw time and memory of a step, the time of an order, and the size and speed of caches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    draw_steps(axes[0, 0], result["steps"], "seconds_per_row", 1)
    draw_steps(axes[0, 1], result["steps"], "peak_memory_bytes", 1e9)
    axes[0, 0].set(ylabel="seconds per row", title="Training step")
    axes[0, 1].set(ylabel="peak memory, GB", title="Training step")
    axes[0, 0].legend(frameon=False)
    rows, seconds = zip(*((order["rows"], order["seconds"]) for order in result["orders"]), strict=True)
    axes[1, 0].loglog(rows, seconds, "o-", color=COLOURS["chunked"])
    axes[1, 0].set(xlabel="rows", ylabel="seconds", title="Order of an epoch")
    draw_caches(axes[1, 1], result["caches"])
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def draw_steps(axis: Any, steps: Sequence[dict[str, Any]], what: str, unit: float) -> None:
    """Draw what is changed side by side, in groups."""
    place, ticks, names = 0, [], []
    for changed in dict.fromkeys(step["changed"] for step in steps):
        group = [step for step in steps if step["changed"] == changed]
        values = list(dict.fromkeys(step["size"][changed] for step in group))
        places = [place + n for n in range(len(values))]
        for arm in ARMS:
            line = [step[what] / unit for step in group if step["arm"] == arm]
            axis.plot(places, line, "o-", color=COLOURS[arm], label=arm if place == 0 else None)
        ticks += places
        names += [f"{value // 1024}k" if changed == "vocabulary" else f"{value:g}" for value in values]
        axis.text(
            sum(places) / len(places), -0.14, changed, transform=axis.get_xaxis_transform(), ha="center", va="top"
        )
        place = places[-1] + 2
    axis.set_xticks(ticks, names)
    axis.set_ylim(0)


def draw_caches(axis: Any, caches: Sequence[dict[str, Any]]) -> None:
    """Draw sizes as bars, what was computed as marks, and the speed of reading beside them."""
    places = range(len(caches))
    sizes = [cache["bytes_per_token"] / 1e3 for cache in caches]
    bars = axis.barh(places, sizes, color=COLOURS["chunked"], label="on disk")
    computed = [cache["computed_bytes_per_token"] / 1e3 for cache in caches]
    axis.plot(computed, places, "|", color="black", markersize=14, label="computed")
    speeds = [f"{cache['read_tokens_per_second'] / 1e3:.0f}k tokens/s read" for cache in caches]
    axis.bar_label(bars, speeds, padding=6, fontsize=8)
    axis.set_yticks(places, [cache["kind"] for cache in caches])
    axis.invert_yaxis()
    axis.margins(x=0.35)
    axis.set(xlabel="GB per million response tokens", title="Teacher cache")
    axis.legend(frameon=False, loc="lower right")


if __name__ == "__main__":
    main()
