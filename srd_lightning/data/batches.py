"""Tokenised rows become a batch; and what a batch must be, from here or from elsewhere.

It has what Hugging Face models take: ``input_ids``, ``attention_mask`` and unshifted ``labels``, -100 where no token of
the response stands.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from srd_lightning.errors import DataError
from srd_lightning.losses.base import IGNORE_INDEX

FIELDS = ("input_ids", "attention_mask", "labels")
MUST_HAVE = "a batch must be a mapping with input_ids, attention_mask and labels, integers of one shape [rows, tokens]"


def check_batch(batch: Any, vocabulary: int | None = None, name: str = "batch") -> Mapping[str, Tensor]:
    """Return a batch that is what models and losses take it for.

    Args:
        batch: ``input_ids``; ``attention_mask``, 1 at tokens and 0 at padding; ``labels``, unshifted: at each position
            its own token, or -100 where nothing is learnt. ``[B, T]`` each; what else is in it is left alone.
        vocabulary: Token ids that the model knows, if that is known.
        name: Of the batch, for the message.

    Raises:
        DataError: It is not; says what is missing or wrong, and how it must be.

    Example:
        >>> import torch
        >>> ids = torch.tensor([[5, 6, 7]])
        >>> check_batch({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}, 8)["labels"]
        tensor([[5, 6, 7]])
    """
    if problem := problem_of(batch, vocabulary):
        raise DataError(f"{name}: {problem}")
    return batch  # type: ignore[no-any-return]


def problem_of(batch: Any, vocabulary: int | None = None) -> str | None:
    """Return why something is no batch, if it is none; see `check_batch`."""
    return _wrong_fields(batch) or _wrong_values(batch, vocabulary)


def _wrong_fields(batch: Any) -> str | None:
    if not isinstance(batch, Mapping):
        return f"{MUST_HAVE}, but is a {type(batch).__name__}; let the collate function return a dict"
    if missing := [field for field in FIELDS if field not in batch]:
        hint = "; without padding it is torch.ones_like(input_ids)" if missing == ["attention_mask"] else ""
        return f"{MUST_HAVE}, but has no {' and no '.join(missing)}, only {', '.join(map(str, batch))}{hint}"
    for field in FIELDS:
        values = batch[field]
        if not isinstance(values, Tensor) or values.is_floating_point() or values.ndim != 2:
            found = f"{values.dtype} {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            return f"{MUST_HAVE}, but {field} is {found}"
    shapes = {field: tuple(batch[field].shape) for field in FIELDS}
    if len(set(shapes.values())) > 1:
        return f"{MUST_HAVE}, but {', '.join(f'{field} is {list(shape)}' for field, shape in shapes.items())}"
    return None


def _wrong_values(batch: Mapping[str, Tensor], vocabulary: int | None) -> str | None:
    input_ids, mask, labels = (batch[field].cpu() for field in FIELDS)
    if not bool(((mask == 0) | (mask == 1)).all()):
        return "attention_mask must be 1 at tokens and 0 at padding, but holds other numbers"
    learnt = labels != IGNORE_INDEX
    for field, ids in (("input_ids", input_ids[mask == 1]), ("labels", labels[learnt])):
        wrong = ids < 0 if vocabulary is None else (ids < 0) | (ids >= vocabulary)
        if bool(wrong.any()):
            known = "ids are 0 or more" if vocabulary is None else f"the model knows 0 to {vocabulary - 1}"
            masks = ", and -100 marks what is not learnt" if field == "labels" else ""
            return f"{field} holds {int(ids[wrong][0])}, which is no token: {known}{masks}"
    if _are_shifted(input_ids, labels, learnt):
        return (
            "labels are shifted already: each is the token after its position; give the token at its position, as "
            "Hugging Face's models take it, for the shift is made here"
        )
    return None


def _are_shifted(input_ids: Tensor, labels: Tensor, learnt: Tensor) -> bool:
    """Return whether labels are the tokens after their positions, and not those at them."""
    inner = learnt[:, :-1]
    if int(inner.sum()) < 2:
        return False
    next_ones = bool((labels[:, :-1] == input_ids[:, 1:])[inner].all())
    return next_ones and not bool((labels == input_ids)[learnt].all())


def collate(rows: Sequence[Mapping[str, Any]], pad_token_id: int, pad_to_multiple_of: int = 1) -> dict[str, Tensor]:
    """Pad rows on the right to a batch.

    Args:
        rows: Tokenised rows.
        pad_token_id: Fills up; masked, so any id will do.
        pad_to_multiple_of: T is the length of the longest row, rounded up to a multiple of this.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, each ``[B, T]``, int64.

    Example:
        >>> rows = [{"input_ids": [5, 6, 7], "prompt_length": 1}, {"input_ids": [5, 8], "prompt_length": 1}]
        >>> collate(rows, pad_token_id=0)["labels"]
        tensor([[-100,    6,    7],
                [-100,    8, -100]])
    """
    longest = max(len(row["input_ids"]) for row in rows)
    shape = (len(rows), math.ceil(longest / pad_to_multiple_of) * pad_to_multiple_of)
    input_ids = torch.full(shape, pad_token_id)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE_INDEX)
    for position, row in enumerate(rows):
        ids = torch.tensor(row["input_ids"])
        input_ids[position, : len(ids)] = ids
        attention_mask[position, : len(ids)] = 1
        labels[position, row["prompt_length"] : len(ids)] = ids[row["prompt_length"] :]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def prompts_and_responses(batch: Mapping[str, Tensor]) -> list[tuple[list[int], list[int]]]:
    """Return the tokens of each row of a batch without padding: those before the first label, and the labels.

    Example:
        >>> rows = [{"input_ids": [5, 6, 7], "prompt_length": 1}, {"input_ids": [5, 8], "prompt_length": 1}]
        >>> prompts_and_responses(collate(rows, pad_token_id=0))
        [([5], [6, 7]), ([5], [8])]
    """
    return [_split_row(*row) for row in zip(*(batch[name].tolist() for name in FIELDS), strict=True)]


def _split_row(input_ids: list[int], attention_mask: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
    """Return prompt and response: what stands before the first label, and the labels."""
    first = next((position for position, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))
    prompt = [token for token, real in zip(input_ids[:first], attention_mask[:first], strict=True) if real]
    return prompt, [label for label in labels if label != IGNORE_INDEX]
