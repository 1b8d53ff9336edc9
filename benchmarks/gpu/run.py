"""All that needs a GPU, on a machine that has one or more: tests, and three benchmarks.

    python benchmarks/gpu/run.py --json results-gpu.json

- ``tests``: ``tests/test_gpu.py``, one GPU against all of them.
- ``loss``: ``benchmarks/loss.py``, against Liger where it is installed.
- ``step``: ``benchmarks/step.py``.
- ``reflection``: ``benchmarks/reflection.py``.

Each piece is a process of its own, stopped with all that it has started when it takes longer than ``--limit``. What is
known is written after each. The model and the data of the last two are random ones unless others are named: then they
tell of speed and memory, not of quality. Nothing is fetched. Where there is no GPU nothing is done and nothing is
written; ``--device cpu`` tries the pieces at toy size. See ``benchmarks/gpu/README.md``.
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
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from random_model import SHAPES, write_model, write_rows  # noqa: E402
from record import surroundings  # noqa: E402

PIECES = ("tests", "loss", "step", "reflection")
NEEDS = {"tests": ("pytest", "peft")}
"""Modules that this library does without."""
SIZES = {
    "cuda": {
        "tests": "",
        "loss": "--compile --dtypes bf16 --tokens 1024 4096 --width 2048 --chunks 256 auto --losses ForwardKL "
        "JensenShannon",
        "step": "--rows 128 --batch 16 --micro-batch-tokens 16384",
        "reflection": "--rows 256 --paper-rows 48",
    },
    "cpu": {
        "tests": "-k objective",
        "loss": "--tokens 16 --vocabulary 64 --width 8 --losses JensenShannon --dtypes fp32 --chunks 8 --repeats 1",
        "step": "--rows 4 --batch 2 --keep-layers 0 --variants live_fp32",
        "reflection": "--rows 4 --paper-rows 2",
    },
}
"""Arguments of each piece."""
LAST_LINES = 40


def command(piece: str, options: argparse.Namespace, folder: Path) -> list[str]:
    """Return how a piece is run."""
    sizes = shlex.split(SIZES[options.device][piece])
    if piece == "tests":
        tests = [str(ROOT / "tests" / "test_gpu.py"), "-m", "gpu", "-rs", "--durations=0"]
        return [sys.executable, "-m", "pytest", *tests, f"--junitxml={folder / 'tests.xml'}", *sizes]
    inputs = [] if piece == "loss" else ["--model", options.model, "--data", *options.data]
    if piece != "loss" and options.keep_layers:
        sizes += ["--keep-layers", *map(str, options.keep_layers)]
    script = str(ROOT / "benchmarks" / f"{piece}.py")
    return [sys.executable, script, *inputs, *sizes, "--json", str(folder / f"{piece}.json")]


def environment(device: str) -> dict[str, str]:
    """Return the variables under which pieces run: without the hub, and without GPUs where they are not asked for."""
    found = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return found if device == "cuda" else {**found, "CUDA_VISIBLE_DEVICES": "", "SRD_TEST_DEVICE": device}


def run(piece: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run a piece; return what came of it."""
    if missing := [module for module in NEEDS.get(piece, ()) if find_spec(module) is None]:
        return {"outcome": "skipped", "reason": f"not installed: {', '.join(missing)}"}
    words = command(piece, options, folder)
    print(f"{piece}: {shlex.join(words)}", flush=True)
    output, start = folder / f"{piece}.txt", time.perf_counter()
    code = run_together(words, options.limit, output, environment(options.device))
    result: dict[str, Any] = {"command": shlex.join(words), "seconds": round(time.perf_counter() - start, 1)}
    if code is None:
        result |= {"outcome": "stopped", "reason": f"it took longer than {options.limit:g} s"}
    elif code:
        result |= {"outcome": "failed", "reason": f"exit code {code}"}
    else:
        result |= {"outcome": "passed"}
    found = {} if code is None else found_by(piece, folder)
    if result["outcome"] == "passed" and not found:
        found = {"outcome": "failed", "reason": "it has written no numbers"}
    result |= found
    if result["outcome"] != "passed":
        result["last_lines"] = output.read_text(errors="replace").splitlines()[-LAST_LINES:]
    return result


