"""Where the tokens of the response stand in a batch, and how it is cut into parts, settled before it leaves the host.

A mask of a tensor on a GPU, its length or whether any of it is true are things for which the host must wait until all
work before them is done. Positions are not, so a step that is given them runs ahead of the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from srd_lightning.data.batches import FIELDS, fields_of, is_of_encoder_decoder
from srd_lightning.losses.base import IGNORE_INDEX, response_mask

FIRST = "first_token"
"""Name of ``[B]`` in a batch that brings along something of its tokens, ``[M, width]``, without padding: where there
that of the first token of each row stands, or would stand. So what was laid out may be more than is learnt."""
COST_OF_PART = 256
"""What a part costs besides its positions, in positions: each makes and adds up all gradients."""


class Packed(NamedTuple):
    """The tokens of a batch behind each other, without its padding.

    Args:
        tokens: Where the M tokens stand in the batch, ``[M]``, as positions in ``[B * T]``.
        position_ids: Place of each in its row, ``[M]``.
        positions: Which of the M predict the response, ``[N]``.
    """

    tokens: Tensor
    position_ids: Tensor
    positions: Tensor


class Layout(NamedTuple):
    """What a step must know of a batch to compute it without asking the device.

    Args:
        positions: Where the N tokens of the response are predicted, ``[N]``, as positions in ``[B * T]``.
        targets: These tokens, ``[N]``.
        right_padded: Whether no token stands behind padding.
        packed: The batch without padding, where that is wanted.
        tokens: Where what the batch brings along of these tokens stands among all that it brings along, ``[N]``; see
            `FIRST`.
        parts: In which the batch is to be taken, longest rows first; without, it is taken whole.
        rows: How many of the N each row has, numbers of the host.
    """

    positions: Tensor
    targets: Tensor
    right_padded: bool
    packed: Packed | None = None
    tokens: Tensor | None = None
    parts: tuple[Part, ...] = ()
    rows: tuple[int, ...] = ()

    def to(self, device: torch.device) -> Layout:
        """Return it on a device, where it goes in one copy, for which the host does not wait."""
        if device == self.positions.device:
            return self
        found: list[Tensor] = []
        _each(self, found.append)
        whole = torch.cat(found)
        whole = (whole.pin_memory() if device.type == "cuda" else whole).to(device, non_blocking=True)
        moved = iter(torch.split(whole, [len(values) for values in found]))
        layout: Layout = _each(self, lambda _: next(moved))
        return layout


class Part(NamedTuple):
    """Some rows of a batch, trimmed to their longest.

    Args:
        rows: Which, ``[b]``.
        width: Positions of the longest.
        layout: Of them alone.
    """

    rows: Tensor
    width: int
    layout: Layout


class LaidOut(dict[str, Any]):
    """A batch whose layout is known; to a model, ``model(**batch)``, it is the batch.

    Args:
        fields: See `check_batch`; and what is cached of the teacher.
        layout: Of these fields, on their device.
    """

    def __init__(self, fields: Mapping[str, Any], layout: Layout) -> None:
        super().__init__(fields)
        self.layout = layout

    def without_columns(self) -> LaidOut:
        """Return its fields alone: what is cached of the teacher is large."""
        return LaidOut({name: self[name] for name in fields_of(self)}, self.layout)

    def parts(self) -> list[LaidOut]:
        """Return the parts in which it is to be taken, or nothing but itself; what is no field stays whole."""
        return [
            LaidOut({**self, **{name: self[name].index_select(0, rows)[:, :width] for name in FIELDS}}, layout)
            for rows, width, layout in self.layout.parts
        ] or [self]


@dataclass(frozen=True)
class Inspected:
    """The layout of a batch that was looked at before it moved, for as long as nobody changes it there.

    Args:
        layout: On its device.
        tensors: Its fields.
        versions: How often each had been changed in place.
    """

    layout: Layout
    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]

    @classmethod
    def of(cls, moved: Mapping[str, Tensor], layout: Layout) -> Inspected:
        """Return it, once it is known where the batch is.

        Args:
            moved: The batch on its device.
            layout: Made on the host.
        """
        tensors = tuple(moved[name] for name in fields_of(moved))
        return cls(layout.to(tensors[0].device), tensors, tuple(map(_version, tensors)))

    def is_of(self, batch: Any) -> bool:
        """Return whether a batch has these very fields, unchanged; the mapping may be another."""
        if not isinstance(batch, Mapping) or len(fields := fields_of(batch)) != len(self.tensors):
            return False
        known = zip(fields, self.tensors, self.versions, strict=True)
        return all(batch.get(name) is tensor and _version(tensor) == version for name, tensor, version in known)


def lay_out(batch: Mapping[str, Tensor], packing: bool = False, max_tokens: int | None = None) -> Layout:
    """Look where what stands in a batch.

    Args:
        batch: See `check_batch`; on a GPU, to look makes the host wait. Positions are those of ``labels``.
        packing: Also say where the tokens stand without padding; not of an encoder-decoder, nor are there parts.
        max_tokens: Most rows times longest row of a part; a single longer row is a part of its own. By default the
            batch is taken whole.

    Example:
        >>> ids = torch.tensor([[5, 6, 7], [5, 8, 0]])
        >>> batch = {"input_ids": ids, "attention_mask": ids.sign(), "labels": ids.where(ids > 5, -100)}
        >>> batch["labels"][1, 2] = -100
        >>> layout = lay_out(batch)
        >>> layout.positions.tolist(), layout.targets.tolist(), layout.right_padded
        ([0, 1, 3], [6, 7, 8], True)
    """
    mask, (predicts, ahead) = batch["attention_mask"], predicting(batch)
    positions = predicts.flatten().nonzero()[:, 0]
    targets = batch["labels"].flatten()[positions + ahead].long()
    tokens = (batch[FIRST][:, None] + _tokens_before(batch)).flatten()[positions] if FIRST in batch else None
    packed, rows = _packed(mask, predicts) if packing else None, tuple(predicts.sum(1).tolist())
    parts = () if max_tokens is None else _parts(batch, packing, max_tokens)
    return Layout(positions, targets, pads_right(mask), packed, tokens, parts, rows)


def predicting(batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """Return which positions predict a token of the response, and how far ahead of each its label stands.

    A decoder is given the labels themselves, and says at each position which token comes next. The decoder of an
    encoder-decoder is given them one place later, and says which token stands there.

    Args:
        batch: See `check_batch`.

    Returns:
        A mask of the positions of ``labels``, ``[B, T]``, and 1 or 0.
    """
    labels = batch["labels"]
    if is_of_encoder_decoder(batch):
        return labels != IGNORE_INDEX, 0
    return torch.nn.functional.pad(response_mask(labels), (0, 1), value=False), 1


def _tokens_before(batch: Mapping[str, Tensor]) -> Tensor:
    """Return how many tokens of its row, prompt included, stand before the token that each position predicts."""
    mask = batch["attention_mask"]
    if is_of_encoder_decoder(batch):
        return mask.sum(1, keepdim=True) + torch.arange(batch["labels"].shape[1], device=mask.device)
    return mask.cumsum(1)


def layout_of(batch: Mapping[str, Tensor], packing: bool = False) -> Layout:
    """Return the layout of a batch: that which it brings along, else one that is made now."""
    return batch.layout if isinstance(batch, LaidOut) else lay_out(batch, packing)


def pads_right(attention_mask: Tensor) -> bool:
    """Return whether no token of ``[B, T]`` stands behind padding.

    Example:
        >>> pads_right(torch.tensor([[1, 1, 0]])), pads_right(torch.tensor([[0, 1, 1]]))
        (True, False)
    """
    return bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all())


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _packed(mask: Tensor, predicts: Tensor) -> Packed:
    real = mask.bool()
    return Packed(real.flatten().nonzero()[:, 0], (mask.cumsum(1) - 1)[real], predicts[real].nonzero()[:, 0])


def _parts(batch: Mapping[str, Tensor], packing: bool, max_tokens: int) -> tuple[Part, ...]:
    """Return parts of rows of similar length, longest rows first; no row is lost."""
    mask = batch["attention_mask"]
    ends = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1).tolist()
    order = sorted(range(len(ends)), key=lambda row: -ends[row])
    cuts = _cuts([ends[row] for row in order], max_tokens)
    fields = [name for name in (*FIELDS, FIRST) if name in batch]
    parts = []
    for first, last in itertools.pairwise(cuts):
        rows, width = torch.tensor(order[first:last], device=mask.device), ends[order[first]]
        some = {name: batch[name][rows] for name in fields}
        trimmed = {name: values[:, :width] if values.ndim == 2 else values for name, values in some.items()}
        parts.append(Part(rows, width, lay_out(trimmed, packing)))
    return tuple(parts)


def _cuts(lengths: Sequence[int], max_tokens: int) -> list[int]:
    """Return where to cut rows, longest first, so that positions and parts cost least; both ends included."""
    best: list[tuple[float, int]] = [(0.0, 0)]  # of the first so many rows: the least cost, and the last cut before
    for last in range(1, len(lengths) + 1):
        choices = [
            (best[first][0] + (last - first) * lengths[first] + COST_OF_PART, first)
            for first in range(last)
            if (last - first) * lengths[first] <= max_tokens or last - first == 1
        ]
        best.append(min(choices))
    cuts = [len(lengths)]
    while cuts[-1]:
        cuts.append(best[cuts[-1]][1])
    return cuts[::-1]


def _each(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Return a layout, or a part of one, with something else in the place of each tensor."""
    if isinstance(value, Tensor):
        return change(value)
    if not isinstance(value, tuple):
        return value
    changed = [_each(part, change) for part in value]
    return type(value)(*changed) if isinstance(value, (Layout, Packed, Part)) else tuple(changed)
