import os
import shutil
import signal
import subprocess
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import HANGS, of_program

from srd_lightning.curation import score_store as store_module
from srd_lightning.curation.score_store import ScoreStore, by_id
from srd_lightning.errors import StorageError
from srd_lightning.storage import write_atomically

MADE_OF = {"rows": "r1", "student": "s1", "decoding": "d1"}
CRITERIA = {"rouge_l": "RougeL", "nll": "NLL"}
SCORES = [
    {"id": "b", "rouge_l": 0.1, "nll": 2.5, "answer": "é\n"},
    {"id": "a", "rouge_l": 1.0, "nll": 1 / 3, "answer": ""},
    {"id": "c", "rouge_l": 0.0, "nll": 0.7, "answer": "no"},
]
IDS = pa.array(["a", "b", "c", "d"])


@pytest.fixture
def store(tmp_path):
    return ScoreStore(tmp_path / "new" / "scores", MADE_OF, CRITERIA)


@pytest.fixture
def full(store):
    """A store with one shard per row."""
    for score in SCORES:
        store.append([score])
    return store


def nll(store):
    return store.columns(IDS, ["nll"])["nll"].tolist()


def shards(store):
    return sorted(store.folder.glob("part-*.parquet"))


def shard_of(store, row_id):
    return next(shard for shard in shards(store) if pq.read_table(shard)["id"].to_pylist() == [row_id])


