"""What is tested and measured on a GPU, in pieces of a few minutes each.

    python benchmarks/gpu/run.py --list                           # the pieces, and how long each is expected to take
    python benchmarks/gpu/run.py                                  # all of them
    python benchmarks/gpu/run.py --pieces 1 kernel --json results-gpu.jsonl

A piece is a program of its own, which is stopped with all that it has started when it takes longer than ``--limit``.
Each arm that it has measured, or tested, is a line of JSON in the file as soon as it is known, so that whatever
stops a piece, or this script, costs one arm. A line more says how the piece ended. Lines are appended: pieces may be
run in several calls. Where neither a model nor data are named they are random: then they tell of speed and memory, not
of quality. Nothing is fetched. Where there is no GPU nothing is done and nothing is written; ``--rehearse`` runs every
piece at toy size on a CPU. See ``benchmarks/gpu/README.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from random_model import SHAPES, write_model, write_rows  # noqa: E402
from record import surroundings  # noqa: E402

LAST_LINES = 40


@dataclass(frozen=True)
class Piece:
    """A program with its arguments.

    Args:
        what: It tells.
        seconds: It is expected to take on an H100: a guess, until it has been run.
        program: A file in ``benchmarks``, or the names of tests in ``tests/test_gpu.py``, as ``pytest -k`` takes them.
        sizes: Arguments on a GPU.
        tiny: Arguments on a CPU.
        needs: Modules that this library does without.
        rows: Whether it takes a model and rows.
    """

    what: str
    seconds: int
    program: str
    sizes: str = ""
    tiny: str = ""
    needs: tuple[str, ...] = ()
    rows: bool = False


def tests(what: str, seconds: int, names: str, tiny: str) -> Piece:
    """Return a piece that is some of the tests."""
    return Piece(what, seconds, names, tiny=tiny, needs=("pytest", "hypothesis", "peft"))


STEPS = "--rows 128 --batch 16 --micro-batch-tokens 16384"
TINY_PAIR = "tiny --steps 1 --warm-up 1 --profiled 1"
PIECES = {
    "equal": tests(
        "tests: a GPU computes and trains as a CPU does",
        120,
        "objective or as_a_cpu_does or clips or packed or as_on_a_cpu",
        "objective",
    ),
    "kernel": Piece(
        "the Triton kernels against float64 and operations of torch; time and bytes against what was expected",
        90,
        "gpu/kernel.py",
        tiny="--shapes 32,64,8 --losses ForwardKL topk",
    ),
    "small": Piece(
        "tokens per second, MFU, waits per step: 0.1B learns from 1.5B", 60, "gpu/throughput.py", "small", TINY_PAIR
    ),
    "large": Piece(
        "tokens per second, MFU, waits per step: 1.5B learns from 7B", 180, "gpu/throughput.py", "large", TINY_PAIR
    ),
    "resume": tests("tests: a run that is killed goes on with the same weights", 120, "killed", "auto"),
    "strategies": tests(
        "tests: all GPUs train as one does under DDP, FSDP1 and FSDP2", 240, "all_devices", "ddp-offload"
    ),
    "loss": Piece(
        "the objective alone at five sizes, against Liger",
        240,
        "loss.py",
        "--compile --dtypes bf16 --tokens 512 1024 2048 4096 8192 --width 2048 --chunks auto --losses JensenShannon",
        "--tokens 16 --vocabulary 64 --width 8 --losses JensenShannon --dtypes fp32 --chunks 8 --repeats 1",
    ),
    "step": Piece(
        "a training step against the paper's loop",
        240,
        "step.py",
        STEPS,
        "--rows 4 --batch 2 --keep-layers 0 --variants live_fp32",
        rows=True,
    ),
    "trl": Piece(
        "a training step against TRL's GKDTrainer",
        150,
        "versus_trl.py",
        f"{STEPS} --arms trl_bf16 ours_live_bf16 ours_cached_bf16",
        "--rows 4 --batch 2 --keep-layers 0 --arms ours_live_fp32",
        needs=("trl",),
        rows=True,
    ),
    "reflection": Piece(
        "rows per second of the student's reflection, against the paper's settings",
        180,
        "reflection.py",
        "--rows 256 --paper-rows 48",
        "--rows 4 --paper-rows 2",
        rows=True,
    ),
}


def command(piece: Piece, options: argparse.Namespace, folder: Path) -> list[str]:
    """Return how a piece is run."""
    sizes = shlex.split(piece.tiny if options.rehearse else piece.sizes)
    if not piece.program.endswith(".py"):
        names = f"({piece.program}) and ({' '.join(sizes)})" if sizes else piece.program
        words = ["-m", "pytest", str(ROOT / "tests" / "test_gpu.py"), "-m", "gpu", "-k", names, "-p", "each_test"]
        return [sys.executable, *words, "-p", "no:cacheprovider"]
    words = [sys.executable, str(ROOT / "benchmarks" / piece.program), *sizes]
    if piece.rows:
        words += ["--model", options.model, "--data", *options.data]
        if options.keep_layers:
            words += ["--keep-layers", *map(str, options.keep_layers)]
    return words


def environment(rehearse: bool) -> dict[str, str]:
    """Return the variables under which pieces run: without the hub, and without GPUs in a rehearsal."""
    path = os.pathsep.join(filter(None, [str(ROOT), str(HERE), os.environ.get("PYTHONPATH")]))
    found = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    return {**found, "CUDA_VISIBLE_DEVICES": "", "SRD_TEST_DEVICE": "cpu"} if rehearse else found


def run(name: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run a piece, and write every arm as it comes; return how it ended."""
    piece = PIECES[name]
    if missing := [module for module in piece.needs if find_spec(module) is None]:
        return {"outcome": "skipped", "reason": f"not installed: {', '.join(missing)}"}
    words = command(piece, options, folder)
    print(f"{name}: about {piece.seconds} s, at most {options.limit:g} s: {shlex.join(words)}", flush=True)
    output, start, arms = folder / f"{name}.txt", time.perf_counter(), list[dict[str, Any]]()
    with started(words, output, environment(options.rehearse)) as process:
        for line in lines_of(process, output, start + options.limit):
            if (arm := arm_in(line)) is not None:
                arms.append(arm)
                append({"piece": name, **arm}, options.json)
                print(f"  {arm['arm']}: {arm['says']}", flush=True)
        code = process.poll()
    result: dict[str, Any] = {"arms": len(arms), "seconds": round(time.perf_counter() - start, 1)}
    if code is None:
        result |= {"outcome": "stopped", "reason": f"it took longer than {options.limit:g} s"}
    elif failed := [arm["arm"] for arm in arms if arm.get("outcome") == "failed"]:
        result |= {"outcome": "failed", "reason": f"{len(failed)} of {len(arms)}: {', '.join(failed)}"}
    elif code:
        result |= {"outcome": "failed", "reason": f"exit code {code}"}
    elif all(arm.get("outcome") == "skipped" for arm in arms):
        result |= {"outcome": "failed", "reason": "no test has run" if arms else "it has told of nothing"}
    else:
        result |= {"outcome": "passed"}
    if result["outcome"] != "passed":
        result["last_lines"] = output.read_text(errors="replace").splitlines()[-LAST_LINES:]
    return result


