"""What a student answers to the prompts of a batch, beside the reference response."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from srd_lightning.data.batches import check_batch, prompts_and_responses
from srd_lightning.models.family import is_encoder_decoder
from srd_lightning.models.generation import Decoding, generate


def answers(
    student: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    batch: Mapping[str, Tensor],
    decoding: Decoding,
    seed: int | None = None,
) -> list[dict[str, str]]:
    """Return prompt, reference response and generated answer of every row that has a response.

    Args:
        student: Who answers; where it is sharded all ranks must ask, also those without a row, see `generate`.
        tokenizer: Of the student.
        batch: See `check_batch`.
        decoding: How answers are generated.
        seed: Of the sampling; by default that of ``decoding``.

    Raises:
        DataError: The batch is not what it must be.
    """
    two_texts = is_encoder_decoder(student)
    check_batch(batch, encoder_decoder=two_texts)
    rows = [(prompt, response) for prompt, response in prompts_and_responses(batch) if response]
    prompts, limits = [prompt for prompt, _ in rows], decoding.limits([len(response) for _, response in rows])
    found = generate(student, tokenizer, prompts, decoding, seed, limits)
    return [
        {
            "prompt": tokenizer.decode(prompt, skip_special_tokens=two_texts),  # of one text they may be the template's
            "response": tokenizer.decode(response, skip_special_tokens=True).strip(),
            "answer": answer,
        }
        for (prompt, response), answer in zip(rows, found, strict=True)
    ]
