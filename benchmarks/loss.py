"""The objective alone, forward and backward: every loss, all logits at once against chunk by chunk.

    python benchmarks/loss.py --tokens 512 2048 --losses ForwardKL JensenShannon --json loss.json

- ``naive``: all logits of student and teacher by a matrix product, log-softmax, divergence and cross-entropy, autograd.
- ``chunked``: this library's `chunked_objective`, with each of ``--chunks`` as the tokens whose logits exist at a time.
- ``compiled``: the same with ``compile=True`` and the default chunk; only with ``--compile``.
- ``liger``: `LigerFusedLinearJSDLoss` as it comes, on a GPU where liger-kernel is installed, for JensenShannon.
- ``products``: the four matrix products that none can do without; their time is the floor.

The student's hidden states [N, d] and head [V, d] get gradients, the teacher's do not; temperature 1.5, share of
distillation 0.8. All inputs are of the type that is named. Every arm, at every size, runs in a process of its own.
After a call that warms up, one is measured for memory and some for time. Reported are the median seconds; the peak
memory above what the inputs take, gradients included; both over ``naive``; and how far the gradients are from
``naive`` in float64: the largest difference over the largest entry, on the first 64 tokens, in chunks of 16. Times
are noisy: quote the ratio of one run, with the machine it was made on. Let nothing else run beside it: ``chunked``
has many small operations, and on a CPU it loses most where cores are shared.

    python benchmarks/loss.py --ratios --tokens 128 --json methods.json

compares instead what the losses of docs/methods.md cost against forward KL, in chunks, with and without a share of
cross-entropy: in one process, one call of each in turn. On a CPU seconds are those of the processor on one thread, so
that what runs beside matters little. A ratio is the median over rounds of a call's seconds over the mean of forward
KL's two in the same round, at its beginning and its end.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from arms import attempt, peak_bytes
from record import record, told
from torch import Tensor

LOSSES = ("ForwardKL", "ReverseKL", "JensenShannon", "TotalVariation", "SkewForwardKL", "SkewReverseKL")
OTHERS = ("AlphaBeta", "AdaptiveKL", "TAID", "ContrastivePair", "Selected", "TokenTemperature", "AdaKD")
"""In the order of docs/methods.md; AdaKD is both of the last two, by Hellinger distance and half of the tokens."""
ROW_TOKENS = 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
KD_WEIGHT, TEMPERATURE = 0.8, 1.5
RESET_PEAK = Path("/proc/self/clear_refs")


class Arm(NamedTuple):
    """A way to compute the objective, or, without a loss, the bare products."""

    name: str
    chunk: int | str | None = None


class Inputs(NamedTuple):
    """What goes in: of the student with gradients, of the teacher without."""

    hidden: Tensor
    head: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor
    targets: Tensor

    def first(self, tokens: int, dtype: torch.dtype | None = None) -> Inputs:
        """Return the first tokens of it, perhaps in another type."""
        parts = [self.hidden[:tokens], self.head, self.teacher_hidden[:tokens], self.teacher_head]
        parts = [part.detach().to(dtype or part.dtype) for part in parts]
        return Inputs(*(part.requires_grad_(place < 2) for place, part in enumerate(parts)), self.targets[:tokens])


def make_inputs(tokens: int, vocabulary: int, width: int, dtype: torch.dtype) -> Inputs:
    """Return random ones whose logits have a standard deviation of 2."""
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        hidden, teacher_hidden = torch.randn(2, tokens, width)
        head, teacher_head = torch.randn(2, vocabulary, width) * 2 / width**0.5
        targets = torch.randint(vocabulary, (tokens,))
    return Inputs(hidden, head, teacher_hidden, teacher_head, targets).first(tokens, dtype)


def naive(inputs: Inputs, loss: Any, arm: Arm) -> Tensor:
    """Compute the objective from all logits."""
    from srd_lightning.losses import log_probabilities, upcast

    logits = inputs.hidden @ inputs.head.T
    teacher_logp = log_probabilities(inputs.teacher_hidden @ inputs.teacher_head.T, loss.temperature)
    kd = loss.divergence(teacher_logp, log_probabilities(logits, loss.temperature)).mean() * loss.scale
    ce = torch.nn.functional.cross_entropy(upcast(logits), inputs.targets)
    return (1 - KD_WEIGHT) * ce + KD_WEIGHT * kd


def chunked(inputs: Inputs, loss: Any, arm: Arm) -> Tensor:
    """Compute it with this library."""
    from srd_lightning.losses.chunked import chunked_objective
    from srd_lightning.losses.head import Head
    from srd_lightning.teacher.live import by_head

    teacher = by_head(Head(inputs.teacher_head), inputs.teacher_hidden)
    how = {"kd_weight": KD_WEIGHT, "chunk": arm.chunk, "compile": arm.name == "compiled"}
    return chunked_objective(inputs.hidden, Head(inputs.head), inputs.targets, loss, teacher, **how).loss


def liger(inputs: Inputs, loss: Any, arm: Arm) -> Tensor:
    """Compute it with Liger, which does not scale by the temperature squared by itself."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    shares = {"weight_hard_loss": 1 - KD_WEIGHT, "weight_soft_loss": KD_WEIGHT * loss.scale}
    how = {"beta": loss.beta, "temperature": loss.temperature, "chunk_size": arm.chunk}
    student, teacher = (inputs.hidden, inputs.head), (inputs.teacher_hidden, inputs.teacher_head)
    return LigerFusedLinearJSDLoss(**shares, **how)(*student, *teacher, inputs.targets)


