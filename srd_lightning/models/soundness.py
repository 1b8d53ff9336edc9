"""What a student and a teacher must be: models that do not see the answer, with weights that are numbers."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from srd_lightning.data.batches import DECODER_INPUT
from srd_lightning.errors import ModelError, in_one_line
from srd_lightning.models.calling import eval_mode
from srd_lightning.models.family import family_of, is_encoder_decoder
from srd_lightning.models.vocabulary import check_tokens

TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-4}
"""Of the logits by type, relative to the largest: how far another last token may change those before it by rounding."""
HALF_TOLERANCE = 2e-2


@torch.no_grad()
def check_causal(model: nn.Module, name: str) -> None:
    """Check that a model predicts each token from those before it: another last token must not change what it says.

    Takes a forward pass of eight tokens. Models in half precision on a CPU, where that is slow, are believed.

    Args:
        model: Takes ``input_ids`` and ``attention_mask``, and as an encoder-decoder ``decoder_input_ids``; returns an
            object with ``logits``.
        name: Of the model, for the message.

    Raises:
        ModelError: It looks ahead, as encoders do, or it cannot be called like that.
    """
    weight = next(model.parameters())
    if isinstance(weight, DTensor) or weight.is_meta or (weight.is_cpu and weight.dtype != torch.float32):
        return
    tokens = torch.tensor([[1, 2, 3, 1], [1, 2, 3, 2]], device=weight.device)
    given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if is_encoder_decoder(model):
        given |= {"input_ids": tokens[:1].repeat(2, 1), DECODER_INPUT: tokens}
    with eval_mode(model):
        try:
            output = cast(Any, model)(**given)
            first, second = cast(Tensor, output.logits[:, :-1].float())
        except (TypeError, AttributeError) as error:
            raise ModelError(
                f"{name}: {type(model).__name__} cannot be called as a causal language model, with input_ids and "
                f"attention_mask, returning logits ({type(error).__name__}: {in_one_line(error)[:300]})"
            ) from error
        except (RuntimeError, ValueError, ImportError, NotImplementedError):  # such as kernels that need a GPU
            return
    tolerance = TOLERANCES.get(weight.dtype, HALF_TOLERANCE)
    if float((first - second).abs().max()) > tolerance * float(first.abs().max()):
        raise ModelError(
            f"{name}: {type(model).__name__} is no causal language model: the last token changes what it says of those "
            "before, so it would see the answer that it is to learn"
        )


def check_weights(model: nn.Module, name: str) -> None:
    """Check that all weights are numbers; a bias may be -inf, which forbids a token. About 0.1 s per GB.

    Args:
        model: Sharded weights are left out.
        name: Of the model, for the message.

    Raises:
        ModelError: A weight is NaN or inf.
    """
    weights = [(key, weight) for key, weight in model.named_parameters() if not isinstance(weight, DTensor)]
    broken = [key for key, weight in weights if not _is_finite(weight.detach())]
    if broken:
        raise ModelError(
            f"{name} has weights that are NaN or inf, {broken[0]} among {len(broken)} of {len(weights)} tensors; its "
            "training has diverged or its file is damaged: choose an earlier checkpoint, or load it anew"
        )


def _is_finite(weight: Tensor) -> bool:
    if weight.is_meta or not weight.numel() or weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return True
    low, high = weight.aminmax()  # one pass, and no copy; NaN wins
    return bool(torch.isfinite(high)) and (bool(torch.isfinite(low)) or weight.ndim == 1)


def check_module(model: nn.Module, name: str, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Check a model that was given as a module.

    Args:
        model: The model, loaded.
        name: What it is, for the message.
        tokenizer: Of the rows, if it is known.

    Raises:
        ModelError: It cannot be a student or a teacher.
    """
    family_of(getattr(model, "config", None))  # which an encoder-decoder must say in full
    check_weights(model, name)
    if tokenizer is not None and hasattr(model, "get_input_embeddings"):
        check_tokens(len(cast(Any, model).get_input_embeddings().weight), tokenizer, name)
    check_causal(model, name)
