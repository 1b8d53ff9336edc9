"""The rows of the contest: evenly spaced ones that are short enough, where the studies beside this look for them.

    python benchmarks/evidence/rows.py --train train.jsonl --heldout dev.jsonl --model FOLDER --out runs/evidence/rows

``few.jsonl`` (512 rows) is the pool of *few visits*, ``many.jsonl`` (96 of these) that of *the paper's regime*, and
``heldout.jsonl`` (200) what all arms are measured on. A row is short enough if it has at most 192 tokens, those of the
template among them, and its prompt at most 128. Rows to train on whose prompt is also held out are left out, and so are
those that repeat the prompt of an earlier one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from srd_lightning import ChatTemplate, Pretrained
from srd_lightning.data.contamination import find_contamination
from srd_lightning.data.row_reader import load_rows
from srd_lightning.data.tokenization import tokenize
from srd_lightning.storage import write_atomically

FIELDS = ["instruction", "input", "output"]
MAX_LENGTH, MAX_PROMPT_LENGTH = 192, 128


def short_rows(files: list[str], tokenizer: Any) -> Dataset:
    """Return those rows of some files that no length cuts, with their prompts."""
    rows = concatenate_datasets([load_rows(file).select_columns(FIELDS) for file in files])
    rows = rows.add_column("id", [str(row) for row in range(len(rows))])
    template = ChatTemplate("You are a helpful assistant.").bind(tokenizer)
    tokens, _ = tokenize(rows, tokenizer, template, MAX_LENGTH + 1, MAX_PROMPT_LENGTH)
    short = {row["id"]: row["prompt"] for row in tokens if len(row["input_ids"]) <= MAX_LENGTH}
    rows = rows.select([row for row, name in enumerate(rows["id"]) if name in short])
    return rows.add_column("prompt", [short[name] for name in rows["id"]])


def evenly(rows: Dataset, number: int) -> Dataset:
    """Return rows that are evenly spaced."""
    return rows.select(np.linspace(0, len(rows) - 1, number).round().astype(int))


def write(rows: Dataset, path: Path) -> None:
    """Write rows to train on or to measure on."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows.select_columns(["id", *FIELDS]))
    write_atomically(path, "".join(lines).encode())
    print(f"{path}: {len(rows)} rows")


def main() -> None:
    """Write the three files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", nargs="+", required=True, help="files of rows to train on")
    parser.add_argument("--heldout", nargs="+", required=True, help="files of rows to measure on")
    parser.add_argument("--model", required=True, help="folder or hub id whose tokenizer counts")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    options = parser.parse_args()
    tokenizer = Pretrained(options.model).tokenizer()
    train, heldout = short_rows(options.train, tokenizer), short_rows(options.heldout, tokenizer)
    found = find_contamination({"train": train, "heldout": heldout})
    left_out = {*found.duplicates, *found.leaks["heldout"]}
    few = evenly(train.select([row for row in range(len(train)) if row not in left_out]), 512)
    write(few, options.out / "few.jsonl")
    write(evenly(few, 96), options.out / "many.jsonl")
    write(evenly(heldout, 200), options.out / "heldout.jsonl")


if __name__ == "__main__":
    main()