def gradients(arm: Arm, inputs: Inputs, loss: Any) -> tuple[Tensor, ...]:
    """Run forward and backward; return the gradients of the hidden states and of the head."""
    if arm.name == "products":
        with torch.no_grad():
            _, logits = inputs.teacher_hidden @ inputs.teacher_head.T, inputs.hidden @ inputs.head.T
            return logits @ inputs.head, logits.T @ inputs.hidden
    compute = {"naive": naive, "chunked": chunked, "compiled": chunked, "liger": liger}[arm.name]
    return torch.autograd.grad(compute(inputs, loss, arm), (inputs.hidden, inputs.head))


def difference(arm: Arm, inputs: Inputs, loss: Any) -> float:
    """Return how far the gradients on the first tokens are from those of `naive` in float64."""
    expected = gradients(Arm("naive"), inputs.first(64, torch.float64), loss)
    found = gradients(Arm(arm.name, arm.chunk and 16), inputs.first(64), loss)
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))


def extra_peak(work: Callable[[], Any]) -> int:
    """Return the most memory that work takes above what is held before: of the GPU if there is one."""
    reset_peak()
    before = high_water_mark()
    work()
    return high_water_mark() - before


def reset_peak() -> None:
    """Let the high-water mark begin at what is held now."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif RESET_PEAK.exists():
        ctypes.CDLL(None).malloc_trim(0)  # memory that was freed and kept would be used again unseen
        RESET_PEAK.write_text("5")


def high_water_mark() -> int:
    """Return the peak memory since it was last reset, of this process or the GPU; off Linux, since it began."""
    if torch.cuda.is_available() or not RESET_PEAK.exists():
        return peak_bytes()
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def measure(work: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Warm up, then return median seconds and peak memory."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else int
    work()
    peak, seconds = extra_peak(work), []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        work()
        wait()
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "peak_memory_bytes": peak}


def named(loss: str) -> Any:
    """Return a loss as it comes, at the temperature of all arms."""
    from srd_lightning import losses

    made = losses.Selected(losses.TokenTemperature(), losses.Hellinger(), 0.5) if loss == "AdaKD" else None
    made = getattr(losses, loss)() if made is None else made
    made.temperature = TEMPERATURE
    return made


def ratios(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure what each loss costs against forward KL, call by call in turn."""
    on_gpu = torch.cuda.is_available()
    clock = time.perf_counter if on_gpu else time.process_time
    if not on_gpu:
        torch.set_num_threads(1)
    from srd_lightning.losses.chunked import chunked_objective
    from srd_lightning.losses.head import Head
    from srd_lightning.teacher.live import by_head

    results, (tokens, *_) = [], options.tokens
    losses = {name: named(name) for name in ("ForwardKL", *OTHERS)}
    for dtype, kd_weight in itertools.product(options.dtypes, (KD_WEIGHT, 1.0)):
        inputs = make_inputs(tokens, options.vocabulary, options.width, DTYPES[dtype])
        rows = [ROW_TOKENS] * (tokens // ROW_TOKENS) + [tokens % ROW_TOKENS]

        def seconds(loss: Any, inputs: Inputs = inputs, kd_weight: float = kd_weight, rows: Any = rows) -> float:
            leaves, start = inputs.first(tokens), clock()
            teacher, head = by_head(Head(leaves.teacher_head), leaves.teacher_hidden), Head(leaves.head)
            chunked_objective(leaves.hidden, head, leaves.targets, loss, teacher, kd_weight, rows=rows).loss.backward()
            if on_gpu:
                torch.cuda.synchronize()
            return clock() - start

        found: dict[str, list[float]] = {name: [] for name in losses}
        for turn in range(options.repeats + 1):  # the first warms up
            times = {name: seconds(loss) for name, loss in losses.items()}
            forward = (times["ForwardKL"] + seconds(losses["ForwardKL"])) / 2
            for name in found if turn else ():
                found[name].append(times[name] / forward)
        for name, over in found.items():
            row = {"loss": name, "dtype": dtype, "kd_weight": kd_weight, "tokens": tokens, "each": over}
            results.append({**row, "over_forward_kl": statistics.median(over), "least": min(over), "most": max(over)})
            print(json.dumps(results[-1]), file=sys.stderr)
    return results


def run(arm: Arm, loss: str | None, dtype: str, tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one arm in this process."""
    inputs = make_inputs(tokens, options.vocabulary, options.width, DTYPES[dtype])
    objective = loss and named(loss)
    result = {**arm._asdict(), "loss": loss, "dtype": dtype, "tokens": tokens}
    result.update(measure(lambda: gradients(arm, inputs, objective), options.repeats))
    if objective:
        result["gradient_difference"] = difference(arm, inputs, objective)
    return result


def run_all(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run every arm, tell of it, and compare what belongs together."""
    results = []
    for dtype, tokens in itertools.product(options.dtypes, options.tokens):
        (floor,) = run_some([Arm("products")], None, dtype, tokens, options)
        results.append(floor)
        for loss in options.losses:
            arms = [Arm("naive"), *(Arm("chunked", chunk) for chunk in options.chunks)]
            arms += [Arm("compiled", 256)] * options.compile
            arms += [Arm("liger", 1024)] * (options.liger and loss == "JensenShannon")
            for result in (found := run_some(arms, loss, dtype, tokens, options)):
                result["seconds_over_products"] = result["seconds"] / floor["seconds"]
                if found[0]["name"] == "naive":
                    result["seconds_over_naive"] = result["seconds"] / found[0]["seconds"]
                    result["memory_over_naive"] = result["peak_memory_bytes"] / found[0]["peak_memory_bytes"]
            results += found
    return results


def run_some(
    arms: Sequence[Arm], loss: str | None, dtype: str, tokens: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Run arms; return what those that did not fail have measured."""
    results = []
    for arm in arms:
        name = " ".join(map(str, filter(None, (loss, dtype, tokens, *arm))))
        if (result := attempt(name, run, arm, loss, dtype, tokens, options)) is not None:
            says = f"{1e3 * result['seconds']:.4g} ms, {result['peak_memory_bytes'] / 1e9:.3g} GB"
            print(told(name, says, **result), flush=True)
            results.append(result)
    return results


def main() -> None:
    """Run the arms, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048], help="response tokens")
    parser.add_argument("--vocabulary", type=int, default=49152, help="of student and teacher")
    parser.add_argument("--width", type=int, default=576, help="of the hidden states of both")
    how = {"type": lambda text: text if text == "auto" else int(text), "default": [64, 256, 1024]}
    parser.add_argument("--chunks", nargs="+", help="of this library; auto is its default", **how)
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=LOSSES, help="which to run")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="of all inputs")
    parser.add_argument("--compile", action="store_true", help="also compile what turns logits into gradients")
    parser.add_argument("--ratios", action="store_true", help="all losses against forward KL, and nothing else")
    parser.add_argument("--repeats", type=int, default=3, help="calls that are timed")
    parser.add_argument("--json", type=Path, help="file to write; a plot is put beside it")
    options = parser.parse_args()
    options.liger = torch.cuda.is_available() and find_spec("liger_kernel") is not None
    if not options.liger:
        print("liger was left out: it needs a GPU and liger-kernel", file=sys.stderr)
    options.load_before = os.getloadavg()[0]
    results = ratios(options) if options.ratios else run_all(options)
    settings = {name: str(value) for name, value in vars(options).items()}
    print(record({"results": results, "options": settings, "threads": torch.get_num_threads()}, options.json))
    if options.json and not options.ratios:
        plot(results, options.json.with_suffix(".png"))


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw time and memory of the first loss against tokens, and the time of all losses at the largest size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    dtypes = list(dict.fromkeys(result["dtype"] for result in results))
    size = 12, 3.4 * len(dtypes)
    figure, axes = pyplot.subplots(len(dtypes), 3, figsize=size, layout="constrained", squeeze=False)
    for row, dtype in zip(axes, dtypes, strict=True):
        some = [result for result in results if result["dtype"] == dtype]
        loss = next(result["loss"] for result in some if result["loss"])
        draw_sizes(row, [result for result in some if result["loss"] in (loss, None)], f"{loss}, {dtype}")
        draw_losses(row[2], [result for result in some if result["loss"]], dtype)
        for axis in row:
            axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def by_arm(results: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Return the results of each arm with how to draw it: ours blue, the darker the later it comes."""
    found: dict[Arm, list[dict[str, Any]]] = {}
    for result in sorted(results, key=lambda result: result["tokens"]):
        found.setdefault(Arm(result["name"], result["chunk"]), []).append(result)
    colours = {"naive": "#c0504d", "products": "#b0b0b0", "compiled": "#e08a1e", "liger": "#4a9a5b"}
    blues = itertools.cycle(["#9ecae1", "#4292c6", "#08306b"])
    labels = [(name, f"{name} {chunk}" if name == "chunked" else name) for name, chunk in found]
    styles = [{"color": colours.get(name) or next(blues), "label": label} for name, label in labels]
    return list(zip(styles, found.values(), strict=True))


def draw_sizes(axes: Any, results: Sequence[dict[str, Any]], title: str) -> None:
    for style, line in by_arm(results):
        tokens, floor = [result["tokens"] for result in line], line[0]["loss"] is None
        axes[0].plot(tokens, [result["seconds"] for result in line], "--" if floor else "o-", **style)
        if not floor:
            axes[1].plot(tokens, [result["peak_memory_bytes"] / 1e9 for result in line], "o-", **style)
    for axis, label in zip(axes, ("seconds", "peak memory, GB"), strict=False):
        axis.set(xlabel="tokens", ylabel=label, title=title, xlim=0, ylim=0)
    axes[0].legend(frameon=False, fontsize=8)


def draw_losses(axis: Any, results: Sequence[dict[str, Any]], dtype: str) -> None:
    largest, losses = max(result["tokens"] for result in results), list(dict.fromkeys(r["loss"] for r in results))
    arms = by_arm([result for result in results if result["tokens"] == largest and result["name"] != "naive"])
    height = 0.8 / len(arms)
    for place, (style, found) in enumerate(arms):
        where = [losses.index(result["loss"]) + (place - (len(arms) - 1) / 2) * height for result in found]
        axis.barh(where, [result["seconds_over_naive"] for result in found], height, **style)
    axis.axvline(1, color="#c0504d")
    axis.set(xlabel="seconds over naive", title=f"{largest} tokens, {dtype}", ylim=(len(losses) - 0.5, -0.5))
    axis.set_yticks(range(len(losses)), losses)


if __name__ == "__main__":
    main()
