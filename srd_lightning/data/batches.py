"""Tokenised rows become a batch; and what a batch must be, from here or from elsewhere.

It has what Hugging Face models take: ``input_ids``, ``attention_mask`` and unshifted ``labels``, -100 where no token of
the response stands. That of an encoder-decoder also has ``decoder_input_ids``, by which it is known: its labels are the
response alone, and the decoder is given these, shifted.
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
DECODER_INPUT = "decoder_input_ids"
"""Field that the batches of encoder-decoders have besides."""
MUST_HAVE = "a batch must be a mapping with input_ids, attention_mask and labels, integers of one shape [rows, tokens]"
MUST_HAVE_TWO = (
    "a batch of an encoder-decoder must be a mapping with input_ids and attention_mask, integers of one shape [rows, "
    "tokens of prompts], and labels and decoder_input_ids, of one shape [rows, tokens of responses]"
)


def is_of_encoder_decoder(batch: Mapping[str, Any]) -> bool:
    """Return whether a batch is one of an encoder-decoder."""
    return DECODER_INPUT in batch


def fields_of(batch: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the fields of a batch, by its form."""
    return (*FIELDS, DECODER_INPUT) if is_of_encoder_decoder(batch) else FIELDS


def check_batch(
    batch: Any, vocabulary: int | None = None, name: str = "batch", encoder_decoder: bool = False
) -> Mapping[str, Tensor]:
    """Return a batch that is what models and losses take it for.

    Args:
        batch: ``input_ids``; ``attention_mask``, 1 at tokens and 0 at padding; ``labels``, unshifted: at each position
            its own token, or -100 where nothing is learnt. ``[B, T]`` each; what else is in it is left alone.
        vocabulary: Token ids that the model knows, if that is known.
        name: Of the batch, for the message.
        encoder_decoder: Whether it is for one: then ``labels`` and ``decoder_input_ids`` are ``[B, U]``.

    Raises:
        DataError: It is not; says what is missing or wrong, and how it must be.

    Example:
        >>> import torch
        >>> ids = torch.tensor([[5, 6, 7]])
        >>> check_batch({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}, 8)["labels"]
        tensor([[5, 6, 7]])
    """
    if problem := problem_of(batch, vocabulary, encoder_decoder):
        raise DataError(f"{name}: {problem}")
    return batch  # type: ignore[no-any-return]


def problem_of(batch: Any, vocabulary: int | None = None, encoder_decoder: bool = False) -> str | None:
    """Return why something is no batch, if it is none; see `check_batch`."""
    return _wrong_fields(batch, encoder_decoder) or _wrong_values(batch, vocabulary)


def _wrong_fields(batch: Any, encoder_decoder: bool) -> str | None:
    must_have, fields = (MUST_HAVE_TWO, (*FIELDS, DECODER_INPUT)) if encoder_decoder else (MUST_HAVE, FIELDS)
    if not isinstance(batch, Mapping):
        return f"{must_have}, but is a {type(batch).__name__}; let the collate function return a dict"
    if missing := [field for field in fields if field not in batch]:
        return f"{must_have}, but has no {' and no '.join(missing)}, only {', '.join(map(str, batch))}{_hint(missing)}"
    if not encoder_decoder and is_of_encoder_decoder(batch):
        return f"{must_have}, but has decoder_input_ids, which only an encoder-decoder takes; the student is a decoder"
    for field in fields:
        values = batch[field]
        if not isinstance(values, Tensor) or values.is_floating_point() or values.ndim != 2:
            found = f"{values.dtype} {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            return f"{must_have}, but {field} is {found}"
    shapes = {field: tuple(batch[field].shape) for field in fields}
    texts = (fields[:2], fields[2:]) if encoder_decoder else (fields,)
    unlike = any(len({shapes[field] for field in text}) > 1 for text in texts)
    if unlike or len({rows for rows, _ in shapes.values()}) > 1:
        return f"{must_have}, but {', '.join(f'{field} is {list(shape)}' for field, shape in shapes.items())}"
    return None


def _hint(missing: Sequence[str]) -> str:
    if missing == ["attention_mask"]:
        return "; without padding it is torch.ones_like(input_ids)"
    if missing == [DECODER_INPUT]:
        return "; transformers' DataCollatorForSeq2Seq(tokenizer, model=model) makes it of the labels"
    return ""


