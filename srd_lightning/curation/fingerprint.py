"""What scores were made from, in a few digests."""

from __future__ import annotations

import hashlib
from dataclasses import asdict

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from srd_lightning.digests import bytes_digest, weights_digest
from srd_lightning.models.generation import Decoding, end_tokens


def fingerprint(
    rows: Dataset,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    template: object,
    decoding: Decoding,
    scoring_version: str,
) -> dict[str, str]:
    """Return a digest of each part that scores depend on.

    Args:
        rows: Tokenised rows; their order does not matter.
        model: The student, by the bytes of its weights.
        tokenizer: By its vocabulary.
        template: By its text.
        decoding: By its settings, and the tokens that end an answer.
        scoring_version: Of the code that scores.

    Returns:
        Digest by part.
    """
    return {
        "rows": _sum_of_digests(rows),
        "student": weights_digest(model),
        "tokenizer": bytes_digest([repr(sorted(tokenizer.get_vocab().items())).encode()]),
        "template": bytes_digest([repr((template, getattr(tokenizer, "chat_template", None))).encode()]),
        "decoding": bytes_digest([repr((sorted(asdict(decoding).items()), end_tokens(model, tokenizer))).encode()]),
        "scoring version": scoring_version,
    }


def _sum_of_digests(rows: Dataset) -> str:
    """Digest rows one by one: in any order they have the same sum, and none has to be kept."""
    total = 0
    columns = rows.select_columns(["id", "prompt", "response", "input_ids"]).with_format("arrow")
    for table in columns.iter(batch_size=1000):
        texts = zip(*(table[name].to_pylist() for name in ("id", "prompt", "response")), strict=True)
        for text, ids in zip(texts, table["input_ids"], strict=True):
            row = repr(text).encode() + ids.values.to_numpy().tobytes()
            total += int.from_bytes(hashlib.sha256(row).digest(), "big")
    return f"{total % 2**256:064x}"[:16]
