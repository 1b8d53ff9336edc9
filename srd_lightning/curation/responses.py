"""Responses that a model writes to the prompts of some rows, as a data file to train on: sequence-level distillation.

Kim and Rush, Sequence-Level Knowledge Distillation, EMNLP 2016. The model answers as a student does that reflects:
in fixed batches dealt to the ranks, each batch stored as soon as it is written, so that a run that was killed goes on.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from datasets import Dataset
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from transformers import PreTrainedTokenizerBase

from srd_lightning.criteria.base import CUT, Criterion, ReflectionBatch
from srd_lightning.curation.reflection import Reflector
from srd_lightning.curation.student_source import ReflectingStudent, find_family
from srd_lightning.data.templates import ChatTemplate, Example, PromptTemplate, with_response
from srd_lightning.data.tokenization import ids_of, row_ids, tokenize
from srd_lightning.digests import digest
from srd_lightning.distributed.process_group import Ranks
from srd_lightning.errors import DataError, SettingError
from srd_lightning.models.generation import Decoding
from srd_lightning.models.pretrained import Pretrained
from srd_lightning.storage import check_file, write_atomically

PLACEHOLDER = "."
"""Stands for the response while prompts are tokenised; no model sees it."""
WRITER = "written_by"
"""Field of the rows that are written, by which a file is known to be one that may be replaced."""


class CutAtLimit(Criterion):
    """Whether an answer was cut at its limit, 1 or 0: its writer would have gone on."""

    column, higher_is_easier = CUT, False

    def scores(self, reflected: ReflectionBatch) -> list[float]:
        """See `Criterion.scores`."""
        answers = reflected.answers  # which are kept beside the scores where a criterion has asked for them
        return [float(cut) for _, cut in zip(answers, reflected.cut, strict=True)]


@dataclass(frozen=True)
class ResponseWriter:
    """Lets a model write a response to every prompt, on all ranks.

    Args:
        source: The model.
        name: What it is called in the file.
        tokenizer: Of the model.
        template: Makes prompts of rows.
        max_prompt_length: In tokens; rows with a longer prompt are left out, and counted.
        decoding: How it writes.
        tokens_per_batch: Most tokens of a batch, see `fixed_batches`.
        threads: Of a CPU.

    Raises:
        SettingError: ``decoding.max_length_ratio`` is set, which needs reference responses.
    """

    source: Pretrained | nn.Module
    name: str
    tokenizer: PreTrainedTokenizerBase
    template: PromptTemplate | ChatTemplate
    max_prompt_length: int
    decoding: Decoding
    tokens_per_batch: int
    threads: int

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.decoding.max_length_ratio is not None:
            raise SettingError(
                "decoding.max_length_ratio bounds an answer by the reference response, which is not looked at here; "
                "set decoding.max_new_tokens"
            )

    def write(self, rows: Dataset, path: Path, root: Path, trainer: Trainer | None = None) -> Counter[str]:
        """Write the rows with the model's responses, all of them or nothing.

        Args:
            rows: As read; of their responses nothing is used.
            path: A jsonl file.
            root: Folder in which what was written is kept until all of it is there, and after.
            trainer: Gives the device, and under FSDP2 shards a model that is loaded by name; by default the model stays
                where it is.

        Returns:
            Why rows were left out, and how many.

        Raises:
            DataError: No response is left.
        """
        rows = _with_ids(rows)
        prompts, report = tokenize(
            rows,
            self.tokenizer,
            cast(PromptTemplate, _Prompts(self.template.bind(self.tokenizer))),
            max_length=self.max_prompt_length + 16,
            max_prompt_length=self.max_prompt_length,
            split="generate",
            family=find_family(self.source, None),
        )
        device = None if trainer is None else trainer.strategy.root_device
        student = ReflectingStudent(self.source, None, self.tokenizer, self.template, device, trainer)
        model = student.untrained()
        reflector = Reflector([CutAtLimit()], self.decoding, self.tokens_per_batch, self.threads, "responses")
        made_of = reflector.fingerprint(prompts, model, student)
        scores = reflector.scores(prompts, model, student, root / "responses" / digest(made_of), made_of)
        left_out = Counter(report.dropped)

        def finish() -> Counter[str]:
            ids = ids_of(prompts)
            cut = {row for row, was_cut in zip(ids.to_pylist(), scores.columns[CUT], strict=True) if was_cut}
            written = list(self._rows(rows, scores.answers(ids), cut, left_out))
            if not written:
                raise DataError(f"{self.name} has written no response that is whole: {_counts(left_out)}")
            write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written).encode())
            rank_zero_info(f"{len(written)} of {len(rows)} rows are in {path}; left out: {_counts(left_out)}")
            return left_out

        return Ranks().rank0_result(finish)

    def _rows(
        self, rows: Dataset, answers: Mapping[str, str], cut: set[str], left_out: Counter[str]
    ) -> Iterator[dict[str, Any]]:
        """Yield the rows whose response is whole, and count the others."""
        for row in cast("Iterator[dict[str, Any]]", rows):
            row_id = row["id"]
            if row_id not in answers:
                continue  # dropped for its prompt
            if row_id in cut:
                left_out[f"cut at decoding.max_new_tokens {self.decoding.max_new_tokens}"] += 1
            elif not answers[row_id]:
                left_out["empty response"] += 1
            else:
                yield {**with_response(row, answers[row_id]), WRITER: self.name}


def _with_ids(rows: Dataset) -> Dataset:
    """Return rows with a column ``id`` of texts, so that digests of their content are made once."""
    ids = row_ids(rows)
    return (rows.remove_columns("id") if "id" in rows.column_names else rows).add_column("id", ids)


@dataclass(frozen=True)
class _Prompts:
    """A template that makes the prompt alone: the response may be missing."""

    template: PromptTemplate | ChatTemplate

    def __call__(self, row: Mapping[str, Any]) -> Example:
        return self.template(with_response(row, PLACEHOLDER))


def check_path(path: Path) -> None:
    """Refuse a file that cannot be written, or that holds something else than such rows, before models are loaded.

    Raises:
        SettingError: It is no name of a jsonl file.
        StorageError: It cannot be written.
    """
    if path.suffix != ".jsonl":
        raise SettingError(f"path must name a .jsonl file, but is {path}")
    check_file(path, "path", "what an earlier run has written", _is_ours)


def _is_ours(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            return WRITER in json.loads(file.readline())
        except (ValueError, TypeError):
            return False


def _counts(left_out: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "none"
