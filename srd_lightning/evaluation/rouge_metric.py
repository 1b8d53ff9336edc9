"""`RougeL`: ROUGE-L as a metric of torchmetrics, for any LightningModule."""

from __future__ import annotations

from collections.abc import Sequence

from srd_lightning.evaluation.text_metrics import rouge_l
from srd_lightning.evaluation.weighted_mean import WeightedMean


class RougeL(WeightedMean):
    """Mean ROUGE-L F1 of answers, in [0, 1], over all batches and ranks; of each pair what `rouge_l` returns.

    Log the metric itself, ``self.log("val_rouge_l", self.rouge_l)``, and Lightning resets it every epoch and adds up
    the ranks.

    Example:
        >>> metric = RougeL()
        >>> metric.update(["testing one two", "no"], ["testing one two", "yes"])
        >>> metric.update("testing", "testing one two")
        >>> metric.compute()
        tensor(0.5000)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def update(self, preds: str | Sequence[str], target: str | Sequence[str]) -> None:  # type: ignore[override]
        """Add some answers.

        Args:
            preds: One answer, or one per row, ``[B]``.
            target: The reference response of each, ``[B]``.

        Raises:
            ValueError: There are not as many of both.
        """
        answers = [preds] if isinstance(preds, str) else preds
        references = [target] if isinstance(target, str) else target
        scores = [rouge_l(*pair) for pair in zip(references, answers, strict=True)]
        super().update(sum(scores) / max(len(scores), 1), len(scores))
