"""What the objective would cost on an H100, counted: bytes, launches, products and memory. Nothing here runs on a GPU.

    python benchmarks/cost_model.py --json cost_model.json

One forward and backward pass in bf16 of N response tokens, with all six losses (temperature 1.5, share of distillation
0.8), and with the likeliest 64 tokens of a teacher:

- ``plain, 256``: chunks of 256 tokens, operations of torch, the head's gradient added to fp32 from a product in bf16.
  So it was before there was a kernel, and so it is with ``chunk=256`` where there is none.
- ``plain``: operations of torch in the chunks that `chunk_size` chooses: losses of one's own, no Triton.
- ``kernel``: `losses/triton/kernel.py`, for ``topk`` `losses/triton/top_k.py`, in the same chunks.

Operations of torch are counted as they are called, on tensors without memory: each reads its arguments and writes its
results once (a log-softmax reads twice), but for products, which are counted by their operations; what these read and
write is in the speed of products, except where they add to fp32. The kernel's count is written down below. Time is
bytes over 3.35 TB/s, plus operations of products over 650 TFLOP/s; for the kernel, bytes or instructions, whichever
take longer. Neither launches nor what a GPU finds in its cache are in it. ``--check`` counts and measures on a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from arms import in_own_process
from loss import extra_peak
from record import record
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from srd_lightning import losses
from srd_lightning.losses import chunked
from srd_lightning.losses.chunked import chunk_size, chunked_objective
from srd_lightning.losses.head import Head
from srd_lightning.losses.top_k import POWERS, TopKTeacher
from srd_lightning.teacher.live import by_head

BYTES_PER_S, FLOPS_PER_S = 3.35e12, 650e12
INSTRUCTIONS_PER_S = 132 * 128 * 1.755e9
"""Of an H100 SXM: its memory, products as they are reached in bf16, and 128 lanes of each of its multiprocessors."""
LOSSES = ("ForwardKL", "ReverseKL", "JensenShannon", "TotalVariation", "SkewForwardKL", "SkewReverseKL")
KERNEL = {"ForwardKL": 62, "ReverseKL": 76, "JensenShannon": 133, "TotalVariation": 87} | dict.fromkeys(LOSSES[4:], 137)
"""Instructions of a logit: those in the kernel's loops, as Triton 3.9 compiles them for sm_90, over a turn's logits."""
SHAPES = ((8192, 128256, 4096), (8192, 151936, 3584), (8192, 50257, 768))
KD_WEIGHT, TEMPERATURE, LIKELIEST = 0.8, 1.5, 64
VIEWS = {
    *("view", "_unsafe_view", "t", "transpose", "expand", "slice", "select", "detach", "unsqueeze", "squeeze", "alias"),
    *("permute", "split", "unbind", "as_strided", "lift_fresh"),
}
EMPTY = {"empty", "empty_like", "new_empty"}
WRITE_ONLY = {"zeros", "new_zeros", "zeros_like", "fill_", "full", "new_full", "zero_", "ones"}
PRODUCTS = {"mm", "addmm", "addmm_"}


class Count(TorchDispatchMode):
    """Counts what operations of torch read, write, multiply and hold, besides what they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.bytes = self.flops = self.instructions = self.held = self.peak = 0
        self.by_operation: Counter[str] = Counter()
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call an operation, and count it."""
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        made = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        if name not in VIEWS and not name.endswith("_"):
            for tensor in made:
                self.hold(tensor.untyped_storage())
        if name not in VIEWS | EMPTY:
            given = {id(value): value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
            self.launches += 1
            moved = self.product(args, made) if name in PRODUCTS else traffic(name, [*given.values()], made)
            self.bytes += moved
            self.by_operation[name] += moved
        return result

    def hold(self, storage: Any) -> None:
        """Note memory that is taken, until it is let go."""
        key, size = storage._cdata, storage.nbytes()
        if key not in self.storages:
            self.storages.add(key)
            self.held += size
            self.peak = max(self.peak, self.held)
            weakref.finalize(storage, self.let_go, key, size)

    def let_go(self, key: int, size: int) -> None:
        """Note that memory is free."""
        self.storages.discard(key)
        self.held -= size

    def product(self, args: Any, made: list[Tensor]) -> int:
        """Note a product; return the bytes that it reads and writes of a wider type than it multiplies."""
        *added, left, right = [value for value in args if isinstance(value, Tensor)]
        self.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return sum(size_of(tensor) for tensor in (*added, *made) if tensor.dtype != left.dtype)


def size_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def traffic(name: str, given: list[Tensor], made: list[Tensor]) -> int:
    """Return the bytes that an operation reads and writes."""
    write = sum(map(size_of, made))
    read = 0 if name in WRITE_ONLY else sum(map(size_of, given))
    if name == "copy_":  # what is overwritten is not read
        read = size_of(given[-1])
    elif name == "_log_softmax":
        read *= 2
    elif name in ("gather", "scatter_", "scatter_add_"):  # only where the indices point
        read = write = 2 * sum(size_of(tensor) for tensor in given if tensor.dtype == torch.int64)
    elif name == "scatter":
        read = size_of(given[0])
    return read + write


class KernelCount:
    """Stands for `losses.triton.kernel`: what it reads and writes, without doing it."""

    def __init__(self, count: Count) -> None:
        self.count = count

    def way(self, cost: Any, logits: Tensor, teacher: Any) -> Callable[..., Tensor]:
        """Return what `losses.triton.choice.way` would."""
        return self.of_likeliest if isinstance(teacher, TopKTeacher) else self.to_gradient

    def of_likeliest(self, cost: Any, logits: Tensor, teacher: TopKTeacher, targets: Tensor) -> Tensor:
        """Read the student's row for its normalisers; read it again and write the gradient; some 45 of [n, k]."""
        self.count.launches += 2 + 45
        self.count.bytes += 3 * size_of(logits) + 45 * 3 * size_of(teacher.logp)
        return torch.empty(2, len(logits), device=logits.device).sum(1)

    def to_gradient(self, cost: Any, logits: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        """Read both rows for normalisers, for the sum of q h (known of forward KL) and for the gradient; write that."""
        name = type(cost.loss).__name__
        readings = 2 if name == "ForwardKL" else 3
        values = torch.empty(2, len(logits), device=logits.device)
        self.count.launches += 1
        instructions = KERNEL[name] * logits.numel() / INSTRUCTIONS_PER_S * BYTES_PER_S
        moved = readings * (size_of(logits) + size_of(teacher)) + size_of(logits)
        self.count.bytes += moved
        self.count.instructions += max(0, int(instructions) - moved)  # what they take longer, as bytes
        return values.sum(1)


@contextlib.contextmanager
def path(name: str, count: Count) -> Iterator[None]:
    """Let the objective go one of the ways; tensors without memory know no autocast."""
    changes: dict[str, Any] = {"_adds_to_fp32": lambda device, dtype: name != "plain, 256"}
    if name == "kernel":
        stand_in = KernelCount(count)
        changes |= {"has_kernel": lambda device: True, "_kernel": stand_in.way}
    if name == "plain, 256":
        changes |= {"PIECE_LOGITS": 2**62}
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch("torch.is_autocast_enabled", lambda device: False))
        stack.enter_context(patch("torch.autocast", lambda *_, **__: contextlib.nullcontext()))
        for attribute, value in changes.items():
            stack.enter_context(patch.object(chunked, attribute, value))
        yield


