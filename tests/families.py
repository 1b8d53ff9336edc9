"""Tiny random models of many architectures, decoders and encoder-decoders, and what each says to a row alone."""

import inspect

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM, ByT5Tokenizer
from transformers.utils import logging

DEPTH = 4
SIZES = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": DEPTH,
    "head_dim": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "n_groups": 1,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_d_ssm": 64,
    "state_size": 8,
    "num_heads": 4,
    "use_mamba_kernels": False,
}
"""Of whatever a configuration has of these."""
TWO_STACKS = {
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "dropout_rate": 0.0,
    "dropout": 0.0,
    "initializer_factor": 1.0,
    "init_std": 0.3,
    "vocab_size": 384,
    "max_position_embeddings": 600,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
"""Of whatever the configuration of an encoder-decoder has of these."""
ENCODER_DECODERS = {"t5": {}, "mt5": {"tie_word_embeddings": False}, "bart": {"decoder_start_token_id": 1}}
"""Settings of some; BART begins with its end token."""


def tiny(name, seed=0, **settings):
    """Return a random model of an architecture, small in what its configuration has."""
    logging.set_verbosity_error()
    if name in ENCODER_DECODERS:
        return _encoder_decoder(name, seed, {**ENCODER_DECODERS[name], **settings})
    kind = CONFIG_MAPPING[name]
    names = {*inspect.signature(kind).parameters, *dir(kind), *kind.attribute_map}
    sizes = {kind.attribute_map.get(size, size): value for size, value in SIZES.items() if size in names}
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(kind(**{**sizes, **settings})).eval()


def _encoder_decoder(name, seed, settings):
    kind = CONFIG_MAPPING[name]
    names = {*inspect.signature(kind).parameters, *dir(kind)}
    sizes = {size: value for size, value in TWO_STACKS.items() if size in names or size == "decoder_start_token_id"}
    torch.manual_seed(seed)
    model = AutoModelForSeq2SeqLM.from_config(kind(**{**sizes, **settings})).eval()
    if name == "bart":
        model.final_logits_bias.normal_()
    return model


class Numbers(ByT5Tokenizer):
    """Writes token ids as numbers, so that answers show every token."""

    def decode(self, ids, **options):
        return " ".join(map(str, ids))


def said_alone(model, row):
    """Return the logits that predict the response of a tokenised row, ``[n, V]``, float64: no batch, and no padding."""
    ids, start = torch.tensor([row["input_ids"]]), row["prompt_length"]
    if model.config.is_encoder_decoder:
        return model(input_ids=ids[:, :start], labels=ids[:, start:]).logits[0].double()
    return model(input_ids=ids).logits[0, start - 1 : -1].double()


def own_loss(model, row):
    """Return the loss that a model itself gives the response of a row, without one of its router."""
    quiet = {"output_router_logits": False} if getattr(model.config, "output_router_logits", False) else {}
    ids, start = torch.tensor([row["input_ids"]]), row["prompt_length"]
    if model.config.is_encoder_decoder:
        return model(input_ids=ids[:, :start], labels=ids[:, start:]).loss
    labels = ids.clone()
    labels[0, :start] = -100
    return model(input_ids=ids, labels=labels, **quiet).loss
