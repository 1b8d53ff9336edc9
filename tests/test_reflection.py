from dataclasses import replace

import pytest
import torch
from conftest import make_rows, tiny_model
from datasets import Dataset
from rouge_score.rouge_scorer import RougeScorer
from transformers import ByT5Tokenizer, GPT2Config, GPT2LMHeadModel

from srd_lightning import reflection
from srd_lightning.evaluation import Decoding, generate
from srd_lightning.reflection import fingerprint, fixed_batches, reflect, score_batch
from srd_lightning.rows import tokenize
from srd_lightning.store import ScoreStore
from srd_lightning.templates import ALPACA, PromptTemplate

TEMPLATE = PromptTemplate("{instruction} {input}", "{instruction}")
GREEDY = Decoding(max_new_tokens=6)
SAMPLING = Decoding(max_new_tokens=6, temperature=1.0)


@pytest.fixture
def model():
    return tiny_model(initializer_range=0.3)


@pytest.fixture
def data(tokenizer):
    return tokenised(tokenizer, make_rows(20))


@pytest.fixture
def score(model, tokenizer, data, tmp_path):
    """Reflect with these settings; each folder is a store of its own."""

    def run(folder="scores", rows=data, decoding=GREEDY, **options):
        return reflect(model, tokenizer, rows, ScoreStore(tmp_path / folder, {}), decoding, **options)

    return run


def tokenised(tokenizer, rows):
    return tokenize(Dataset.from_list(rows), tokenizer, TEMPLATE)[0]


def in_other_order(data):
    return data.select([(7 * row) % len(data) for row in range(len(data))])


def forbid_generation(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("no answer is missing")

    monkeypatch.setattr(reflection, "generate", refuse)


def stop_after(monkeypatch, batches):
    """Let the run fail after this many batches."""
    left = iter(range(batches))

    def answer(*arguments, **options):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return generate(*arguments, **options)

    monkeypatch.setattr(reflection, "generate", answer)


class TestScoreBatch:
    def test_nll_is_the_loss_of_the_model_on_the_row_alone(self, model, tokenizer, data):
        for row, found in zip(data, score_batch(model, tokenizer, data.to_list(), GREEDY, seed=0), strict=True):
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
        (found,) = score_batch(model, tokenizer, [row], GREEDY, seed=0)
        assert len(losses) == len(row["response"]) + 1
        assert found["nll"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)

    def test_answers_belong_to_their_rows(self, model, tokenizer, data):
        found = score_batch(model, tokenizer, data.to_list(), GREEDY, seed=0)
        prompts = [row["input_ids"][: row["prompt_length"]] for row in data]
        assert [score["id"] for score in found] == data["id"][:]
        assert [score["answer"] for score in found] == [
            generate(model, tokenizer, [prompt], GREEDY)[0] for prompt in prompts
        ]

    def test_rouge_l_is_of_the_answer_against_the_truth(self, model, tokenizer, monkeypatch):
        rows = [{"instruction": "Hi", "output": "one two three"}, {"instruction": "b", "output": "x"}]
        monkeypatch.setattr(reflection, "generate", lambda *arguments, **options: ["two three four five", "X!"])
        found = score_batch(model, tokenizer, tokenised(tokenizer, rows).to_list(), GREEDY, seed=0)
        assert [score["rouge_l"] for score in found] == [pytest.approx(4 / 7), 1.0]
        scorer = RougeScorer(["rougeL"], use_stemmer=True)
        assert found[0]["rouge_l"] == scorer.score("one two three", "two three four five")["rougeL"].fmeasure

    def test_dropout_is_off_for_a_model_in_training(self, tokenizer, data):
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=384, n_embd=32, n_layer=2, n_head=2, eos_token_id=1, bos_token_id=None)
        model = GPT2LMHeadModel(config).train()
        found = score_batch(model, tokenizer, data.to_list(), GREEDY, seed=0)
        assert all(module.training for module in model.modules())
        assert found == score_batch(model.eval(), tokenizer, data.to_list(), GREEDY, seed=0)

    def test_leaves_no_gradients(self, model, tokenizer, data):
        score_batch(model, tokenizer, data.to_list()[:2], GREEDY, seed=0)
        assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


