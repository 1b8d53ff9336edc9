"""What a family of models is given: a decoder one text, prompt and response; an encoder-decoder two.

Rows are the same for both: ``input_ids`` are the tokens of prompt and response, ``prompt_length`` says where the latter
begins. What differs is which tokens frame the two, and what becomes of them in a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from srd_lightning.data.batches import DECODER_INPUT, collate, padded
from srd_lightning.losses.base import IGNORE_INDEX

Tokens = list[list[int]]
Ints = NDArray[np.int64]


class Family(Protocol):
    """What is asked of a family."""

    @property
    def made_of(self) -> tuple[str, ...]:
        """What its tokens depend on besides rows, tokenizer and template."""

    def tokens(
        self, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], responses: Sequence[str]
    ) -> tuple[Tokens, Tokens]:
        """Return the tokens of prompts and of responses, with those that the family puts around each."""

    def collate(
        self, rows: Sequence[Mapping[str, Any]], pad_token_id: int, pad_to_multiple_of: int = 1
    ) -> dict[str, Tensor]:
        """Return the batch of tokenised rows."""

    def padded_apart(self, prompt_lengths: Ints, lengths: Ints) -> list[Ints]:
        """Return the lengths, ``[N]`` each, of the texts of N rows that a batch pads each for itself."""


@dataclass(frozen=True)
class Decoder:
    """Reads the prompt and goes on: GPT-2, Llama, Qwen, Mamba, …; the response ends with the end token."""

    def __str__(self) -> str:
        """Return what it is called in messages."""
        return "a decoder"

    @property
    def made_of(self) -> tuple[str, ...]:
        """See `Family.made_of`."""
        return ()

    def tokens(
        self, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], responses: Sequence[str]
    ) -> tuple[Tokens, Tokens]:
        """Tokenise as they stand; the beginning token stands in front if the tokenizer puts one there."""
        prefix = _beginning(tokenizer)
        asked = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
        said = tokenizer(list(responses), add_special_tokens=False)["input_ids"]
        asked = [ids if ids[: len(prefix)] == prefix else prefix + ids for ids in asked]
        return asked, [[*ids, tokenizer.eos_token_id] for ids in said]

    def collate(
        self, rows: Sequence[Mapping[str, Any]], pad_token_id: int, pad_to_multiple_of: int = 1
    ) -> dict[str, Tensor]:
        """See `batches.collate`."""
        return collate(rows, pad_token_id, pad_to_multiple_of)

    def padded_apart(self, prompt_lengths: Ints, lengths: Ints) -> list[Ints]:
        """Return the lengths of prompt and response together."""
        return [lengths]


DECODER = Decoder()


@dataclass(frozen=True)
class EncoderDecoder:
    """Has an encoder for the prompt and a decoder for the response: T5, mT5, BART, ….

    Args:
        decoder_start_token_id: With which its decoder begins.

    Example:
        >>> tokens = {2: [5, 1, 7, 8, 1], 3: [5, 6, 1, 9, 1]}
        >>> rows = [{"input_ids": ids, "prompt_length": length} for length, ids in tokens.items()]
        >>> batch = EncoderDecoder(decoder_start_token_id=0).collate(rows, pad_token_id=0)
        >>> batch["input_ids"].tolist(), batch["labels"].tolist()
        ([[5, 1, 0], [5, 6, 1]], [[7, 8, 1], [9, 1, -100]])
        >>> batch["decoder_input_ids"].tolist()
        [[0, 7, 8], [0, 9, 1]]
    """

    decoder_start_token_id: int

    def __str__(self) -> str:
        """Return what it is called in messages."""
        return f"an encoder-decoder whose decoder begins with token {self.decoder_start_token_id}"

    @property
    def made_of(self) -> tuple[str, ...]:
        """See `Family.made_of`."""
        return ("encoder-decoder",)

    def tokens(
        self, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], responses: Sequence[str]
    ) -> tuple[Tokens, Tokens]:
        """Tokenise as texts of their own, framed as the tokenizer frames inputs and targets; both end with the end."""
        asked, said = tokenizer(list(prompts))["input_ids"], tokenizer(text_target=list(responses))["input_ids"]
        end = tokenizer.eos_token_id
        return asked, [ids if ids[-1:] == [end] else [*ids, end] for ids in said]

    def collate(
        self, rows: Sequence[Mapping[str, Any]], pad_token_id: int, pad_to_multiple_of: int = 1
    ) -> dict[str, Tensor]:
        """Pad prompts and responses apart, each on the right.

        Args:
            rows: Tokenised rows.
            pad_token_id: Fills up; masked, so any id will do.
            pad_to_multiple_of: Of S and T, which else are the lengths of the longest prompt and response.

        Returns:
            ``input_ids`` and ``attention_mask`` of the prompts, each ``[B, S]``; ``labels``, the responses, and
            ``decoder_input_ids``, the same one place later, behind the token with which the decoder begins, each
            ``[B, T]``, int64.
        """
        prompts = [row["input_ids"][: row["prompt_length"]] for row in rows]
        responses = [row["input_ids"][row["prompt_length"] :] for row in rows]
        labels = padded([response or [IGNORE_INDEX] for response in responses], IGNORE_INDEX, pad_to_multiple_of)
        shifted = padded([[self.decoder_start_token_id, *response] for response in responses], pad_token_id)
        shifted = torch.nn.functional.pad(shifted, (0, labels.shape[1] - shifted.shape[1]), value=pad_token_id)
        mask = [[1] * len(prompt) for prompt in prompts]
        return {
            "input_ids": padded(prompts, pad_token_id, pad_to_multiple_of),
            "attention_mask": padded(mask, 0, pad_to_multiple_of),
            "labels": labels,
            DECODER_INPUT: shifted,
        }

    def padded_apart(self, prompt_lengths: Ints, lengths: Ints) -> list[Ints]:
        """Return the lengths of prompts, and those of responses."""
        return [prompt_lengths, lengths - prompt_lengths]


def _beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token that the tokenizer puts in front of every text, if it does so."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []
