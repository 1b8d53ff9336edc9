"""Rows and files of rows that cannot be used as they are."""

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from faults.fault import ROWS, Fault

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
TWO = [*ROWS[:2]]
NO_ANSWER = "expected a field output or response or completion or answer, but the row has instruction"
SCORED = [{"id": str(number), **row} for number, row in enumerate(ROWS)]
JUDGE = [{"class_path": "Column", "init_args": {"column": "judge", "higher_is_easier": True}}]


def rows_in(name: str, content: str | bytes | list[Any]) -> dict[str, Any]:
    """Return settings and files of a run whose rows stand in one file."""
    return {"settings": {"data": {"data": name}}, "files": {name: content}}


def rows(*given: Any) -> dict[str, Any]:
    """Return settings of a run whose rows stand in the recipe."""
    return {"settings": {"data": {"data": list(given)}}}


def scores(name: str, content: str | bytes | None = None, **data: Any) -> dict[str, Any]:
    """Return settings and files of a run whose scores stand in a file."""
    settings = {"data": {"data": SCORED, "scores": name, "criteria": JUDGE, **data}}
    return {"settings": settings, "files": {} if content is None else {name: content}}


def parquet(**columns: Any) -> bytes:
    """Return a parquet file."""
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def json_line(output: str) -> str:
    """Return three rows of which the last has an output that is written like this."""
    return "".join(json.dumps(row) + "\n" for row in TWO) + f'{{"instruction": "Say.", "output": {output}}}\n'


def damage_manifest(folder: Path) -> None:
    """Leave scores of which nobody knows what they were made of."""
    (folder / "scores").mkdir()
    (folder / "scores/manifest.json").write_text("[]")


