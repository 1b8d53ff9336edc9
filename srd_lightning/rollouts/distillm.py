"""DistiLLM: the share of the student's own text grows when validation gets worse, and texts are used again.

Ko et al., *DistiLLM: Towards Streamlined Distillation for Large Language Models*, arXiv 2402.03898: its adaptive
off-policy approach.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from srd_lightning.distributed.process_group import Ranks
from srd_lightning.errors import SettingError
from srd_lightning.models.generation import Decoding
from srd_lightning.protocols import ShapesBatches
from srd_lightning.rollouts.base import SAMPLED, Engine, Models, Moment, Rollouts, Text, check_decoding, check_share

ReplayRatio = Literal["decreasing", "increasing", "constant"]


class DistiLLM(Rollouts):
    r"""With probability phi a batch is the student's own: written now, or drawn from what it wrote before.

    phi rises by ``rise``, up to 1, at the end of each validation whose loss is at least the previous one's plus
    ``tolerance``. Of u, drawn uniformly, follows what a batch is: written now and kept where :math:`u < s`, or
    :math:`u < \phi` as long as the buffer is not full; drawn from the buffer where :math:`s \le u < \phi`; as it came
    where :math:`u \ge \phi`. With t, the share of the planned steps that was made, s is :math:`\phi (1 - t)`
    (``decreasing``), :math:`\phi t` (``increasing``) or :math:`\phi / 2` (``constant``). The loss is that of the
    module: the paper's are `SkewForwardKL` and `SkewReverseKL`.

    Args:
        share: phi at first.
        rise: What is added to it.
        tolerance: How much the loss may rise without that.
        replay_ratio: How the share of texts that are written anew changes.
        capacity: Texts that each rank keeps, at least a batch; the oldest make room.
        monitor: Name of the validation loss.
        decoding: How the student writes; its seed also decides what a batch is.
        engine: Who writes; by default the student.

    Raises:
        SettingError: A setting is out of range.

    Example:
        >>> distillm = DistiLLM(share=0.2)
        >>> for loss in (2.0, 2.05, 2.3):
        ...     distillm.validated({"val_nll": loss})
        >>> round(distillm.phi, 1)
        0.3
    """

    def __init__(
        self,
        share: float = 0.0,
        rise: float = 0.1,
        tolerance: float = 0.1,
        replay_ratio: ReplayRatio = "decreasing",
        capacity: int = 1000,
        monitor: str = "val_nll",
        decoding: Decoding = SAMPLED,
        engine: Engine | None = None,
    ) -> None:
        self.share = check_share("share", share)
        self.rise = check_share("rise", rise)
        if replay_ratio not in get_args(ReplayRatio):
            raise SettingError(f"replay_ratio must be decreasing, increasing or constant, but is {replay_ratio!r}")
        if not isinstance(capacity, int) or capacity < 1:
            raise SettingError(f"capacity must be a whole number of at least 1, but is {capacity!r}")
        self.tolerance = tolerance
        self.replay_ratio = replay_ratio
        self.capacity = capacity
        self.monitor = monitor
        self.decoding = check_decoding(decoding)
        self.engine = engine
        self._begin()

    def _begin(self) -> None:
        self.phi = self.share
        """Share of the batches that are the student's own, as it is now."""
        self.kept: deque[Text] = deque(maxlen=self.capacity)
        """Texts of this rank, the oldest first."""
        self._full = False
        self._last_loss: float | None = None

    def check(self, module: Any, trainer: Any, data: object) -> None:
        """Refuse a run without end, whose steps cannot be planned, one without validation, and too small a buffer.

        Raises:
            SettingError: It is one.
        """
        if trainer.max_epochs in (None, -1) and trainer.max_steps < 0 and self.replay_ratio != "constant":
            raise SettingError(
                f"replay_ratio {self.replay_ratio} needs the length of the run: set max_epochs or max_steps of the "
                "trainer, or replay_ratio to constant"
            )
        if trainer.limit_val_batches == 0:
            self.started(validates=False)
        if isinstance(data, ShapesBatches):
            self._check_capacity(data.rows_per_batch())

    def _check_capacity(self, rows: int) -> None:
        if rows > self.capacity:
            raise SettingError(
                f"DistiLLM draws batches of {rows} rows from the texts that it keeps, but capacity is {self.capacity}; "
                "raise it to that at least, or lower batch_size"
            )

    def started(self, validates: bool) -> None:
        """Refuse to go on without validation.

        Raises:
            SettingError: There is none, so the share would stay.
        """
        if self.rise and not validates:
            raise SettingError(
                "DistiLLM raises its share when the validation loss rises, but nothing is validated; give validation "
                "data, and a limit_val_batches above 0, or set rise to 0 and share to what it shall stay"
            )

    def begin(self, data: object) -> None:
        """Begin with an empty buffer."""
        self._begin()

    def is_own(self, moment: Moment) -> bool:
        """Return whether the batch is the student's own."""
        return moment.draw(self.decoding.seed) < self.phi

    def texts(self, rows: list[Text], models: Models) -> list[Text]:
        """Write responses now, and keep them; or draw texts from those that were kept."""
        moment = models.moment
        self._check_capacity(len(rows))
        if self._full and moment.draw(self.decoding.seed) >= self._share_written(moment):
            chance = random.Random(moment.seed(self.decoding.seed))
            return chance.sample(list(self.kept), len(rows))
        written = models.answer(rows, self.decoding, self.engine)
        self.kept.extend(text for text in written if text.response)
        if not self._full:  # ranks may keep unlike numbers, and must agree what to do
            self._full = all(Ranks().all_results(lambda: len(self.kept) == self.capacity))
        return written

    def _share_written(self, moment: Moment) -> float:
        if self.replay_ratio == "constant":
            return self.phi / 2
        made = moment.progress()
        return self.phi * (made if self.replay_ratio == "increasing" else 1 - made)

    def validated(self, measures: dict[str, Any]) -> None:
        """Raise the share where the loss has risen since the validation before.

        Raises:
            SettingError: What is monitored was not measured.
        """
        if self.monitor not in measures:
            raise SettingError(
                f"DistiLLM monitors {self.monitor}, which validation does not log, only {', '.join(measures)}; set "
                "monitor to one of these"
            )
        loss, last = float(measures[self.monitor]), self._last_loss
        self._last_loss = loss
        if last is not None and loss >= last + self.tolerance and self.phi < 1:
            self.phi = min(self.phi + self.rise, 1.0)
            rank_zero_info(
                f"{self.monitor} rose from {last:.4f} to {loss:.4f}: own text is {self.phi:.0%} of the batches"
            )

    def measures(self) -> dict[str, float]:
        """Return the share, and how full the buffer of this rank is."""
        return {"rollouts/share": self.phi, "rollouts/kept": float(len(self.kept))}

    def state(self) -> dict[str, Any]:
        """Return share, last loss and buffer."""
        return {"phi": self.phi, "last_loss": self._last_loss, "kept": _pack(self.kept)}

    def load(self, states: list[dict[str, Any]], rank: int, size: int) -> None:
        """Go on with them; on another number of ranks the texts of all are dealt anew, the newest last."""
        self.phi, self._last_loss = states[0]["phi"], states[0]["last_loss"]
        buffers = [_unpack(state["kept"]) for state in states]
        if len(buffers) != size:
            buffers = [texts[-self.capacity :] for texts in deal(buffers, size)]
        self.kept.extend(buffers[rank])
        self._full = all(len(texts) >= self.capacity for texts in buffers)