class TestFixedBatches:
    def test_hold_every_row_once(self, data):
        batches = fixed_batches(data, 6)
        assert [len(batch) for batch in batches] == [6, 6, 6, 2]
        assert sorted(row for batch in batches for row in batch.tolist()) == list(range(20))

    def test_go_from_short_to_long_prompts(self, data):
        lengths = [data["prompt_length"][row] for batch in fixed_batches(data, 6) for row in batch]
        assert lengths == sorted(data["prompt_length"])
        assert len(set(lengths)) > 1

    def test_are_the_same_for_the_rows_in_any_order(self, data):
        other = in_other_order(data)
        ids = [[data["id"][row] for row in batch] for batch in fixed_batches(data, 6)]
        assert [[other["id"][row] for row in batch] for batch in fixed_batches(other, 6)] == ids


def scores_agree(found, expected):
    assert found.keys() == expected.keys()
    assert {row: score["answer"] for row, score in found.items()} == {
        row: score["answer"] for row, score in expected.items()
    }
    for row, score in found.items():
        assert score["nll"] == pytest.approx(expected[row]["nll"], rel=1e-5)
        assert score["rouge_l"] == expected[row]["rouge_l"]


class TestReflect:
    def test_every_row_has_a_score(self, score, data):
        scores = score(batch_size=3)
        assert sorted(scores) == sorted(data["id"])
        assert all(row == found["id"] for row, found in scores.items())
        assert {tuple(found) for found in scores.values()} == {("id", "rouge_l", "nll", "answer")}

    @pytest.mark.parametrize("batch_size", [1, 3, 20, 64])
    def test_batch_size_does_not_matter(self, score, batch_size):
        scores_agree(score("a", batch_size=batch_size), score("b", batch_size=7))

    @pytest.mark.parametrize("decoding", [GREEDY, SAMPLING], ids=["greedy", "sampling"])
    def test_order_of_the_rows_does_not_matter(self, score, data, decoding):
        found = score("a", rows=in_other_order(data), decoding=decoding, batch_size=6)
        assert found == score("b", decoding=decoding, batch_size=6)

    def test_the_store_holds_what_is_returned(self, score, tmp_path):
        scores = score(batch_size=2)
        assert ScoreStore(tmp_path / "scores", {}).read() == scores

    def test_a_second_run_generates_nothing(self, score, monkeypatch):
        scores = score(batch_size=2)
        forbid_generation(monkeypatch)
        assert score(batch_size=2) == scores

    def test_a_second_run_of_other_order_and_batches_generates_nothing(self, score, data, monkeypatch):
        scores = score(batch_size=2)
        forbid_generation(monkeypatch)
        assert score(rows=in_other_order(data), batch_size=3) == scores


@pytest.mark.parametrize("decoding", [GREEDY, SAMPLING], ids=["greedy", "sampling"])
class TestAStoppedRun:
    def test_goes_on_and_gives_the_same_scores(self, score, monkeypatch, tmp_path, decoding):
        expected = score("whole", decoding=decoding, batch_size=1)
        with monkeypatch.context() as patch:
            stop_after(patch, batches=13)
            with pytest.raises(KeyboardInterrupt):
                score(decoding=decoding, batch_size=1)
        kept = ScoreStore(tmp_path / "scores", {}).read()
        assert len(kept) == reflection.BATCHES_PER_PART
        assert score(decoding=decoding, batch_size=1) == expected

    def test_does_not_score_again_what_is_kept(self, score, monkeypatch, decoding):
        with monkeypatch.context() as patch:
            stop_after(patch, batches=8)
            with pytest.raises(KeyboardInterrupt):
                score(decoding=decoding, batch_size=1)
        stop_after(monkeypatch, batches=12)
        assert len(score(decoding=decoding, batch_size=1)) == 20

    def test_a_lost_part_is_made_again(self, score, tmp_path, decoding):
        expected = score(decoding=decoding, batch_size=1)
        parts = sorted((tmp_path / "scores").glob("part-*"))
        assert len(parts) == 3
        parts[1].unlink()
        assert score(decoding=decoding, batch_size=1) == expected

    def test_going_on_with_other_batches_keeps_every_score(self, score, monkeypatch, tmp_path, decoding):
        with monkeypatch.context() as patch:
            stop_after(patch, batches=8)
            with pytest.raises(KeyboardInterrupt):
                score(decoding=decoding, batch_size=1)
        monkeypatch.setattr(reflection, "BATCHES_PER_PART", 4)
        scores = score(decoding=decoding, batch_size=2)
        assert ScoreStore(tmp_path / "scores", {}).read() == scores


