"""A tiny model, rows, and settings that only train: all that the tests need, made in memory."""

from functools import partial

import references
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from srd_lightning.data.templates import PromptTemplate
from srd_lightning.data.tokenization import tokenize
from srd_lightning.losses import (
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
)

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""Settings of a trainer that only trains."""


LOSSES = {
    "forward_kl": (ForwardKL, references.forward_kl),
    "reverse_kl": (ReverseKL, references.reverse_kl),
    "jensen_shannon": (partial(JensenShannon, beta=0.3), partial(references.jensen_shannon, beta=0.3)),
    "total_variation": (TotalVariation, references.total_variation),
    "skew_forward_kl": (partial(SkewForwardKL, alpha=0.2), partial(references.skew_forward_kl, alpha=0.2)),
    "skew_reverse_kl": (partial(SkewReverseKL, alpha=0.2), partial(references.skew_reverse_kl, alpha=0.2)),
}
"""Each loss with the reference of its divergence."""


def tiny_model(seed=0, **options):
    torch.manual_seed(seed)
    config = {
        "vocab_size": 384,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "bos_token_id": None,
        **options,
    }
    return LlamaForCausalLM(LlamaConfig(**config))


def lively_model(seed=0, **options):
    """A model with large weights, which does not say the same to every prompt."""
    return tiny_model(seed, initializer_range=0.3, **options)


PLAIN = PromptTemplate("{instruction} {input}", "{instruction}")


def tokenised(tokenizer, rows):
    return tokenize(Dataset.from_list(rows), tokenizer, PLAIN)[0]


def in_other_order(data):
    return data.select([(7 * row) % len(data) for row in range(len(data))])


def make_rows(number):
    return [{"instruction": f"Say {row}.", "output": "ab" * (1 + row % 5) + str(row)} for row in range(number)]
