"""From files to tokenised rows, and from rows to a batch.

A tokenised row has ``id``, ``prompt``, ``response``, ``input_ids`` (prompt and response), ``prompt_length`` and
``length``. A batch has what Hugging Face models take: ``input_ids``, ``attention_mask`` and unshifted ``labels``, -100
where no token of the response stands.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from datasets import Dataset, DatasetDict, Features, List, Value, load_dataset, load_from_disk
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from srd_lightning import sources
from srd_lightning.losses import IGNORE_INDEX
from srd_lightning.templates import ChatTemplate, Example, PromptTemplate


@dataclass
class Report:
    """What happened to the rows of a split."""

    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    cut: int = 0

    def __str__(self) -> str:
        """Say it in one line."""
        dropped = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items()) or "none"
        return f"{self.rows} rows; dropped: {dropped}; responses cut to max_length: {self.cut}"


def load_splits(data: Any) -> dict[str, Dataset]:
    """Read every split.

    Args:
        data: ``{split: source}``, or one source: a folder or hub id that has several splits, or the training data. A
            source is a file (jsonl, json, csv, parquet), a list of files, a ``save_to_disk`` folder, a hub id, a
            `datasets.Dataset`, or a list of rows.

    Returns:
        Data sets by split; ``train``, ``validation`` and ``test`` are the ones that are used.
    """
    if isinstance(data, (str, Path)) and Path(data).suffix not in sources.FORMATS:
        data = _load_folder_or_hub(str(data))
    if isinstance(data, Mapping):  # a DatasetDict is one
        return {split: load_rows(source, split) for split, source in data.items()}
    return {"train": load_rows(data)}


def load_rows(source: Any, split: str = "train") -> Dataset:
    """Read one source; see `load_splits`. The split is for messages.

    Raises:
        FileNotFoundError: There is no such file, folder or hub id.
        ValueError: The source holds several splits, or no rows.
    """
    if isinstance(source, (Dataset, DatasetDict)):
        rows = source
    elif isinstance(source, (str, Path)) and Path(source).suffix not in sources.FORMATS:
        rows = _load_folder_or_hub(str(source))
    elif isinstance(source, (str, Path)):
        rows = sources.from_files([source])
    elif source and isinstance(source[0], (str, Path)):
        rows = sources.from_files(source)
    else:
        rows = sources.from_rows(source)
    if not isinstance(rows, Dataset):
        raise ValueError(
            f"{split}: the source holds the splits {', '.join(rows)}; name one, or give it as the whole `data`"
        )
    if len(rows) == 0:
        raise ValueError(f"{split}: {source if isinstance(source, (str, Path)) else 'the source'} holds no rows")
    return rows


def _load_folder_or_hub(name: str) -> Dataset | DatasetDict:
    if Path(name).is_dir() and any(Path(name).glob("*.json")):
        try:
            return load_from_disk(name)
        except IndexError as error:  # its way to say that no file of rows is there
            raise ValueError(f"train: {name} holds no rows") from error
    try:
        return load_dataset(name)
    except Exception as error:  # the hub's client raises many kinds
        raise FileNotFoundError(
            f"{name!r} is neither a {'/'.join(sources.FORMATS)} file, nor a folder written by save_to_disk, nor a data "
            f"set that the hub gives: {' '.join(str(error).split())}"
        ) from error


def row_ids(rows: Dataset) -> list[str]:
    """Return one id per row, which stays with the row wherever it stands.

    Args:
        rows: Rows with or without an ``id`` column.

    Returns:
        The ``id`` column as text; without one, a digest of the row's content, numbered where rows repeat.

    Raises:
        ValueError: An id is missing or stands twice.
    """
    if "id" in rows.column_names:
        ids = [str(row_id) for row_id in rows["id"] if row_id is not None]
        if len(ids) < len(rows):
            raise ValueError(f"{len(rows) - len(ids)} of {len(rows)} rows have no id; give every row one, or none")
        repeated = [row_id for row_id, count in Counter(ids).items() if count > 1]
        if repeated:
            raise ValueError(
                f"row ids must be unique, but {len(repeated)} stand more than once, {repeated[0]!r} among them; "
                "give every row its own, or remove the column to use ids made from the content"
            )
        return ids
    seen: Counter[str] = Counter()
    ids = []
    for row in rows:
        digest = hashlib.sha256(repr(sorted(row.items())).encode()).hexdigest()[:16]
        ids.append(digest if not seen[digest] else f"{digest}-{seen[digest]}")
        seen[digest] += 1
    return ids


def ids_of(rows: Dataset) -> pa.Array:
    """Return the ids of tokenised rows, ``[N]``, as they stand in memory-mapped files."""
    return rows.select_columns(["id"]).with_format("arrow")[:]["id"].combine_chunks()


def tokenize(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    template: PromptTemplate | ChatTemplate,
    max_length: int = 512,
    max_prompt_length: int = 256,
    split: str = "train",
) -> tuple[Dataset, Report]:
    """Fill the template and tokenise; drop and count what cannot be used.

    Prompt and response are tokenised apart and put together, so that the border between them is exact. The beginning
    token stands in front if the tokenizer puts one there, the end token behind.

    Args:
        rows: As read.
        tokenizer: Of the student.
        template: Bound to the tokenizer.
        max_length: Tokens of prompt and response together; a longer response is cut, and counted.
        max_prompt_length: Tokens of the prompt; a row with a longer one is dropped, and counted.
        split: For messages.

    Returns:
        Tokenised rows and the report.

    Raises:
        ValueError: A row lacks a field, named with the row; ids repeat; or no row is left.
    """
    report = Report(rows=len(rows))
    ids = row_ids(rows)
    texts = rows.remove_columns("id") if "id" in rows.column_names else rows
    tokenised = texts.map(
        _tokenize_batch,
        batched=True,
        with_indices=True,
        fn_kwargs={
            "ids": ids,
            "tokenizer": tokenizer,
            "template": template,
            "max_length": max_length,
            "max_prompt_length": max_prompt_length,
            "split": split,
        },
        remove_columns=texts.column_names,
        features=TOKENISED,
        desc=f"tokenise {split}",
    )
    report.cut = sum(tokenised["cut"])
    reasons = list(tokenised["drop"])
    report.dropped = Counter(reason for reason in reasons if reason)
    kept = [row for row, reason in enumerate(reasons) if not reason]
    if not kept:
        raise ValueError(f"{split}: no row is left of {report}")
    return tokenised.select(kept).remove_columns(["drop", "cut"]), report


TOKENISED = Features(
    {
        "id": Value("string"),
        "prompt": Value("string"),
        "response": Value("string"),
        "input_ids": List(Value("int32")),
        "prompt_length": Value("int32"),
        "length": Value("int32"),
        "drop": Value("string"),
        "cut": Value("bool"),
    }
)


def _tokenize_batch(
    batch: Mapping[str, Sequence[Any]],
    indices: Sequence[int],
    ids: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    template: PromptTemplate | ChatTemplate,
    max_length: int,
    max_prompt_length: int,
    split: str,
) -> dict[str, list[Any]]:
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    examples = [
        _fill(template, row, ids[index], f"{split} row {index}") for row, index in zip(rows, indices, strict=True)
    ]
    prefix = _beginning(tokenizer)
    prompts = tokenizer([example.prompt for example in examples], add_special_tokens=False)["input_ids"]
    responses = tokenizer([example.response for example in examples], add_special_tokens=False)["input_ids"]
    columns: dict[str, list[Any]] = {name: [] for name in TOKENISED}
    for index, example, prompt, response in zip(indices, examples, prompts, responses, strict=True):
        if prompt[: len(prefix)] != prefix:
            prompt = prefix + prompt
        full = [*prompt, *response, tokenizer.eos_token_id]
        columns["id"].append(ids[index])
        columns["prompt"].append(example.prompt)
        columns["response"].append(example.response)
        columns["prompt_length"].append(len(prompt))
        columns["input_ids"].append(full[:max_length])
        columns["length"].append(len(columns["input_ids"][-1]))
        columns["drop"].append(_reason_to_drop(example, len(prompt), max_prompt_length))
        columns["cut"].append(columns["drop"][-1] == "" and len(full) > max_length)
    return columns


def _fill(template: PromptTemplate | ChatTemplate, row: Mapping[str, Any], row_id: str, name: str) -> Example:
    try:
        return template(row)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{name} (id {row_id}): {error.args[0]}") from error


def _beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token that the tokenizer puts in front of every text, if it does so."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []


def _reason_to_drop(example: Example, prompt_length: int, max_prompt_length: int) -> str:
    if not example.response.strip():
        return "empty response"
    if prompt_length == 0:
        return "empty prompt"
    if prompt_length > max_prompt_length:
        return f"prompt over {max_prompt_length} tokens"
    return ""


def collate(rows: Sequence[Mapping[str, Any]], pad_token_id: int) -> dict[str, Tensor]:
    """Pad rows on the right to a batch.

    Args:
        rows: Tokenised rows.
        pad_token_id: Fills up; masked, so any id will do.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, each ``[B, T]``, int64.

    Example:
        >>> rows = [{"input_ids": [5, 6, 7], "prompt_length": 1}, {"input_ids": [5, 8], "prompt_length": 1}]
        >>> collate(rows, pad_token_id=0)["labels"]
        tensor([[-100,    6,    7],
                [-100,    8, -100]])
    """
    shape = (len(rows), max(len(row["input_ids"]) for row in rows))
    input_ids = torch.full(shape, pad_token_id)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE_INDEX)
    for position, row in enumerate(rows):
        ids = torch.tensor(row["input_ids"])
        input_ids[position, : len(ids)] = ids
        attention_mask[position, : len(ids)] = 1
        labels[position, row["prompt_length"] : len(ids)] = ids[row["prompt_length"] :]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
