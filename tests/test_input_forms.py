"""Whatever rows are given as: they are read as the text that stands there, or refused by name, or counted."""

import datetime
import gzip
import json
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from tiny import PLAIN
from transformers import ByT5Tokenizer

from srd_lightning import ChatTemplate, SRDDataModule
from srd_lightning.errors import DataError

TOKENIZER = ByT5Tokenizer()
TOKENIZER.chat_template = (
    "{% for turn in messages %}{% if turn.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "[{{ turn.role }}] {{ turn.content }}{% endfor %}"
)
ROW = {"instruction": "Say a.", "output": "a"}
ROWS = [ROW, {"instruction": "Say b.", "output": "b"}]
PAIRS = [("Say a.", "a"), ("Say b.", "b")]
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


def pairs_of(data, template=PLAIN, split="train"):
    """Return prompt and response of every row that is trained on, and how many were dropped, by reason."""
    module = SRDDataModule(data, TOKENIZER, template=template, schedule={0: 1.0})
    module.setup("fit")
    rows = module.rows[split]
    return [(row["prompt"], row["response"]) for row in rows], dict(module.reports[split].dropped)


def file(name, content):
    """Write a file and return its name: bytes as they are, text as UTF-8, anything else as JSON."""
    text = content if isinstance(content, (str, bytes)) else json.dumps(content, ensure_ascii=False)
    raw = text if isinstance(text, bytes) else text.encode()
    return raw_file(name, gzip.compress(raw) if name.endswith(".gz") else raw)


def raw_file(name, content):
    Path(name).write_bytes(content)
    return name


def folder_named(name):
    Path(name).mkdir()
    return name


def parquet(**columns):
    pq.write_table(pa.table(columns), "rows.parquet")
    return "rows.parquet"


def folder(**files):
    Path("rows").mkdir()
    for name, content in files.items():
        file(f"rows/{name.replace('_', '.')}", content)
    return "rows"


def json_rows(*texts):
    return file("rows.jsonl", "".join(f'{{"instruction": "Say.", "output": {text}}}\n' for text in texts))


