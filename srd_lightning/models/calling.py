"""How a causal language model is called, so that padding and settings of its own do not change what it computes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn


def logits_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return all logits of a model, ``[B, T, V]``.

    Args:
        model: Takes ``input_ids`` and ``attention_mask``, and returns an object with ``logits``.
        batch: Has both.
    """
    mask = batch["attention_mask"]
    return cast(Tensor, model(input_ids=batch["input_ids"], attention_mask=mask, **extras(model, mask)).logits)


def extras(model: nn.Module, attention_mask: Tensor) -> dict[str, Any]:
    """Return what else a model must be told of a batch: positions where padding is on the left, no router's logits.

    Models with learnt positions count from the first column unless they are told otherwise, and would take the first
    token of a padded row for a later one. Transformers' ``generate`` does the same.

    Args:
        model: The model.
        attention_mask: ``[B, T]``
    """
    found: dict[str, Any] = router_off(model)
    if not pads_right(attention_mask) and "position_ids" in _parameters(model):
        found["position_ids"] = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
    return found


def router_off(model: Any) -> dict[str, Any]:
    """Return what keeps a mixture of experts from giving its router's logits, if it is configured to: none use them."""
    return (
        {"output_router_logits": False}
        if getattr(getattr(model, "config", None), "output_router_logits", False)
        else {}
    )


def pads_right(attention_mask: Tensor) -> bool:
    """Return whether no token of ``[B, T]`` stands behind padding.

    Example:
        >>> import torch
        >>> pads_right(torch.tensor([[1, 1, 0]])), pads_right(torch.tensor([[0, 1, 1]]))
        (True, False)
    """
    return bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all())


def _parameters(model: Any) -> Mapping[str, inspect.Parameter]:
    """Return what the forward of a model takes by name, also where it is adapted (PEFT) or compiled."""
    model = getattr(model, "_orig_mod", model)
    model = model.get_base_model() if hasattr(model, "peft_config") else model
    return inspect.signature(model.forward).parameters
