"""The script for machines with GPUs, tried with the CPU as device at toy size."""

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import HANGS, python, surroundings

ROOT = Path(__file__).resolve().parents[1]


def run(folder, *arguments):
    """Run the script as if there were no GPU; return how it ended, and what it wrote if it did."""
    command = [
        python(),
        str(ROOT / "benchmarks" / "gpu" / "run.py"),
        *arguments,
        "--json",
        str(folder / "results.json"),
    ]
    environment = surroundings(CUDA_VISIBLE_DEVICES="")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANGS, check=False)
    path = folder / "results.json"
    return done, json.loads(path.read_text(), parse_constant=pytest.fail) if path.exists() else None


def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path):
    done, results = run(tmp_path)
    assert done.returncode == 0
    assert "there is no GPU that torch can use: nothing was run, and nothing is written" in done.stdout
    assert results is None
    assert not list(tmp_path.iterdir())


def test_every_piece_runs_and_its_numbers_are_in_the_results(tmp_path):
    done, results = run(tmp_path, "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"device", "cores", "versions", "commit", "clean", "date"} <= results.keys()
    assert (results["ran_on"], results["model"]) == ("cpu", "random")
    pieces = results["pieces"]
    assert list(pieces) == ["tests", "loss", "step", "reflection"]
    for name, piece in pieces.items():
        assert piece["outcome"] == "passed"
        assert piece["seconds"] > 0
        assert (f"{name}.py" in piece["command"]) == (name != "tests")
        assert f"{name}: passed" in done.stdout
    tests = pieces["tests"]["result"]
    assert tests["tests"] > 0 == tests["failed"] == len(tests["skipped"])
    assert any(arm["name"] == "chunked" for arm in pieces["loss"]["result"]["results"])
    assert pieces["loss"]["note"] == "Liger was not measured: it needs a GPU and liger-kernel"
    assert pieces["step"]["result"]["variants"]["live_fp32"]["rows_per_second"] > 0
    assert pieces["reflection"]["result"]["arms"]["ours"]["rows"] == 4


SLEEPER = "sleep 600 & echo $!; wait"
WRITER = (
    "import json, sys; json.dump({'rows_per_second': 2.0, 'order_correlation': float('nan')}, open(sys.argv[1], 'w'))"
)


@pytest.fixture
def kit(monkeypatch, tmp_path):
    """Return what runs the script in this process, with other commands for its pieces, and returns its exit code."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "gpu"))
    script = importlib.import_module("run")
    inputs = ["--device", "cpu", "--model", "none", "--data", "none"]

    def run_with(limit=HANGS, **commands):
        monkeypatch.setattr(script, "command", lambda piece, options, folder: commands[piece](folder))
        pieces = ["--pieces", *commands, "--json", str(tmp_path / "results.json")]
        monkeypatch.setattr(sys, "argv", ["run.py", *inputs, "--limit", str(limit), *pieces])
        return script.main()

    yield run_with
    del sys.modules["run"]


def writes(folder):
    return [sys.executable, "-c", WRITER, str(folder / "step.json")]


def test_a_piece_that_fails_is_recorded_and_the_others_run(kit, tmp_path):
    code = kit(loss=lambda folder: [sys.executable, "-c", "print('almost'); raise SystemExit(3)"], step=writes)
    pieces = json.loads((tmp_path / "results.json").read_text())["pieces"]
    assert code == 1
    assert pieces["loss"].items() >= {"outcome": "failed", "reason": "exit code 3", "last_lines": ["almost"]}.items()
    assert pieces["step"]["outcome"] == "passed"
    assert pieces["step"]["result"] == {"rows_per_second": 2.0, "order_correlation": None}


def test_a_piece_that_takes_too_long_is_stopped_with_what_it_has_started(kit, tmp_path):
    assert kit(limit=5, reflection=lambda folder: ["sh", "-c", SLEEPER]) == 1
    piece = json.loads((tmp_path / "results.json").read_text())["pieces"]["reflection"]
    assert piece.items() >= {"outcome": "stopped", "reason": "it took longer than 5 s"}.items()
    assert 5 <= piece["seconds"] < 600
    (child,) = piece["last_lines"]
    until = time.monotonic() + 30
    while runs(int(child)) and time.monotonic() < until:
        time.sleep(0.01)  # it was killed, and is gone as soon as the kernel has come to it
    assert not runs(int(child)), "what a piece has started is stopped with it"


def runs(process):
    """Return whether a process still does something: one that nobody waits for stays on as a zombie."""
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_an_interrupt_leaves_what_is_known(kit, tmp_path):
    def interrupts(folder):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kit(step=writes, loss=interrupts)
    pieces = json.loads((tmp_path / "results.json").read_text())["pieces"]
    assert {name: piece["outcome"] for name, piece in pieces.items()} == {"step": "passed"}


def test_tests_that_are_all_skipped_have_not_passed(kit, tmp_path):
    (tmp_path / "test_nothing.py").write_text("import pytest\n\ndef test_one():\n    pytest.skip('no reason')\n")
    pytest_here = [sys.executable, "-m", "pytest", str(tmp_path / "test_nothing.py"), f"--rootdir={tmp_path}"]
    assert kit(tests=lambda folder: [*pytest_here, f"--junitxml={folder / 'tests.xml'}"]) == 1
    tests = json.loads((tmp_path / "results.json").read_text())["pieces"]["tests"]
    assert (tests["outcome"], tests["reason"]) == ("failed", "no test has run")
    assert tests["result"]["skipped"] == {"test_one": "no reason"}


def test_a_piece_without_numbers_has_not_passed(kit, tmp_path):
    assert kit(step=lambda folder: [sys.executable, "-c", ""]) == 1
    step = json.loads((tmp_path / "results.json").read_text())["pieces"]["step"]
    assert (step["outcome"], step["reason"]) == ("failed", "it has written no numbers")


def test_a_piece_that_lacks_a_module_is_skipped(kit, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules["run"].NEEDS, "step", ("no_such_module",))
    assert kit(step=writes) == 1
    step = json.loads((tmp_path / "results.json").read_text())["pieces"]["step"]
    assert step == {"outcome": "skipped", "reason": "not installed: no_such_module"}


def test_a_model_needs_data(tmp_path):
    done, results = run(tmp_path, "--device", "cpu", "--model", str(tmp_path))
    assert (done.returncode, results) == (2, None)
    assert "--model and --data come together" in done.stderr
