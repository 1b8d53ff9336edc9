import csv
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from tiny import in_other_order, make_rows, tokenised
from transformers import ByT5Tokenizer, DataCollatorForSeq2Seq

from srd_lightning.data.batches import collate
from srd_lightning.data.row_reader import load_rows, load_splits
from srd_lightning.data.tokenization import lengths_of, row_ids

ROWS = make_rows(6)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def as_jsonl(folder, rows):
    return str(write_jsonl(folder / "rows.jsonl", rows))


def as_json(folder, rows):
    (folder / "rows.json").write_text(json.dumps(rows))
    return str(folder / "rows.json")


def as_csv(folder, rows):
    return str(write_csv(folder / "rows.csv", rows))


def as_parquet(folder, rows):
    Dataset.from_list(rows).to_parquet(folder / "rows.parquet")
    return str(folder / "rows.parquet")


def as_path(folder, rows):
    return write_jsonl(folder / "rows.jsonl", rows)


def as_files(folder, rows):
    return [str(write_jsonl(folder / f"{name}.jsonl", part)) for name, part in (("a", rows[:1]), ("b", rows[1:]))]


def as_saved_dataset(folder, rows):
    Dataset.from_list(rows).save_to_disk(folder / "saved")
    return str(folder / "saved")


def as_dataset(folder, rows):
    return Dataset.from_list(rows)


def as_list(folder, rows):
    return rows


def each(*sources):
    return pytest.mark.parametrize("source", sources, ids=[source.__name__[3:] for source in sources])


every_source = each(as_jsonl, as_json, as_csv, as_parquet, as_path, as_files, as_saved_dataset, as_dataset, as_list)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def splits(data):
    return {split: rows.to_list() for split, rows in load_splits(data).items()}


