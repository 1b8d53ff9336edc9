"""An encoder-decoder in two parts: all that comes before its output head, and the head."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from srd_lightning.data.layout import layout_of
from srd_lightning.losses.auxiliary import LAST
from srd_lightning.losses.head import Head
from srd_lightning.models.calling import inputs_of
from srd_lightning.models.output_head import output_head

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class SplitEncoderDecoder:
    """What comes before the head, and the head, of an encoder-decoder of transformers, also under LoRA.

    Architectures differ in what they are made of, and in what they do to the last hidden states (T5 scales them). So
    the whole is run, with a hook before its head that keeps what comes there and lets no position through.

    Args:
        model: The whole.
    """

    model: nn.Module

    @property
    def body(self) -> Any:
        """The whole: there is no module without the head."""
        return self.model

    def hidden(self, batch: Batch) -> Tensor:
        """See `BodyAndHead.hidden`."""
        return self.layers(batch, (LAST,))[LAST]

    def layers(self, batch: Batch, numbers: Collection[int]) -> dict[int, Tensor]:
        """See `BodyAndHead.layers`; of the decoder's."""
        found: dict[int, Tensor] = {}

        def keep(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            found[LAST] = given[0]
            return (given[0][:, :0], *given[1:])

        others = sorted(set(numbers) - {LAST})
        wanted = {"output_hidden_states": True} if others else {}
        handle = cast(Any, self.model).get_output_embeddings().register_forward_pre_hook(keep)
        try:  # not called as a module, which it is already: FSDP2 has gathered it
            output = cast(Any, self.model).forward(**inputs_of(self.model, batch), use_cache=False, **wanted)
        finally:
            handle.remove()
        found |= {number: output.decoder_hidden_states[number] for number in others}
        positions = layout_of(batch).positions
        return {number: states.flatten(0, 1).index_select(0, positions) for number, states in found.items()}

    def head(self) -> Head:
        """See `BodyAndHead.head`."""
        return output_head(self.model)
