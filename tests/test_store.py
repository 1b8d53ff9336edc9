from pathlib import Path

import pytest

from srd_lightning.store import ScoreStore, write_atomically

MADE_OF = {"rows": "r1", "student": "s1", "decoding": "d1"}
SCORES = [
    {"id": "b", "rouge_l": 0.1, "nll": 2.5, "answer": "é\n"},
    {"id": "a", "rouge_l": 1.0, "nll": 1 / 3, "answer": ""},
    {"id": "c", "rouge_l": 0.0, "nll": 0.7, "answer": "no"},
]
BY_ID = {score["id"]: score for score in SCORES}


@pytest.fixture
def store(tmp_path):
    return ScoreStore(tmp_path / "new" / "scores", MADE_OF)


def half_a_write(path, content):
    with path.open("wb") as file:
        file.write(content[: len(content) // 2])
    raise OSError("disk full")


def test_a_new_store_is_empty(store):
    assert store.read() == {}


def test_round_trip(store):
    store.append("0", SCORES)
    assert ScoreStore(store.folder, MADE_OF).read() == BY_ID


def test_parts_add_up(store):
    for name, score in zip("xyz", SCORES, strict=True):
        store.append(name, [score])
    assert store.read() == BY_ID


def test_the_same_name_replaces(store):
    store.append("0", SCORES[:2])
    store.append("0", SCORES[2:])
    assert store.read() == {"c": SCORES[2]}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"student": "s2"}, "student"),
        ({"rows": "r2", "decoding": "d2"}, "rows, decoding"),
        ({"template": "t1"}, "template"),
    ],
    ids=["one", "two", "unknown_before"],
)
def test_another_fingerprint_names_what_differs(store, changed, named):
    with pytest.raises(ValueError, match=f"were made with another {named}; point `scores` to a new folder"):
        ScoreStore(store.folder, {**MADE_OF, **changed})


def test_a_refused_store_is_left_as_it_was(store):
    store.append("0", SCORES)
    with pytest.raises(ValueError, match="another student"):
        ScoreStore(store.folder, {**MADE_OF, "student": "s2"})
    assert ScoreStore(store.folder, MADE_OF).read() == BY_ID


def test_an_interrupted_write_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "write_bytes", half_a_write)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "file", b"new content")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch):
    write_atomically(tmp_path / "file", b"old")
    monkeypatch.setattr(Path, "write_bytes", half_a_write)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "file", b"new content")
    assert (tmp_path / "file").read_bytes() == b"old"


def test_an_interrupted_append_is_not_read(store, monkeypatch):
    store.append("0", SCORES[:1])
    monkeypatch.setattr(Path, "write_bytes", half_a_write)
    with pytest.raises(OSError, match="disk full"):
        store.append("1", SCORES[1:])
    assert store.read() == {"b": SCORES[0]}


def test_a_write_that_succeeds_leaves_one_file(tmp_path):
    write_atomically(tmp_path / "a" / "b", b"x")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
