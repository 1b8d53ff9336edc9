"""Training rows whose prompt stands twice, or stands in a held-out split: found before the curation, by text alone."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from datasets import Dataset

from srd_lightning.errors import DataError


@dataclass(frozen=True)
class Contamination:
    """What `find_contamination` found. Row numbers count from 0 in ``train`` and ascend.

    Args:
        rows: Number of rows by split.
        duplicates: Rows of ``train`` whose prompt stands in an earlier row of it.
        leaks: By held-out split, rows of ``train`` whose prompt equals one of that split.
        leaked_prompts: By held-out split, number of its rows whose prompt stands in ``train``.
    """

    rows: dict[str, int]
    duplicates: list[int]
    leaks: dict[str, list[int]]
    leaked_prompts: dict[str, int]

    def reasons(self) -> dict[int, str]:
        """Say why each contaminated row should not be trained on.

        Returns:
            One reason by row of ``train``; the first split counts.

        Example:
            >>> found = Contamination({"train": 9, "dev": 2, "test": 2}, [], {"dev": [2], "test": [4, 2]}, {})
            >>> found.reasons()
            {2: 'prompt of dev', 4: 'prompt of test'}
        """
        reasons: dict[int, str] = {}
        for split, rows in self.leaks.items():
            for row in rows:
                reasons.setdefault(row, f"prompt of {split}")
        return reasons

    def __str__(self) -> str:
        """Say it in lines."""
        size = self.rows["train"]
        lines = [f"train: {len(self.duplicates) or 'none'} of {size} prompts repeat that of an earlier row"]
        for split, rows in self.leaks.items():
            hit = f"{self.leaked_prompts[split] or 'none'} of its {self.rows[split]} prompts"
            lines.append(f"{split}: {hit} also in train" + (f", in {len(rows)} of {size} rows" if rows else ""))
        return "\n".join(lines)


class _Separators(dict[int, str]):
    """For `str.translate`: a space for every character that is no letter, mark or digit, looked up once."""

    def __missing__(self, code: int) -> str:
        letter = chr(code)
        self[code] = letter if unicodedata.category(letter)[0] in "LMN" else " "
        return self[code]


_SEPARATORS = _Separators()


def normalize(text: str) -> str:
    r"""Reduce a text to what makes two prompts the same.

    Args:
        text: In any script.

    Returns:
        The text in lower case, with one space for every run of other characters than letters, the marks that belong to
        them, and digits, and none at the ends. Texts that differ in symbols only, such as ``C`` and ``C++``, are equal.

    Example:
        >>> normalize("  What's 7_8?\nWas heißt «ÉTÉ»?")
        'what s 7 8 was heißt été'
    """
    return " ".join(text.lower().translate(_SEPARATORS).split())


def find_contamination(splits: Mapping[str, Dataset]) -> Contamination:
    """Compare the prompts of ``train`` with each other and with the prompts of every other split.

    Prompts are equal if they are after `normalize`. They are read in batches, and only digests of 16 bytes are held.

    Args:
        splits: Tokenised rows by split, of which the column ``prompt`` is read; ``train`` is compared with the others.

    Returns:
        What was found.

    Raises:
        DataError: There is no split ``train``.

    Example:
        >>> train = Dataset.from_dict({"prompt": ["Who am I?", "Why?", "who am i", "When?"]})
        >>> found = find_contamination({"train": train, "test": Dataset.from_dict({"prompt": ["WHY", "Where?"]})})
        >>> print(found)
        train: 1 of 4 prompts repeat that of an earlier row
        test: 1 of its 2 prompts also in train, in 1 of 4 rows
        >>> found.reasons()
        {1: 'prompt of test'}
    """
    if "train" not in splits:
        raise DataError(
            f"the splits must have 'train' among them, but are {', '.join(splits)}; name the training data so"
        )
    train = splits["train"]
    held_out = {split: rows for split, rows in splits.items() if split != "train"}
    digests = list(_digests(train))
    prompts = {split: Counter(_digests(rows)) for split, rows in held_out.items()}
    leaks = {split: [row for row, digest in enumerate(digests) if digest in known] for split, known in prompts.items()}
    return Contamination(
        rows={split: len(rows) for split, rows in splits.items()},
        duplicates=_repeated(digests),
        leaks=leaks,
        leaked_prompts={
            split: sum(known[digest] for digest in known.keys() & digests) for split, known in prompts.items()
        },
    )


def _repeated(digests: Sequence[bytes]) -> list[int]:
    seen: set[bytes] = set()
    repeated = []
    for row, digest in enumerate(digests):
        if digest in seen:
            repeated.append(row)
        seen.add(digest)
    return repeated


def _digests(rows: Dataset) -> Iterator[bytes]:
    for text in _texts(rows):
        yield hashlib.blake2b(text.encode(), digest_size=16).digest()


def _texts(rows: Dataset) -> Iterator[str]:
    for batch in rows.select_columns(["prompt"]).iter(batch_size=1000):
        yield from map(normalize, batch["prompt"])
