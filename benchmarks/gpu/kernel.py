"""The Triton kernels where they belong: against float64, against operations of torch, and against what was expected.

    python benchmarks/gpu/kernel.py

First what the device reaches in copies and in large products. Then of each loss, and of a teacher whose likeliest
tokens are known:

- ``exact``: the value and the gradient by given logits, in bf16 and fp32, by the kernel and by operations of torch:
  the norm of the difference to float64 over the norm.
- ``alone``: time of the kernel on 2048 tokens, and the bytes that it must read and write over that time.
- ``objective``: forward and backward pass from hidden states and heads in bf16, by the kernel and by operations of
  torch. Expected is what `cost_model.json` says, by the speeds that were just measured instead of an H100's.

Without Triton only operations of torch are measured, which on a GPU is a failure.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from cost_model import BYTES_PER_S, FLOPS_PER_S, KD_WEIGHT, SHAPES, TEMPERATURE, Count, KernelCount, make  # noqa: E402
from cost_model import LOSSES as FROM_LOGITS  # noqa: E402
from loss import measure  # noqa: E402
from record import told  # noqa: E402
from step import matmul_flops_per_second  # noqa: E402

from srd_lightning import losses  # noqa: E402
from srd_lightning.losses import chunked, token_loss  # noqa: E402
from srd_lightning.losses.chunked import chunk_size  # noqa: E402
from srd_lightning.losses.pieces import TEACHER_TOKENS  # noqa: E402
from srd_lightning.losses.token_loss import TokenLoss  # noqa: E402
from srd_lightning.losses.top_k import POWERS, TopKTeacher  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16 = torch.bfloat16
LOSSES = (*FROM_LOGITS, "topk")
LIKELIEST = 64
EXPECTED = json.loads((ROOT / "benchmarks" / "results" / "cost_model.json").read_text())["expected_not_measured"]
Shape = tuple[int, int, int]
Told = Iterator[str]


def ceilings() -> tuple[float, float]:
    """Return the bytes that a copy reads and writes in a second, and the operations of a large product in bf16."""
    size = 2**30 if DEVICE == "cuda" else 2**22
    a, b = (torch.empty(size, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    seconds = measure(lambda: b.copy_(a), 10)["seconds"]
    return 2 * size / seconds, matmul_flops_per_second(BF16 if DEVICE == "cuda" else torch.float32)


def likeliest(logits: torch.Tensor) -> TopKTeacher:
    """Return what a cache would keep of a teacher's logits."""
    logp = logits.double().log_softmax(-1)
    best = logp.topk(LIKELIEST if logp.shape[1] > LIKELIEST else 4)
    others = logp.scatter(1, best.indices, -torch.inf)
    rest = torch.stack([(others * power).logsumexp(-1) for power in POWERS], 1)
    return TopKTeacher(best.values.float(), best.indices, rest.float())


def cost_of(name: str) -> TokenLoss:
    loss = getattr(losses, name if name != "topk" else "ForwardKL")(temperature=TEMPERATURE)
    return TokenLoss(loss, KD_WEIGHT)


