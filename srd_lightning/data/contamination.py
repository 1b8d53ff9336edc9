"""Training rows whose prompt stands twice, or stands in a held-out split: found before the curation, by text alone."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from srd_lightning.errors import DataError, SettingError

SAMPLE = 1000  # rows, at least, that show what most prompts share


@dataclass(frozen=True)
class Hygiene:
    """What `inspect` found. Row numbers count from 0 in ``train`` and ascend.

    Args:
        rows: Number of rows by split.
        duplicates: Rows of ``train`` whose prompt stands in an earlier row of it.
        leaks: By held-out split, rows of ``train`` whose prompt equals one of that split.
        leaked_prompts: By held-out split, number of its rows whose prompt stands in ``train``.
        near_leaks: By held-out split, rows of ``train`` whose prompt nearly equals one of that split and equals none;
            empty if near leaks were not looked for.
    """

    rows: dict[str, int]
    duplicates: list[int]
    leaks: dict[str, list[int]]
    leaked_prompts: dict[str, int]
    near_leaks: dict[str, list[int]]

    def reasons(self) -> dict[int, str]:
        """Say why each contaminated row should not be trained on.

        Returns:
            One reason by row of ``train``: equality goes before near equality, then the first split counts.

        Example:
            >>> found = Hygiene({"train": 9, "dev": 2, "test": 2}, [], {"dev": [], "test": [4]}, {}, {"dev": [2, 4]})
            >>> found.reasons()
            {4: 'prompt of test', 2: 'nearly a prompt of dev'}
        """
        reasons: dict[int, str] = {}
        for kind, leaks in (("prompt of", self.leaks), ("nearly a prompt of", self.near_leaks)):
            for split, rows in leaks.items():
                for row in rows:
                    reasons.setdefault(row, f"{kind} {split}")
        return reasons

    def contaminated(self) -> list[int]:
        """Return the rows of ``train`` that leak anything, each once, ascending: what decontamination drops."""
        return sorted(self.reasons())

    def __str__(self) -> str:
        """Say it in lines."""
        size = self.rows["train"]
        lines = [f"train: {len(self.duplicates) or 'none'} of {size} prompts repeat that of an earlier row"]
        for split, rows in self.leaks.items():
            hit = f"{self.leaked_prompts[split] or 'none'} of its {self.rows[split]} prompts"
            lines.append(f"{split}: {hit} also in train" + (f", in {len(rows)} of {size} rows" if rows else ""))
        for split, rows in self.near_leaks.items():
            lines.append(f"{split}: {len(rows) or 'none'} of {size} train rows nearly equal one of its prompts")
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


def inspect(splits: Mapping[str, Dataset], near: float | None = None) -> Hygiene:
    """Compare the prompts of ``train`` with each other and with the prompts of every other split.

    Prompts are equal if they are after `normalize`. They are read in batches, and only digests of 16 bytes are held.

    Near leaks are found by the words: two prompts are as similar as the share of their three-word sequences that both
    have (Jaccard). Sequences in more than a tenth of the training prompts say nothing, so they are left out: those are
    the words of the template, in each of its variants, and openings such as "what is". In a file of few rows nothing
    counts as template. The whole prompt is compared, so another question about the same long input is near, too. Words
    are what spaces separate, so scripts without spaces have hardly any near leaks. Candidates come from MinHash and are
    then compared exactly; a pair is missed with a chance below 1 % if ``near`` is 0.5, and hardly ever above.

    Args:
        splits: Tokenised rows by split, of which the column ``prompt`` is read; ``train`` is compared with the others.
        near: Least similarity of near leaks, in (0, 1]; 0.8 is usual. ``None`` looks for equal prompts only.

    Returns:
        What was found.

    Raises:
        DataError: There is no split ``train``.
        SettingError: ``near`` is not in (0, 1], or is given and the library datasketch is not installed.

    Example:
        >>> train = Dataset.from_dict({"prompt": ["Who am I?", "Why?", "who am i", "When?"]})
        >>> found = inspect({"train": train, "test": Dataset.from_dict({"prompt": ["WHY", "Where?"]})})
        >>> print(found)
        train: 1 of 4 prompts repeat that of an earlier row
        test: 1 of its 2 prompts also in train, in 1 of 4 rows
        >>> found.contaminated()
        [1]
    """
    if "train" not in splits:
        raise DataError(
            f"the splits must have 'train' among them, but are {', '.join(splits)}; name the training data so"
        )
    train = splits["train"]
    held_out = {split: rows for split, rows in splits.items() if split != "train"}
    near_prompts = None if near is None else _NearPrompts(held_out, _boilerplate(train), near)
    digests = list(_digests(train))
    prompts = {split: Counter(_digests(rows)) for split, rows in held_out.items()}
    leaks = {split: [row for row, digest in enumerate(digests) if digest in known] for split, known in prompts.items()}
    return Hygiene(
        rows={split: len(rows) for split, rows in splits.items()},
        duplicates=_repeated(digests),
        leaks=leaks,
        leaked_prompts={
            split: sum(known[digest] for digest in known.keys() & digests) for split, known in prompts.items()
        },
        near_leaks={} if near_prompts is None else near_prompts.leaks(train, leaks),
    )


def check_near(near: float) -> None:
    """Check that nearly equal prompts can be looked for.

    Raises:
        SettingError: It is no similarity in (0, 1], or the library datasketch is not installed.
    """
    if not 0 < near <= 1:
        raise SettingError(f"near_duplicates must be a similarity in (0, 1], such as 0.8, but is {near}")
    try:
        import datasketch  # noqa: F401
    except ImportError as error:
        raise SettingError('near_duplicates needs datasketch: pip install "srd-lightning[near-duplicates]"') from error


class _NearPrompts:
    """The prompts of the held-out splits, to be asked which of them nearly equal another prompt."""

    def __init__(self, held_out: Mapping[str, Dataset], boilerplate: frozenset[str], near: float) -> None:
        check_near(near)
        from datasketch import MinHash, MinHashLSH

        self.held_out = held_out
        self.boilerplate = boilerplate
        self.near = near
        self.empty = MinHash()
        self.index = MinHashLSH(near / 2)  # lets more through than asked for, as each is compared exactly
        for split, rows in held_out.items():
            for row, text in enumerate(_texts(rows)):
                if shingles := self.shingles(text):
                    self.index.insert((split, row), self.sketch(shingles))

    def shingles(self, text: str) -> frozenset[str]:
        return _shingles(text) - self.boilerplate

    def sketch(self, shingles: frozenset[str]) -> Any:
        sketch = self.empty.copy()
        sketch.update_batch(shingle.encode() for shingle in shingles)
        return sketch

    def leaks(self, train: Dataset, equal: Mapping[str, list[int]]) -> dict[str, list[int]]:
        """Return the rows of ``train`` near a prompt, by split, without those known to equal one of that split."""
        near: dict[str, set[int]] = {split: set() for split in self.held_out}
        for row, text in enumerate(_texts(train)):
            shingles = self.shingles(text)
            for split, candidate in self.index.query(self.sketch(shingles)):
                if row not in near[split] and self.similarity(shingles, split, candidate) >= self.near:
                    near[split].add(row)
        return {split: sorted(rows.difference(equal[split])) for split, rows in near.items()}

    def similarity(self, shingles: frozenset[str], split: str, row: int) -> float:
        other = self.shingles(normalize(self.held_out[split][row]["prompt"]))
        return len(shingles & other) / len(shingles | other)


def _boilerplate(train: Dataset) -> frozenset[str]:
    """Return what stands in over a tenth of the different prompts in an even sample, and in more than ten of them."""
    sample = train.select(range(0, len(train), max(1, len(train) // SAMPLE)))
    texts = set(_texts(sample))
    prompts_with = Counter(shingle for text in texts for shingle in _shingles(text))
    return frozenset(shingle for shingle, count in prompts_with.items() if count > max(10, len(texts) / 10))


def _shingles(text: str) -> frozenset[str]:
    """Return the sequences of three words in a text."""
    words = text.split()
    return frozenset(" ".join(words[start : start + 3]) for start in range(len(words) - 2))


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
