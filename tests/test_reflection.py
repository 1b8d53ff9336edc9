import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from tiny import in_other_order, tokenised
from transformers import GPT2Config, GPT2LMHeadModel

from srd_lightning.criteria import NegativeLogLikelihood, RougeL
from srd_lightning.criteria import base as criteria_base
from srd_lightning.criteria.base import ReflectionBatch, score_batch
from srd_lightning.curation.reflection import fixed_batches
from srd_lightning.models.generation import Decoding, generate

GREEDY = Decoding(max_new_tokens=6)


def score(model, tokenizer, rows):
    return score_batch(ReflectionBatch(model, tokenizer, rows, GREEDY), [RougeL(), NegativeLogLikelihood()])


class TestScoreBatch:
    def test_nll_is_the_loss_of_the_model_on_the_row_alone(self, model, tokenizer, data):
        for row, found in zip(data, score(model, tokenizer, data.to_list()), strict=True):
            ids = torch.tensor([row["input_ids"]])
            labels = ids.clone()
            labels[0, : row["prompt_length"]] = -100
            assert found["nll"] == pytest.approx(model(input_ids=ids, labels=labels).loss.item(), rel=1e-5)

    def test_nll_is_the_mean_over_response_and_end(self, model, tokenizer, data):
        row = data[0]
        ids, start = row["input_ids"], row["prompt_length"]
        assert ids[-1] == tokenizer.eos_token_id
        logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        losses = [-logp[place - 1, ids[place]].item() for place in range(start, len(ids))]
        (found,) = score(model, tokenizer, [row])
        assert len(losses) == len(row["response"]) + 1
        assert found["nll"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)

    def test_answers_belong_to_their_rows(self, model, tokenizer, data):
        found = score(model, tokenizer, data.to_list())
        prompts = [row["input_ids"][: row["prompt_length"]] for row in data]
        assert [score["id"] for score in found] == data["id"][:]
        assert [score["answer"] for score in found] == [
            generate(model, tokenizer, [prompt], GREEDY)[0] for prompt in prompts
        ]

    def test_rouge_l_is_of_the_answer_against_the_truth(self, model, tokenizer, monkeypatch):
        rows = [{"instruction": "Hi", "output": "one two three"}, {"instruction": "b", "output": "x"}]
        written = [tokenizer.encode(text) for text in ("two three four five", "X!")]
        monkeypatch.setattr(criteria_base, "generate_ids", lambda *arguments, **options: written)
        found = score(model, tokenizer, tokenised(tokenizer, rows).to_list())
        assert [score["rouge_l"] for score in found] == [pytest.approx(4 / 7), 1.0]
        scorer = RougeScorer(["rougeL"], use_stemmer=True)
        assert found[0]["rouge_l"] == scorer.score("one two three", "two three four five")["rougeL"].fmeasure

    def test_dropout_is_off_for_a_model_in_training(self, tokenizer, data):
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=384, n_embd=32, n_layer=2, n_head=2, eos_token_id=1, bos_token_id=None)
        model = GPT2LMHeadModel(config).train()
        found = score(model, tokenizer, data.to_list())
        assert all(module.training for module in model.modules())
        assert found == score(model.eval(), tokenizer, data.to_list())

    def test_leaves_no_gradients(self, model, tokenizer, data):
        score(model, tokenizer, data.to_list()[:2])
        assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())

    def test_rows_of_like_length_go_through_the_model_together(self, model, tokenizer, data, monkeypatch):
        expected = [row["nll"] for row in score(model, tokenizer, data.to_list())]
        monkeypatch.setattr(criteria_base, "SCORED_AT_ONCE", 60)
        seen = []
        reflected = ReflectionBatch(model, tokenizer, data.to_list(), GREEDY)
        model.register_forward_pre_hook(lambda module, args, given: seen.append(given["input_ids"]), with_kwargs=True)
        assert [row["nll"] for row in score_batch(reflected, [NegativeLogLikelihood()])] == pytest.approx(
            expected, rel=1e-5
        )
        assert sum(map(len, seen)) == 20
        assert all(ids.numel() <= 60 for ids in seen)
        assert sum(ids.numel() for ids in seen) < 1.05 * sum(data["length"])

    def test_bf16_answers_leave_losses_as_they_are(self, model, tokenizer, data):
        rows = data.to_list()
        fast = ReflectionBatch(model, tokenizer, rows, Decoding(max_new_tokens=6, bf16=True))
        found = score_batch(fast, [RougeL(), NegativeLogLikelihood()])
        assert [row["nll"] for row in found] == [row["nll"] for row in score(model, tokenizer, rows)]

    def test_no_answer_is_generated_that_no_criterion_looks_at(self, model, tokenizer, data, monkeypatch):
        monkeypatch.setattr(criteria_base, "generate_ids", None)
        found = score_batch(ReflectionBatch(model, tokenizer, data.to_list(), GREEDY), [NegativeLogLikelihood()])
        assert {tuple(row) for row in found} == {("id", "nll")}

    def test_answers_that_are_known_are_not_generated_again(self, model, tokenizer, data, monkeypatch):
        monkeypatch.setattr(criteria_base, "generate_ids", None)
        rows = data.to_list()[:2]
        reflected = ReflectionBatch(model, tokenizer, rows, GREEDY, answers=[rows[0]["response"], "x"])
        assert [row["rouge_l"] for row in score_batch(reflected, [RougeL()])] == [1.0, 0.0]

    def test_answers_stop_at_the_ratio_to_the_response(self, model, tokenizer):
        model.generation_config.eos_token_id = None
        rows = tokenised(tokenizer, [{"instruction": "a", "output": "b" * length} for length in (3, 11)]).to_list()
        tokenizer.decode = lambda ids, **options: " ".join(map(str, ids))
        decoding = Decoding(max_new_tokens=40, max_length_ratio=1.5)
        lengths = [len(answer.split()) for answer in ReflectionBatch(model, tokenizer, rows, decoding).answers]
        assert lengths == [8, 18]


