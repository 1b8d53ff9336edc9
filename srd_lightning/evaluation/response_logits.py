"""Logits at the positions that predict the reference response."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from srd_lightning.losses.base import response_mask


@torch.no_grad()
def response_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the logits that predict the responses; no other position goes through the output head.

    What a model does to its logits (scaling, soft-capping) is done to these.

    Args:
        model: A causal language model with transformers' ``get_output_embeddings``.
        batch: ``input_ids``, ``attention_mask`` and ``labels``, each ``[B, T]``.

    Returns:
        ``[N, V]``, for the N response tokens of all rows, in their order.
    """
    mask = nn.functional.pad(response_mask(batch["labels"]), (0, 1), value=False)
    head: nn.Module = cast(Any, model).get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, hidden: (hidden[0][mask][None],))
    try:
        return cast(Tensor, model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[0])
    finally:
        hook.remove()
