"""How a language model is called, so that padding and settings of its own do not change what it computes."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, cast

from torch import Tensor, nn

from srd_lightning.data.batches import DECODER_INPUT, is_of_encoder_decoder
from srd_lightning.data.layout import LaidOut, pads_right
from srd_lightning.errors import ModelError
from srd_lightning.models.family import is_encoder_decoder


def logits_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return all logits of a model, ``[B, T, V]``, at the positions of ``labels``.

    Args:
        model: Takes `inputs_of` a batch, and returns an object with ``logits``.
        batch: See `check_batch`; of one whose layout is not known the device is asked for it.
    """
    return cast(Tensor, model(**inputs_of(model, batch)).logits)


def inputs_of(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what of a batch a model is called with, and what else it must be told of it.

    Raises:
        ModelError: The batch is made for a decoder and the model an encoder-decoder, or the other way round.
    """
    mask, two_texts = batch["attention_mask"], is_of_encoder_decoder(batch)
    if two_texts != is_encoder_decoder(model):
        kinds = ("a decoder", "an encoder-decoder")
        raise ModelError(
            f"this batch is made for {kinds[two_texts]}, but {type(model).__name__} is {kinds[not two_texts]}; choose "
            "models of one family"
        )
    given: dict[str, Any] = {"input_ids": batch["input_ids"], "attention_mask": mask}
    if two_texts:
        return given | {DECODER_INPUT: batch[DECODER_INPUT]} | router_off(model)
    on_right = batch.layout.right_padded if isinstance(batch, LaidOut) else pads_right(mask)
    return given | extras(model, mask, on_right)


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
