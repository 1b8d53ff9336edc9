import pytest
import torch
from tiny import lively_model, make_rows, tokenised
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    ByT5Tokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from srd_lightning import ForwardKL
from srd_lightning.data.batches import collate
from srd_lightning.losses import response_mask
from srd_lightning.models.calling import extras, logits_of
from srd_lightning.training.step import DistillationStep

SIZE = {"vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
EXPERTS = {"intermediate_size": 32, "num_key_value_heads": 2, "num_local_experts": 4, "router_jitter_noise": 0.0}


def gpt2(seed=0):
    torch.manual_seed(seed)
    config = {"vocab_size": 384, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
    return GPT2LMHeadModel(GPT2Config(**config)).eval()


def opt():
    torch.manual_seed(0)
    config = OPTConfig(**SIZE, ffn_dim=64, max_position_embeddings=64, word_embed_proj_dim=32, init_std=0.3)
    return OPTForCausalLM(config).eval()


def bloom():
    torch.manual_seed(0)
    return BloomForCausalLM(BloomConfig(vocab_size=384, hidden_size=32, n_layer=2, n_head=2)).eval()


def mixtral():
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZE, **EXPERTS, output_router_logits=True, initializer_range=0.3)).eval()


def left_padded():
    """Rows of unlike length, with their padding on the left as many collators put it."""
    rows = tokenised(ByT5Tokenizer(), make_rows(5)).to_list()
    batch = collate(rows, pad_token_id=0)
    lengths = batch["attention_mask"].sum(1)
    width = batch["labels"].shape[1]
    return rows, {
        name: torch.stack([row.roll(width - int(length)) for row, length in zip(values, lengths, strict=True)])
        for name, values in batch.items()
    }


@pytest.mark.parametrize("make", [gpt2, opt, bloom, lively_model, mixtral])
def test_rows_padded_on_the_left_have_the_logits_that_they_have_alone(make):
    model = make().eval()
    rows, batch = left_padded()
    with torch.no_grad():
        found = logits_of(model, batch)[:, :-1][response_mask(batch["labels"])]
        alone = [model(torch.tensor([row["input_ids"]])).logits[0, row["prompt_length"] - 1 : -1] for row in rows]
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("chunk", [8, None], ids=["chunked", "all_logits"])
@pytest.mark.parametrize("micro_batch_tokens", [None, 60])
def test_a_step_is_the_same_wherever_the_padding_is(chunk, micro_batch_tokens):
    found = []
    for batch in (left_padded()[1], collate(left_padded()[0], pad_token_id=0)):
        student = gpt2()
        step = DistillationStep(chunk, micro_batch_tokens=micro_batch_tokens).attach(student, gpt2(1))
        objective = step.objective(batch, ForwardKL(), 0.5)
        objective.loss.backward()
        found.append((objective.loss.detach(), [weight.grad for weight in student.parameters()]))
    (loss, gradients), (expected, others) = found
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    for gradient, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


def test_nothing_is_added_where_padding_is_on_the_right():
    batch = collate(left_padded()[0], pad_token_id=0)
    assert extras(gpt2(), batch["attention_mask"], right_padded=True) == {}


def test_logits_of_a_router_are_never_made():
    rows, _ = left_padded()
    batch, model, seen = collate(rows, pad_token_id=0), mixtral(), []
    model.model.register_forward_hook(lambda module, arguments, output: seen.append(output.router_logits))
    step = DistillationStep().attach(model, mixtral())
    step.objective(batch, ForwardKL(), 0.5).loss.backward()
    logits_of(model, batch)
    assert seen
    assert all(logits is None for logits in seen)