def some(name: str, tokens: int, vocabulary: int, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """Return logits of a student and of a teacher, and targets."""
    torch.manual_seed(0)
    logits, teacher = (2 * torch.randn(2, tokens, vocabulary, device=DEVICE)).to(dtype)
    targets = torch.randint(vocabulary, (tokens,), device=DEVICE)
    return logits.clone(), likeliest(teacher) if name == "topk" else teacher.clone(), targets


def kernel_for(name: str, logits: Any, teacher: Any) -> Callable[..., Any] | None:
    """Return the kernel, where there is Triton; one that is left out is a failure."""
    if not chunked.has_kernel(torch.device(DEVICE)):
        return None
    from srd_lightning.losses.triton import choice

    kernel = choice.way(cost_of(name), logits, teacher)
    assert kernel is not None, "the kernel was left out; the reason stands above"
    return kernel


def exact(name: str, vocabulary: int) -> Told:
    """Tell how far value and gradient are from float64."""
    for dtype in (BF16, torch.float32):
        logits, teacher, targets = some(name, 48, vocabulary, dtype)
        wide = (
            teacher.double()
            if isinstance(teacher, torch.Tensor)
            else TopKTeacher(*(x.double() for x in teacher[:1]), teacher[1], teacher[2].double())
        )
        reference = logits.double()
        value = token_loss.to_gradient(cost_of(name), reference, wide, targets)
        found: dict[str, Any] = {}
        for way, compute in (("torch", token_loss.to_gradient), ("kernel", kernel_for(name, logits, teacher))):
            if compute is not None:
                own = logits.clone()
                pairs = (compute(cost_of(name), own, teacher, targets), value), (own, reference)
                found[way] = [float((one.double() - other).norm() / other.norm()) for one, other in pairs]
        bound = 4 * torch.finfo(dtype).eps + 1e-4
        good = all(off < bound for offs in found.values() for off in offs)
        says = ", ".join(f"{way} {offs[0]:.1e} {offs[1]:.1e}" for way, offs in found.items())
        arm = f"{name} exact {str(dtype).removeprefix('torch.')} {vocabulary}"
        yield told(arm, f"value and gradient off by {says}", **found, **({} if good else {"outcome": "failed"}))


def alone(name: str, vocabulary: int, copies: float) -> Told:
    """Tell the time of the kernel alone, or of what takes its place."""
    logits, teacher, targets = some(name, TEACHER_TOKENS if DEVICE == "cuda" else 16, vocabulary, BF16)
    compute = kernel_for(name, logits, teacher) or token_loss.to_gradient
    cost = cost_of(name)
    measured = measure(lambda: compute(cost, logits, teacher, targets), 10)
    count = Count()
    KernelCount(count).way(cost, logits, teacher)(cost, logits, teacher, targets)
    share = count.bytes / measured["seconds"] / copies
    says = f"{1e3 * measured['seconds']:.3f} ms, {count.bytes / 1e9:.2f} GB by count, {share:.0%} of a copy's speed"
    yield told(f"{name} alone {vocabulary}", says, bytes=count.bytes, share_of_copy=share, **measured)


def objective(name: str, shape: Shape, copies: float, products: float) -> Told:
    """Tell the time of the objective both ways, beside what was expected."""
    width = shape[2]
    chunk = chunk_size(DEVICE, width, BF16)
    ways = {"plain": False, "kernel": True} if chunked.has_kernel(torch.device(DEVICE)) else {"plain": False}
    for way, has in ways.items():
        with patch.object(chunked, "has_kernel", lambda device, has=has: has):
            measured = measure(make(name, *shape, chunk, BF16, DEVICE), 3)
        says = f"{1e3 * measured['seconds']:.2f} ms, {measured['peak_memory_bytes'] / 1e9:.2f} GB"
        numbers: dict[str, Any] = {"path": way, **measured}
        key = {"loss": name, "path": way, **dict(zip(("tokens", "vocabulary", "width"), shape, strict=True))}
        if (one := next((one for one in EXPECTED if key.items() <= one.items()), None)) is not None:
            moved = (one["ms"] - one["products_ms"]) * BYTES_PER_S / copies
            here = moved + one["products_ms"] * FLOPS_PER_S / products
            numbers |= {"expected_ms": here, "expected_peak_gb": one["peak_gb"]}
            says += f"; expected here {here:.2f} ms, {one['peak_gb']:.2f} GB"
        yield told(f"{name} objective {','.join(map(str, shape))} {way}", says, **numbers)


def main() -> None:
    """Measure, and tell of each arm; one that fails does not keep the others from being run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    how = {"type": lambda text: tuple(map(int, text.split(","))), "default": SHAPES}
    parser.add_argument("--shapes", nargs="+", help="N,V,d: tokens, vocabulary, width", **how)
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=LOSSES, help="which to run")
    options = parser.parse_args()
    start = time.perf_counter()
    copies, products = ceilings()
    says = f"{copies / 1e12:.3g} TB/s in a copy, {products / 1e12:.4g} TFLOP/s in products"
    print(told("ceilings", says, bytes_per_s=copies, flops_per_s=products), flush=True)
    vocabulary = options.shapes[0][1]
    for name in options.losses:
        try:
            for line in exact(name, vocabulary):
                print(line, flush=True)
            for line in alone(name, vocabulary, copies):
                print(line, flush=True)
            for shape in options.shapes:
                for line in objective(name, shape, copies, products):
                    print(line, flush=True)
        except Exception as error:
            traceback.print_exc()
            print(told(name, f"failed: {type(error).__name__}: {error}"[:500], outcome="failed"), flush=True)
    if DEVICE == "cuda" and not chunked.has_kernel(torch.device(DEVICE)):
        raise SystemExit("there is no Triton, so no kernel was measured")
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
