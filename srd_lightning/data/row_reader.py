"""The rows of every split, from whatever they are given as (files, folders, the hub, Python): read and tokenised.

`RowReader` does all of it, and gives `ReadRows`; `load_splits` below finds and reads the rows.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from transformers import PreTrainedTokenizerBase

from srd_lightning.data.contamination import find_contamination
from srd_lightning.data.families import DECODER, Family
from srd_lightning.data.readers import FORMATS, check_there, form_of, from_files, from_rows
from srd_lightning.data.templates import ChatTemplate, PromptTemplate, kind_of
from srd_lightning.data.tokenization import Report, check_first_rows, digest_of_rows, digest_of_tokens, ids_of, tokenize
from srd_lightning.errors import DataError, MissingDataError, SettingError, SRDError, in_one_line

NEEDED = {
    "fit": ("training", ("train",)),
    "validate": ("validation", ("validation",)),
    "test": ("testing", ("test",)),
    "predict": ("prediction", ("predict", "test")),
}
"""What a stage does, and the splits of which it needs one."""


@dataclass
class ReadRows:
    """The rows of all splits, read and tokenised once for all that is done with them.

    Args:
        splits: Tokenised rows by split.
        reports: What happened to them, by split.
        tokenizer: That made the tokens.
        family: Of the models that they were made for.
    """

    splits: dict[str, Dataset]
    reports: dict[str, Report]
    tokenizer: PreTrainedTokenizerBase
    family: Family

    def __post_init__(self) -> None:
        """Know the training rows as they were read."""
        self._train = self.splits.get("train")

    @cached_property
    def digest_of_rows(self) -> str:
        """Of the ids of the training rows, in their order, before any were dropped as leaks."""
        assert self._train is not None
        return digest_of_rows(ids_of(self._train))

    @cached_property
    def digest_of_tokens(self) -> str:
        """Of the tokens of the same rows."""
        assert self._train is not None
        return digest_of_tokens(self._train)

    def find_leaks(self, drop: bool) -> None:
        """Report training rows that stand twice or in another split.

        Args:
            drop: Leave out those that stand in another split, and count them.

        Raises:
            DataError: None is left.
        """
        found, train = find_contamination(self.splits), self.splits["train"]
        rank_zero_info(str(found))
        reasons = found.reasons() if drop else {}
        if not reasons:
            return
        kept = [row for row in range(len(train)) if row not in reasons]
        if not kept:
            raise DataError(
                f"decontaminate leaves no row: each of the {len(reasons)} prompts of train stands in another "
                "split; train on other rows, or set decontaminate to false"
            )
        self.splits["train"] = train.select(kept)
        self.reports["train"].dropped.update(reasons.values())


@dataclass(frozen=True)
class RowReader:
    """Reads what a data module was given; arguments are those of `SRDDataModule`.

    Raises:
        SettingError: Lengths that leave no room for a response.
    """

    data: Any
    template: PromptTemplate | ChatTemplate
    max_length: int
    max_prompt_length: int

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.max_prompt_length >= self.max_length:
            raise SettingError(
                f"max_prompt_length must be smaller than max_length, or no response fits, but they are "
                f"{self.max_prompt_length} and {self.max_length}"
            )

    def check(self, stage: str) -> None:
        """Check that there is something to run on, where that is known before it is read."""
        if isinstance(self.data, Mapping):
            check_splits(self.data, stage)

    def rows(self, split: str) -> Dataset:
        """Return the rows of one split as they were written.

        Raises:
            DataError: There is no such split, or it cannot be read.
        """
        by_split = isinstance(self.data, Mapping) and split in self.data
        splits = load_splits({split: self.data[split]} if by_split else self.data)
        if split not in splits:
            raise DataError(f"there is no split {split!r}, but `data` has {', '.join(splits)}; name one of these")
        return splits[split]

    def read(self, tokenizer: PreTrainedTokenizerBase, stage: str, family: Family = DECODER) -> ReadRows:
        """Read and tokenise all splits, once it is seen that a stage can do with them.

        Args:
            tokenizer: Of the student.
            stage: ``fit``, ``validate``, ``test`` or ``predict``.
            family: Of the student.

        Raises:
            DataError: There is nothing to run on, or a row is not what it must be.
        """
        template = self.template.bind(tokenizer)
        splits = load_splits(self.data)
        check_splits(splits, stage)
        for split, rows in splits.items():
            check_first_rows(rows, template, split)
        tokenised, reports = {}, {}
        for split, rows in splits.items():
            tokenised[split], reports[split] = tokenize(
                rows, tokenizer, template, self.max_length, self.max_prompt_length, split, family
            )
            rank_zero_info(f"{split}: {reports[split]}")
        return ReadRows(tokenised, reports, tokenizer, family)


def check_splits(splits: Iterable[str], stage: str) -> None:
    """Check that there is something to run on.

    Args:
        splits: Names of those that there are.
        stage: ``fit``, ``validate``, ``test`` or ``predict``.

    Raises:
        DataError: There is nothing.
    """
    (work, needed), there = NEEDED[stage], list(splits)
    if not set(needed).intersection(there):
        names = " or ".join(repr(split) for split in needed)
        raise DataError(f"{work} needs the split {names}, but `data` has {', '.join(there)}")


SPLITS = ("train", "validation", "test", "predict")
"""The splits that a run looks at."""
ALIASES = {"val": "validation", "valid": "validation", "dev": "validation", "eval": "validation", "training": "train"}


def load_splits(data: Any) -> dict[str, Dataset]:
    """Read every split.

    Args:
        data: ``{split: source}`` with the splits ``train``, ``validation``, ``test`` and ``predict``, or one source: a
            folder or hub id that has several splits, or the training data. A source is a file of one of the forms in
            `srd_lightning.data.readers`, a list of files, a ``save_to_disk`` folder, a hub id, a `datasets.Dataset`, a
            pandas DataFrame, or rows as any iterable.

    Returns:
        Data sets by split.

    Raises:
        DataError: A split has another name, or a source cannot be read; see `load_rows`.
    """
    if isinstance(data, (str, Path)) and form_of(data) is None:
        data = _from_folder_or_hub(str(data))
    if not isinstance(data, Mapping):  # a DatasetDict is one
        data = {"train": data}
    for split in data:
        if split not in SPLITS:
            raise DataError(f"`data` has the split {split!r}, which no run looks at; {_advice(str(split))}")
    for source in data.values():
        _check_files(source)
    return {split: load_rows(source, split) for split, source in data.items()}


def _advice(split: str) -> str:
    nearest = ALIASES.get(split.lower(), next(iter(difflib.get_close_matches(split.lower(), SPLITS, n=1)), None))
    names = ", ".join(SPLITS[:-1]) + f" and {SPLITS[-1]}"
    return f"call it {nearest}, if that is meant" if nearest else f"splits are {names}"


def _check_files(source: Any) -> None:
    """Look for the files of all splits before the first is read."""
    for file in [source] if isinstance(source, (str, Path)) else source if isinstance(source, (list, tuple)) else ():
        if isinstance(file, (str, Path)) and form_of(file):
            check_there(Path(file).expanduser())


def load_rows(source: Any, split: str = "train") -> Dataset:
    """Read one source; see `load_splits`. The split is for messages.

    Raises:
        MissingDataError: There is no such file, folder or hub id.
        DataError: The source holds several splits, or no rows, or something that is no row.
    """
    rows = _load(source, split)
    if not isinstance(rows, Dataset):
        raise DataError(
            f"{split}: the source holds the splits {', '.join(rows)}; name one, or give it as the whole `data`"
        )
    if len(rows) == 0:
        raise DataError(f"{split}: {source if isinstance(source, (str, Path)) else 'the source'} holds no rows")
    return rows


def _load(source: Any, split: str) -> Any:
    if isinstance(source, (str, Path)):
        return from_files([source]) if form_of(source) else _from_folder_or_hub(str(source))
    if isinstance(source, (Dataset, DatasetDict, pd.DataFrame)):
        return source if not isinstance(source, pd.DataFrame) else from_rows(source, split)
    if not isinstance(source, Iterable) or isinstance(source, (bytes, Mapping)):
        raise DataError(
            f"{split} must be a file, a list of files, a folder, a hub id, a data set, or rows, but is "
            f"{kind_of(source)}{'; leave the split out where there are no rows' if source is None else ''}"
        )
    rows = list(source)
    if not rows or not all(isinstance(row, (str, Path)) for row in rows):
        return from_rows(rows, split)
    if texts := [row for row in rows if form_of(row) is None]:
        raise DataError(
            f"{split}: {str(texts[0])[:80]!r} is neither the name of a {'/'.join(FORMATS)} file nor a row; a row is "
            "{'instruction': …, 'output': …}"
        )
    return from_files(rows)


def _from_folder_or_hub(name: str) -> Any:
    """Return the data set, data sets, or files by split, that a name stands for."""
    folder = Path(name).expanduser()
    if folder.is_file():
        raise DataError(f"{name} is a file of another form than {', '.join(FORMATS)}; write its rows as one of these")
    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        try:
            return _known_splits(load_from_disk(str(folder)), name)
        except IndexError as error:  # its way to say that no file of rows is there
            raise DataError(f"train: {name} holds no rows") from error
        except (OSError, KeyError, TypeError, json.JSONDecodeError, pa.ArrowInvalid) as error:
            raise DataError(f"{name} is damaged, write it with save_to_disk again: {in_one_line(error)}") from error
    if files := _files_by_split(folder):
        return files
    try:
        return _known_splits(load_dataset(name), name)
    except SRDError:
        raise
    except Exception as error:  # the hub's client raises many kinds
        raise MissingDataError(
            f"{name!r} is neither a {'/'.join(FORMATS)} file, nor a folder with train.jsonl or the like or written by "
            f"save_to_disk, nor a data set that the hub gives: {in_one_line(error)}"
        ) from error


def _known_splits(rows: Any, name: str) -> Any:
    """Leave out the splits of a published data set that no run looks at, and say so."""
    if not isinstance(rows, Mapping):
        return rows
    known = {split: rows[split] for split in rows if split in SPLITS}
    if not known:
        raise DataError(f"{name} holds the splits {', '.join(rows)}, but none of {', '.join(SPLITS)}")
    if others := [str(split) for split in rows if split not in SPLITS]:
        rank_zero_warn(f"{name}: not used are the splits {', '.join(others)}")
    return known


def _files_by_split(folder: Path) -> dict[str, list[Path]]:
    """Return the files of a folder that are named after a split."""
    files: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("*")):
        stem = file.name.partition(".")[0]
        if form_of(file) and stem.lower() in ALIASES:
            raise DataError(f"{file} is the file of no split; {_advice(stem)}")
        if form_of(file) and stem in SPLITS:
            files.setdefault(stem, []).append(file)
    if twice := [split for split, found in files.items() if len(found) > 1]:
        names = ", ".join(file.name for file in files[twice[0]])
        raise DataError(f"{folder} has {names} for the split {twice[0]}; name the files in `data`, by split")
    return files
