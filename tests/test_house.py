"""What `benchmarks/house.py` counts without running anything."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def house(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import house

    return house


@pytest.fixture
def source(house, tmp_path):
    def write(text):
        path = tmp_path / house.PACKAGE / "one.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return house.Source(tmp_path)

    return write


def test_what_is_to_be_read_exists(house):
    found = house.Source(ROOT).reading()
    assert all(found[f"files to read for {change}"] for change in house.READING)


SET = """
class Own:
    def work(self, trainer):
        self.mine = 1
        self.other.x, own = 1, 2
        made = Own()
        made.x: int = 1
        given = self.find()
        given.x += 1
        object.__setattr__(self, "x", 1)
        object.__setattr__(trainer, "x", 1)
        super().__setattr__("x", 1)
        del trainer.x
        def within():
            made.y = 1
            trainer.y = 1
"""


def test_attributes_set_from_afar(house, source):
    [path] = source(SET).trees
    found = [place.partition(":")[2] for place in house.set_from_afar(path, source(SET))]
    assert found == ["11 trainer", "13 trainer", "16 trainer", "5 self.other", "9 given"]


def test_lines_are_counted_once(source):
    found = source('"""Head\n\n"""\nclass A:\n    x = 1\n    def f(self): ...\n\nclass B(A): ...\n')
    assert [len(found.places(name)) for name in ("head of A", "A", "A.f", "file of B", "C")] == [3, 3, 1, 8, 0]
    assert found.single_bases() == ["A"]


def test_circles(house):
    assert house.circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [{"b", "c"}]