def half_a_write(path, content):
    with path.open("wb") as file:
        file.write(content[: len(content) // 2])
    raise OSError("disk full")


class TestRoundTrip:
    def test_a_new_store_is_empty(self, store):
        assert np.isnan(nll(store)).all()
        assert store.answers(IDS) == {}

    def test_scores_come_back_exactly_in_the_order_asked_for(self, full):
        again = ScoreStore(full.folder, MADE_OF, CRITERIA)
        assert nll(again)[:3] == [1 / 3, 2.5, 0.7]
        assert np.isnan(nll(again)[3])
        assert again.columns(pa.array(["c", "a"]), ["rouge_l", "nll"])["rouge_l"].tolist() == [0.0, 1.0]

    def test_answers(self, full):
        assert full.answers(pa.array(["a", "b"])) == {"a": "", "b": "é\n"}

    def test_a_column_that_is_added_later(self, full):
        later = ScoreStore(full.folder, MADE_OF, {"ifd": "IFD"})
        later.append([{"id": "c", "ifd": 0.5}, {"id": "a", "ifd": 0.25}])
        found = later.columns(IDS, ["ifd"])["ifd"]
        assert found[[0, 2]].tolist() == [0.25, 0.5]
        assert np.isnan(found[[1, 3]]).all()
        assert nll(later)[:3] == [1 / 3, 2.5, 0.7]
        assert later.answers(IDS) == {"a": "", "b": "é\n", "c": "no"}

    def test_reopened_as_it_is(self, full):
        assert nll(ScoreStore.reopen(full.folder)) == pytest.approx(nll(full), nan_ok=True)


class TestCompact:
    def test_keeps_every_score(self, full):
        later = ScoreStore(full.folder, MADE_OF, {"ifd": "IFD"})
        later.append([{"id": "b", "ifd": 0.5}])
        before = nll(full)
        later.compact()
        assert len(shards(full)) == 1
        assert nll(full) == pytest.approx(before, nan_ok=True)
        assert later.columns(pa.array(["b"]), ["ifd"])["ifd"].tolist() == [0.5]
        assert full.answers(IDS) == {"a": "", "b": "é\n", "c": "no"}

    def test_files_do_not_depend_on_how_scores_came(self, tmp_path):
        folders = []
        for name, parts in {
            "x": [SCORES],
            "y": [SCORES[2:], SCORES[:1], SCORES[1:2]],
            "z": [SCORES[1:], SCORES],
        }.items():
            store = ScoreStore(tmp_path / name, MADE_OF, CRITERIA)
            for part in parts:
                store.append(part)
            store.compact()
            folders.append({path.name: path.read_bytes() for path in sorted(store.folder.glob("*.*"))})
        assert folders[0] == folders[1] == folders[2]
        assert len(folders[0]) == 2

    def test_is_known_to_have_been_done(self, full):
        assert not full.is_compact(3)
        full.compact()
        assert full.is_compact(3)
        assert not full.is_compact(4)
        ScoreStore(full.folder, MADE_OF, {"ifd": "IFD"}).append([{"id": "b", "ifd": 0.5}])
        assert not full.is_compact(3)

    def test_that_was_broken_off_is_not_done(self, full):
        full.compact()
        (first,) = (path.read_bytes() for path in shards(full))
        later = ScoreStore(full.folder, MADE_OF, {"ifd": "IFD"})
        later.append([{"id": "b", "ifd": 0.5}])
        later.compact()
        (full.folder / full._name(first)).write_bytes(first)  # what it had not come to remove
        assert not full.is_compact(3)

    def test_removes_what_a_killed_process_left_half_written(self, full):
        (full.folder / ".part-x.parquet.123").write_bytes(b"half")
        full.compact()
        assert not list(full.folder.glob(".part*"))

    def test_shards_of_limited_size_sorted_by_id(self, full, monkeypatch):
        monkeypatch.setattr(store_module, "ROWS_PER_SHARD", 2)
        full.compact()
        assert sorted(pq.read_table(shard)["id"].to_pylist() for shard in shards(full)) == [["a", "b"], ["c"]]

    def test_own_shards_are_merged_from_time_to_time(self, store, monkeypatch):
        monkeypatch.setattr(store_module, "SHARDS_PER_MERGE", 2)
        counts = []
        for number in range(5):
            store.append([{"id": str(number), "nll": float(number)}])
            counts.append(len(shards(store)))
        assert counts == [1, 1, 2, 2, 3]
        assert store.columns(pa.array(["4", "0"]), ["nll"])["nll"].tolist() == [4.0, 0.0]


class TestDamage:
    @pytest.fixture(params=["truncated", "emptied", "byte_flipped", "of_another_store", "renamed"])
    def damaged(self, request, full, tmp_path):
        """Damage the shard of row a, and return its path."""
        shard = shard_of(full, "a")
        content = shard.read_bytes()
        if request.param == "truncated":
            shard.write_bytes(content[:-20])
        elif request.param == "emptied":
            shard.write_bytes(b"")
        elif request.param == "byte_flipped":
            place = content.index(np.float64(1 / 3).tobytes())
            shard.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            assert pq.read_table(shard)["nll"].to_pylist() != [1 / 3]  # still a readable file
        elif request.param == "of_another_store":
            other = ScoreStore(tmp_path / "other", {**MADE_OF, "student": "s2"}, CRITERIA)
            other.append([{"id": "a", "rouge_l": 0.5, "nll": 9.0, "answer": "x"}])
            shard.unlink()
            shutil.copy(shards(other)[0], full.folder)
            shard = full.folder / shards(other)[0].name
        else:
            shard = shard.rename(shard.with_name(f"part-{'0' * 32}.parquet"))
        return shard

    def test_is_named_and_its_rows_are_missing(self, full, damaged):
        with pytest.warns(UserWarning, match=f"{damaged.name} is damaged or belongs to another store"):
            found = nll(full)
        assert np.isnan(found[0])
        assert found[1:3] == [2.5, 0.7]

    def test_is_put_aside_once(self, full, damaged):
        with pytest.warns(UserWarning, match="damaged"):
            nll(full)
        assert damaged.with_suffix(".damaged").exists()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert np.isnan(nll(full)[0])

    def test_does_not_survive_compaction(self, full, damaged):
        with pytest.warns(UserWarning, match="damaged"):
            full.compact()
        assert np.isnan(nll(full)[0])
        assert len(shards(full)) == 1


@pytest.mark.parametrize(
    "text",
    ["", '{"made_of": {"rows"', "[]", "{}", '{"made_of": 1, "criteria": {}}', "null"],
    ids=["empty", "cut", "list", "object", "number", "null"],
)
def test_a_damaged_manifest_is_named(full, text):
    (full.folder / "manifest.json").write_text(text)
    with pytest.raises(StorageError, match=r"manifest.json cannot be read .* delete the folder"):
        ScoreStore(full.folder, MADE_OF, CRITERIA)


class TestFingerprint:
    @pytest.mark.parametrize(
        ("changed", "named"),
        [
            ({"student": "s2"}, "student"),
            ({"rows": "r2", "decoding": "d2"}, "rows, decoding"),
            ({"template": "t1"}, "template"),
        ],
        ids=["one", "two", "unknown_before"],
    )
    def test_another_one_names_what_differs(self, store, changed, named):
        with pytest.raises(StorageError, match=f"were made with another {named}; point `scores` to a new folder"):
            ScoreStore(store.folder, {**MADE_OF, **changed}, CRITERIA)

    def test_a_criterion_with_other_settings_is_named(self, store):
        with pytest.raises(StorageError, match="were made with another nll;"):
            ScoreStore(store.folder, MADE_OF, {"nll": "another", "ifd": "IFD"})

    def test_a_refused_store_is_left_as_it_was(self, full):
        with pytest.raises(StorageError, match="another student"):
            ScoreStore(full.folder, {**MADE_OF, "student": "s2"}, {"ifd": "IFD"})
        assert nll(ScoreStore(full.folder, MADE_OF, {"ifd": "other"}))[:3] == [1 / 3, 2.5, 0.7]


class TestLock:
    def test_a_second_run_is_told(self, store, monkeypatch, tmp_path):
        monkeypatch.setattr("srd_lightning.results_folder.PATIENCE", 0.1)
        code = f"""
            import sys
            from pathlib import Path
            from srd_lightning.curation.score_store import ScoreStore
            with ScoreStore.locked(Path({str(store.folder)!r}), {MADE_OF!r}, {{}}):
                print("locked", flush=True)
                sys.stdin.read()
        """
        (tmp_path / "other.py").write_text(textwrap.dedent(code))
        other = subprocess.Popen(**of_program(tmp_path / "other.py"), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            assert other.stdout.readline() == "locked\n"
            with pytest.raises(StorageError, match="another run is writing scores to"):
                ScoreStore.locked(store.folder, MADE_OF, {"ifd": "IFD"}).__enter__()
            assert "ifd" not in (store.folder / "manifest.json").read_text()
        finally:
            os.kill(other.pid, signal.SIGKILL)
            other.wait()
        monkeypatch.setattr("srd_lightning.results_folder.PATIENCE", HANGS)
        with ScoreStore.locked(store.folder, MADE_OF, {}):  # the lock ends with the process
            pass

    def test_is_free_again_afterwards(self, tmp_path):
        for _ in range(2):
            with ScoreStore.locked(tmp_path / "a" / "b", MADE_OF, CRITERIA) as store:
                assert np.isnan(nll(store)).all()

    def test_is_free_again_where_a_store_was_refused(self, store):
        for _ in range(2):
            with pytest.raises(StorageError, match="another student"):
                ScoreStore.locked(store.folder, {**MADE_OF, "student": "s2"}, CRITERIA).__enter__()


class TestByIds:
    def test_a_row_that_stands_twice_has_one_score(self):
        table = pa.table({"id": ["a", "b", "a"], "nll": [None, 2.0, 1.0]})
        assert by_id(table, pa.array(["a", "b"]), ["nll"])["nll"].tolist() == [1.0, 2.0]

    def test_whole_numbers(self):
        found = by_id(pa.table({"id": ["a"], "length": [3]}), pa.array(["a"]), ["length"])["length"]
        assert found.dtype == np.float64
        assert found.tolist() == [3.0]

    def test_no_row_has_a_score(self):
        found = by_id(pa.table({"id": ["a"], "nll": pa.array([None], pa.float64())}), pa.array(["a", "b"]), ["nll"])
        assert np.isnan(found["nll"]).tolist() == [True, True]


class TestWriteAtomically:
    def test_an_interrupted_write_leaves_no_file(self, tmp_path, monkeypatch):
        monkeypatch.setattr(Path, "write_bytes", half_a_write)
        with pytest.raises(OSError, match="disk full"):
            write_atomically(tmp_path / "file", b"new content")
        assert list(tmp_path.iterdir()) == []

    def test_an_interrupted_write_keeps_the_old_file(self, tmp_path, monkeypatch):
        write_atomically(tmp_path / "file", b"old")
        monkeypatch.setattr(Path, "write_bytes", half_a_write)
        with pytest.raises(OSError, match="disk full"):
            write_atomically(tmp_path / "file", b"new content")
        assert (tmp_path / "file").read_bytes() == b"old"

    def test_an_interrupted_append_is_not_read(self, store, monkeypatch):
        store.append(SCORES[:1])
        monkeypatch.setattr(Path, "write_bytes", half_a_write)
        with pytest.raises(OSError, match="disk full"):
            store.append(SCORES[1:])
        assert np.isnan(nll(store)).tolist() == [True, False, True, True]

    def test_a_write_that_succeeds_leaves_one_file(self, tmp_path):
        write_atomically(tmp_path / "a" / "b", b"x")
        assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