FAULTS: list[Fault] = [
    Fault(
        id="no_file",
        done="A file that is not there",
        settings={"data": {"data": {"train": ROWS, "validation": "gone.jsonl"}}},
        says="there is no file gone.jsonl; `data` takes .jsonl, .ndjson, .json, .csv, .tsv, .jsonl.gz, .json.gz, .csv.gz, "
        ".tsv.gz, .parquet files",
    ),
    Fault(
        id="file_of_another_form",
        done="Rows in a text file",
        **rows_in("rows.txt", "Say one. one\n"),
        says="rows.txt is a file of another form than .jsonl, .ndjson, .json, .csv, .tsv, .jsonl.gz, .json.gz, .csv.gz, "
        ".tsv.gz, .parquet; write its rows as one of these",
    ),
    Fault(
        id="jsonl_cut",
        done="A jsonl file that was cut",
        **rows_in("rows.jsonl", json_line('"one"') + '{"instruction": "Say'),
        says="rows.jsonl line 4 is not JSON: Unterminated string starting at at character 17",
    ),
    Fault(
        id="gz_cut",
        done="A .gz file that was cut",
        **rows_in("rows.jsonl.gz", gzip.compress(json_line('"one"').encode(), mtime=0)[:40]),
        says="rows.jsonl.gz cannot be unpacked, it is cut or no gzip file: Compressed file ended before the end-of-stream "
        "marker was reached",
    ),
    Fault(
        id="not_utf_8",
        done="A file in latin-1",
        **rows_in("rows.csv", "instruction,output\nSay.,\xe9\n".encode("latin-1")),
        says="rows.csv is not UTF-8 (byte 0xe9); save it as UTF-8",
    ),
    Fault(
        id="no_rows",
        done="A file without rows",
        **rows_in("rows.json", '{"data": []}'),
        says="train: rows.json holds no rows",
    ),
    Fault(
        id="json_of_texts",
        done="A JSON list of texts",
        **rows_in("rows.json", '["Say one."]'),
        says="rows.json row 0 must have named fields, but is 'Say one.'",
    ),
    Fault(
        id="texts_for_rows",
        done="Texts instead of rows in a recipe",
        **rows("Say one."),
        says="train: 'Say one.' is neither the name of a .jsonl/.ndjson/.json/.csv/.tsv/.jsonl.gz/.json.gz/.csv.gz/.tsv.gz/"
        ".parquet file nor a row; a row is {'instruction': …, 'output': …}",
    ),
    Fault(
        id="quote_never_closed",
        done="A quote that is never closed in a CSV",
        **rows_in("rows.csv", 'instruction,output\nSay one.,one\n"Say two.,two\nSay three.,three\n'),
        says="rows.csv line 3: unexpected end of data (values are separated by ','); a text that begins with a quote must "
        "end with one, and quotes in it are written twice",
    ),
    Fault(
        id="too_many_values",
        done="A CSV row with more values than names",
        **rows_in("rows.csv", "instruction,output\nSay one, now.,one\n"),
        says="rows.csv line 2 has more values than the first line has names, 3 and 2; put texts in quotes that contain what "
        "separates values",
    ),
    Fault(
        id="name_twice",
        done="A CSV with a name twice",
        **rows_in("rows.csv", "instruction,output,output\na,b,c\n"),
        says="rows.csv line 1: every name must stand once and without spaces around it, but 'output' does not",
    ),
    Fault(
        id="first_line_again",
        done="CSV files put together with their first lines",
        **rows_in("rows.csv", "instruction,output\na,b\ninstruction,output\nc,d\n"),
        says="rows.csv line 3 repeats the first line; remove it",
    ),
    Fault(
        id="field_twice",
        done="A field twice in one JSON object",
        **rows_in("rows.jsonl", json_line('"one", "output": "two"')),
        says="rows.jsonl line 3 has the field 'output' twice in one object; remove one of them",
    ),
    Fault(
        id="half_a_pair",
        done="A text cut inside a character",
        **rows_in("rows.jsonl", json_line(r'"one \ud83d"')),
        says=r"rows.jsonl line 3: output has half a surrogate pair, '\ud83d', as character 4, which is no text; the text was "
        "cut inside a character: repair it, or leave the row out",
    ),
    Fault(
        id="truth_value",
        done="`true` as an answer",
        **rows_in("rows.jsonl", json_line("true")),
        says="rows.jsonl line 3: output must be text, but is the truth value True; write it as text",
    ),
    Fault(
        id="not_a_number",
        done="NaN as an answer",
        **rows_in("rows.jsonl", json_line("NaN")),
        says=f"train row 2: {NO_ANSWER}",
    ),
    Fault(
        id="number_in_a_recipe",
        done="A number with a fraction as an answer in a recipe, where 1.50 is 1.5",
        **rows(*TWO, {"instruction": "Say.", "output": 1.5}),
        says="train row 2: output must be text, but is the number 1.5; write it as text",
    ),
    Fault(
        id="bytes",
        done="Bytes in a parquet file",
        **rows_in("rows.parquet", parquet(prompt=["a", "b"], response=[b"a", b"b"])),
        says="rows.parquet row 0: response must be text, but is bytes; decode it first",
    ),
    Fault(
        id="no_answer",
        done="A row without an answer",
        **rows(*TWO, {"instruction": "Say."}),
        says=f"train row 2: {NO_ANSWER}",
    ),
    Fault(
        id="unknown_fields",
        done="Rows whose fields have other names",
        **rows({"ask": "Say.", "say": "one"}),
        says="train row 0: expected a field instruction or prompt or question or query, but the row has ask, say",
    ),
    Fault(
        id="tool_calls",
        done="Messages with tool calls",
        **rows({"messages": [TALK[0], {**TALK[1], "tool_calls": [{"id": "1"}]}]}),
        says="train row 0: messages[1] has tool_calls, which is not trained on; write it into the text, or leave the row out",
    ),
    Fault(
        id="image",
        done="Messages with an image",
        **rows({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, TALK[1]]}),
        says="train row 0: messages[0].content must be text, but is a list whose entry 0 is image_url; only text is trained "
        'on: give text, or parts that are all {"type": "text", "text": …}',
    ),
    Fault(
        id="several_turns",
        done="Several turns in a plain template",
        **rows({"messages": TALK * 2}),
        says="train row 0: PromptTemplate takes one user turn and its answer, but the roles are 'user assistant user "
        "assistant'; use ChatTemplate",
    ),
    Fault(
        id="nothing_left",
        done="Only rows that ask or answer nothing",
        **rows({"instruction": "", "output": "one"}, {"instruction": "Say nothing.", "output": " "}),
        says="train: no row is left of 2 rows; dropped: 1 empty prompt, 1 empty response; responses cut to max_length: 0",
    ),
    Fault(
        id="ids_twice",
        done="Two rows with one id",
        **rows(*({"id": 7, **row} for row in TWO)),
        says="row ids must be unique, but 1 stand more than once, '7' among them; give every row its own, or remove the column "
        "to use ids made from the content",
    ),
    Fault(
        id="val",
        done="`val:` for `validation:`",
        settings={"data": {"data": {"train": ROWS, "val": ROWS}}},
        says="`data` has the split 'val', which no run looks at; call it validation, if that is meant",
    ),
    Fault(
        id="test_without_rows",
        done="`srd test` without test rows",
        argv=("test",),
        settings={"data": {"data": {"train": ROWS}}},
        says="testing needs the split 'test', but `data` has train",
    ),
    Fault(
        id="predict_without_rows",
        done="`srd predict` with training rows alone",
        argv=("predict",),
        says="prediction needs the split 'predict' or 'test', but `data` has train",
    ),
    Fault(
        id="all_contaminated",
        done="`decontaminate` where every prompt stands in another split",
        settings={"data": {"data": {"train": ROWS, "test": ROWS}, "decontaminate": True}},
        says="decontaminate leaves no row: each of the 8 prompts of train stands in another split; train on other rows, or set "
        "decontaminate to false",
    ),
    Fault(
        id="beyond_positions",
        done="`max_length` beyond the model's positions",
        argv=("fit", "--data.max_length", "4096"),
        says="max_length lets a row have 4096 tokens, but the student has 2048 positions; set it to at most 2048",
    ),
    Fault(
        id="epoch_no_whole_number",
        done="A stage from epoch 1.5 on",
        settings={"data": {"schedule": {0: 0.5, 1.5: 1.0}}},
        says="the epochs of schedule must be whole numbers, but one is 1.5",
    ),
    Fault(
        id="scores_file_missing",
        done="A file of scores that is not there",
        **scores("scores.parquet"),
        says="`scores` names the file scores.parquet, which is not there; a folder has another name",
    ),
    Fault(
        id="scores_of_another_form",
        done="Scores in a text file",
        **scores("scores.txt", "0 1.5\n"),
        says="`scores` names the file scores.txt, but files of scores are .jsonl, .ndjson, .json, .csv, .tsv, .jsonl.gz, "
        ".json.gz, .csv.gz, .tsv.gz, .parquet",
    ),
    Fault(
        id="scores_without_column",
        done="A file of scores without the column that a criterion needs",
        **scores("scores.csv", "id,other\n0,1.5\n"),
        says="scores.csv has no column 'judge' for Column, only id, other; add it, or leave the criterion out",
    ),
    Fault(
        id="scores_without_rows",
        done="A file of scores with names of columns and nothing else",
        **scores("scores.csv", "id,judge\n"),
        says="scores.csv holds no scores; score every row",
    ),
    Fault(
        id="scores_twice",
        done="Two scores for one row",
        **scores("scores.csv", "id,judge\n" + "".join(f"{row % 8},{row}\n" for row in range(9))),
        says="scores.csv has more than one judge for 1 rows, '0' among them; keep one",
    ),
    Fault(
        id="scores_no_numbers",
        done="Scores that are no numbers",
        **scores("scores.csv", "id,judge\n" + "".join(f"{row},good\n" for row in range(8))),
        says="scores.csv: the column 'judge' must hold numbers, but does not: Failed to parse string: 'good' as a scalar of "
        "type double",
    ),
    Fault(
        id="column_without_file",
        done="A criterion of a file without a file",
        settings={"data": {"criteria": JUDGE}},
        says="the column 'judge' is read from a file, but `scores` names none",
    ),
    Fault(
        id="scores_below_a_file",
        done="A folder of scores below a file",
        settings={"data": {"scores": "notes/scores"}},
        files={"notes": "x"},
        says="scores needs the folder notes/scores, but {folder}/notes is a file; name another place",
    ),
    Fault(
        id="scores_damaged",
        done="Scores whose manifest is damaged",
        settings={"data": {"scores": "scores"}},
        prepare=damage_manifest,
        left=("scores/.lock",),
        says="scores/manifest.json cannot be read (it is not a manifest), so nobody knows what the "
        "scores beside it were made of; delete the folder, or point `scores` to another one",
    ),
]
