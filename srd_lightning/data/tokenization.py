"""Rows of text become rows of tokens, once: what was tokenised is kept on disk and found again.

A tokenised row has ``id``, ``prompt``, ``response``, ``input_ids`` (prompt and response), ``prompt_length`` and
``length``. All rows of a split stand in one Arrow file in the cache of `datasets`, named after what they depend on;
``datasets.disable_caching()`` turns the reuse off, and the folder may be deleted at any time. At the end of the file:
ids, lengths and digests of tokenised rows.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import filelock
import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from srd_lightning.data.families import DECODER, Family
from srd_lightning.data.readers import unwritable_cache
from srd_lightning.data.templates import ChatTemplate, Example, PromptTemplate, fields_read, is_missing
from srd_lightning.digests import bytes_digest
from srd_lightning.errors import DataError

VERSION = 2
"""Of the code below: to be raised whenever it gives other tokens for the same rows."""
PROBE = "The  QUICK fox's\n\t12345 \u00e9e\u0301 \ufb01 \u4e2d\u6587 \U0001f642 <s></s> ab "
"""Two spaces, capitals, an apostrophe, digits, composed and decomposed letters, a ligature, tokens that models have."""


ROWS_AT_A_TIME = 65_536
"""That are held in memory where digests are made."""
FIRST_ROWS = 100
"""Rows that show whether the template fits, before all are tokenised."""


@dataclass
class Report:
    """What happened to the rows of a split, and which of their fields no template looks at."""

    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    cut: int = 0
    unread: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Say it in one line."""
        dropped = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items()) or "none"
        unread = f"; fields not read: {', '.join(self.unread)}" if self.unread else ""
        return f"{self.rows} rows; dropped: {dropped}; responses cut to max_length: {self.cut}{unread}"


def tokenize(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    template: PromptTemplate | ChatTemplate,
    max_length: int = 512,
    max_prompt_length: int = 256,
    split: str = "train",
    family: Family = DECODER,
) -> tuple[Dataset, Report]:
    """Fill the template and tokenise; drop and count what cannot be used.

    Prompt and response are tokenised apart and put together, so that the border between them is exact; which tokens
    frame them is the family's. Rows that an earlier run, or another rank, has tokenised in the same way are read from
    disk.

    Args:
        rows: As read.
        tokenizer: Of the student.
        template: Bound to the tokenizer.
        max_length: Tokens of prompt and response together; a longer response is cut, and counted.
        max_prompt_length: Tokens of the prompt; a row with a longer one is dropped, and counted.
        split: For messages.
        family: Of the student.

    Returns:
        Tokenised rows and the report.

    Raises:
        DataError: A row lacks a field, named with the row; ids repeat; or no row is left.
        StorageError: The cache of `datasets` cannot be written.
    """
    lengths = {"max_length": max_length, "max_prompt_length": max_prompt_length}
    try:
        tokenised = _tokenised(rows, tokenizer, template, lengths, split, family)
    except OSError as error:
        raise unwritable_cache(error) from error
    return _drop(tokenised, split, unread_fields(rows, template))


def _tokenised(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    template: PromptTemplate | ChatTemplate,
    lengths: Mapping[str, int],
    split: str,
    family: Family,
) -> Dataset:
    made_of = (_tokenizer_digest(tokenizer), _template_key(template), str(lengths), *family.made_of)
    file = _file(_rows_digest(rows), *made_of)
    with filelock.FileLock(f"{file}.lock"):  # of several ranks the first tokenises, and the others read
        tokenised = _read(file, len(rows)) if _is_known(rows, template) else None
        if tokenised is None:
            texts = rows.remove_columns("id") if "id" in rows.column_names else rows
            tokenised = texts.map(
                _tokenize_batch,
                batched=True,
                with_indices=True,
                fn_kwargs={
                    "ids": row_ids(rows),
                    "tokenizer": tokenizer,
                    "template": template,
                    "family": family,
                    "split": split,
                    **lengths,
                },
                remove_columns=texts.column_names,
                features=TOKENISED,
                cache_file_name=str(file),  # written under another name, then renamed
                load_from_cache_file=False,
                new_fingerprint=file.stem,
                desc=f"tokenise {split}",
            ).with_format(None)
    return tokenised


def check_first_rows(rows: Dataset, template: PromptTemplate | ChatTemplate, split: str) -> None:
    """Fill the template with the first rows, so that one that does not fit is known before all rows are tokenised.

    Raises:
        DataError: A row lacks a field or has one that is no text; the message names the row and what it has.
    """
    for number, row in enumerate(rows.select(range(min(FIRST_ROWS, len(rows))))):
        _fill(template, row, row.get("id"), f"{split} row {number}")


