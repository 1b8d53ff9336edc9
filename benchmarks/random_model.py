"""A random model with its tokenizer, and rows of its words: where no other can be had, and only speed is asked for."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, NamedTuple


class Shape(NamedTuple):
    """Of a Llama, whose words are ``w2``, ``w3``, …, and of rows, with the median and the most words of a response."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    rows: int
    median: int
    most: int


SHAPES = {
    "cuda": Shape(vocabulary=49152, width=576, layers=30, heads=9, rows=1024, median=60, most=250),
    "cpu": Shape(vocabulary=64, width=16, layers=2, heads=2, rows=8, median=4, most=9),
}
"""Large: as SmolLM2-135M, which `benchmarks/step.py` takes by default, and rows as long as Dolly's."""


def tokenizer_of_words(vocabulary: int) -> Any:
    """Return a tokenizer of so many words, two of which are special."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<unknown>", "<end>"]
    words = [*special, *(f"w{number}" for number in range(len(special), vocabulary))]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token=special[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=special[0], eos_token=special[1], pad_token=special[1]
    )


def write_model(folder: Path, shape: Shape) -> str:
    """Write a model and its tokenizer; return the folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer_of_words(shape.vocabulary).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=round(shape.width * 8 / 3),
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=1,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def write_rows(path: Path, shape: Shape) -> str:
    """Write rows whose lengths are spread as those of written answers are; return the file."""
    chance = random.Random(0)

    def words(median: int) -> str:
        number = min(max(round(chance.lognormvariate(0, 0.9) * median), 1), shape.most)
        return " ".join(f"w{chance.randrange(2, shape.vocabulary)}" for _ in range(number))

    rows = [
        {"id": row, "instruction": words(shape.median // 2), "output": words(shape.median)} for row in range(shape.rows)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)
