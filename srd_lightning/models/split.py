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

from srd_lightning.data.batches import DECODER_INPUT, is_of_encoder_decoder
from srd_lightning.data.layout import Packed, lay_out, layout_of
from srd_lightning.distributed.fsdp2 import inside
from srd_lightning.errors import ModelError, lacks_memory
from srd_lightning.losses.auxiliary import LAST
from srd_lightning.losses.head import Head
from srd_lightning.models.calling import eval_mode, extras, logits_of, router_off
from srd_lightning.models.encoder_decoder import SplitEncoderDecoder
from srd_lightning.models.family import is_encoder_decoder
from srd_lightning.models.output_head import output_head

Batch = Mapping[str, Tensor]
SAMPLE = 32
"""Most tokens in each of the two rows that the parts are tried on."""


class CannotSplit(ValueError):
    """Why a model cannot be used in two parts."""


class BodyAndHead(Protocol):
    """What is asked of a model in two parts. Another family is one more class like these two."""

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
        """See `BodyAndHead.head`."""
        return output_head(self.model)


def split(model: nn.Module, batch: Batch, packing: bool = False) -> BodyAndHead:
    """Take a model apart, and see on a few tokens that the parts give its own logits.

    Args:
        model: A language model.
        batch: Its first row lends its tokens.
        packing: As in `SplitModel`; not with an encoder-decoder.

    Returns:
        The parts.

    Raises:
        CannotSplit: They do not, with the reason.
        ModelError: Packed rows do not get the states that they get alone.
    """
    parts: BodyAndHead = SplitEncoderDecoder(model) if is_encoder_decoder(model) else SplitModel(model)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        raise CannotSplit(f"{type(model).__name__} has no output head that get_output_embeddings() returns")
    if any(isinstance(part, nn.Dropout) and part.p > 0 for part in head.modules()):
        raise CannotSplit("there is dropout in the output head")
    if getattr(head, "lora_variant", None):  # untrained, it looks like plain LoRA
        raise CannotSplit("the adapter of the output head is a variant of LoRA, such as DoRA")
    sample = _sample(batch)
    with eval_mode(model), torch.no_grad():
        every = logits_of(model, sample).flatten(0, 1)  # what fails here, fails as a whole
        logits = every.index_select(0, lay_out(sample).positions)
        try:
            found = inside(model, lambda: parts.head()(parts.hidden(sample)))
        except (AttributeError, TypeError, RuntimeError) as error:
            if lacks_memory(error):  # all logits would take more still
                raise
            raise CannotSplit(f"{type(model).__name__} cannot be used in parts: {error}") from error
        if found.shape != logits.shape or _difference(found, logits) > _tolerance(logits):
            raise CannotSplit(f"body and head of {type(model).__name__} give other logits than the whole")
        if packing:
            packed = SplitModel(model, packing=True)
            _check_packing(parts, packed, sample)
            return packed
    return parts


def _sample(batch: Batch) -> dict[str, Tensor]:
    """Return a few tokens, all to be predicted, of rows of unlike length."""
    input_ids = batch["input_ids"][:1, :SAMPLE]
    input_ids = torch.cat([input_ids, input_ids.flip(1)])
    mask = torch.ones_like(input_ids)
    mask[-1, 1 + input_ids.shape[1] // 2 :] = 0
    sample = {"input_ids": input_ids, "attention_mask": mask, "labels": input_ids.masked_fill(mask == 0, -100)}
    if is_of_encoder_decoder(batch):
        said = batch[DECODER_INPUT][:1, :SAMPLE]
        sample[DECODER_INPUT] = torch.cat([said, said.flip(1)])
        sample["labels"] = sample[DECODER_INPUT]
    return sample


def _check_packing(alone: BodyAndHead, packed: SplitModel, sample: Batch) -> None:
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
