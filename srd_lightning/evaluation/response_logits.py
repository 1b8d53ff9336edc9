"""How likely a model finds the truth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from srd_lightning.losses.base import response_mask, upcast


class TokenSums(NamedTuple):
    """Sums over the response tokens of each row, ``[B]``, and the number of tokens, ``[B]``."""

    sums: Tensor
    tokens: Tensor


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


@torch.no_grad()
def negative_log_likelihood(logits: Tensor, labels: Tensor) -> TokenSums:
    """Sum the token loss of every row's response.

    Args:
        logits: ``[B, T, V]``.
        labels: ``[B, T]``, unshifted, -100 where no token is scored.

    Returns:
        Sums in nats and numbers of tokens.

    Example:
        >>> negative_log_likelihood(torch.zeros(1, 3, 4), torch.tensor([[-100, 2, 1]]))
        TokenSums(sums=tensor([2.7726]), tokens=tensor([2]))
    """
    mask = response_mask(labels)
    losses = nn.functional.cross_entropy(upcast(logits[:, :-1][mask]), labels[:, 1:][mask], reduction="none")
    rows = mask.nonzero()[:, 0]
    sums = torch.zeros(len(mask), dtype=losses.dtype, device=losses.device).index_add_(0, rows, losses)
    return TokenSums(sums, mask.sum(dim=1))