def _wrong_values(batch: Mapping[str, Tensor], vocabulary: int | None) -> str | None:
    input_ids, mask, labels = (batch[field].cpu() for field in FIELDS)
    if not bool(((mask == 0) | (mask == 1)).all()):
        return "attention_mask must be 1 at tokens and 0 at padding, but holds other numbers"
    learnt = labels != IGNORE_INDEX
    tokens = {"input_ids": input_ids[mask == 1], "labels": labels[learnt]}
    if is_of_encoder_decoder(batch):
        tokens[DECODER_INPUT] = batch[DECODER_INPUT].cpu().flatten()
    for field, ids in tokens.items():
        wrong = ids < 0 if vocabulary is None else (ids < 0) | (ids >= vocabulary)
        if bool(wrong.any()):
            known = "ids are 0 or more" if vocabulary is None else f"the model knows 0 to {vocabulary - 1}"
            masks = ", and -100 marks what is not learnt" if field == "labels" else ""
            return f"{field} holds {int(ids[wrong][0])}, which is no token: {known}{masks}"
    if is_of_encoder_decoder(batch):
        return _not_shifted(labels, batch[DECODER_INPUT].cpu())
    if _are_shifted(input_ids, labels, learnt):
        return (
            "labels are shifted already: each is the token after its position; give the token at its position, as "
            "Hugging Face's models take it, for the shift is made here"
        )
    return None


def _not_shifted(labels: Tensor, decoder_input_ids: Tensor) -> str | None:
    """Return what is wrong where a decoder is given the very tokens that it is to say."""
    learnt = labels != IGNORE_INDEX
    if int(learnt.sum()) > 1 and bool((labels == decoder_input_ids)[learnt].all()):
        return (
            "decoder_input_ids are the labels themselves, so the decoder would see each token that it is to say; they "
            "are the labels one place later, behind decoder_start_token_id"
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
    ids = [row["input_ids"] for row in rows]
    masked = [row["prompt_length"] for row in rows]
    labels = [[IGNORE_INDEX] * length + list(row[length:]) for row, length in zip(ids, masked, strict=True)]
    return {
        "input_ids": padded(ids, pad_token_id, pad_to_multiple_of),
        "attention_mask": padded([[1] * len(row) for row in ids], 0, pad_to_multiple_of),
        "labels": padded(labels, IGNORE_INDEX, pad_to_multiple_of),
    }


def padding_of(tokenizer: Any) -> int:
    """Return the token that fills up the batches of a tokenizer: its end token, where it has none for that."""
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    return int(end if pad is None else pad)


def padded(rows: Sequence[Sequence[int]], value: int, multiple_of: int = 1) -> Tensor:
    """Return rows of numbers, filled up on the right to the longest, rounded up to a multiple: ``[B, T]``, int64.

    Example:
        >>> padded([[5, 6, 7], [5, 8]], 0).tolist()
        [[5, 6, 7], [5, 8, 0]]
    """
    longest = max(len(row) for row in rows)
    whole = torch.full((len(rows), math.ceil(longest / multiple_of) * multiple_of), value)
    for place, row in enumerate(rows):
        whole[place, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return whole


def prompts_and_responses(batch: Mapping[str, Tensor]) -> list[tuple[list[int], list[int]]]:
    """Return the tokens of each row of a batch without padding: those of its prompt, and the labels.

    Example:
        >>> rows = [{"input_ids": [5, 6, 7], "prompt_length": 1}, {"input_ids": [5, 8], "prompt_length": 1}]
        >>> prompts_and_responses(collate(rows, pad_token_id=0))
        [([5], [6, 7]), ([5], [8])]
    """
    split = _both if is_of_encoder_decoder(batch) else _split_row
    return [split(*row) for row in zip(*(batch[name].tolist() for name in FIELDS), strict=True)]


def _split_row(input_ids: list[int], attention_mask: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
    """Return prompt and response: what stands before the first label, and the labels."""
    first = next((position for position, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))
    return _both(input_ids[:first], attention_mask[:first], labels)


def _both(input_ids: list[int], attention_mask: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
    """Return the tokens without padding, and the labels."""
    prompt = [token for token, real in zip(input_ids, attention_mask, strict=True) if real]
    return prompt, [label for label in labels if label != IGNORE_INDEX]