def make(
    name: str, tokens: int, vocabulary: int, width: int, chunk: int, dtype: torch.dtype, device: str
) -> Callable[[], Any]:
    """Return what runs an objective, forward and backward."""
    loss = getattr(losses, name if name != "topk" else "ForwardKL")(temperature=TEMPERATURE)
    hidden, teacher_hidden = (torch.empty(tokens, width, dtype=dtype, device=device) for _ in range(2))
    heads = [torch.empty(vocabulary, width, dtype=dtype, device=device) for _ in range(2)]
    if device != "meta":
        for tensor in (hidden, teacher_hidden, *heads):
            tensor.normal_(std=0.1)
    targets = torch.zeros(tokens, dtype=torch.int64, device=device)
    likeliest = TopKTeacher(
        torch.zeros(tokens, LIKELIEST, device=device),
        torch.arange(LIKELIEST, device=device).expand(tokens, LIKELIEST).contiguous(),
        torch.zeros(tokens, len(POWERS), device=device),
    )
    live = by_head(Head(heads[1]), teacher_hidden)
    teacher = live if name != "topk" else lambda some: TopKTeacher(*(values[some] for values in likeliest))
    leaves = hidden.requires_grad_(), heads[0].requires_grad_()

    def work() -> Any:
        found = chunked_objective(leaves[0], Head(leaves[1]), targets, loss, teacher, KD_WEIGHT, chunk=chunk)
        return torch.autograd.grad(found.loss, leaves)

    return work