def unread_fields(rows: Dataset, template: PromptTemplate | ChatTemplate) -> tuple[str, ...]:
    """Return the names of the fields that a template does not look at, as the first rows show it.

    Example:
        >>> from srd_lightning.data.templates import ALPACA
        >>> rows = Dataset.from_list([{"instruction": "Add.", "output": "2", "topic": "mathematics"}])
        >>> unread_fields(rows, ALPACA)
        ('topic',)
    """
    if type(template) not in (PromptTemplate, ChatTemplate):
        return ()
    first = rows.select(range(min(FIRST_ROWS, len(rows))))
    read = {"id"}.union(*(fields_read(row) for row in first))
    return tuple(name for name in rows.column_names if name not in read)


def _drop(tokenised: Dataset, split: str, unread: tuple[str, ...]) -> tuple[Dataset, Report]:
    columns = tokenised.select_columns(["drop", "cut"]).with_format("arrow")[:]
    reasons = {str(reason["values"]): int(reason["counts"]) for reason in columns["drop"].value_counts().to_pylist()}
    reasons.pop("", None)
    report = Report(len(tokenised), Counter(reasons), int(columns["cut"].to_numpy().sum()), unread)
    kept = np.flatnonzero(columns["drop"].to_numpy() == "")
    if not len(kept):
        raise DataError(f"{split}: no row is left of {report}")
    return tokenised.select(kept).remove_columns(["drop", "cut"]), report


def _file(*made_of: str) -> Path:
    name = hashlib.sha256(repr((VERSION, *made_of)).encode()).hexdigest()[:32]
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "srd_lightning"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.arrow"


def _is_known(rows: Dataset, template: PromptTemplate | ChatTemplate) -> bool:
    """Return whether digests say all that the tokens depend on; a template or a format of one's own is code."""
    own = type(template) not in (PromptTemplate, ChatTemplate) or rows.format["type"] is not None
    return datasets.is_caching_enabled() and not own


def _read(file: Path, rows: int) -> Dataset | None:
    """Return what is in a file, or nothing where it is not there or not whole."""
    if not file.exists():
        return None
    try:
        tokenised = Dataset.from_file(str(file))
        whole = len(tokenised) == rows
    except (pa.ArrowInvalid, OSError):
        whole = False
    if whole:
        return tokenised
    warnings.warn(f"{file} is damaged; its rows are tokenised again", stacklevel=3)
    return None