def deal(buffers: Sequence[Sequence[Text]], size: int) -> list[list[Text]]:
    """Deal the texts of some ranks to others, the newest last.

    Args:
        buffers: Of each rank, the oldest text first.
        size: Ranks that there are now.

    Example:
        >>> first, second = [Text([1], [2]), Text([3], [4])], [Text([5], [6])]
        >>> deal([first, second], 1)
        [[Text(prompt=[1], response=[2]), Text(prompt=[3], response=[4]), Text(prompt=[5], response=[6])]]
    """
    longest = max(map(len, buffers))
    ages = [[*[None] * (longest - len(texts)), *texts] for texts in buffers]  # aligned at the newest
    in_order = [text for texts in zip(*ages, strict=True) for text in texts if text is not None]
    return [in_order[rank::size] for rank in range(size)]


def _pack(texts: Iterable[Text]) -> dict[str, Tensor]:
    """Return texts as two tensors: tokens one after the other, and lengths ``[N, 2]``."""
    kept = list(texts)
    tokens = [token for text in kept for part in text for token in part]
    lengths = [[len(part) for part in text] for text in kept]
    return {
        "tokens": torch.tensor(tokens, dtype=torch.int32),
        "lengths": torch.tensor(lengths, dtype=torch.int32).view(-1, 2),
    }


def _unpack(packed: dict[str, Tensor]) -> list[Text]:
    parts = [part.tolist() for part in torch.split(packed["tokens"], packed["lengths"].flatten().tolist())]
    return [Text(prompt, response) for prompt, response in zip(parts[::2], parts[1::2], strict=True)]