def expected(name: str, way: str, tokens: int, vocabulary: int, width: int) -> dict[str, Any]:
    """Count one path of one loss."""
    chunk = 256 if way == "plain, 256" else chunk_size("cuda", width, torch.bfloat16)
    count = Count()
    with path(way, count):
        work = make(name, tokens, vocabulary, width, chunk, torch.bfloat16, "meta")
        with count:
            work()
    chunks = -(-tokens // chunk)
    moved, products = count.bytes / BYTES_PER_S, count.flops / FLOPS_PER_S
    return {
        "loss": name,
        "path": way,
        "tokens": tokens,
        "vocabulary": vocabulary,
        "width": width,
        "chunk": chunk,
        "bytes_per_logit": count.bytes / (tokens * vocabulary),
        "launches_per_chunk": count.launches / chunks,
        "launches": count.launches,
        "products_ms": 1e3 * products,
        "ms": 1e3 * (moved + products + count.instructions / BYTES_PER_S),
        "peak_gb": count.peak / 1e9,
    }


def by_hand() -> dict[str, Any]:
    """Count a piece of forward KL on a CPU, and say by hand what that must be: tensors that are read or written."""
    from srd_lightning.losses.token_loss import TokenLoss, to_gradient

    logits, teacher = torch.randn(2, 16, 4096)
    with Count() as count:
        to_gradient(TokenLoss(losses.ForwardKL(TEMPERATURE), KD_WEIGHT), logits, teacher, torch.zeros(16).long())
    steps = {
        "student: log-softmax": 3,
        "both: divided, log-softmax, floor": 2 * (2 + 3 + 2),
        "p = exp": 2,
        "value: difference, times p, sum": 3 + 3 + 1,
        "q = exp, minus p": 2 + 3,
        "gradient times weight": 2,
        "CE: exp, times 0.2, added": 2 + 3,
        "in place of the logits": 2,
    }
    hand = sum(steps.values()) * 4
    return {"steps": steps, "by_hand": hand, "counted": count.bytes / logits.numel()}


def measured_peak(tokens: int, chunk: int) -> dict[str, float]:
    """Return the peak memory on this CPU, counted and measured, in fp32."""
    work = make("ForwardKL", tokens, 49152, 576, chunk, torch.float32, "cpu")
    with Count() as count:
        work()
    work()
    return {"tokens": tokens, "chunk": chunk, "counted_gb": count.peak / 1e9, "measured_gb": extra_peak(work) / 1e9}


def main() -> None:
    """Count, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="hold the count against one by hand and measured memory")
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    results = [
        expected(name, way, *shape)
        for shape in SHAPES
        for name in (*LOSSES, "topk")
        for way in ("plain, 256", "plain", "kernel")
    ]
    print(table(results))
    found: dict[str, Any] = {"expected_not_measured": results}
    if options.check:
        peaks = [in_own_process(measured_peak, 512, chunk) for chunk in (256, 512)]
        found["check"] = {"bytes_per_logit": by_hand(), "peak": peaks}
        print(json.dumps(found["check"], indent=2))
    record(found, options.json)


def table(results: list[dict[str, Any]]) -> str:
    """Return the results as lines of Markdown: of each loss the ways beside each other."""
    lines = ["| V, d | loss | bytes a logit | launches | expected ms | peak GB |", "|---|---|---|---|---|---|"]
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in results:
        rows.setdefault((f"{one['vocabulary']:,}, {one['width']:,}", one["loss"]), []).append(one)
    for (shape, loss), ways in rows.items():
        cells = (("bytes_per_logit", ".0f"), ("launches", ",d"), ("ms", ".1f"), ("peak_gb", ".1f"))
        texts = [" → ".join(format(way[name], how) for way in ways) for name, how in cells]
        lines.append(f"| {shape} | `{loss}` | {' | '.join(texts)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