def _rows_digest(rows: Dataset) -> str:
    digest = hashlib.sha256(repr(rows.features).encode())
    for table in rows.with_format("arrow").iter(batch_size=1000):
        for batch in table.combine_chunks().to_batches():
            digest.update(batch.serialize())
    return digest.hexdigest()


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of which tokens there are: what tokens mean, whichever rules made them."""
    return bytes_digest([repr(sorted(tokenizer.get_vocab().items())).encode()])


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest vocabulary, rules and templates, and what is made of a probe: not all tokenizers can say their rules."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    rules = {} if fast is None else json.loads(fast.to_str())
    rules |= {"truncation": None, "padding": None}  # what it was last used with
    probes = [tokenizer(PROBE, add_special_tokens=special)["input_ids"] for special in (False, True)]
    name, vocabulary = type(tokenizer).__name__, vocabulary_digest(tokenizer)
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    parts = (name, vocabulary, rules, probes, ends, tokenizer.special_tokens_map, tokenizer.chat_template)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _template_key(template: PromptTemplate | ChatTemplate) -> str:
    """Return the template as text; the tokenizer that it is bound to is digested by itself."""
    settings = {name: value for name, value in vars(template).items() if name != "tokenizer"}
    return f"{type(template).__name__} {settings}"


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
    family: Family,
    max_length: int,
    max_prompt_length: int,
    split: str,
) -> dict[str, list[Any]]:
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    examples = [
        _fill(template, row, ids[index], f"{split} row {index}") for row, index in zip(rows, indices, strict=True)
    ]
    texts = [example.prompt for example in examples], [example.response for example in examples]
    prompts, responses = family.tokens(tokenizer, *texts)
    columns: dict[str, list[Any]] = {name: [] for name in TOKENISED}
    for index, example, prompt, response in zip(indices, examples, prompts, responses, strict=True):
        full = [*prompt, *response]
        columns["id"].append(ids[index])
        columns["prompt"].append(example.prompt)
        columns["response"].append(example.response)
        columns["prompt_length"].append(len(prompt))
        columns["input_ids"].append(full[:max_length])
        columns["length"].append(len(columns["input_ids"][-1]))
        columns["drop"].append(_reason_to_drop(example, len(prompt), max_prompt_length))
        columns["cut"].append(columns["drop"][-1] == "" and len(full) > max_length)
    return columns


def _fill(template: PromptTemplate | ChatTemplate, row: Mapping[str, Any], row_id: Any, name: str) -> Example:
    try:
        return template(row)
    except (KeyError, ValueError) as error:  # a template of one's own may raise its own
        known = "" if row_id is None else f" (id {row_id})"
        raise DataError(f"{name}{known}: {error.args[0]}") from error


def _reason_to_drop(example: Example, prompt_length: int, max_prompt_length: int) -> str:
    if not example.response.strip():
        return "empty response"
    if prompt_length == 0 or not example.prompt.strip():
        return "empty prompt"
    if prompt_length > max_prompt_length:
        return f"prompt over {max_prompt_length} tokens"
    return ""


def row_ids(rows: Dataset) -> list[str]:
    """Return one id per row, which stays with the row wherever it stands.

    Args:
        rows: Rows with or without an ``id`` column.

    Returns:
        The ``id`` column as text; without one, a digest of the row's content, numbered where rows repeat.

    Raises:
        DataError: An id is missing or stands twice.
    """
    if "id" in rows.column_names:
        ids = [str(row_id) for row_id in rows["id"] if not is_missing(row_id)]
        if len(ids) < len(rows):
            raise DataError(f"{len(rows) - len(ids)} of {len(rows)} rows have no id; give every row one, or none")
        repeated = [row_id for row_id, count in Counter(ids).items() if count > 1]
        if repeated:
            raise DataError(
                f"row ids must be unique, but {len(repeated)} stand more than once, {repeated[0]!r} among them; "
                "give every row its own, or remove the column to use ids made from the content"
            )
        return ids
    seen: Counter[str] = Counter()
    ids = []
    for batch in rows.iter(batch_size=1000):
        for values in zip(*batch.values(), strict=True):
            content = sorted(zip(batch, values, strict=True))
            digest = hashlib.sha256(repr(content).encode()).hexdigest()[:16]
            ids.append(digest if not seen[digest] else f"{digest}-{seen[digest]}")
            seen[digest] += 1
    return ids


def with_answers(
    rows: Dataset,
    answers: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    limits: Sequence[float],
) -> Dataset:
    """Return tokenised rows with answers in place of their responses, tokenised as these are.

    Args:
        rows: Tokenised, ``[N]``.
        answers: None of them empty, ``[N]``.
        tokenizer: Of the rows.
        max_length: Tokens of prompt and answer; longer answers are cut.
        limits: Tokens from which on an answer counts as cut, and gets no end token, ``[N]``.

    Returns:
        Rows of the same ids and prompts.
    """
    found = tokenizer(list(answers), add_special_tokens=False)["input_ids"]
    columns: dict[str, list[Any]] = {name: [] for name in rows.column_names}
    for place, (row, answer, ids) in enumerate(zip(rows, answers, found, strict=True)):
        ended = len(ids) < limits[place]
        prompt = row["input_ids"][: row["prompt_length"]]
        full = [*prompt, *ids, *([tokenizer.eos_token_id] if ended else [])][:max_length]
        for name, value in {**row, "response": answer, "input_ids": full, "length": len(full)}.items():
            columns[name].append(value)
    return Dataset.from_dict(columns, features=rows.features)


def ids_of(rows: Dataset) -> pa.Array:
    """Return the ids of tokenised rows, ``[N]``, as they stand in memory-mapped files."""
    return rows.select_columns(["id"]).with_format("arrow")[:]["id"].combine_chunks()


def lengths_of(rows: Dataset) -> NDArray[np.int32]:
    """Return the lengths of tokenised rows in tokens, ``[N]``; nothing else of them is read."""
    lengths: NDArray[np.int32] = rows.data.column("length").to_numpy()
    places = rows._indices  # which `datasets` itself makes Python numbers of: minutes for 100 million rows
    return lengths if places is None else lengths[places.column(0).to_numpy()]


def response_lengths(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return how many tokens the responses of some tokenised rows have, ``[B]``, the end token included.

    Example:
        >>> response_lengths([{"input_ids": [5, 6, 7], "prompt_length": 1}])
        [2]
    """
    return [len(row["input_ids"]) - row["prompt_length"] for row in rows]


def digest_of_rows(ids: pa.Array) -> str:
    """Return a digest of which rows there are, in which order.

    Args:
        ids: Of the rows, ``[N]``.

    Example:
        >>> digest_of_rows(pa.array(["a", "b"]))
        '911169ddaaf146af'
    """
    digest = hashlib.sha256()
    for first in range(0, len(ids), ROWS_AT_A_TIME):
        digest.update("".join(f"{row}\n" for row in ids[first : first + ROWS_AT_A_TIME].to_pylist()).encode())
    return digest.hexdigest()[:16]


def digest_of_tokens(rows: Dataset) -> str:
    """Return a digest of the tokens of tokenised rows, at about a GB a second.

    Args:
        rows: With ``input_ids`` and ``prompt_length``.
    """
    digest = hashlib.sha256()
    columns = rows.select_columns(["input_ids", "prompt_length"]).with_format("arrow")
    for first in range(0, len(rows), ROWS_AT_A_TIME):
        piece: Any = columns[first : first + ROWS_AT_A_TIME]
        tokens = piece["input_ids"].combine_chunks()
        for values in (tokens.flatten(), tokens.value_lengths(), piece["prompt_length"].combine_chunks()):
            digest.update(values.cast(pa.int32()).to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()[:16]
