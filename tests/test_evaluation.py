import pytest
import references
import torch
from tiny import lively_model, make_rows, tokenised
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from srd_lightning.criteria.base import response_logits
from srd_lightning.data.batches import collate


def batch_of_rows(tokenizer, number=5):
    return collate(tokenised(tokenizer, make_rows(number)).to_list(), pad_token_id=0)


def logits_of(model, batch):
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def capped_model():
    """A model that does something to its logits after the output head."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}
    return Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, final_logit_softcapping=0.5, initializer_range=0.3)).eval()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=384, n_embd=32, n_layer=2, n_head=2)).eval()


class TestResponseLogits:
    @pytest.mark.parametrize("make", [lively_model, capped_model, gpt2])
    def test_are_those_of_all_positions_where_responses_are_predicted(self, make, tokenizer):
        model, batch = make(), batch_of_rows(tokenizer)
        full = logits_of(model, batch)
        expected = [full[row, place] for row, place in references.response_positions(batch["labels"])]
        assert torch.allclose(response_logits(model, batch), torch.stack(expected), atol=1e-5)

    def test_no_other_position_goes_through_the_head(self, model, tokenizer):
        batch, seen = batch_of_rows(tokenizer), []
        model.lm_head.register_forward_hook(lambda module, hidden, logits: seen.append(logits.shape))
        response_logits(model, batch)
        assert seen == [(1, int((batch["labels"] != -100).sum()), 384)]

    def test_the_model_is_left_as_it_was(self, model, tokenizer):
        batch = batch_of_rows(tokenizer)
        before = logits_of(model, batch)
        response_logits(model, batch)
        assert torch.equal(logits_of(model, batch), before)