class TestSources:
    @every_source
    def test_one_source_is_the_training_data(self, tmp_path, source):
        assert splits(source(tmp_path, ROWS)) == {"train": ROWS}

    @every_source
    def test_a_source_per_split(self, tmp_path, source):
        assert splits({"train": source(tmp_path, ROWS), "test": ROWS[:1]}) == {"train": ROWS, "test": ROWS[:1]}

    @each(as_jsonl, as_json, as_csv, as_parquet)
    @pytest.mark.parametrize(
        "outputs",
        [["007", "1.50"], ["2020-01-01", "2021-02-03"], ["True", "False"], ["NA", "null"]],
        ids=["numbers", "dates", "booleans", "missing_values"],
    )
    def test_text_stays_as_it_is_written(self, tmp_path, source, outputs):
        rows = [{"instruction": "Say it.", "output": output} for output in [*outputs, *outputs]]
        assert splits(source(tmp_path, rows)) == {"train": rows}

    def test_files_of_several_formats(self, tmp_path):
        files = [write_jsonl(tmp_path / "a.jsonl", ROWS[:2]), write_csv(tmp_path / "b.csv", ROWS[2:])]
        assert splits(files) == {"train": ROWS}

    @each(as_jsonl, as_json, as_files, as_list)
    def test_a_field_that_the_first_row_lacks_is_kept(self, tmp_path, source):
        rows = [{"instruction": "Hi", "output": "a"}, {"instruction": "Add.", "input": "1 + 1", "output": "2"}]
        assert [row.get("input") for row in splits(source(tmp_path, rows))["train"]] == [None, "1 + 1"]

    @each(as_jsonl, as_json, as_csv, as_parquet)
    def test_a_changed_file_is_read_again(self, tmp_path, source):
        splits(source(tmp_path, ROWS))
        assert splits(source(tmp_path, ROWS[:3])) == {"train": ROWS[:3]}

    @each(as_jsonl, as_json, as_csv, as_parquet)
    def test_a_text_may_be_long(self, tmp_path, source):
        rows = [{"instruction": "Hi", "output": "ab" * 100_000}]
        assert splits(source(tmp_path, rows)) == {"train": rows}

    @each(as_jsonl, as_json, as_list)
    def test_fields_that_no_template_reads_become_text(self, tmp_path, source):
        rows = [{"prompt": "Hi", "answer": "a", "note": note} for note in (7, 1.5, True, ["1", "a"], {"a": None})]
        found = splits(source(tmp_path, rows))["train"]
        assert [row["note"] for row in found] == ["7", "1.5", "True", '["1", "a"]', '{"a": null}']

    def test_turns_of_a_file_are_kept(self, tmp_path):
        rows = [{"messages": [{"role": "user", "content": "é"}, {"role": "assistant", "content": "7"}]}]
        assert splits(as_jsonl(tmp_path, rows)) == {"train": rows}

    @pytest.mark.parametrize("saved", [False, True], ids=["in_memory", "folder"])
    def test_dataset_dict(self, tmp_path, saved):
        data = DatasetDict(train=Dataset.from_list(ROWS), validation=Dataset.from_list(ROWS[:2]))
        if saved:
            data.save_to_disk(tmp_path / "saved")
            data = str(tmp_path / "saved")
        assert splits(data) == {"train": ROWS, "validation": ROWS[:2]}

    @pytest.mark.parametrize(
        ("found", "expected"),
        [
            (Dataset.from_list(ROWS), {"train": ROWS}),
            (DatasetDict(test=Dataset.from_list(ROWS)), {"test": ROWS}),
        ],
        ids=["one_split", "several_splits"],
    )
    def test_hub_id(self, monkeypatch, found, expected):
        monkeypatch.setattr("srd_lightning.data.row_reader.load_dataset", {"owner/name": found}.__getitem__)
        assert splits("owner/name") == expected

    def test_hub_that_does_not_answer(self, monkeypatch):
        def unreachable(name):
            raise ConnectionError("no route")

        monkeypatch.setattr("srd_lightning.data.row_reader.load_dataset", unreachable)
        with pytest.raises(FileNotFoundError, match=r"^'owner/name' is neither .* that the hub gives: no route$"):
            load_splits("owner/name")

    @pytest.mark.parametrize("saved", [False, True], ids=["in_memory", "folder"])
    def test_a_split_cannot_hold_splits(self, tmp_path, saved):
        data = DatasetDict(easy=Dataset.from_list(ROWS), hard=Dataset.from_list(ROWS))
        data.save_to_disk(tmp_path / "saved")
        with pytest.raises(ValueError, match="holds the splits easy, hard"):
            load_splits({"train": str(tmp_path / "saved") if saved else data})

    @each(as_jsonl, as_json, as_csv)
    def test_a_byte_order_mark_is_no_text(self, tmp_path, source):
        path = Path(source(tmp_path, ROWS))
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        assert splits(str(path)) == {"train": ROWS}

    def test_blank_lines_may_stand_before_a_json_array(self, tmp_path):
        (tmp_path / "rows.json").write_text("\n " + json.dumps(ROWS, indent=1))
        assert splits(str(tmp_path / "rows.json")) == {"train": ROWS}

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("rows.jsonl", '{"instruction": "a", "output": "b"}\n"text"\n'),
            ("rows.jsonl", "[1]\n"),
            ("rows.json", '["text"]'),
            ("rows.json", '[{"instruction": "a"},'),
            ("rows.jsonl", '{"messages": "text"}\n'),
            ("rows.csv", "instruction,output\na,b,c\n"),
            ("rows.parquet", "text"),
        ],
        ids=["text_line", "list_line", "array_of_text", "open_array", "messages_of_text", "long_csv_row", "no_parquet"],
    )
    def test_a_file_that_holds_something_else_is_named(self, tmp_path, name, text):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=f"^[^\n]*{name}[^\n]*$"):
            load_rows(str(tmp_path / name))

    def test_the_rows_given_are_not_changed(self):
        rows = make_rows(2)
        load_rows(rows)
        assert rows == make_rows(2)


