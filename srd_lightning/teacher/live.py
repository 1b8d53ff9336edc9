"""What the teacher says to a batch: computed now, or read from a cache of what it said before.

A teacher gives its logits a slice of the response tokens at a time, so that nobody ever holds all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from srd_lightning.data.layout import layout_of
from srd_lightning.distributed.fsdp2 import inside
from srd_lightning.losses.auxiliary import LAST
from srd_lightning.losses.base import FLOOR, upcast
from srd_lightning.losses.chunked import CHUNK
from srd_lightning.losses.head import Head
from srd_lightning.losses.pieces import Logits
from srd_lightning.losses.top_k import POWERS, TopKTeacher
from srd_lightning.models.calling import logits_of
from srd_lightning.models.split import BodyAndHead

Batch = Mapping[str, Tensor]


class Teacher(Protocol):
    """Says how likely it finds each token at the response positions of a batch."""

    def logits(self, batch: Batch, vocabulary: int | None) -> Logits:
        """Return what gives the logits of the first ``vocabulary`` tokens, or of all."""

    def logits_and_layers(
        self, batch: Batch, vocabulary: int | None, numbers: Collection[int]
    ) -> tuple[Logits, dict[int, Tensor]]:
        """Return them, and the hidden states of some layers; see `BodyAndHead.layers`."""


@dataclass(frozen=True)
class LiveTeacher:
    """A model that is run on every batch.

    Args:
        model: Frozen, in eval mode.
        parts: Its parts, if it could be taken apart; else all its logits are made.
    """

    model: nn.Module
    parts: BodyAndHead | None

    def logits(self, batch: Batch, vocabulary: int | None) -> Logits:
        """See `Teacher.logits`."""
        return self.logits_and_layers(batch, vocabulary, ())[0]

    @torch.no_grad()
    def logits_and_layers(
        self, batch: Batch, vocabulary: int | None, numbers: Collection[int]
    ) -> tuple[Logits, dict[int, Tensor]]:
        """Run the body, or the whole, which has no hidden states to give."""
        if self.parts is None:
            every = logits_of(self.model, batch).flatten(0, 1)
            logits = every.index_select(0, layout_of(batch).positions)[:, :vocabulary]
            return lambda tokens: logits[tokens], {}
        found = inside(self.model, functools.partial(self.parts.layers, batch, {LAST, *numbers}))
        return by_head(self.parts.head().narrow(vocabulary), found[LAST]), found  # sharded, it keeps its head at hand


def by_head(head: Head, hidden: Tensor) -> Logits:
    """Return what applies a head to a slice of hidden states, in their type or, if that is wider, the head's."""
    dtype = torch.promote_types(hidden.dtype, head.weight.dtype)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    head = head.to(dtype)
    return lambda tokens: head(hidden[tokens].to(dtype))


@dataclass(frozen=True)
class HiddenStates:
    """Keeps the final hidden states; exact, where they are kept in the type in which the teacher computes.

    Args:
        dtype: In which they are kept.
    """

    dtype: torch.dtype = torch.bfloat16

    @property
    def fields(self) -> dict[str, torch.dtype]:
        """Type of what is kept of each response token, by the name that it has in a batch."""
        return {"teacher_hidden": self.dtype}

    def bytes_per_token(self, width: int) -> int:
        """Return how much disk a response token takes, where hidden states are so wide."""
        return self.dtype.itemsize * width

    def observe(self, hidden: Tensor, head: Head) -> dict[str, Tensor]:
        """Return what to keep of hidden states ``[N, d]``, each ``[N, width]``."""
        return {"teacher_hidden": hidden.to(self.dtype)}

    def logits(self, kept: Batch, head: Head) -> Logits:
        """Return what makes logits of it."""
        return by_head(head, kept["teacher_hidden"])


@dataclass(frozen=True)
class TopK:
    """Keeps the likeliest tokens, and the mass of all others at several temperatures; see `TopKTeacher`.

    Args:
        k: How many tokens.
    """

    k: int = 64

    @property
    def fields(self) -> dict[str, torch.dtype]:
        """See `HiddenStates.fields`."""
        return {"teacher_logp": torch.float32, "teacher_ids": torch.int32, "teacher_rest": torch.float32}

    def bytes_per_token(self, width: int) -> int:
        """See `HiddenStates.bytes_per_token`."""
        return 4 * (2 * self.k + len(POWERS))

    def observe(self, hidden: Tensor, head: Head) -> dict[str, Tensor]:
        """See `HiddenStates.observe`."""
        found = [self._observe(head(some)) for some in torch.split(hidden, CHUNK)]
        return {name: torch.cat(values) for name, values in zip(self.fields, zip(*found, strict=True), strict=True)}

    def _observe(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logp = upcast(logits).log_softmax(-1)
        best = logp.topk(min(self.k, logp.shape[1]))
        others = logp.scatter(1, best.indices, -torch.inf)
        rest = torch.stack([(others * power).logsumexp(-1) for power in POWERS], dim=1)
        return best.values.float(), best.indices.int(), rest.clamp(min=FLOOR).float()

    def logits(self, kept: Batch, head: Head) -> Logits:
        """See `HiddenStates.logits`; the head is not needed."""
        logp, ids, rest = kept["teacher_logp"], kept["teacher_ids"].long(), kept["teacher_rest"]
        return lambda tokens: TopKTeacher(logp[tokens], ids[tokens], rest[tokens])


@dataclass(frozen=True)
class CachedTeacher:
    """What batches bring along of a teacher that need not be there.

    Args:
        kind: What was kept.
        head: Of the teacher.
    """

    kind: HiddenStates | TopK
    head: Head

    def to(self, target: torch.device | torch.dtype) -> CachedTeacher:
        """Return it on a device, or with its head in a type."""
        return CachedTeacher(self.kind, self.head.to(target))

    def logits(self, batch: Batch, vocabulary: int | None) -> Logits:
        """See `Teacher.logits`."""
        return self.logits_and_layers(batch, vocabulary, ())[0]

    def logits_and_layers(
        self, batch: Batch, vocabulary: int | None, numbers: Collection[int]
    ) -> tuple[Logits, dict[int, Tensor]]:
        """Take what the batch brings along of its tokens, ``[N, width]`` each; of layers there is at most the last."""
        tokens = cast(Tensor, layout_of(batch).tokens)
        kept = {name: batch[name].index_select(0, tokens) for name in self.kind.fields}
        layers = {LAST: kept["teacher_hidden"]} if "teacher_hidden" in kept else {}
        return self.kind.logits(kept, self.head.narrow(vocabulary)), layers
