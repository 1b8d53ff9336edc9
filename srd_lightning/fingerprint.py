"""What scores were made from, in a few digests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from srd_lightning.generation import Decoding, end_tokens


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
        "tokenizer": _digest([repr(sorted(tokenizer.get_vocab().items())).encode()]),
        "template": _digest([repr((template, getattr(tokenizer, "chat_template", None))).encode()]),
        "decoding": _digest([repr((sorted(asdict(decoding).items()), end_tokens(model, tokenizer))).encode()]),
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


def digest(made_of: Mapping[str, str]) -> str:
    """Return a short name for what scores were made of."""
    return _digest([repr(sorted(made_of.items())).encode()])


def weights_digest(model: nn.Module) -> str:
    """Return a digest of a model's weights: about a second per GB."""
    return _digest(_weights(model))


def _weights(model: nn.Module) -> Iterator[bytes]:
    for name, tensor in sorted(model.state_dict().items()):
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
        yield tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]