class TestIds:
    def test_content_ids_stay_with_their_rows(self):
        rows = [ROWS[position] for position in (3, 1, 5, 0, 2, 4)]
        ids = dict(zip([row["instruction"] for row in ROWS], row_ids(Dataset.from_list(ROWS)), strict=True))
        assert row_ids(Dataset.from_list(rows)) == [ids[row["instruction"]] for row in rows]

    def test_content_ids_do_not_depend_on_the_order_of_the_fields(self):
        turned = [dict(reversed(row.items())) for row in ROWS]
        assert row_ids(Dataset.from_list(turned)) == row_ids(Dataset.from_list(ROWS))

    @pytest.mark.parametrize("field", ["instruction", "output"])
    def test_content_ids_tell_rows_apart(self, field):
        rows = [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": "b", field: "c"}]
        assert len(set(row_ids(Dataset.from_list(rows)))) == 2

    def test_repeated_rows_have_ids_of_their_own(self):
        rows = [ROWS[0], ROWS[1], ROWS[0], ROWS[0]]
        ids = row_ids(Dataset.from_list(rows))
        assert len(set(ids)) == 4
        assert set(ids[:2]) == set(row_ids(Dataset.from_list(ROWS[:2])))

    @pytest.mark.parametrize(
        ("given", "ids"), [([3, 1], ["3", "1"]), (["x", "03"], ["x", "03"])], ids=["numbers", "text"]
    )
    def test_given_ids_are_kept_as_text(self, given, ids):
        assert row_ids(Dataset.from_list([{"id": row_id, "output": ""} for row_id in given])) == ids

    def test_a_repeated_id_is_named(self):
        with pytest.raises(ValueError, match="1 stand more than once, 'b' among them"):
            row_ids(Dataset.from_list([{"id": "a"}, {"id": "b"}, {"id": "b"}]))

    def test_a_missing_id(self):
        with pytest.raises(ValueError, match="1 of 2 rows have no id"):
            row_ids(Dataset.from_list([{"id": None}, {"id": "b"}]))


def test_lengths_are_those_of_the_tokens(tokenizer):
    rows = in_other_order(tokenised(tokenizer, ROWS))
    assert lengths_of(rows).tolist() == [len(ids) for ids in rows["input_ids"]]


class TestCollate:
    ROWS = (
        {"input_ids": [5, 6, 7, 1], "prompt_length": 2},
        {"input_ids": [8, 1], "prompt_length": 1},
    )

    def test_pads_on_the_right(self):
        batch = {name: values.tolist() for name, values in collate(self.ROWS, pad_token_id=9).items()}
        assert batch == {
            "input_ids": [[5, 6, 7, 1], [8, 1, 9, 9]],
            "attention_mask": [[1, 1, 1, 1], [1, 1, 0, 0]],
            "labels": [[-100, -100, 7, 1], [-100, 1, -100, -100]],
        }

    @pytest.mark.parametrize(("multiple", "width"), [(1, 4), (2, 4), (3, 6), (4, 4), (64, 64)])
    def test_width_is_rounded_up(self, multiple, width):
        plain, wide = (collate(self.ROWS, pad_token_id=9, pad_to_multiple_of=multiple) for multiple in (1, multiple))
        for name, fill in {"input_ids": 9, "attention_mask": 0, "labels": -100}.items():
            assert wide[name].shape == (2, width)
            assert torch.equal(wide[name][:, :4], plain[name])
            assert (wide[name][:, 4:] == fill).all()

    def test_is_int64(self):
        assert {values.dtype for values in collate(self.ROWS, pad_token_id=0).values()} == {torch.int64}

    def test_an_end_token_that_pads_is_not_a_label(self):
        assert collate(self.ROWS, pad_token_id=1)["labels"].tolist() == [[-100, -100, 7, 1], [-100, 1, -100, -100]]

    def test_equals_the_collator_of_transformers(self, tokenizer):
        rows = tokenised(tokenizer, ROWS).to_list()
        features = [
            {
                "input_ids": row["input_ids"],
                "attention_mask": [1] * len(row["input_ids"]),
                "labels": [-100] * row["prompt_length"] + row["input_ids"][row["prompt_length"] :],
            }
            for row in rows
        ]
        theirs = DataCollatorForSeq2Seq(ByT5Tokenizer(padding_side="right"))(features)
        ours = collate(rows, pad_token_id=tokenizer.pad_token_id)
        assert ours.keys() == theirs.keys()
        for name, values in ours.items():
            torch.testing.assert_close(values, theirs[name])
