"""What a student answers to the prompts of a batch, beside the reference response."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from srd_lightning.data.batches import FIELDS, check_batch
from srd_lightning.losses.base import IGNORE_INDEX
from srd_lightning.models.generation import Decoding, generate


def answers(
    student: nn.Module, tokenizer: PreTrainedTokenizerBase, batch: Mapping[str, Tensor], decoding: Decoding
) -> list[dict[str, str]]:
    """Return prompt, reference response and generated answer of every row that has a response.

    Args:
        student: Who answers; where it is sharded all ranks must ask, also those without a row, see `generate`.
        tokenizer: Of the student.
        batch: ``input_ids``, ``attention_mask``, ``labels``, ``[B, T]`` each.
        decoding: How answers are generated.

    Raises:
        DataError: The batch is not what it must be.
    """
    check_batch(batch)
    rows = [_split_row(*row) for row in zip(*(batch[name].tolist() for name in FIELDS), strict=True)]
    rows = [(prompt, response) for prompt, response in rows if response]
    prompts, limits = [prompt for prompt, _ in rows], decoding.limits([len(response) for _, response in rows])
    found = generate(student, tokenizer, prompts, decoding, limits=limits)
    return [
        {
            "prompt": tokenizer.decode(prompt),
            "response": tokenizer.decode(response, skip_special_tokens=True).strip(),
            "answer": answer,
        }
        for (prompt, response), answer in zip(rows, found, strict=True)
    ]


def _split_row(input_ids: list[int], attention_mask: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
    """Return prompt and response: what stands before the first label, and the labels."""
    first = next((position for position, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))
    prompt = [token for token, real in zip(input_ids[:first], attention_mask[:first], strict=True) if real]
    return prompt, [label for label in labels if label != IGNORE_INDEX]
