"""A language model in two parts: a body that makes hidden states, and the output head on them.

So only positions that predict a token of the response go through the head. Nothing is believed about an architecture
that was not seen on a few tokens of the first batch: the two parts must give the model's own logits.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from srd_lightning.data.layout import Packed, layout_of
from srd_lightning.distributed.fsdp2 import inside
from srd_lightning.errors import ModelError, lacks_memory
from srd_lightning.losses.auxiliary import LAST
from srd_lightning.losses.base import response_mask
from srd_lightning.losses.head import Head
from srd_lightning.models.calling import eval_mode, extras, logits_of, router_off

Batch = Mapping[str, Tensor]
SAMPLE = 32
"""Most tokens in each of the two rows that the parts are tried on."""


class CannotSplit(ValueError):
    """Why a model cannot be used in two parts."""


class BodyAndHead(Protocol):
    """What is asked of a model in two parts. Another family, such as encoder-decoders, is one more class like this."""

    @property
    def model(self) -> nn.Module:
        """The whole."""

    @property
    def body(self) -> Any:
        """What makes hidden states, as a module that can be compiled."""

    def hidden(self, batch: Batch) -> Tensor:
        """Return the final hidden states at the positions that predict the response, ``[N, d]``, row after row."""

    def layers(self, batch: Batch, numbers: Collection[int]) -> dict[int, Tensor]:
        """Return the same of several layers, numbered as in `AuxiliaryLoss`."""

    def head(self) -> Head:
        """Return what makes logits of the final ones, as it is now."""


@dataclass(frozen=True)
class SplitModel:
    """Body and head of a causal language model of transformers, also under LoRA.

    Args:
        model: The whole.
        packing: Put the rows of a batch behind each other, without padding; the model's attention must keep them apart
            by their ``position_ids``, as transformers' does.
    """

    model: nn.Module
    packing: bool = False

    def hidden(self, batch: Batch) -> Tensor:
        """See `BodyAndHead.hidden`."""
        return self.layers(batch, (LAST,))[LAST]

    def layers(self, batch: Batch, numbers: Collection[int]) -> dict[int, Tensor]:
        """See `BodyAndHead.layers`."""
        layout = layout_of(batch, self.packing)
        positions = layout.positions
        if self.packing:
            tokens, position_ids, positions = cast(Packed, layout.packed)
            input_ids = batch["input_ids"].flatten().index_select(0, tokens)
            given = {"input_ids": input_ids[None], "position_ids": position_ids[None]}
        elif layout.right_padded:  # causal attention never looks at right padding: no mask, and the fused kernel
            given = {"input_ids": batch["input_ids"]}
        else:
            given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
            given |= extras(self.body, batch["attention_mask"], layout.right_padded)
        wanted = {"output_hidden_states": True} if set(numbers) - {LAST} else {}
        output = self.body(use_cache=False, **{**router_off(self.body), **wanted, **given})
        found = {
            number: output.last_hidden_state if number == LAST else output.hidden_states[number]
            for number in dict.fromkeys(numbers)
        }
        return {number: states.flatten(0, 1).index_select(0, positions) for number, states in found.items()}

    @property
    def body(self) -> Any:
        """What makes hidden states."""
        whole: Any = self.model
        whole = whole.get_base_model() if hasattr(whole, "peft_config") else whole
        return whole.base_model

    def head(self) -> Head:
        """Return the head as it is now; weights of LoRA are part of it, and get their gradient through it."""
        module = cast(Any, self.model).get_output_embeddings()
        config = cast(Any, self.model).config.get_text_config()
        scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        cap = getattr(config, "final_logit_softcapping", None)
        if hasattr(module, "modules_to_save"):  # PEFT's: a trained copy of the head
            module = module.modules_to_save[module.active_adapter]
        weight = module.weight
        if hasattr(module, "base_layer") and not module.merged:
            weight = sum((module.get_delta_weight(adapter) for adapter in module.active_adapters), weight)
        return Head(weight, module.bias, scale, cap)


def split(model: nn.Module, batch: Batch, packing: bool = False) -> SplitModel:
    """Take a model apart, and see on a few tokens that the parts give its own logits.

    Args:
        model: A causal language model.
        batch: Its first row lends its tokens.
        packing: As in `SplitModel`.

    Returns:
        The parts.

    Raises:
        CannotSplit: They do not, with the reason.
        ModelError: Packed rows do not get the states that they get alone.
    """
    parts = SplitModel(model)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        raise CannotSplit(f"{type(model).__name__} has no output head that get_output_embeddings() returns")
    if any(isinstance(part, nn.Dropout) and part.p > 0 for part in head.modules()):
        raise CannotSplit("there is dropout in the output head")
    if getattr(head, "lora_variant", None):  # untrained, it looks like plain LoRA
        raise CannotSplit("the adapter of the output head is a variant of LoRA, such as DoRA")
    sample = _sample(batch)
    with eval_mode(model), torch.no_grad():
        logits = logits_of(model, sample)[:, :-1][response_mask(sample["labels"])]  # what fails here, fails as a whole
        try:
            found = inside(model, lambda: parts.head()(parts.hidden(sample)))
        except (AttributeError, TypeError, RuntimeError) as error:
            if lacks_memory(error):  # all logits would take more still
                raise
            raise CannotSplit(f"{type(model).__name__} cannot be used in parts: {error}") from error
        if found.shape != logits.shape or _difference(found, logits) > _tolerance(logits):
            raise CannotSplit(f"body and head of {type(model).__name__} give other logits than the whole")
        if packing:
            _check_packing(parts, SplitModel(model, packing=True), sample)
    return SplitModel(model, packing)


def _sample(batch: Batch) -> dict[str, Tensor]:
    """Return a few tokens, all to be predicted, of rows of unlike length."""
    input_ids = batch["input_ids"][:1, :SAMPLE]
    input_ids = torch.cat([input_ids, input_ids.flip(1)])
    mask = torch.ones_like(input_ids)
    mask[-1, 1 + input_ids.shape[1] // 2 :] = 0
    return {"input_ids": input_ids, "attention_mask": mask, "labels": input_ids.masked_fill(mask == 0, -100)}


def _check_packing(alone: SplitModel, packed: SplitModel, sample: Batch) -> None:
    expected = alone.hidden(sample)
    if _difference(packed.hidden(sample), expected) > _tolerance(expected):
        attention = getattr(cast(Any, alone.model).config, "_attn_implementation", "unknown")
        raise ModelError(
            f"{type(alone.model).__name__} mixes rows that are packed (attention {attention}); turn "
            "packing off, or choose another attn_implementation"
        )


def _difference(values: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest value; what is NaN or infinite must be so in both."""
    values, expected, finite = values.float(), expected.float(), expected.isfinite()
    if not torch.equal(values.isfinite(), finite):
        return math.inf
    largest = expected.abs().where(finite, 0).max().clamp(min=1e-9)
    return float((values - expected).abs().where(finite, 0).max() / largest)


def _tolerance(values: Tensor) -> float:
    """Return what another order of the same sums may change, relative to the largest value."""
    return 1e-4 if torch.finfo(values.dtype).bits >= 32 else 5e-2
