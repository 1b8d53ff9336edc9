"""`srd curate --export`: curated rows as a data set, worked out by hand."""

import json

import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from tiny import PLAIN, QUIET, tiny_model
from transformers import ByT5Tokenizer

from srd_lightning import KDLightningModule, SRDDataModule
from srd_lightning.command.trainer import SRDTrainer
from srd_lightning.curation.curated_rows import _free
from srd_lightning.errors import DataError, SettingError, StorageError

ROWS = [
    {"id": "b", "instruction": "Two?", "input": "x", "output": "2", "topic": "é"},
    {"id": "a", "instruction": "One?", "output": "1", "topic": None},
    {"id": "d", "instruction": "Four?", "output": "4", "topic": "sums"},
    {"id": "c", "instruction": "Three?", "output": "3", "topic": "sums"},
    {"id": "e", "instruction": "Said to nobody?", "output": " ", "topic": "dropped"},
]
SCORES = {  # rouge_l, nll, answer
    "a": (1.0, 1.0, "1"),
    "b": (0.5, 2.0, "too"),
    "c": (0.5, 1.0, None),
    "d": (0.0, 4.0, ""),
}
# By ROUGE-L a is 1, b and c share 2 and 3, d is 4; by NLL a and c share 1 and 2, b is 3, d is 4. With k = 60 that fuses
# to a, c, b, d. Of four rows 25 % are one, a, and 75 % are three.
EXPECTED = {
    "id": ["a", "b", "c", "d"],
    "prompt": ["One?", "Two? x", "Three?", "Four?"],
    "response": ["1", "2", "3", "4"],
    "kept": [True, True, True, False],
    "stage": [0, 1, 1, -1],
    "position": [0, 2, 1, 3],
    "rouge_l": [1.0, 0.5, 0.5, 0.0],
    "nll": [1.0, 2.0, 1.0, 4.0],
    "rank_rouge_l": [1.0, 2.5, 2.5, 4.0],
    "rank_nll": [1.5, 3.0, 1.5, 4.0],
    "answer": ["1", "too", None, ""],
    "input": [None, "x", None, None],
    "instruction": ["One?", "Two?", "Three?", "Four?"],
    "output": ["1", "2", "3", "4"],
    "topic": [None, "é", "sums", "sums"],
}


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    monkeypatch.setattr("srd_lightning.curation.report.plot", lambda *_: None)


@pytest.fixture
def scores(tmp_path):
    names = ("rouge_l", "nll", "answer")
    lines = ({"id": row_id, **dict(zip(names, known, strict=True))} for row_id, known in SCORES.items())
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(tmp_path / "scores.jsonl")


def curate(tmp_path, rows, export, **options):
    settings = {"template": PLAIN, "schedule": {0: 0.25, 1: 0.75}, **options}
    trainer = SRDTrainer(default_root_dir=tmp_path / "run", **QUIET)
    trainer.curate(
        KDLightningModule(tiny_model(), kd_weight=0.0), SRDDataModule(rows, ByT5Tokenizer(), **settings), str(export)
    )


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_every_trainer_can_read_it(suffix, scores, tmp_path):
    file = tmp_path / f"curated.{suffix}"
    curate(tmp_path, ROWS, file, scores=scores)
    kind = {"jsonl": "json"}.get(suffix, suffix)
    read = load_dataset(kind, data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
    assert {name: list(read[name]) for name in read.column_names} == EXPECTED
    assert list(read.column_names) == list(EXPECTED)
    before = file.read_bytes()
    curate(tmp_path, ROWS[::-1], file, scores=scores)  # in place of the earlier one, from rows in another order
    assert file.read_bytes() == before


def test_a_schedule_that_ranks_nothing(tmp_path):
    file = tmp_path / "curated.jsonl"
    curate(tmp_path, ROWS, file, schedule={0: 1.0})
    read = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["id"], row["kept"], row["stage"]) for row in read] == [(name, True, 0) for name in "abcd"]
    assert set(read[0]) == set(EXPECTED) - {"rouge_l", "nll", "rank_rouge_l", "rank_nll", "answer"}


def test_fields_whose_names_are_taken(scores, tmp_path):
    rows = [
        {"id": row["id"], "prompt": row["instruction"], "response": row["output"], "answer": "mine"} for row in ROWS[:4]
    ]
    turns = [{"role": "user", "content": "Five?"}, {"role": "assistant", "content": "5"}]
    curate(tmp_path, rows, tmp_path / "curated.parquet", scores=scores)
    read = pq.read_table(tmp_path / "curated.parquet")
    assert read["prompt"].to_pylist() == EXPECTED["instruction"]
    assert read["original_prompt"].to_pylist() == EXPECTED["instruction"]
    assert read["original_answer"].to_pylist() == ["mine"] * 4
    assert read["answer"].to_pylist() == EXPECTED["answer"]
    assert _free("id", {"id": 0, "original_id": 0}) == "original_original_id"
    curate(tmp_path, [{"messages": turns}] * 2, tmp_path / "turns.jsonl", schedule={0: 1.0})
    assert [json.loads(line)["messages"] for line in (tmp_path / "turns.jsonl").open()] == [turns, turns]


class TestRefusedBeforeRowsAreRead:
    def refused(self, tmp_path, export, rows=(), **options):
        datamodule = SRDDataModule(rows, ByT5Tokenizer(), schedule={0: 0.5}, **options)
        datamodule.set_up_for = lambda *_: pytest.fail("curated")
        SRDTrainer(default_root_dir=tmp_path, **QUIET).curate(
            KDLightningModule(tiny_model(), kd_weight=0.0), datamodule, str(export)
        )

    @pytest.mark.parametrize("name", ["rows.csv", "rows", "rows.jsonl.gz"])
    def test_another_ending(self, name, tmp_path):
        with pytest.raises(
            SettingError, match=r"export must name a \.jsonl or \.parquet file, but is .*; give it such"
        ):
            self.refused(tmp_path, tmp_path / name)

    @pytest.mark.parametrize("name", ["mine.jsonl", "mine.parquet"])
    def test_a_file_of_the_users(self, name, tmp_path):
        (tmp_path / name).write_text('{"id": 1}\n')
        with pytest.raises(StorageError, match="does not hold the rows of an earlier curation; name another file"):
            self.refused(tmp_path, tmp_path / name)
        assert (tmp_path / name).read_text() == '{"id": 1}\n'

    def test_rows_that_can_be_read_once(self, tmp_path):
        with pytest.raises(
            SettingError, match="rows that can be read again, but `data` is a list_iterator; give a list"
        ):
            self.refused(tmp_path, tmp_path / "rows.jsonl", {"train": iter(ROWS)})


def test_rows_that_were_changed_meanwhile(scores, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    datamodule = SRDDataModule(
        str(tmp_path / "rows.jsonl"), ByT5Tokenizer(), template=PLAIN, schedule={0: 0.5}, scores=scores
    )
    datamodule.set_up_for(KDLightningModule(tiny_model(), kd_weight=0.0), None)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[2:]))
    with pytest.raises(DataError, match="2 of 4 curated rows, 'b' among them, are no longer in `data`"):
        datamodule.export(tmp_path / "curated.jsonl")
    assert not (tmp_path / "curated.jsonl").exists()
