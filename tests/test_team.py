"""Curation by real processes: kill -9, uneven shares, a process that fails, a second run in the same folder."""

import signal
import subprocess

import pyarrow.parquet as pq
import pytest
from conftest import HANGS, of_project
from tiny import tiny_model
from transformers import ByT5Tokenizer

ROWS = 41


def start(folder, devices, *arguments):
    folder.mkdir(exist_ok=True)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(**of_project("reflect", folder, devices, *arguments, ranks=devices), **pipes)


def run(folder, devices, *arguments):
    """Curate; return the exit code and what was said."""
    with start(folder, devices, *arguments) as process:
        _, errors = process.communicate(timeout=HANGS)
    return process.returncode, errors


def scores(folder):
    """Return the files of the store, byte by byte."""
    store = folder / "scores"
    return {path.name: path.read_bytes() for path in (*store.glob("part-*"), store / "manifest.json")}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """A folder that one undisturbed process has curated."""
    folder = tmp_path_factory.mktemp("one")
    code, errors = run(folder, 1)
    assert code == 0, errors[-3000:]
    assert len(scores(folder)) == 2
    return folder


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_write_the_same_bytes_as_one(expected, tmp_path, strategy):
    code, errors = run(tmp_path, 2, strategy, "slow_in_the_second_process")
    assert code == 0, errors[-3000:]
    assert scores(tmp_path) == scores(expected)
    assert not list((tmp_path / "scores").glob(".signs*"))
    order = (expected / "order0.json").read_text()
    assert [(tmp_path / f"order{rank}.json").read_text() for rank in (0, 1)] == [order, order]


def test_two_processes_write_the_same_responses_as_one(tmp_path):
    """Under FSDP2 too, where none of them has all weights of the model that writes."""
    writer = tiny_model(1)
    writer.lm_head.weight.data[1] *= -8  # the end token: some answers end
    writer.save_pretrained(tmp_path / "writer")
    ByT5Tokenizer().save_pretrained(tmp_path / "writer")
    written, sharded = [], []
    for devices, strategy in ((1, "auto"), (2, "ddp"), (2, "fsdp2")):
        folder = tmp_path / strategy
        code, errors = run(folder, devices, strategy, "writes")
        assert code == 0, errors[-3000:]
        written.append((folder / "written.jsonl").read_bytes())
        sharded.append({path.read_text() for path in folder.glob("sharded*")})
    assert written == [written[0]] * 3
    assert sharded == [{"False"}, {"False"}, {"True"}]
    assert 0 < len(written[0].splitlines()) < 5


class TestKilled:
    @pytest.mark.parametrize("devices", [1, 2], ids=["one_process", "two_processes"])
    def test_goes_on_and_writes_the_same_bytes(self, expected, tmp_path, devices):
        code, _ = run(tmp_path, devices, "ddp", "killed_in_the_third_batch")
        assert code != 0
        kept = [pq.read_table(part) for part in (tmp_path / "scores").glob("part-*")]
        assert len(kept) >= 2  # all but the batch in hand
        assert sum(map(len, kept)) < ROWS
        code, errors = run(tmp_path, 3 - devices)
        assert code == 0, errors[-3000:]
        assert scores(tmp_path) == scores(expected)


class TestAFailingProcess:
    @pytest.mark.parametrize("trouble", ["failing_in_the_second_process", "failing_in_the_first_process"])
    def test_ends_the_run_with_its_reason(self, tmp_path, trouble):
        code, errors = run(tmp_path, 2, "ddp", trouble)
        assert code != 0
        assert "OSError: no space left on the disk" in errors
        number = int("second" in trouble)
        assert f"RankError: process {number} failed: OSError: no space left on the disk" in errors

    def test_that_is_killed_is_missed_by_the_other(self, tmp_path):
        """Rank 0 is nobody's child, so nobody but the second can notice."""
        code, _ = run(tmp_path, 2, "ddp", "killed_in_the_first_process")
        assert code == -signal.SIGKILL
        assert "process 0 is gone: it was killed" in (tmp_path / "error1.txt").read_text()

    def test_another_student_in_one_process_is_named(self, tmp_path):
        code, errors = run(tmp_path, 2, "ddp", "another_student")
        assert code != 0
        assert "rank 1 has another student than rank 0" in errors

    def test_an_error_before_the_work_reaches_all(self, tmp_path):
        (tmp_path / "scores").mkdir()
        (tmp_path / "scores" / "manifest.json").write_text('{"made_of": {}, "criteria": {}}')
        code, errors = run(tmp_path, 2, "ddp")
        assert code != 0
        assert "were made with another rows, student" in errors


def test_two_runs_in_one_folder(expected, tmp_path):
    """The second of two runs at the same time is told, or finds the work done; the scores are sound in any case."""
    first = start(tmp_path, 1, "ddp", "waiting_for_a_sign")
    while not (tmp_path / "scores" / ".lock").exists():
        assert first.poll() is None, first.stderr.read()[-3000:]
    code, errors = run(tmp_path, 1, "ddp", "impatient")
    (tmp_path / "go").touch()
    assert code != 0
    assert "another run is writing scores to" in errors
    _, errors = first.communicate(timeout=HANGS)
    assert first.returncode == 0, errors[-3000:]
    assert scores(tmp_path) == scores(expected)
