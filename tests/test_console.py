"""How a command ends: what is said, with which exit code, and where the traceback is."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from conftest import HANGS, of_program
from faults.fault import RECIPE
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny import QUIET

from srd_lightning.command.console import Ending, explain
from srd_lightning.errors import DataError, NonFiniteError, RankError, SettingError
from srd_lightning.training.failures import MEMORY_HINT

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    """No ranks, and notes of what was said of one's own."""
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "SRD_RUN"):
        monkeypatch.setenv(name, "")  # so that it is as before afterwards
        monkeypatch.delenv(name)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()


def command(error, folder, **options):
    with Ending("srd fit", **options) as ending:
        if folder is not None:
            ending.begin_run(folder)
        raise error


def ended(error, folder=None, **options):
    """Return the exit code of a command that an error ends."""
    with pytest.raises(SystemExit) as caught:
        command(error, folder, **options)
    return caught.value.code


class Interrupt(L.Callback):
    def on_train_start(self, trainer, pl_module):
        raise KeyboardInterrupt


def interrupted_training(folder):
    with Ending("srd fit"):
        L.Trainer(**QUIET, max_steps=1, callbacks=[Interrupt()], default_root_dir=folder).fit(BoringModel())


@pytest.fixture
def restore_ctrl_c():
    """Lightning ignores Ctrl-C once it has come."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def wrapped(outer, cause):
    outer.__cause__ = cause
    return outer


class TestExplain:
    @pytest.mark.parametrize(
        ("error", "paragraph"),
        [
            (DataError("train row 3 has no output"), "train row 3 has no output"),
            (wrapped(RuntimeError("wrapper"), SettingError("too large")), "too large"),
            (wrapped(KeyError("a"), wrapped(ValueError("b"), NonFiniteError("loss is nan"))), "loss is nan"),
            (
                OSError(errno.ENOSPC, "No space left on device", "run/a.ckpt"),
                "run/a.ckpt: No space left on device; make room, or let the run write to another disk",
            ),
            (
                PermissionError(errno.EACCES, "Permission denied", "rows.jsonl"),
                "rows.jsonl: Permission denied; let it be read and written, or give another path",
            ),
            (OSError("gpt9 is not a local folder\n  and no model of the hub"), "gpt9 is not a local folder and no "
             "model of the hub"),
            (MisconfigurationException("no\n such accelerator"), "no such accelerator"),
            (torch.OutOfMemoryError("CUDA out of memory."), f"CUDA out of memory.{MEMORY_HINT}"),
            (RuntimeError(f"DefaultCPUAllocator: can't allocate memory{MEMORY_HINT}"),
             f"DefaultCPUAllocator: can't allocate memory{MEMORY_HINT}"),
            (MemoryError(), f"out of memory{MEMORY_HINT}"),
        ],
        ids=str,
    )  # fmt: skip
    def test_an_error_of_the_users(self, error, paragraph):
        assert explain(error) == paragraph

    @pytest.mark.parametrize(
        "error", [KeyError("x"), AssertionError(), RuntimeError("shapes"), wrapped(ValueError("a"), OSError("b"))]
    )
    def test_a_bug(self, error):
        assert explain(error) is None

    def test_an_error_while_one_of_the_users_was_handled(self):
        error = KeyError("cleaning up")
        error.__context__ = DataError("row 3")
        assert explain(error) == "row 3"

    def test_what_datasets_wraps(self):
        from datasets.exceptions import DatasetGenerationError

        error = wrapped(DatasetGenerationError("An error occurred"), TypeError("Couldn't cast\narray"))
        assert explain(error) == "data cannot be read: Couldn't cast array"


class TestEnding:
    def test_well(self, capsys):
        with Ending("srd fit"):
            pass
        assert capsys.readouterr() == ("", "")

    def test_by_an_error_before_work_begins(self, capsys):
        assert ended(SettingError("too large")) == 2
        assert capsys.readouterr().err == "srd fit: error: too large\n"

    def test_by_an_error_of_the_run(self, tmp_path, capsys):
        assert ended(DataError("row 3"), tmp_path / "run") == 2
        log = tmp_path / "run" / "srd-error.log"
        expected = f"srd fit: error: row 3\n(The traceback is in {log}; --traceback shows it.)\n"
        assert capsys.readouterr().err == expected
        text = log.read_text()
        assert "Traceback (most recent call last)" in text
        assert "DataError: row 3" in text
        assert sys.argv[0] in text

    @pytest.mark.parametrize("folder", ["file/run", "s3://bucket/run"])
    def test_where_the_folder_cannot_be_written(self, folder, tmp_path, capsys, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "file").write_text("in the way")
        ended(DataError("row 3"), folder)
        (log,) = (tmp_path / "temporary").iterdir()
        assert "DataError: row 3" in log.read_text()
        assert f"(The traceback is in {log}; --traceback shows it.)" in capsys.readouterr().err

    def test_where_nothing_can_be_written(self, tmp_path, capsys, monkeypatch):
        (tmp_path / "file").write_text("in the way")
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
        assert ended(DataError("row 3"), tmp_path / "file") == 2
        said, where = capsys.readouterr().err.splitlines()
        assert said == "srd fit: error: row 3"
        assert where.startswith("(The traceback could not be written, ")

    def test_with_its_traceback(self, tmp_path, capsys):
        assert ended(DataError("row 3"), tmp_path / "run", show_traceback=True) == 2
        said = capsys.readouterr().err
        assert said.startswith("Traceback (most recent call last)")
        assert said.endswith("srd fit: error: row 3\n")
        assert not (tmp_path / "run").exists()

    def test_by_a_bug(self, capsys):
        with pytest.raises(KeyError):
            command(KeyError("x"), None)
        assert capsys.readouterr() == ("", "")

    def test_by_an_exit(self, capsys):
        assert ended(SystemExit(143)) == 143
        assert capsys.readouterr() == ("", "")

    def test_by_ctrl_c(self, capsys):
        assert ended(KeyboardInterrupt()) == 130
        assert capsys.readouterr().err == "srd fit: stopped by Ctrl-C\n"

    def test_by_ctrl_c_while_lightning_trains(self, capsys, restore_ctrl_c, tmp_path):
        with pytest.raises(SystemExit) as caught:
            interrupted_training(tmp_path)
        assert caught.value.code == 130
        assert capsys.readouterr().err == "srd fit: stopped by Ctrl-C\n"


class TestSeveralRanks:
    """Each call is another rank: what they share is a folder for temporary files, and their environment."""

    @pytest.fixture(params=["launcher", "torchrun"])
    def as_rank(self, request, monkeypatch):
        name = {"launcher": "SRD_RUN", "torchrun": "TORCHELASTIC_RUN_ID"}[request.param]

        def become(rank, run="a"):
            monkeypatch.setenv(name, run)
            monkeypatch.setenv("LOCAL_RANK", str(rank))

        return become

    def test_say_the_same_once(self, as_rank, tmp_path, capsys):
        codes = []
        for rank in (1, 0, 2):
            as_rank(rank)
            codes.append(ended(DataError("row 3"), tmp_path))
        assert codes == [2, 2, 2]
        assert capsys.readouterr().err.count("error: row 3") == 1
        assert (tmp_path / "srd-error-rank1.log").exists()

    def test_say_what_only_they_know(self, as_rank, capsys):
        for rank in (0, 1):
            as_rank(rank)
            ended(DataError(f"row {rank}"))
        assert [line[-5:] for line in capsys.readouterr().err.splitlines()] == ["row 0", "row 1"]

    def test_of_another_run_say_it_again(self, as_rank, capsys):
        for run in ("a", "b"):
            as_rank(0, run)
            ended(DataError("row 3"))
        assert capsys.readouterr().err.count("error: row 3") == 2

    def test_say_it_again_when_started_again(self, as_rank, capsys, tmp_path):
        as_rank(0)
        ended(DataError("row 3"))
        (note,) = (tmp_path / "temporary").glob("srd-said-*/*")
        os.utime(note, (1, 1))
        ended(DataError("row 3"))
        assert capsys.readouterr().err.count("error: row 3") == 2

    def test_leave_the_word_to_the_one_that_has_failed(self, as_rank, capsys):
        as_rank(1)
        ended(DataError("row 3"))
        as_rank(0)
        assert ended(RankError("rank 1 failed: DataError: row 3")) == 2
        assert capsys.readouterr().err == "srd fit: error: row 3\n"

    def test_of_a_real_run(self, tmp_path):
        (tmp_path / "rows.jsonl").write_text('{"instruction": "Hi"}\n')
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
        settings = ["--data.data=rows.jsonl", "--trainer.devices=2", "--trainer.strategy=ddp"]
        command = of_program(ROOT / "cli.py", "fit", "--config=recipe.yaml", *settings, ranks=2)
        done = subprocess.run(**command, cwd=tmp_path, capture_output=True, timeout=HANGS, check=False)
        assert done.returncode == 2
        assert done.stderr.count("srd fit: error: ") == 1
        assert "srd fit: error: train row 0" in done.stderr
        assert "Traceback (" not in done.stderr
        assert len([*(tmp_path / "run").glob("srd-error*.log")]) == 1

    def test_speak_for_one_that_cannot(self, as_rank, capsys, monkeypatch):
        monkeypatch.setattr("srd_lightning.command.console.SECONDS_TO_SPEAK", 0)
        as_rank(0)
        ended(RankError("rank 1 is gone"))
        assert capsys.readouterr().err == "srd fit: error: rank 1 is gone\n"
