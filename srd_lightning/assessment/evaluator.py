"""`Evaluator`: a model answers rows, greedily and sampling, and is measured on them beside its teacher.

Each kind of answer is a reflection (`curation.reflection`) with measures for criteria: fixed batches are dealt to the
ranks and kept on disk by row id as soon as they are done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset
from torch import nn

from srd_lightning.assessment.measures import AnswerTokens, Predictions
from srd_lightning.assessment.protocol import EvaluationProtocol
from srd_lightning.criteria.base import CUT, Criterion
from srd_lightning.criteria.standard import RougeL
from srd_lightning.curation.reflection import Reflector
from srd_lightning.curation.student_source import ReflectingStudent
from srd_lightning.data.tokenization import ids_of
from srd_lightning.digests import digest, weights_digest
from srd_lightning.evaluation.calibration import Floats
from srd_lightning.models.pretrained import Pretrained


class Answers(NamedTuple):
    """The answers of one seed to all rows.

    Args:
        columns: What was measured, ``[N]`` by name.
        texts: By row id.
    """

    columns: Mapping[str, Floats]
    texts: Mapping[str, str]


class Evaluated(NamedTuple):
    """Rows with what was measured on them.

    Args:
        rows: Tokenised, ``[N]``.
        answers: By seed; ``None`` is the greedy answer, which has the columns of the reference response too.
        made_of: Digests of what all of it depends on, by part.
    """

    rows: Dataset
    answers: Mapping[int | None, Answers]
    made_of: Mapping[str, str]


@dataclass(frozen=True)
class Evaluator:
    """Lets a model answer rows, on all ranks, and measures it.

    Args:
        protocol: How it answers.
        tokens_per_batch: See `fixed_batches`.
        threads: Of a CPU.
        teacher: Beside which it is measured, if there is one; whole on each rank.
        vocabulary: Says how many tokens the two share, or nothing where all are.
    """

    protocol: EvaluationProtocol
    tokens_per_batch: int
    threads: int
    teacher: Pretrained | nn.Module | None = None
    vocabulary: Callable[[nn.Module], int | None] = lambda _: None

    def evaluate(
        self, rows: Dataset, model: nn.Module, student: ReflectingStudent, kept: Path, name: str = "rows"
    ) -> Evaluated:
        """Measure what has not been measured yet.

        What is sampled is a function of the seed and of the batch in which a row is answered, hence of the rows and
        ``tokens_per_batch``, and not of the ranks.

        Args:
            rows: Tokenised rows, whose responses are the references.
            model: That is measured.
            student: By which tokenizer and template it answers, and where.
            kept: Folder in which batches are kept, in one folder for each thing that they depend on.
            name: Of the rows, for the progress bar.

        Returns:
            The same on all ranks.

        Raises:
            StorageError: The folder cannot be written, or another run has it.
            RankError: Another rank has failed.
        """
        found: dict[int | None, Answers] = {}
        made_of: dict[str, str] = {}
        for seed, decoding in self.protocol.decodings().items():
            measures: list[Criterion] = [RougeL(), AnswerTokens()]
            task = f"{name}: {'greedy answers' if seed is None else f'answers with seed {seed}'}"
            own = {"sampling": repr(sorted(asdict(decoding).items())), "batches": f"of {self.tokens_per_batch} tokens"}
            if seed is None:
                measures += Predictions(self.teacher, self.vocabulary).criteria()
                own = {"teacher": self._teacher_digest()}
            reflector = Reflector(measures, decoding, self.tokens_per_batch, self.threads, task)
            made_of = made_of or dict(reflector.fingerprint(rows, model, student))
            of_these = {**made_of, **own}
            scores = reflector.scores(rows, model, student, kept / digest(of_these), of_these)
            ids = ids_of(rows)
            found[seed] = Answers({**scores.columns, CUT: scores.cut(ids)}, scores.answers(ids))
        return Evaluated(rows, found, made_of)

    def _teacher_digest(self) -> str:
        if self.teacher is None:
            return "none"
        return self.teacher.digest() if isinstance(self.teacher, Pretrained) else weights_digest(self.teacher)
