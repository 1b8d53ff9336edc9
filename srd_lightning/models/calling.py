"""How a causal language model is called, so that padding and settings of its own do not change what it computes."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, cast

from torch import Tensor, nn

from srd_lightning.data.layout import LaidOut, pads_right


def logits_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return all logits of a model, ``[B, T, V]``.

    Args:
        model: Takes ``input_ids`` and ``attention_mask``, and returns an object with ``logits``.
        batch: Has both; of one whose layout is not known the device is asked for it.
    """
    mask = batch["attention_mask"]
    on_right = batch.layout.right_padded if isinstance(batch, LaidOut) else pads_right(mask)
    given = extras(model, mask, on_right)
    return cast(Tensor, model(input_ids=batch["input_ids"], attention_mask=mask, **given).logits)


def extras(model: nn.Module, attention_mask: Tensor, right_padded: bool) -> dict[str, Any]:
    """Return what else a model must be told of a batch: positions where padding is on the left, no router's logits.

    Models with learnt positions count from the first column unless they are told otherwise, and would take the first
    token of a padded row for a later one. Transformers' ``generate`` does the same.

    Args:
        model: The model.
        attention_mask: ``[B, T]``
        right_padded: Whether none of its tokens stands behind padding.
    """
    found: dict[str, Any] = router_off(model)
    if not right_padded and "position_ids" in _parameters(model):
        found["position_ids"] = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
    return found


def router_off(model: Any) -> dict[str, Any]:
    """Return what keeps a mixture of experts from giving its router's logits, if it is configured to: none use them."""
    return (
        {"output_router_logits": False}
        if getattr(getattr(model, "config", None), "output_router_logits", False)
        else {}
    )


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout off for a while: a student that trains must not be left in eval mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _parameters(model: Any) -> Mapping[str, inspect.Parameter]:
    """Return what the forward of a model takes by name, also where it is adapted (PEFT) or compiled."""
    model = getattr(model, "_orig_mod", model)
    model = model.get_base_model() if hasattr(model, "peft_config") else model
    return inspect.signature(model.forward).parameters