@contextlib.contextmanager
def started(words: Sequence[str], output: Path, variables: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Start a command that writes to a file; afterwards end what it has started and left."""
    with output.open("w") as file:
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def lines_of(process: subprocess.Popen[bytes], output: Path, until: float) -> Iterator[str]:
    """Yield each line that a process writes to a file, until it ends or its time is over."""
    with output.open("rb") as file:
        rest, ended = b"", False
        while not ended and time.perf_counter() < until:
            ended = process.poll() is not None  # what it has written is read once more
            *lines, rest = (rest + file.read()).split(b"\n")
            yield from (line.decode(errors="replace") for line in lines)
            time.sleep(0 if ended else 0.05)


def arm_in(line: str) -> dict[str, Any] | None:
    """Return what a line says of an arm, if it is such a line; see `record.told`."""
    if not line.startswith('{"arm": '):
        return None
    return json.loads(line, parse_constant=lambda name: None)  # NaN is no JSON


def append(result: dict[str, Any], path: Path) -> None:
    """Append a line to a file, and see it on the disk."""
    with path.open("a") as file:
        file.write(f"{json.dumps(result)}\n")
        file.flush()
        os.fsync(file.fileno())


def chosen(text: str) -> str:
    """Return the name of a piece from its name or its number."""
    names = list(PIECES)
    if text.isdecimal() and 1 <= int(text) <= len(names):
        return names[int(text) - 1]
    if text not in names:
        raise argparse.ArgumentTypeError(f"{text} is no piece; these are: {', '.join(names)}, or a number from 1 on")
    return text


def main() -> int:
    """Run the pieces; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="only say which pieces there are")
    parser.add_argument("--rehearse", action="store_true", help="run them at toy size on a CPU")
    parser.add_argument("--pieces", nargs="+", type=chosen, default=list(PIECES), help="which to run: names or numbers")
    parser.add_argument("--limit", type=float, default=480, help="seconds that each piece may take")
    parser.add_argument("--model", help="folder of a model, for those that take rows; by default a random one")
    parser.add_argument("--keep-layers", type=int, nargs="+", help="layers that the student has of it")
    parser.add_argument("--data", nargs="+", help="files of rows; by default random ones")
    parser.add_argument("--json", type=Path, default=Path("results-gpu.jsonl"), help="file to append to")
    options = parser.parse_args()
    if options.list:
        for number, (name, piece) in enumerate(PIECES.items(), 1):
            print(f"{number:2} {name:<11}{piece.seconds:4} s  {piece.what}")
        return 0
    if (options.model is None) != (options.data is None):
        parser.error("--model and --data come together: random rows are made of a random model's tokens")
    if not options.rehearse and not torch.cuda.is_available():
        print("there is no GPU that torch can use: nothing was run, and nothing is written")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        return run_all(options, Path(folder))


def run_all(options: argparse.Namespace, folder: Path) -> int:
    """Run one piece after the other; what is skipped, because something is not installed, has not failed."""
    append({**surroundings(), "rehearsal": options.rehearse, "model": options.model or "random"}, options.json)
    if options.model is None and any(PIECES[name].rows for name in options.pieces):
        shape = SHAPES["cpu" if options.rehearse else "cuda"]
        options.model, options.data = write_model(folder / "model", shape), [write_rows(folder / "rows.jsonl", shape)]
    ended = {}
    for name in options.pieces:
        result = ended[name] = run(name, options, folder)
        append({"piece": name, **result}, options.json)
        said = [result["outcome"], f"{result.get('seconds', 0):.0f} s", result.get("reason")]
        print(f"{name}: {', '.join(filter(None, said))}", *result.get("last_lines", []), sep="\n  ", flush=True)
    print(f"results are in {options.json}:", *(f"{name} {result['outcome']}" for name, result in ended.items()))
    return int(any(result["outcome"] in ("failed", "stopped") for result in ended.values()))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a piece that runs is ended then too
    sys.exit(main())
