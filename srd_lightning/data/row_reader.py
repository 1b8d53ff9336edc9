"""`RowReader`: the rows of all splits, read and tokenised, and without those that stand in another split."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from srd_lightning.data.contamination import check_near, inspect
from srd_lightning.data.splits import load_splits
from srd_lightning.data.templates import ChatTemplate, PromptTemplate
from srd_lightning.data.tokenization import Report, check_first_rows, tokenize
from srd_lightning.errors import DataError, SettingError

NEEDED = {
    "fit": ("training", ("train",)),
    "validate": ("validation", ("validation",)),
    "test": ("testing", ("test",)),
    "predict": ("prediction", ("predict", "test")),
}
"""What a stage does, and the splits of which it needs one."""


@dataclass(frozen=True)
class RowReader:
    """Reads what a data module was given; arguments are those of `SRDDataModule`.

    Raises:
        SettingError: Lengths that leave no room for a response, or no similarity in (0, 1].
    """

    data: Any
    template: PromptTemplate | ChatTemplate
    max_length: int
    max_prompt_length: int
    decontaminate: bool
    near_duplicates: float | None

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.max_prompt_length >= self.max_length:
            raise SettingError(
                f"max_prompt_length must be smaller than max_length, or no response fits, but they are "
                f"{self.max_prompt_length} and {self.max_length}"
            )
        if self.near_duplicates is not None:
            check_near(self.near_duplicates)

    def check(self, stage: str) -> None:
        """Check that there is something to run on, where that is known before it is read."""
        if isinstance(self.data, Mapping):
            check_splits(self.data, stage)

    def read(self, tokenizer: PreTrainedTokenizerBase, stage: str) -> tuple[dict[str, Dataset], dict[str, Report]]:
        """Read and tokenise all splits, once it is seen that a stage can do with them.

        Args:
            tokenizer: Of the student.
            stage: ``fit``, ``validate``, ``test`` or ``predict``.

        Returns:
            Tokenised rows, and what happened to them, by split.
        """
        template = self.template.bind(tokenizer)
        splits = load_splits(self.data)
        check_splits(splits, stage)
        for split, rows in splits.items():
            check_first_rows(rows, template, split)
        tokenised, reports = {}, {}
        for split, rows in splits.items():
            tokenised[split], reports[split] = tokenize(
                rows, tokenizer, template, self.max_length, self.max_prompt_length, split
            )
            rank_zero_info(f"{split}: {reports[split]}")
        return tokenised, reports

    def without_leaks(self, rows: Mapping[str, Dataset], report: Report) -> Dataset:
        """Report training rows that stand twice or in another split, and drop the latter if that is wanted.

        Args:
            rows: Tokenised, by split.
            report: Of ``train``; counts what is dropped.

        Returns:
            The rows to train on.

        Raises:
            DataError: None is left.
        """
        hygiene = inspect(rows, self.near_duplicates)
        rank_zero_info(str(hygiene))
        if not self.decontaminate:
            return rows["train"]
        reasons = hygiene.reasons()
        report.dropped.update(reasons.values())
        kept = [row for row in range(len(rows["train"])) if row not in reasons]
        if not kept:
            raise DataError(
                f"decontaminate leaves no row: each of the {len(reasons)} prompts of train stands in another "
                "split; train on other rows, or set decontaminate to false"
            )
        return rows["train"].select(kept)


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
