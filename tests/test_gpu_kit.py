"""The kit for machines with GPUs, rehearsed on a CPU at toy size."""

import ast
import importlib
import json
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from conftest import HANGS, python, surroundings
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]


def run(folder, *arguments):
    """Run the script as if there were no GPU; return how it ended, and the lines that it wrote if it did."""
    command = [python(), str(ROOT / "benchmarks" / "gpu" / "run.py"), *arguments]
    environment = surroundings(CUDA_VISIBLE_DEVICES="")
    where = ["--json", str(folder / "results.jsonl")]
    done = subprocess.run(
        [*command, *where], env=environment, capture_output=True, text=True, timeout=HANGS, check=False
    )
    return done, lines_of(folder)


def lines_of(folder):
    path = folder / "results.jsonl"
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()] * path.exists()


def ends(lines):
    """Return how each piece ended."""
    return {line["piece"]: line for line in lines if "outcome" in line and "arm" not in line}


def test_without_a_gpu_it_says_so_and_writes_nothing(kit, tmp_path, capsys):
    assert kit(rehearse=False, step=writes) == 0
    assert "there is no GPU that torch can use: nothing was run, and nothing is written" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_every_program_runs_and_tells_of_its_arms(tmp_path):
    """The pieces left out are other arguments of the same programs, or tests, which the suite runs anyway."""
    names = ["kernel", "small", "loss", "step", "trl"]
    done, lines = run(tmp_path, "--rehearse", "--pieces", *names)
    assert done.returncode == 0, done.stdout + done.stderr
    head, *lines = lines
    assert {"device", "cores", "versions", "commit", "clean", "date"} <= head.keys()
    assert (head["rehearsal"], head["model"]) == (True, "random")
    arms = {name: {} for name in names}
    for line in lines:
        if "arm" in line:
            arms[line["piece"]][line["arm"]] = line
            assert f"  {line['arm']}: {line['says']}\n" in done.stdout
    ended = ends(lines)
    assert ended.pop("trl")["reason"] == "not installed: trl"
    assert list(ended) == [name for name in names if name != "trl"]
    for name, piece in ended.items():
        assert (piece["outcome"], piece["arms"]) == ("passed", len(arms[name]))
        assert f"{name}: passed" in done.stdout
    assert arms["kernel"]["ForwardKL exact float32 64"]["torch"][1] < 1e-6
    assert arms["kernel"]["topk objective 32,64,8 plain"]["seconds"] > 0
    assert [arm["waits_per_step"].keys() for arm in arms["small"].values()] == [{"_local_scalar_dense"}] * 3
    assert "JensenShannon fp32 16 chunked 8" in arms["loss"]
    assert arms["step"]["live_fp32"]["rows_per_second"] > 0