def run_together(words: Sequence[str], limit: float, output: Path, variables: dict[str, str]) -> int | None:
    """Run a command, then end what it has started and left; return its exit code, or nothing if it was stopped."""
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
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def found_by(piece: str, folder: Path) -> dict[str, Any]:
    """Return the numbers that a piece has written, and what is to be said about them."""
    if piece == "tests":
        path = folder / "tests.xml"
        return count_tests(path) if path.exists() else {}
    path = folder / f"{piece}.json"
    if not path.exists():
        return {}
    numbers = json.loads(path.read_text(), parse_constant=lambda name: None)  # NaN is no JSON
    if piece == "loss" and not any(arm["name"] == "liger" for arm in numbers["results"]):
        return {"result": numbers, "note": "Liger was not measured: it needs a GPU and liger-kernel"}
    return {"result": numbers}


def count_tests(path: Path) -> dict[str, Any]:
    """Return how many tests there were, and which were skipped; tests of which none has run have not passed."""
    suite = next(ElementTree.parse(path).iter("testsuite"))
    tests, failed = int(suite.get("tests", 0)), int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    skipped = {
        str(case.get("name")): str(reason.get("message"))
        for case in suite.iter("testcase")
        for reason in case.iter("skipped")
    }
    seconds = {str(case.get("name")): float(case.get("time", 0)) for case in suite.iter("testcase")}
    found = {"result": {"tests": tests, "failed": failed, "skipped": skipped, "seconds": seconds}}
    if tests == len(skipped):
        return {"outcome": "failed", "reason": "no test has run", **found}
    return found


def write(results: dict[str, Any], path: Path) -> None:
    """Write results whole or not at all."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps(results, indent=2))
    temporary.replace(path)


def main() -> int:
    """Run the pieces; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=SIZES, default="cuda", help="cpu tries the pieces at toy size")
    parser.add_argument("--pieces", nargs="+", choices=PIECES, default=PIECES, help="which to run")
    parser.add_argument("--limit", type=float, default=540, help="seconds that each piece may take")
    parser.add_argument("--model", help="folder of a model, for step and reflection; by default a random one")
    parser.add_argument("--keep-layers", type=int, nargs="+", help="layers that the student has of it")
    parser.add_argument("--data", nargs="+", help="files of rows; by default random ones")
    parser.add_argument("--json", type=Path, default=Path("results-gpu.json"), help="file to write")
    options = parser.parse_args()
    if (options.model is None) != (options.data is None):
        parser.error("--model and --data come together: random rows are made of a random model's tokens")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("there is no GPU that torch can use: nothing was run, and nothing is written")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        return run_all(options, Path(folder))


def run_all(options: argparse.Namespace, folder: Path) -> int:
    """Run one piece after the other, and write what is known after each."""
    results: dict[str, Any] = {
        **surroundings(),
        "ran_on": options.device,
        "model": options.model or "random",
        "pieces": {},
    }
    if options.model is None and {"step", "reflection"} & {*options.pieces}:
        shape = SHAPES[options.device]
        options.model, options.data = write_model(folder / "model", shape), [write_rows(folder / "rows.jsonl", shape)]
    for piece in options.pieces:
        result = results["pieces"][piece] = run(piece, options, folder)
        write(results, options.json)
        said = [result["outcome"], f"{result.get('seconds', 0):.0f} s", result.get("reason"), result.get("note")]
        print(f"{piece}: {', '.join(str(part) for part in said if part)}", *result.get("last_lines", []), sep="\n  ")
    print(f"results are in {options.json}")
    return int(any(result["outcome"] != "passed" for result in results["pieces"].values()))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a piece that runs is ended then too
    sys.exit(main())