READ = {
    "jsonl": (lambda: file("rows.jsonl", LINES), PAIRS),
    "jsonl_upper_case": (lambda: file("ROWS.JSONL", LINES), PAIRS),
    "ndjson": (lambda: file("rows.ndjson", LINES), PAIRS),
    "jsonl_blank_lines": (lambda: file("rows.jsonl", LINES.replace("\n", "\n\n")), PAIRS),
    "json_array": (lambda: file("rows.json", ROWS), PAIRS),
    "json_array_named_jsonl": (lambda: file("rows.jsonl", ROWS), PAIRS),
    "json_data": (lambda: file("rows.json", {"version": "1", "data": ROWS}), PAIRS),
    "json_data_indented": (lambda: file("rows.json", json.dumps({"data": ROWS}, indent=2)), PAIRS),
    "json_array_indented": (lambda: file("rows.json", json.dumps(ROWS, indent=2)), PAIRS),
    "json_one_row_indented": (lambda: file("rows.json", json.dumps(ROW, indent=2)), PAIRS[:1]),
    "json_rows_indented": (lambda: file("rows.jsonl", "\n".join(json.dumps(row, indent=2) for row in ROWS)), PAIRS),
    "json_row_with_a_field_data": (lambda: file("rows.jsonl", {**ROW, "data": [1, 2]}), PAIRS[:1]),
    "jsonl_gz": (lambda: file("rows.jsonl.gz", LINES), PAIRS),
    "json_gz": (lambda: file("rows.json.gz", ROWS), PAIRS),
    "csv_gz": (lambda: file("rows.csv.gz", "instruction,output\nSay a.,a\n"), PAIRS[:1]),
    "csv": (lambda: file("rows.csv", "instruction,output\nSay a.,a\nSay b.,b\n"), PAIRS),
    "csv_quoted": (lambda: file("rows.csv", 'instruction,output\n"Say, ""a"".\n!",a\n'), [('Say, "a".\n!', "a")]),
    "csv_quotes_inside": (lambda: file("rows.csv", 'instruction,output\nA 5" pipe,a "b"\n'), [('A 5" pipe', 'a "b"')]),
    "csv_carriage_returns": (lambda: file("rows.csv", "instruction,output\r\nSay a.,a\r\n"), PAIRS[:1]),
    "csv_semicolons": (lambda: file("rows.csv", "instruction;output\nSay a, now.;a\n"), [("Say a, now.", "a")]),
    "csv_tabs": (lambda: file("rows.csv", "instruction\toutput\nSay a.\ta\n"), PAIRS[:1]),
    "csv_index": (lambda: file("rows.csv", ",instruction,output\n0,Say a.,a\n"), PAIRS[:1]),
    "csv_byte_order_mark": (lambda: file("rows.csv", "\ufeffinstruction,output\nSay a.,a\n"), PAIRS[:1]),
    "csv_numbers_are_text": (lambda: file("rows.csv", "prompt,response\n007,1.50\n"), [("007", "1.50")]),
    "tsv": (lambda: file("rows.tsv", "instruction\toutput\nSay a, b; c.\ta\n"), [("Say a, b; c.", "a")]),
    "parquet": (lambda: parquet(question=["Say a.", "Say b."], answer=["a", "b"]), PAIRS),
    "parquet_integers": (lambda: parquet(question=["Say."], answer=[7]), [("Say.", "7")]),
    "folder_of_splits": (lambda: folder(train_jsonl=LINES, test_json=[ROW]), PAIRS),
    "folder_of_one": (lambda: folder(train_csv="instruction,output\nSay a.,a\n", README_md="x"), PAIRS[:1]),
    "several_files": (
        lambda: [file("a.jsonl", LINES), file("b.csv", "prompt,answer\nSay c.,c\n")],
        [*PAIRS, ("Say c.", "c")],
    ),
    "list": (lambda: ROWS, PAIRS),
    "tuple": (lambda: tuple(ROWS), PAIRS),
    "generator": (lambda: (row for row in ROWS), PAIRS),
    "dict_values": (lambda: dict(enumerate(ROWS)).values(), PAIRS),
    "data_frame": (lambda: pd.DataFrame(ROWS), PAIRS),
    "data_frame_with_missing_values": (
        lambda: pd.DataFrame([{**ROW, "input": "x", "year": 1.5}, ROWS[1]]),
        [("Say a. x", "a"), PAIRS[1]],
    ),
    "streamed_data_set": (lambda: IterableDataset.from_generator(lambda: iter(ROWS)), PAIRS),
    "data_set": (lambda: Dataset.from_list(ROWS), PAIRS),
    "data_set_of_integers": (lambda: Dataset.from_dict({"prompt": ["Say."], "response": [7]}), [("Say.", "7")]),
    "data_sets": (lambda: DatasetDict(train=Dataset.from_list(ROWS)), PAIRS),
    "question_answer": (lambda: [{"question": "Say a.", "answer": "a"}], PAIRS[:1]),
    "query_response": (lambda: [{"query": "Say a.", "response": "a"}], PAIRS[:1]),
    "instruction_context_response": (
        lambda: [{"instruction": "Say a.", "context": "x", "response": "a"}],
        [("Say a. x", "a")],
    ),
    "conversations": (
        lambda: file(
            "rows.json", [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "7"}]}]
        ),
        [("Hi", "7")],
    ),
    "conversations_in_a_data_set": (
        lambda: Dataset.from_list(
            [{"conversations": [{"from": "human", "value": "A"}, {"from": "gpt", "value": "B"}]}]
        ),
        [("A", "B")],
    ),
    "messages": (lambda: [{"messages": TALK}], [("Hi", "Hello")]),
    "messages_of_parts": (
        lambda: [{"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, TALK[1]]}],
        [("Hi", "Hello")],
    ),
    "messages_without_calls": (lambda: [{"messages": [TALK[0], {**TALK[1], "tool_calls": None}]}], [("Hi", "Hello")]),
    "parts": (lambda: json_rows('[{"type": "text", "text": "é"}]'), [("Say.", "é")]),
    "json_numbers_as_they_are_written": (
        lambda: json_rows("7", "1.50", "1e3", "-0", "0.1000000000000000055511151231257827", "9" * 5000),
        [("Say.", text) for text in ("7", "1.50", "1e3", "-0", "0.1000000000000000055511151231257827", "9" * 5000)],
    ),
    "not_a_number_is_missing": (
        lambda: file("rows.jsonl", '{"prompt": "Say a.", "input": NaN, "score": NaN, "answer": "a"}\n'),
        PAIRS[:1],
    ),
    "other_fields_may_hold_anything": (
        lambda: file("rows.jsonl", {**ROW, "score": 1.5, "good": True, "tags": ["x"], "meta": {"a": None}}),
        PAIRS[:1],
    ),
}


@pytest.mark.parametrize("name", READ)
def test_is_read(name):
    make, expected = READ[name]
    assert pairs_of(make())[0] == expected


REFUSED = {
    "none": (lambda: None, "^train must be a file, .* but is null; leave the split out"),
    "no_validation": (lambda: {"train": ROWS, "validation": None}, "^validation must be a file, .* but is null"),
    "a_number": (lambda: 7, "^train must be a file, .* but is int$"),
    "bytes": (lambda: b"rows", "^train must be a file, .* but is bytes$"),
    "list_of_texts": (
        lambda: ["Say a.", "Say b."],
        "^train: 'Say a.' is neither the name of a .* file nor a row; a row is",
    ),
    "list_of_pairs": (lambda: [("Say a.", "a")], "^train row 0 must have named fields, such as .* but is a tuple$"),
    "list_of_one_none": (lambda: [ROW, None], "^train row 1 must have named fields, .* but is null$"),
    "names_that_are_numbers": (lambda: [{0: "a", 1: "b"}], "^train row 0 must have named .* names that are no text$"),
    "json_of_texts": (
        lambda: file("rows.json", ["Say a."]),
        "^rows.json row 0 must have named fields, but is 'Say a.'$",
    ),
    "columns": (
        lambda: file("rows.json", {"prompt": ["a"], "answer": ["b"]}),
        "rows.json line 1: prompt must be text, but is",
    ),
    "columns_in_python": (
        lambda: {"prompt": ["a"], "answer": ["b"]},
        "needs the split 'train', but `data` has prompt, answer$",
    ),
    "val": (lambda: {"train": ROWS, "val": ROWS}, "the split 'val', which no run looks at; call it validation"),
    "dev": (lambda: {"train": ROWS, "dev": ROWS}, "the split 'dev', .*; call it validation"),
    "tests": (lambda: {"train": ROWS, "tests": ROWS}, "the split 'tests', .*; call it test, if"),
    "easy": (lambda: {"train": ROWS, "easy": ROWS}, "'easy', .*; splits are train, validation, test and predict$"),
    "folder_with_val": (
        lambda: folder(train_jsonl=LINES, val_jsonl=LINES),
        "rows/val.jsonl is the file of no split; call it",
    ),
    "folder_with_two_train": (
        lambda: folder(train_jsonl=LINES, train_csv="a"),
        "has train.csv, train.jsonl for the split train",
    ),
    "file_of_another_form": (lambda: file("rows.txt", "a"), r"^rows.txt is a file of another form than .jsonl, "),
    "folder_named_as_a_file": (
        lambda: {"train": folder_named("x.jsonl")},
        "x.jsonl is a folder",
    ),
    "json_cut": (lambda: file("rows.json", '[{"prompt": "a"},\n'), "^rows.json line 2 is not JSON: "),
    "jsonl_cut": (lambda: file("rows.jsonl", LINES + '{"a": "'), "^rows.jsonl line 3 is not JSON: Unterminated string"),
    "jsonl_of_two_arrays": (
        lambda: file("rows.jsonl", "[1]\n[2]\n"),
        "^rows.jsonl row 0 must have named fields, but is '1'",
    ),
    "json_deep": (
        lambda: file("rows.jsonl", "[" * 100_000),
        "^rows.jsonl (cannot be read as jsonl|line 1 is not JSON)",
    ),
    "gz_cut": (
        lambda: raw_file("a.jsonl.gz", gzip.compress(LINES.encode() * 99)[:60]),
        "^a.jsonl.gz cannot be unpacked",
    ),
    "gz_that_is_none": (
        lambda: raw_file("a.jsonl.gz", LINES.encode()),
        "^a.jsonl.gz cannot be unpacked, ",
    ),
    "utf_16": (
        lambda: file("rows.csv", "prompt,answer\na,b\n".encode("utf-16")),
        r"^rows.csv is not UTF-8 \(byte 0xff\); save it",
    ),
    "latin_1": (
        lambda: file("rows.jsonl", LINES.encode() + b'"\xe9"'),
        r"^rows.jsonl is not UTF-8 \(byte 0xe9\); save it as UTF-8",
    ),
    "parquet_cut": (
        lambda: raw_file("rows.parquet", Path(parquet(prompt=["a"])).read_bytes()[:20]),
        "^rows.parquet cannot be read as parquet",
    ),
    "quote_never_closed": (
        lambda: file("rows.csv", 'prompt,answer\na,1\n"b,2\nc,3\n'),
        "^rows.csv line 3: unexpected end of data .* quote",
    ),
    "quote_closed_later": (
        lambda: file("rows.csv", 'prompt,answer\n"a,1\nb,"2"\n'),
        "^rows.csv line 2: ',' expected after '\"'",
    ),
    "quote_in_tsv": (
        lambda: file("rows.tsv", 'prompt\tanswer\n"a" b\t1\n'),
        r"^rows.tsv line 2: .* separated by '\\t'",
    ),
    "csv_too_many": (
        lambda: file("rows.csv", "prompt,answer\n\na,b,c\n"),
        "^rows.csv line 2 has more values than .* 3 and 2|^rows.csv line 3",
    ),
    "csv_too_few": (
        lambda: file("rows.csv", "prompt,answer\na\n"),
        "expected a field output .*, but the row has prompt$",
    ),
    "csv_name_twice": (
        lambda: file("rows.csv", "prompt,answer,answer\na,b,c\n"),
        "^rows.csv line 1: every name .* but 'answer' does not",
    ),
    "csv_spaces": (lambda: file("rows.csv", "prompt, answer\na, b\n"), "^rows.csv line 1: .* but ' answer' does not"),
    "csv_joined": (
        lambda: file("rows.csv", "prompt,answer\na,b\n\ufeffprompt,answer\nc,d\n"),
        "^rows.csv line 3 repeats the first line",
    ),
    "csv_without_names": (lambda: file("rows.csv", "Say a.,a\nSay b.,b\n"), "but the row has Say a., a$"),
    "messages_as_text": (
        lambda: file("rows.csv", "messages\n[]\n"),
        "rows.csv line 2: messages must be a list of turns, but is text",
    ),
    "field_twice": (
        lambda: file("rows.jsonl", LINES + '{"prompt": "a", "answer": "b", "answer": "c"}'),
        "^rows.jsonl line 3 has the field 'answer' twice",
    ),
    "half_a_surrogate_pair": (
        lambda: json_rows('"a"', r'"a\ud83d"'),
        r"^rows.jsonl line 2: output has half a surrogate pair, '\\ud83d', as character 1",
    ),
    "half_a_surrogate_pair_elsewhere": (
        lambda: [{**ROW, "note": "\ud83d"}],
        "^train row 0: note has half a surrogate pair",
    ),
    "null": (lambda: json_rows('"a"', "null"), "^train row 1: expected a field output .* but the row has instruction$"),
    "not_a_number": (lambda: json_rows("NaN"), "^train row 0: expected a field output .* but the row has instruction$"),
    "not_a_number_in_python": (lambda: [{**ROW, "output": float("nan")}], "^train row 0: expected a field output"),
    "true": (
        lambda: json_rows('"a"', "true"),
        "^rows.jsonl line 2: output must be text, but is the truth value True; write",
    ),
    "float": (
        lambda: [ROW, {**ROW, "output": 1.5}],
        "^train row 1: output must be text, but is the number 1.5; write it as text$",
    ),
    "bytes_in_python": (
        lambda: [{**ROW, "output": b"a"}],
        "^train row 0: output must be text, but is bytes; decode it first$",
    ),
    "bytes_in_parquet": (
        lambda: parquet(prompt=["a"], answer=[b"b"]),
        "^rows.parquet row 0: answer must be text, but is bytes",
    ),
    "floats_in_parquet": (
        lambda: parquet(prompt=["a"], answer=[1.5]),
        "^rows.parquet row 0: answer must be text, .* number 1.5",
    ),
    "floats_in_a_data_set": (
        lambda: Dataset.from_dict({"prompt": ["a"], "answer": [1.5]}),
        "^train row 0: answer must be text",
    ),
    "days_in_parquet": (
        lambda: parquet(prompt=["a"], answer=[datetime.date(2020, 1, 1)]),
        "answer must be text, but is date",
    ),
    "object": (
        lambda: json_rows('{"text": "a"}'),
        "rows.jsonl line 1: output must be text, but is an object; write one",
    ),
    "list_of_answers": (
        lambda: json_rows('["a", "b"]'),
        "rows.jsonl line 1: output must be text, but is a list whose entry 0 is text",
    ),
    "image_part": (
        lambda: [{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, TALK[1]]}],
        r"^train row 0: messages\[0\].content must be text, but is a list whose entry 0 is image_url; only text",
    ),
    "tool_calls": (
        lambda: [{"messages": [TALK[0], {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]}],
        r"^train row 0: messages\[1\] has tool_calls, which is not trained on; write it into the text, or leave",
    ),
    "tool_calls_in_a_file": (
        lambda: file("rows.jsonl", {"messages": [TALK[0], {"role": "assistant", "tool_calls": [{"id": "1"}]}]}),
        r"^rows.jsonl line 1: messages\[1\] has tool_calls",
    ),
    "thoughts": (
        lambda: [{"messages": [TALK[0], {**TALK[1], "reasoning_content": "Hm"}]}],
        r"messages\[1\] has reasoning_content",
    ),
    "image": (
        lambda: Dataset.from_list([{**ROW, "image": "cat.png"}]),
        "^train row 0: the row has image, which is not trained on",
    ),
    "tools": (
        lambda: [{**ROW, "tools": [{"name": "add"}]}],
        "^train row 0: the row has tools, which is not trained on",
    ),
    "turn_of_text": (
        lambda: [{"messages": ["Hi", "Hello"]}],
        r"^train row 0: messages\[0\] must have role and content, but is text",
    ),
    "turn_without_role": (
        lambda: [{"messages": [{"text": "Hi"}]}],
        r"messages\[0\] must have role and content, .* but has text$",
    ),
    "turn_without_content": (
        lambda: [{"messages": [TALK[0], {**TALK[1], "content": None}]}],
        r"needs content, but messages\[1\]",
    ),
    "roles_unknown": (
        lambda: [{"conversations": [{"from": "human", "value": "a"}, {"from": "observation", "value": "b"}]}],
        "roles are 'user observation'",
    ),
    "many_turns": (
        lambda: [{"messages": TALK * 2}],
        "^train row 0: PromptTemplate takes one user turn .*; use ChatTemplate",
    ),
    "turns_in_a_prompt": (
        lambda: [{"prompt": TALK[:1], "completion": TALK[1:]}],
        "^train row 0: prompt must be text, but is a list",
    ),
    "preferences": (lambda: [{"chosen": "a", "rejected": "b"}], "but the row has chosen, rejected$"),
    "text_alone": (lambda: [{"text": "a"}], "^train row 0: expected a field instruction or .*, but the row has text$"),
    "no_rows_in_json": (lambda: file("rows.json", {"data": []}), "^train: rows.json holds no rows"),
    "no_rows_in_a_generator": (lambda: iter([]), "^train: the source holds no rows"),
    "no_rows_in_a_data_frame": (lambda: pd.DataFrame({"prompt": []}), "^train: the source holds no rows"),
    "ids_missing": (lambda: [{**ROW, "id": "a"}, {**ROW, "id": float("nan")}], "^1 of 2 rows have no id"),
    "second_split": (
        lambda: {"train": ROWS, "validation": [{"prompt": "a"}]},
        "^validation row 0: expected a field output",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_by_name(name):
    make, message = REFUSED[name]
    with pytest.raises(DataError, match=message) as caught:
        pairs_of(make())
    assert "\n" not in str(caught.value)


BLANK = [
    {"instruction": "", "output": "a"},
    {"instruction": " \n", "input": "", "output": "a"},
    {"messages": [{"role": "user", "content": ""}, TALK[1]]},
]


@pytest.mark.parametrize("template", [PLAIN, ChatTemplate(system="Be kind.")], ids=["plain", "chat"])
@pytest.mark.parametrize("row", BLANK, ids=["empty", "blank", "turn"])
def test_rows_that_ask_nothing_are_counted(row, template):
    found, dropped = pairs_of([ROW, row], template)
    assert [response for _, response in found] == ["a"]
    assert dropped == {"empty prompt": 1}


def test_a_row_that_asks_by_its_input_alone_is_kept():
    assert pairs_of([{"instruction": "", "input": "1 + 1?", "output": "2"}])[0] == [(" 1 + 1?", "2")]


def test_what_the_chat_template_refuses_is_named():
    turns = [TALK[0], {"role": "tool", "content": "7"}, TALK[1]]
    with pytest.raises(
        DataError, match=r"^train row 0: the tokenizer's chat template refuses .* 'user tool': no tools$"
    ):
        pairs_of([{"messages": turns}], ChatTemplate())


def test_a_row_after_the_first_hundred_is_named_too():
    with pytest.raises(DataError, match=r"^train row 150 \(id .+\): expected a field output"):
        pairs_of([*[ROW] * 150, {"instruction": "Say."}])


def test_the_report_says_which_fields_are_not_read():
    module = SRDDataModule(
        [{**ROW, "id": "1", "topic": "x", "prompt": "y"}], TOKENIZER, template=PLAIN, schedule={0: 1.0}
    )
    module.setup("fit")
    assert str(module.reports["train"]).endswith("; fields not read: topic, prompt")


def test_the_delimiter_is_said(caplog):
    with caplog.at_level("INFO"):
        pairs_of(file("rows.csv", "prompt;answer\na;b\n"))
    assert "rows.csv: values are separated by ';', as in its first line" in caplog.text


def test_files_of_all_splits_are_looked_for_before_one_is_read(monkeypatch):
    monkeypatch.setattr("srd_lightning.data.readers.read", None)
    with pytest.raises(DataError, match=r"there is no file gone\.jsonl"):
        pairs_of({"train": file("rows.jsonl", LINES), "validation": "gone.jsonl"})


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "file")
    with pytest.raises(OSError, match=r"cannot be written to the cache of datasets, .*file: .*HF_DATASETS_CACHE"):
        pairs_of(ROWS)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("validate", "^validation needs the split 'validation', but `data` has train$"),
        ("test", "^testing needs the split 'test', but `data` has train$"),
        ("predict", "^prediction needs the split 'predict' or 'test', but `data` has train$"),
    ],
)
def test_a_stage_without_rows(stage, message):
    with pytest.raises(DataError, match=message):
        SRDDataModule({"train": ROWS}, TOKENIZER, template=PLAIN).setup(stage)