class TestFixedBatches:
    @given(
        st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=40),
        st.integers(10, 300),
        st.sampled_from([None, 0.5, 2.0]),
    )
    def test_hold_every_row_once_within_the_budget(self, lengths, tokens, ratio):
        rows = rows_of(lengths)
        decoding = Decoding(max_new_tokens=30, max_length_ratio=ratio)
        batches = fixed_batches(rows, tokens, decoding)
        assert sorted(row for batch in batches for row in batch.tolist()) == list(range(len(lengths)))
        for batch in batches:
            prompt = max(lengths[row][0] for row in batch)
            rest = max(max(lengths[row][1], decoding.limits([lengths[row][1]])[0]) for row in batch)
            assert len(batch) == 1 or len(batch) * (prompt + rest) <= tokens

    def test_by_hand(self):
        rows = rows_of([(5, 2), (1, 9), (3, 2), (4, 2), (2, 2)])
        found = fixed_batches(rows, 30, Decoding(max_new_tokens=6))
        assert [batch.tolist() for batch in found] == [[1, 4], [2, 3], [0]]  # 2 * (2 + 9), 2 * (4 + 6); 3 * 11 > 30

    def test_answers_of_like_length_go_together(self):
        rows = rows_of([(9, 100), (10, 4), (11, 100), (12, 4)])
        found = fixed_batches(rows, 230, Decoding(max_length_ratio=1.0))
        assert [batch.tolist() for batch in found] == [[1, 3], [0, 2]]

    def test_prompts_of_like_length_go_together_before_that(self):
        rows = rows_of([(9, 20), (100, 4), (10, 20), (101, 4)])
        found = fixed_batches(rows, 250, Decoding(max_length_ratio=1.0))
        assert [batch.tolist() for batch in found] == [[0, 2], [1, 3]]

    def test_are_the_same_for_the_rows_in_any_order(self, data):
        other = in_other_order(data)

        def ids_of(rows):
            return [[rows["id"][int(row)] for row in batch] for batch in fixed_batches(rows, 100, GREEDY)]

        assert len(ids_of(data)) > 3
        assert ids_of(other) == ids_of(data)

    def test_one_row_is_one_batch(self, data):
        assert [batch.tolist() for batch in fixed_batches(data.select([0]), 1, GREEDY)] == [[0]]


def rows_of(lengths):
    """Return rows of these lengths of prompt and response."""
    columns = {"id": [f"{row:03}" for row in range(len(lengths))], "prompt_length": [prompt for prompt, _ in lengths]}
    return Dataset.from_dict({**columns, "length": [sum(both) for both in lengths]})
