"""Reflection: the student answers every prompt, and its answer and its loss say how hard the row is for it.

Fixed batches of rows of like length are dealt to the processes, so a score does not depend on how many there are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from srd_lightning.evaluation import Decoding, eval_mode, generate, negative_log_likelihood, rouge_l
from srd_lightning.rows import collate
from srd_lightning.store import ScoreStore

SCORING_VERSION = "1"
"""Rises when the same inputs would give other scores."""
BATCHES_PER_PART = 8


def reflect(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    store: ScoreStore,
    decoding: Decoding,
    batch_size: int = 16,
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, dict[str, Any]]:
    """Score every row that the store does not hold yet.

    Args:
        model: The student, as it is before training.
        tokenizer: Its tokenizer.
        rows: Tokenised rows, see `rows.tokenize`.
        store: Where the scores are kept; a run that is stopped goes on from there.
        decoding: How the student answers.
        batch_size: Rows per batch.
        rank: This process.
        world_size: Number of processes; each scores its share, and all return all scores.

    Returns:
        By row id: ``id``, ``rouge_l`` (F1 of the answer against the truth), ``nll`` (mean loss of the true response's
        tokens, end token included, in nats) and ``answer``.
    """
    scores = store.read()
    ids = list(rows["id"])
    mine = list(enumerate(fixed_batches(rows, batch_size)))[rank::world_size]
    todo = [(number, batch) for number, batch in mine if any(ids[row] not in scores for row in batch)]
    total = sum(len(batch) for _, batch in todo)
    progress = tqdm(total=total, desc="reflection", unit="row", disable=rank != 0 or not todo)
    part: list[dict[str, Any]] = []
    for position, (number, batch) in enumerate(todo):
        part += score_batch(model, tokenizer, rows.select(batch).to_list(), decoding, seed=decoding.seed + number)
        if (position + 1) % BATCHES_PER_PART == 0 or position + 1 == len(todo):
            store.append(_digest(score["id"].encode() for score in part), part)
            scores |= {score["id"]: score for score in part}
            part = []
        progress.update(len(batch))
    progress.close()
    return _gather(scores)


def fixed_batches(rows: Dataset, batch_size: int) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    """Return row numbers in batches of like prompt length, the same for the same rows in any order."""
    order = np.lexsort((np.array(rows["id"]), np.array(rows["prompt_length"])))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def score_batch(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    decoding: Decoding,
    seed: int,
) -> list[dict[str, Any]]:
    """Score one batch of tokenised rows; see `reflect`."""
    device = next(model.parameters()).device
    prompts = [row["input_ids"][: row["prompt_length"]] for row in rows]
    answers = generate(model, tokenizer, prompts, decoding, seed)
    batch = {name: values.to(device) for name, values in collate(rows, pad_token_id=0).items()}
    with torch.no_grad(), eval_mode(model):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    nll = negative_log_likelihood(logits, batch["labels"])
    means = (nll.sums / nll.tokens).tolist()
    return [
        {"id": row["id"], "rouge_l": rouge_l(row["response"], answer), "nll": mean, "answer": answer}
        for row, answer, mean in zip(rows, answers, means, strict=True)
    ]


def _gather(scores: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return scores
    shares: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(shares, scores)
    return {row_id: score for share in shares for row_id, score in share.items()}


def fingerprint(
    rows: Dataset, model: nn.Module, tokenizer: PreTrainedTokenizerBase, template: object, decoding: Decoding
) -> dict[str, str]:
    """Return a digest of each part that the scores depend on.

    Args:
        rows: Tokenised rows; their order does not matter.
        model: The student, by the bytes of its weights.
        tokenizer: By its vocabulary.
        template: By its text.
        decoding: By its settings.

    Returns:
        Digest by part.
    """
    triples = zip(rows["id"], rows["prompt"], rows["response"], rows["input_ids"], strict=True)
    return {
        "rows": _digest(repr(row).encode() for row in sorted(triples)),
        "student": _digest(_weights(model)),
        "tokenizer": _digest([repr(sorted(tokenizer.get_vocab().items())).encode()]),
        "template": _digest([repr((template, getattr(tokenizer, "chat_template", None))).encode()]),
        "decoding": _digest([repr(sorted(asdict(decoding).items())).encode()]),
        "scoring version": SCORING_VERSION,
    }


def _weights(model: nn.Module) -> Iterator[bytes]:
    for name, tensor in sorted(model.state_dict().items()):
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
        yield tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]