@pytest.mark.parametrize("decoding", [GREEDY, SAMPLING], ids=["greedy", "sampling"])
class TestTwoProcesses:
    def test_shares_are_disjoint_and_complete(self, score, data, decoding):
        shares = [score(f"rank {rank}", decoding=decoding, batch_size=3, rank=rank, world_size=2) for rank in (0, 1)]
        assert not shares[0].keys() & shares[1].keys()
        assert sorted([*shares[0], *shares[1]]) == sorted(data["id"])

    def test_scores_are_those_of_one_process(self, score, decoding):
        shares = [score(f"rank {rank}", decoding=decoding, batch_size=3, rank=rank, world_size=2) for rank in (0, 1)]
        assert {**shares[0], **shares[1]} == score("one", decoding=decoding, batch_size=3)

    def test_may_share_a_store(self, score, decoding):
        score(decoding=decoding, batch_size=3, rank=0, world_size=2)
        both = score(decoding=decoding, batch_size=3, rank=1, world_size=2)
        assert both == score("one", decoding=decoding, batch_size=3)

    def test_more_processes_than_batches(self, score, decoding):
        assert score(decoding=decoding, batch_size=20, rank=1, world_size=2) == {}


class TestFingerprint:
    @pytest.fixture
    def made_of(self, model, tokenizer, data):
        def make(rows=data, model=model, tokenizer=tokenizer, template=ALPACA, decoding=GREEDY):
            return fingerprint(rows, model, tokenizer, template, decoding)

        return make

    def test_is_the_same_for_the_rows_in_any_order(self, made_of, data):
        assert made_of(rows=in_other_order(data)) == made_of()

    def test_is_the_same_for_models_of_the_same_weights(self, made_of, model):
        assert made_of(model=tiny_model(initializer_range=0.3)) == made_of(model=model)

    def test_does_not_depend_on_the_mode(self, made_of, model):
        before = made_of()
        model.train()
        assert made_of() == before

    @pytest.mark.parametrize("part", ["rows", "student", "tokenizer", "template", "decoding"])
    def test_changes_in_the_part_that_changed(self, made_of, part):
        before = made_of()
        after = made_of(**CHANGES[part]())
        assert [name for name in before if before[name] != after[name]] == [part]

    @pytest.mark.parametrize("field", ["id", "instruction", "output"])
    def test_sees_one_field_of_one_row(self, made_of, tokenizer, field):
        rows = [{"id": str(number), **row} for number, row in enumerate(make_rows(5))]
        before = made_of(rows=tokenised(tokenizer, rows))
        rows[3][field] += "!"
        after = made_of(rows=tokenised(tokenizer, rows))
        assert [name for name in before if before[name] != after[name]] == ["rows"]

    @pytest.mark.parametrize("row", [0, 4])
    def test_sees_a_row_that_is_left_out(self, made_of, data, row):
        fewer = data.select([other for other in range(len(data)) if other != row])
        assert made_of(rows=fewer)["rows"] != made_of()["rows"]

    @pytest.mark.parametrize(
        "change",
        [
            {"max_new_tokens": 7},
            {"temperature": 0.5},
            {"top_p": 0.5},
            {"top_k": 5},
            {"no_repeat_ngram_size": 6},
            {"seed": 1},
        ],
        ids=lambda change: next(iter(change)),
    )
    def test_sees_every_setting_of_the_decoding(self, made_of, change):
        assert made_of(decoding=replace(GREEDY, **change))["decoding"] != made_of()["decoding"]

    def test_sees_the_type_of_the_weights(self, made_of, model):
        before = made_of()
        assert made_of(model=model.bfloat16())["student"] != before["student"]

    def test_sees_one_bfloat16_weight(self, made_of, model):
        before = made_of(model=model.bfloat16())
        with torch.no_grad():
            model.lm_head.weight[3, 5] += 1
        assert made_of()["student"] != before["student"]

    def test_sees_the_chat_template(self, made_of, tokenizer):
        before = made_of()
        tokenizer.chat_template = "{{ messages }}"
        assert made_of()["template"] != before["template"]


def changed_weight():
    model = tiny_model(initializer_range=0.3)
    with torch.no_grad():
        model.lm_head.weight[3, 5] += 1e-4
    return {"model": model}


def changed_tokenizer():
    tokenizer = ByT5Tokenizer()
    tokenizer.add_tokens(["<new>"])
    return {"tokenizer": tokenizer}


CHANGES = {
    "rows": lambda: {"rows": tokenised(ByT5Tokenizer(), make_rows(19))},
    "student": changed_weight,
    "tokenizer": changed_tokenizer,
    "template": lambda: {"template": TEMPLATE},
    "decoding": lambda: {"decoding": SAMPLING},
}
