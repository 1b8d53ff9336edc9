import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import lively_model, make_rows, tokenised
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from srd_lightning.data.batches import collate
from srd_lightning.losses import response_mask
from srd_lightning.models.split import CannotSplit, split

SIZE = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
MODELS = {
    "llama": lively_model,
    "gpt2, tied": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=384, n_positions=128, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3)
    ),
    "qwen2, tied": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZE, tie_word_embeddings=True)),
    "gemma2, capped": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZE, head_dim=16, final_logit_softcapping=3.0)),
    "cohere, scaled": lambda: CohereForCausalLM(CohereConfig(**SIZE, logit_scale=0.25)),
    "granite, divided": lambda: GraniteForCausalLM(GraniteConfig(**SIZE, logits_scaling=8.0)),
    "opt, projected": lambda: OPTForCausalLM(
        OPTConfig(**SIZE, ffn_dim=64, max_position_embeddings=64, word_embed_proj_dim=16, init_std=0.3, dropout=0.0)
    ),
}


def lora(model, **options):
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # it is zero at first
            nn.init.normal_(parameter, std=0.3)
    return model


MODELS |= {
    "lora on attention": lambda: lora(lively_model(), target_modules=["q_proj"]),
    "lora on the head": lambda: lora(lively_model(), target_modules=["q_proj", "lm_head"]),
    "trained copy of the head": lambda: lora(lively_model(), target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


@pytest.fixture
def batch(tokenizer):
    return collate(tokenised(tokenizer, make_rows(5)).to_list(), pad_token_id=0)


def whole(model, batch):
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits[:, :-1][response_mask(batch["labels"])]


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_parts_give_logits_and_gradients_of_the_whole(make, batch):
    torch.manual_seed(0)
    model = make().eval()
    parts = split(model, batch)
    weights = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    target = torch.randn(parts.hidden(batch).shape[0], 384)

    def gradients(logits):
        (logits * target).mean().backward()
        found = {name: parameter.grad for name, parameter in weights.items()}
        model.zero_grad(set_to_none=True)
        return found

    logits, expected = parts.head()(parts.hidden(batch)), whole(model, batch)
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * scale)
    found, reference = gradients(logits), gradients(expected)
    for name in weights:
        assert (found[name] is None) == (reference[name] is None)
        if reference[name] is not None:
            scale = float(reference[name].abs().max())
            torch.testing.assert_close(found[name], reference[name], rtol=1e-3, atol=1e-4 * scale + 1e-12)


@pytest.mark.parametrize("make", [MODELS[name] for name in ("llama", "gpt2, tied", "gemma2, capped")])
def test_packed_rows_get_the_states_that_they_get_alone(make, batch):
    torch.manual_seed(0)
    model = make().eval()
    packed, alone = split(model, batch, packing=True).hidden(batch), split(model, batch).hidden(batch)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4 * float(alone.abs().max()))


def test_packing_is_refused_where_rows_would_mix(batch):
    model = lively_model().eval()
    forward = model.model.forward
    model.model.forward = lambda position_ids=None, **inputs: forward(**inputs)
    with pytest.raises(ValueError, match="mixes rows that are packed"):
        split(model, batch, packing=True)


class Unusual(nn.Module):
    """Changes its logits in a way that no configuration tells."""

    def __init__(self):
        super().__init__()
        self.inner = lively_model()
        self.config = self.inner.config
        self.base_model = self.inner.model

    def get_output_embeddings(self):
        return self.inner.lm_head

    def forward(self, **inputs):
        output = self.inner(**inputs)
        output.logits = output.logits * 0.5
        return output


def headless():
    model = lively_model()
    model.get_output_embeddings = lambda: None
    return model


def with_dropout():
    return lora(lively_model(), target_modules=["q_proj", "lm_head"], lora_dropout=0.1)


def with_dora():
    model = lively_model()
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"], use_dora=True))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (with_dora, "variant of LoRA"),
        (Unusual, "give other logits"),
        (headless, "no output head"),
        (with_dropout, "dropout in the output head"),
    ],
)
def test_a_model_that_cannot_be_taken_apart_says_why(make, reason, batch):
    with pytest.raises(CannotSplit, match=reason):
        split(make(), batch)


def test_looking_leaves_modes_and_random_numbers_as_they_were(batch):
    model = lively_model(attention_dropout=0.5).train()
    state = torch.get_rng_state()
    split(model, batch)
    assert all(part.training for part in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_an_error_of_the_model_itself_is_no_reason_to_make_all_logits(batch):
    model = lively_model()

    def fail(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    model.model.layers[0].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        split(model, batch)


def test_a_model_of_nan_or_with_forbidden_tokens_can_be_taken_apart(batch):
    broken, forbids = lively_model(), lively_model()
    with torch.no_grad():
        broken.model.norm.weight.fill_(torch.nan)
        forbids.lm_head.weight[7] = torch.inf
    split(broken, batch)
    split(forbids, batch)


def test_memory_that_is_out_does_not_make_all_logits(batch):
    model = lively_model()

    def too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.model.layers[0].register_forward_hook(too_large)
    with pytest.raises(torch.OutOfMemoryError):
        split(model, batch)
