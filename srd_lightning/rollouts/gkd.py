"""GKD: some batches are answered by the student as it is now, and it learns from the teacher what it should have said.

Agarwal et al., *On-Policy Distillation of Language Models*, arXiv 2306.13649, algorithm 1.
"""

from __future__ import annotations

from srd_lightning.models.generation import Decoding
from srd_lightning.rollouts.base import SAMPLED, Engine, Models, Moment, Rollouts, Text, check_decoding, check_share


class GKD(Rollouts):
    """On a share of the batches the responses are written by the student now, and distilled as they are.

    The sample is trained on at once, never by way of a buffer, and no gradient flows through the sampling. The loss is
    that of the module: the paper's is `JensenShannon`.

    Args:
        share: Probability that a batch is the student's own; 1 is purely on-policy.
        decoding: How it writes; its seed also decides which batches are its own.
        engine: Who writes; by default the student.

    Raises:
        SettingError: The share is outside [0, 1], or the decoding copies the student or needs reference responses.

    Example:
        >>> GKD(share=0.25).share
        0.25
    """

    def __init__(self, share: float = 0.5, decoding: Decoding = SAMPLED, engine: Engine | None = None) -> None:
        self.share = check_share("share", share)
        self.decoding = check_decoding(decoding)
        self.engine = engine

    def is_own(self, moment: Moment) -> bool:
        """Return whether the batch is the student's own."""
        return moment.draw(self.decoding.seed) < self.share

    def texts(self, rows: list[Text], models: Models) -> list[Text]:
        """Write responses now."""
        return models.answer(rows, self.decoding, self.engine)
