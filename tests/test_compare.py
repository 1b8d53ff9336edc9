"""`benchmarks/methods.py` with a random model: every method trains, and a second call goes on where the first ended."""

import json
import math
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WRITES = {"SeqKD", "GKD", "GKD, ContrastivePair", "DistiLLM", "MiniLLM"}


@pytest.fixture
def methods(monkeypatch):
    """Return the script, whose arms run in this process."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import methods

    monkeypatch.setattr(methods, "in_own_process", lambda function, *arguments: function(*arguments))
    return methods


@pytest.fixture
def call(methods, monkeypatch, tmp_path):
    """Return what calls the script, and returns its exit code and what is in its file."""

    def call(*arguments):
        path = tmp_path / "results.json"
        command = ["methods.py", "--tiny", "--at-once", "1", "--json", str(path), *arguments]
        monkeypatch.setattr(sys, "argv", command)
        return methods.main(), json.loads(path.read_text())

    return call


def test_every_method_trains_on_the_same_rows(methods, call, capsys):
    code, found = call()
    said = capsys.readouterr().out
    assert code == 0
    assert list(found["arms"]) == methods.ARMS
    assert found["untrained"]["kept"] == 6  # three quarters of eight
    assert list(found["untrained"]["teacher"]) == ["nll", "rouge_l"]
    for name, arm in found["arms"].items():
        # half of eight rows, then six, in batches of four; their scores are those of the first reflection
        assert (arm["rows"], arm["steps"], arm["reflected_again"]) == (10, 3, 0), name
        assert all(math.isfinite(arm[measure]) for measure in methods.MEASURES), name
        assert arm["nll"] != found["untrained"]["student"]["nll"], name
        assert (arm["generation_seconds"] > 0) == (name in WRITES), name
        assert f"| {name} | " in said, name
    divergences = {name: arm["kl"] for name, arm in found["arms"].items()}
    assert divergences["ContrastivePair"] == divergences["SkewForwardKL"]  # which it is where no text is the student's
    assert len(set(divergences.values())) == len(divergences) - 1


def test_the_teacher_writes_first_and_that_is_charged(methods, call, monkeypatch):
    tasks, write = [], methods.with_responses_of_teacher

    def watched(task, folder):
        after, written = write(task, folder)
        tasks.extend((task, after))
        return after, {**written, "writing_seconds": 1000.0, "writing_processor_seconds": 500.0}

    monkeypatch.setattr(methods, "with_responses_of_teacher", watched)
    _, found = call("--arms", "SeqKD")
    before, after = ({row["id"]: row["output"] for row in task.train} for task in tasks)
    assert before.keys() == after.keys()
    assert not set(before.values()) & set(after.values())
    assert {row["written_by"] for row in tasks[1].train} == {"teacher"}
    arm = found["arms"]["SeqKD"]
    assert (arm["written_rows"], arm["left_out"]) == (8, {})
    assert arm["generation_seconds"] == 1000.0
    assert 50 < arm["processor_seconds_per_row"] < 60
    assert arm["rows_per_second"] < 0.01


def test_a_second_call_runs_what_is_missing(methods, call, monkeypatch, tmp_path):
    names = ["ForwardKL", "ReverseKL"]
    _, first = call("--arms", *names)
    del first["arms"]["ReverseKL"]
    first["arms"]["ForwardKL"]["kl"] = 7.0
    (tmp_path / "results.json").write_text(json.dumps(first))
    ran = []
    monkeypatch.setattr(
        methods, "in_own_process", lambda function, *arguments: ran.append(function.__name__) or function(*arguments)
    )
    code, second = call("--arms", *names)
    assert code == 0
    assert ran == ["choose_rows", "reflect", "run_arm"]
    assert (second["arms"]["ForwardKL"]["kl"], list(second["arms"])) == (7.0, names)


def test_an_arm_that_fails_does_not_end_the_others(methods, call, monkeypatch, capsys):
    def run(function, *arguments):
        if arguments[0] == "ForwardKL":
            raise RuntimeError("there is no memory")
        return function(*arguments)

    monkeypatch.setattr(methods, "in_own_process", run)
    code, found = call("--arms", "ForwardKL", "ReverseKL")
    assert (code, list(found["arms"])) == (1, ["ReverseKL"])
    assert "ForwardKL: there is no memory" in capsys.readouterr().err


def test_arms_of_other_settings_are_not_mixed(call):
    call("--arms", "ForwardKL")
    with pytest.raises(SystemExit, match=r"results\.json has arms of other settings"):
        call("--arms", "ForwardKL", "--max-length", "120")


def test_rows_that_fit_are_taken_evenly_spaced(methods, tmp_path):
    rows = [{"instruction": "w3", "output": " ".join(["w4"] * (200 if row % 2 else 3)), "id": row} for row in range(12)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    teacher = methods.write_model(tmp_path / "teacher", methods.TINY)
    chosen = methods.evenly([str(tmp_path / "train.jsonl")], 3, teacher, max_length=128)
    assert [row["id"] for row in chosen] == ["0", "4", "10"]  # of 0, 2, 4, 6, 8, 10


def test_a_command_names_no_folder_of_this_machine(methods, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/a/methods.py", "--data", "/somewhere/dolly", "--json", "runs/found.json"])
    assert methods.command() == "python benchmarks/methods.py --data dolly --json runs/found.json"
