"""`generation_settings`: how a student that is exported generates by itself.

The rows that it was trained on end with the tokenizer's end token, which the base model's settings need not name (a
base model that was given a chat format, a model that was made from nothing). Its own settings, such as sampling that
its authors recommend, stay; how answers were decoded while it was trained or measured does not come in.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from srd_lightning.models.generation import end_tokens


def generation_settings(student: Any, tokenizer: PreTrainedTokenizerBase | None) -> GenerationConfig | None:
    """Return the generation settings to be saved with a student.

    Args:
        student: A model of transformers; nothing of it is changed.
        tokenizer: Of its rows; without one the settings stay as they are.

    Returns:
        The student's own with all tokens that end an answer (the tokenizer's and its own) and the padding token of the
        tokenizer, else its own, else the first that ends; nothing for a model that has no settings.
    """
    own: GenerationConfig | None = getattr(student, "generation_config", None)
    if own is None or tokenizer is None:
        return own
    settings, ends = copy.deepcopy(own), end_tokens(student, tokenizer)
    if ends:
        pads = (tokenizer.pad_token_id, own.pad_token_id, ends[0])
        settings._from_model_config = False  # else transformers may make them anew from config.json
        settings.eos_token_id = ends[0] if len(ends) == 1 else ends
        settings.pad_token_id = next(token for token in pads if token is not None)
    return settings
