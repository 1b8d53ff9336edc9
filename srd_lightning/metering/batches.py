"""What a batch holds, counted where it is, so that nobody waits for a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from srd_lightning.data.batches import is_of_encoder_decoder
from srd_lightning.losses.base import IGNORE_INDEX


def counts_of(batch: Any) -> dict[str, Tensor | int]:
    """Count a batch of any form, by names of `Work`.

    Args:
        batch: Of Hugging Face's form ``tokens``, ``positions`` and ``responses`` are counted too, those of both texts
            of an encoder-decoder.

    Returns:
        ``rows``: the length of its first tensor. Counts are tensors where the device must add them up.

    Example:
        >>> import torch
        >>> counts_of([torch.zeros(4, 2), torch.zeros(4)])
        {'rows': 4}
    """
    found: dict[str, Tensor | int] = {"rows": _rows(batch)}
    if not isinstance(batch, Mapping):
        return found
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    labelled = labels != IGNORE_INDEX if isinstance(labels, Tensor) else None
    if labelled is not None:
        found["responses"] = labelled.sum()
    if isinstance(mask, Tensor):
        real = [mask, labelled] if is_of_encoder_decoder(batch) and labelled is not None else [mask]
        found["tokens"] = sum(some.sum() for some in real)
        found["positions"] = sum(some.numel() for some in real)
    return found


def _rows(batch: Any) -> int:
    lengths: list[int] = []
    apply_to_collection(batch, Tensor, lambda values: lengths.append(len(values) if values.dim() else 1))
    return lengths[0] if lengths else 0
