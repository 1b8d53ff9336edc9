"""Reflection: the student answers every prompt, and its answer and its loss say how hard the row is for it.

Fixed batches are dealt to the ranks, so a score does not depend on how many there are; all ranks get all scores. What
scores are made of is a `fingerprint`, by which they are found again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedTokenizerBase

from srd_lightning.criteria.base import Criterion, ReflectionBatch, score_batch
from srd_lightning.curation.score_store import Scores, ScoreStore
from srd_lightning.curation.student_source import ReflectingStudent
from srd_lightning.curriculum.ranking import Floats
from srd_lightning.data.tokenization import ids_of, vocabulary_digest
from srd_lightning.digests import bytes_digest
from srd_lightning.distributed.fsdp2 import gathered_digest
from srd_lightning.distributed.process_group import Ranks
from srd_lightning.errors import SettingError
from srd_lightning.models.generation import Decoding, end_tokens
from srd_lightning.models.lockstep import share
from srd_lightning.progress import progress_bar
from srd_lightning.results_folder import MANIFEST

SCORING_VERSION = "2"
"""Rises when the same inputs would give other scores."""
RowNumbers = NDArray[np.int64]


def fixed_batches(rows: Dataset, tokens_per_batch: int, decoding: Decoding) -> list[RowNumbers]:
    """Deal rows into batches that pad little and end together, the same for the same rows in any order.

    Args:
        rows: Tokenised rows.
        tokens_per_batch: Most tokens of a batch: its rows times the longest prompt and the longest answer or response;
            a row that is longer is a batch of its own.
        decoding: How long answers may be.

    Returns:
        Row numbers of each batch.
    """
    ids, prompts, lengths = (np.array(rows[name]) for name in ("id", "prompt_length", "length"))
    limits = np.array(decoding.limits((lengths - prompts).tolist()))
    order = np.lexsort((ids, prompts, limits, np.ceil(np.log2(prompts))))
    batches, first = [], 0
    longest_prompt = longest_rest = 0
    rests = np.maximum(limits, lengths - prompts)
    for position, row in enumerate(order):
        longest_prompt, longest_rest = max(longest_prompt, prompts[row]), max(longest_rest, rests[row])
        if position > first and (position + 1 - first) * (longest_prompt + longest_rest) > tokens_per_batch:
            batches.append(order[first:position])
            first, longest_prompt, longest_rest = position, prompts[row], rests[row]
    return [*batches, order[first:]]


class Known(NamedTuple):
    """Which scores there are before a reflection.

    Args:
        columns: Scores by column, ``[N]``, NaN where there is none.
        unscored: Batches that lack some, each with its number and its row numbers.
    """

    columns: dict[str, Floats]
    unscored: list[tuple[int, RowNumbers]]


@dataclass(frozen=True)
class Reflector:
    """Lets a student reflect, on all ranks, and keeps the scores.

    Args:
        criteria: What to score.
        decoding: How the student answers.
        tokens_per_batch: See `fixed_batches`.
        threads: Of a CPU while it reflects: their number changes the last digits of scores.
        task: What the progress bar says.
    """

    criteria: Sequence[Criterion]
    decoding: Decoding
    tokens_per_batch: int
    threads: int
    task: str = "reflection"

    def fingerprint(self, rows: Dataset, model: nn.Module, student: ReflectingStudent) -> Mapping[str, str]:
        """Return digests, by part, of what scores of these rows are made of.

        Args:
            rows: Tokenised rows.
            model: The student.
            student: By which tokenizer and template it reflects.

        Raises:
            SettingError: The ranks have different students.
        """
        settings = (student.tokenizer, student.template, self.decoding, SCORING_VERSION)
        return _same_in_all(Ranks().all_results(lambda: fingerprint(rows, model, *settings)))

    def scores(
        self, rows: Dataset, model: nn.Module, student: ReflectingStudent, folder: Path, made_of: Mapping[str, str]
    ) -> Scores:
        """Score every row that has no scores yet.

        Args:
            rows: Tokenised rows.
            model: The student; moved to its device while it reflects.
            student: By which tokenizer it reflects, and where.
            folder: Where the scores are kept.
            made_of: Their fingerprint.

        Returns:
            The scores, the same on all ranks.

        Raises:
            StorageError: The folder holds scores made of something else, cannot be written, or another run has it.
            RankError: Another rank has failed.
        """
        team, ids = Ranks(), ids_of(rows)
        names = [criterion.column for criterion in self.criteria]

        def begin() -> tuple[ScoreStore, dict[str, Floats], list[tuple[int, RowNumbers]]]:
            settings = {criterion.column: criterion.settings() for criterion in self.criteria}
            store = stack.enter_context(ScoreStore.locked(folder, made_of, settings))
            columns = store.columns(ids, names)
            todo = self._unscored(rows, columns)
            if not todo and not store.is_compact(len(ids)):  # a run was killed at its very end
                store.compact()
            return store, columns, todo

        def finish() -> dict[str, Floats]:
            store.compact()
            return store.columns(ids, names)

        with ExitStack() as stack:
            store, columns, todo = team.rank0_result(begin)
            if todo:
                with self.ready(model, student) as check:
                    self._reflect(rows, todo[team.rank :: team.size], model, student, store, check)
                columns = team.rank0_result(finish)
        return Scores(columns, store.folder, sum(len(batch) for _, batch in todo), store.answers, store.cut)

    @contextmanager
    def ready(self, model: nn.Module, student: ReflectingStudent) -> Iterator[Callable[[], None]]:
        """Have a student where it reflects, with as many threads as it reflects with.

        Args:
            model: The student; moved back afterwards.
            student: Where it reflects.

        Yields:
            Raises where another rank has failed.
        """
        device = student.device or next(model.parameters()).device
        with _placed(model, device), pinned_threads(self.threads, device), share(model) as check:
            yield check

    def look(self, rows: Dataset, folder: Path, made_of: Mapping[str, str]) -> Known:
        """Return the scores that there are; nothing is written.

        Args:
            rows: Tokenised rows.
            folder: Where the scores are kept.
            made_of: Their fingerprint.

        Raises:
            StorageError: The folder holds scores that were made of something else.
        """
        names, ids = [criterion.column for criterion in self.criteria], ids_of(rows)
        columns = dict.fromkeys(names, np.full(len(rows), np.nan))
        if (folder / MANIFEST).exists():
            store = ScoreStore.reopen(folder)
            store.refuse_another(made_of, {criterion.column: criterion.settings() for criterion in self.criteria})
            columns = store.columns(ids, names)
        return Known(columns, self._unscored(rows, columns))

    def _reflect(
        self,
        rows: Dataset,
        batches: Sequence[tuple[int, RowNumbers]],
        model: nn.Module,
        student: ReflectingStudent,
        store: ScoreStore,
        check: Callable[[], None],
    ) -> None:
        """Score the batches of this rank, and store each as soon as it is scored; their numbers seed the sampling."""
        mine = np.concatenate([batch for _, batch in batches]) if batches else np.array([], dtype=np.int64)
        known = store.answers(ids_of(rows.select(mine))) if len(mine) else {}
        progress = progress_bar(len(mine), self.task, Ranks().rank == 0 and len(batches) > 0)
        try:
            for number, batch in batches:
                check()
                chosen = rows.select(batch).to_list()
                answers = [known[row["id"]] for row in chosen if row["id"] in known]
                given, seed = answers if len(answers) == len(chosen) else None, self.decoding.seed + number
                reflected = ReflectionBatch(model, student.tokenizer, chosen, self.decoding, seed, given)
                store.append(score_batch(reflected, self.criteria))
                progress.update(len(batch))
        finally:
            progress.close()
            for criterion in self.criteria:
                criterion.finish()

    def _unscored(self, rows: Dataset, columns: Mapping[str, Floats]) -> list[tuple[int, RowNumbers]]:
        missing = np.any([np.isnan(values) for values in columns.values()], axis=0)
        batches = enumerate(fixed_batches(rows, self.tokens_per_batch, self.decoding))
        return [(number, batch) for number, batch in batches if missing[batch].any()]


def _same_in_all(made_of: Sequence[Mapping[str, str]]) -> Mapping[str, str]:
    first = made_of[0]
    for rank, other in enumerate(made_of):
        if different := [part for part in first if other[part] != first[part]]:
            raise SettingError(
                f"rank {rank} has another {', '.join(different)} than rank 0; load the same files in all, and "
                "call seed_everything before a model is made from a configuration"
            )
    return first


@contextmanager
def _placed(model: nn.Module, device: torch.device) -> Iterator[None]:
    home = next(model.parameters()).device
    model.to(device)
    try:
        yield
    finally:
        model.to(home)


@contextmanager
def pinned_threads(number: int, device: torch.device) -> Iterator[None]:
    """Compute with a fixed number of threads on a CPU."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fingerprint(
    rows: Dataset,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    template: object,
    decoding: Decoding,
    scoring_version: str,
) -> dict[str, str]:
    """Return a digest of each part that scores depend on.

    Args:
        rows: Tokenised rows; their order does not matter.
        model: The student, by the bytes of its weights; where it is sharded all ranks must ask.
        tokenizer: By its vocabulary.
        template: By its text.
        decoding: By its settings, and the tokens that end an answer.
        scoring_version: Of the code that scores.

    Returns:
        Digest by part.
    """
    settings = {**asdict(decoding), "continuous_batching": False}  # which earlier versions had: their scores are valid
    return {
        "rows": _sum_of_digests(rows),
        "student": gathered_digest(model),
        "tokenizer": vocabulary_digest(tokenizer),
        "template": bytes_digest([repr((template, getattr(tokenizer, "chat_template", None))).encode()]),
        "decoding": bytes_digest([repr((sorted(settings.items()), end_tokens(model, tokenizer))).encode()]),
        "scoring version": scoring_version,
    }


def _sum_of_digests(rows: Dataset) -> str:
    """Digest rows one by one: in any order they have the same sum, and none has to be kept."""
    total = 0
    columns = rows.select_columns(["id", "prompt", "response", "input_ids"]).with_format("arrow")
    for table in columns.iter(batch_size=1000):
        texts = zip(*(table[name].to_pylist() for name in ("id", "prompt", "response")), strict=True)
        for text, ids in zip(texts, table["input_ids"], strict=True):
            row = repr(text).encode() + ids.values.to_numpy().tobytes()
            total += int.from_bytes(hashlib.sha256(row).digest(), "big")
    return f"{total % 2**256:064x}"[:16]