@pytest.fixture
def script(monkeypatch):
    """Return what imports one of the scripts."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "gpu"))
    names = set()

    def load(name):
        names.add(name)
        return importlib.import_module(name)

    yield load
    for name in names:
        del sys.modules[name]


def test_each_test_belongs_to_one_piece(script):
    pieces = [piece.program for piece in script("run").PIECES.values() if not piece.program.endswith(".py")]
    tree = ast.parse((ROOT / "tests" / "test_gpu.py").read_text())
    names = [node.name for node in tree.body if getattr(node, "name", "").startswith("test_")]
    assert len(names) > 5
    for name in names:
        assert sum(any(word in name for word in piece.split(" or ")) for piece in pieces) == 1, name


def test_the_speed_of_a_pair_counts_what_is_needed(script):
    """By hand: a student of one layer, a teacher of two."""
    throughput = script("throughput")
    student, teacher = throughput.Size(4, 8, 1, 2, 2), throughput.Size(4, 8, 2, 2, 1)
    pair = throughput.Pair(student, teacher, vocabulary=10, batch=3, prompt=2, response=4)
    of_student = 2 * (4 * 4 * 4 + 3 * 4 * 8) + 2 * 6 * 4  # q, k, v, o and the three of the MLP; attention
    of_teacher = 2 * 2 * (2 * 4 * 4 + 2 * 4 * 2 + 3 * 4 * 8) + 2 * 2 * 6 * 4  # keys and values of half the width
    heads = 4 * (3 * 2 * 4 * 10), 4 * (2 * 4 * 10)
    live = 3 * (3 * 6 * of_student + heads[0] + 6 * of_teacher + heads[1])
    assert throughput.needed_flops(pair, live=True, with_head=True) == live
    assert throughput.needed_flops(pair, live=False, with_head=False) == 3 * (3 * 6 * of_student + heads[0])


SLEEPER = 'echo \'{"arm": "first", "says": ""}\'; sleep 600 & echo $!; wait'


def says(**numbers):
    """Return a program that tells of an arm."""
    return lambda folder: ["echo", json.dumps({"arm": "one", "says": "2 rows/s", **numbers})]


writes = says(rows_per_second=2.0, order_correlation=float("nan"))


@pytest.fixture
def kit(monkeypatch, tmp_path, script):
    """Return what runs the script in this process, with other commands for its pieces, and returns its exit code."""
    kit = script("run")

    def run_with(limit=HANGS, rehearse=True, **commands):
        names = {id(piece): name for name, piece in kit.PIECES.items()}
        monkeypatch.setattr(kit, "command", lambda piece, options, folder: commands[names[id(piece)]](folder))
        inputs = ["--model", "none", "--data", "none", *["--rehearse"] * rehearse, "--limit", str(limit)]
        pieces = ["--pieces", *commands, "--json", str(tmp_path / "results.jsonl")]
        monkeypatch.setattr(sys, "argv", ["run.py", *inputs, *pieces])
        return kit.main()

    return run_with


def test_a_piece_that_fails_is_recorded_and_the_others_run(kit, tmp_path):
    code = kit(loss=lambda folder: [sys.executable, "-c", "print('almost'); raise SystemExit(3)"], step=writes)
    lines = lines_of(tmp_path)
    ended = ends(lines)
    assert code == 1
    assert ended["loss"].items() >= {"outcome": "failed", "reason": "exit code 3", "last_lines": ["almost"]}.items()
    assert ended["step"]["outcome"] == "passed"
    (arm,) = [line for line in lines if "arm" in line]
    assert arm == {
        "piece": "step",
        "arm": "one",
        "says": "2 rows/s",
        "rows_per_second": 2.0,
        "order_correlation": None,
    }


def test_an_arm_that_fails_is_named(kit, tmp_path):
    assert kit(step=says(outcome="failed")) == 1
    assert ends(lines_of(tmp_path))["step"]["reason"] == "1 of 1: one"


def test_an_arm_that_raises_is_told_of_and_the_next_is_run(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    arms = importlib.import_module("arms")
    monkeypatch.setattr(arms, "in_own_process", lambda function, *arguments: function(*arguments))
    assert arms.attempt("root", int, "4") == 4
    assert arms.attempt("none", int, "four") is None
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line).items() >= {"arm": "none", "outcome": "failed"}.items()
    assert "ValueError: invalid literal" in json.loads(line)["says"]


def test_a_piece_that_takes_too_long_is_stopped_with_what_it_has_started(kit, tmp_path):
    assert kit(limit=2, reflection=lambda folder: ["sh", "-c", SLEEPER]) == 1
    *_, arm, piece = lines_of(tmp_path)
    assert arm == {"piece": "reflection", "arm": "first", "says": ""}, "what it had told of is kept"
    assert piece.items() >= {"outcome": "stopped", "reason": "it took longer than 2 s"}.items()
    assert 2 <= piece["seconds"] < 600
    _, child = piece["last_lines"]
    until = time.monotonic() + 30
    while runs(int(child)) and time.monotonic() < until:
        time.sleep(0.01)  # it was killed, and is gone as soon as the kernel has come to it
    assert not runs(int(child)), "what a piece has started is stopped with it"


def runs(process):
    """Return whether a process still does something: one that nobody waits for stays on as a zombie."""
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_an_interrupt_leaves_what_is_known_and_a_second_call_appends(kit, tmp_path):
    def interrupts(folder):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kit(step=writes, loss=interrupts)
    assert {name: piece["outcome"] for name, piece in ends(lines_of(tmp_path)).items()} == {"step": "passed"}
    kit(loss=writes)
    assert list(ends(lines_of(tmp_path))) == ["step", "loss"]


def test_tests_that_are_all_skipped_have_not_passed(kit, tmp_path):
    (tmp_path / "test_nothing.py").write_text("import pytest\n\ndef test_one():\n    pytest.skip('no reason')\n")
    pytest_here = [sys.executable, "-m", "pytest", str(tmp_path / "test_nothing.py"), f"--rootdir={tmp_path}"]
    assert kit(equal=lambda folder: [*pytest_here, "-p", "each_test", "-p", "no:cacheprovider"]) == 1
    *_, arm, piece = lines_of(tmp_path)
    assert (arm["arm"], arm["outcome"], arm["says"]) == ("test_one", "skipped", "skipped, Skipped: no reason")
    assert (piece["outcome"], piece["reason"]) == ("failed", "no test has run")


def test_a_piece_without_numbers_has_not_passed(kit, tmp_path):
    assert kit(step=lambda folder: [sys.executable, "-c", ""]) == 1
    piece = ends(lines_of(tmp_path))["step"]
    assert (piece["outcome"], piece["reason"]) == ("failed", "it has told of nothing")


def test_pieces_have_numbers(script):
    kit = script("run")
    assert [kit.chosen("1"), kit.chosen(str(len(kit.PIECES)))] == [*kit.PIECES][:: len(kit.PIECES) - 1]
    for wrong in ("0", "99", "tets"):
        with pytest.raises(Exception, match=f"{wrong} is no piece"):
            kit.chosen(wrong)


def test_a_model_needs_data(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", "--rehearse", "--model", "here"])
    with pytest.raises(SystemExit, match="2"):
        script("run").main()
    assert "--model and --data come together" in capsys.readouterr().err


class TestPack:
    """Wheels for a machine without a package index."""

    @pytest.fixture
    def pack(self, script):
        return script("pack")

    @pytest.fixture
    def index(self, pack, monkeypatch):
        """Let there be some packages, each with what it requires; returns the names of those that were downloaded."""
        packages = {
            "ours": ["lacks>=2", "old>=2", "torch>=2", "plain", "tested; extra == 'dev'"],
            "lacks": ["Plain", "extra[more]", "elsewhere; sys_platform == 'win32'"],
            "old": [],
            "extra": ["for-more; extra == 'more'", "for-less; extra == 'less'"],
            "for-more": ["ours"],
        }
        downloaded = []

        def download(wanted, folder, python):
            downloaded.append(wanted.name)
            with zipfile.ZipFile(folder / f"{wanted.name}-1-py3-none-any.whl", "w") as wheel:
                lines = [f"Requires-Dist: {text}\n" for text in packages[wanted.name]]
                wheel.writestr(f"{wanted.name}-1.dist-info/METADATA", "Name: x\n" + "".join(lines) + "\ntext\n")
            return folder / f"{wanted.name}-1-py3-none-any.whl"

        monkeypatch.setattr(pack, "download", download)
        return downloaded

    def test_what_is_lacking_is_collected_with_what_it_needs(self, pack, index, tmp_path):
        have = pack.installed(["plain  # comment", "old==1.5", "", "from-a-file @ file:///x"])
        assert have == {"plain": None, "old": "1.5"}
        wheels = pack.collect(["ours", "unwanted; extra == 'test'"], have, tmp_path, "3.12")
        assert index == ["ours", "lacks", "old", "extra", "for-more"]
        assert [wheel.name.split("-1-")[0] for wheel in wheels] == index

    def test_what_is_there(self, pack):
        have = {"one": "1.5", "some": None}
        found = {text: pack.is_there(Requirement(text), have) for text in ("one>=1", "one>=2", "some>9", "other")}
        assert found == {"one>=1": True, "one>=2": False, "some>9": True, "other": False}

    def test_parts_hold_no_more_than_they_may(self, pack):
        assert pack.into_parts({"a": 3, "b": 5, "c": 6, "d": 2}, 8) == [["c", "d"], ["b", "a"]]
        with pytest.raises(SystemExit, match="more than --limit"):
            pack.into_parts({"a": 9}, 8)


def test_the_readme_lists_the_pieces(script):
    text = (ROOT / "benchmarks" / "gpu" / "README.md").read_text()
    listed = re.findall(r"^\| (\d+) `(\w+)` \| (\d+) s \|", text, re.MULTILINE)
    pieces = [
        (str(number), name, str(piece.seconds)) for number, (name, piece) in enumerate(script("run").PIECES.items(), 1)
    ]
    assert listed == pieces
