"""Which family a model is of, as its configuration says."""

from __future__ import annotations

from typing import Any

from srd_lightning.data.families import DECODER, EncoderDecoder, Family
from srd_lightning.errors import ModelError


def is_encoder_decoder(model: Any) -> bool:
    """Return whether a model is an encoder-decoder; what has no configuration is taken for a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def family_of(config: Any) -> Family:
    """Return the family of a configuration; without one, that of decoders.

    Raises:
        ModelError: An encoder-decoder does not say with which token its decoder begins.

    Example:
        >>> from transformers import GPT2Config, T5Config
        >>> family_of(GPT2Config()), family_of(T5Config(decoder_start_token_id=0))
        (Decoder(), EncoderDecoder(decoder_start_token_id=0))
    """
    if not getattr(config, "is_encoder_decoder", False):
        return DECODER
    start = getattr(config, "decoder_start_token_id", None)
    if not isinstance(start, int):
        raise ModelError(
            f"the configuration of an encoder-decoder ({type(config).__name__}) does not say with which token its "
            "decoder begins; set its decoder_start_token_id, such as to the pad token (T5) or the end token (BART)"
        )
    return EncoderDecoder(start)
