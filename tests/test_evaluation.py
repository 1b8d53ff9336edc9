import random

import pytest
import references
import torch
from conftest import make_rows, tiny_model
from datasets import Dataset
from rouge_score.rouge_scorer import RougeScorer
from transformers import ByT5Tokenizer, GPT2Config, GPT2LMHeadModel

from srd_lightning.evaluation import (
    PAPER_DECODING,
    Decoding,
    divergence_from_teacher,
    end_tokens,
    generate,
    negative_log_likelihood,
    rouge_l,
)
from srd_lightning.rows import collate, tokenize
from srd_lightning.templates import PromptTemplate

PROMPTS = [[70, 71, 72], [80], [90, 91, 92, 93, 94, 95, 96], [100, 101], [70, 71, 72, 73]]
GREEDY = Decoding(max_new_tokens=12)
SAMPLING = Decoding(max_new_tokens=12, temperature=1.0)


class Numbers(ByT5Tokenizer):
    """Writes token ids as numbers, so that answers show every token."""

    def decode(self, ids, **options):
        return " ".join(map(str, ids))


@pytest.fixture
def numbers():
    return Numbers()


@pytest.fixture
def model():
    return lively_model()


def lively_model(seed=0, **options):
    """A model with large weights, which does not say the same to every prompt."""
    return tiny_model(seed, initializer_range=0.3, **options)


def gpt2_with_dropout():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=384, n_embd=32, n_layer=2, n_head=2, eos_token_id=1, bos_token_id=None)
    return GPT2LMHeadModel(config).train()


@torch.no_grad()
def argmax_loop(model, prompt, ends, steps, no_repeat=None):
    ids = list(prompt)
    for _ in range(steps):
        best = model(torch.tensor([ids])).logits[0, -1].argsort(descending=True).tolist()
        if no_repeat:
            seen = [ids[start : start + no_repeat] for start in range(len(ids))]
            best = [token for token in best if [*ids[len(ids) - no_repeat + 1 :], token] not in seen]
        if best[0] in ends:
            break
        ids.append(best[0])
    return ids[len(prompt) :]


def text(ids):
    return " ".join(map(str, ids))


def answers(model, tokenizer, decoding=GREEDY, prompts=PROMPTS, **options):
    return generate(model, tokenizer, prompts, decoding, **options)


def batch_of_rows(tokenizer, number=5):
    template = PromptTemplate("{instruction} {input}", "{instruction}")
    rows, _ = tokenize(Dataset.from_list(make_rows(number)), tokenizer, template)
    return collate(rows.to_list(), pad_token_id=0)


def logits_of(model, batch):
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


class TestGreedy:
    def test_equals_a_loop_of_argmax(self, model, numbers):
        expected = [text(argmax_loop(model, prompt, [1], steps=12)) for prompt in PROMPTS]
        assert len(set(expected)) == len(PROMPTS)
        assert answers(model, numbers) == expected

    def test_does_not_depend_on_the_batch(self, model, numbers):
        alone = [answers(model, numbers, prompts=[prompt])[0] for prompt in PROMPTS]
        assert answers(model, numbers, prompts=PROMPTS[::-1]) == alone[::-1]

    def test_does_not_depend_on_the_seed(self, model, numbers):
        assert answers(model, numbers, seed=1) == answers(model, numbers, seed=2)

    @pytest.mark.parametrize("where", ["tokenizer", "generation_config", "list"])
    def test_stops_at_the_end_token(self, model, numbers, where):
        free = argmax_loop(model, PROMPTS[0], [], steps=12)
        end = free[4]
        if where == "tokenizer":
            numbers.eos_token = chr(end - 3)
            assert numbers.eos_token_id == end
        else:
            model.generation_config.eos_token_id = end if where == "generation_config" else [end, 2]
        assert answers(model, numbers, prompts=PROMPTS[:1]) == [text(free[: free.index(end)])]

    def test_no_token_is_made_after_the_last_answer_has_ended(self, model, numbers, monkeypatch):
        free = argmax_loop(model, PROMPTS[0], [], steps=12)
        model.generation_config.eos_token_id = free[2]
        made, generate_tokens = [], model.generate
        monkeypatch.setattr(model, "generate", lambda **options: made.append(generate_tokens(**options)) or made[0])
        answers(model, numbers, prompts=PROMPTS[:1])
        assert made[0].tolist() == [PROMPTS[0] + free[: free.index(free[2]) + 1]]

    def test_padding_behind_an_early_end_is_no_answer(self, model, numbers):
        end = argmax_loop(model, PROMPTS[0], [], steps=12)[2]
        model.generation_config.eos_token_id = end
        expected = [text(argmax_loop(model, prompt, [1, end], steps=12)) for prompt in PROMPTS]
        assert len({len(answer.split()) for answer in expected}) > 1
        assert answers(model, numbers) == expected

    def test_answers_are_as_long_as_they_may_be(self, model, numbers):
        assert [len(answer.split()) for answer in answers(model, numbers, Decoding(max_new_tokens=3))] == [3] * 5

    @pytest.mark.parametrize(
        "own",
        [
            {"repetition_penalty": 5.0},
            {"do_sample": True, "temperature": 9.0},
            {"max_length": 4},
            {"num_beams": 3},
            {"suppress_tokens": list(range(100, 200))},
            {"bad_words_ids": [[token] for token in range(100, 200)]},
        ],
        ids=["repetition_penalty", "sampling", "max_length", "beams", "suppress_tokens", "bad_words"],
    )
    def test_the_models_own_settings_do_not_leak(self, model, numbers, own):
        expected = [text(argmax_loop(model, prompt, [1], steps=12)) for prompt in PROMPTS]
        for name, value in own.items():
            setattr(model.generation_config, name, value)
        assert answers(model, numbers) == expected

    def test_a_tokenizer_without_padding(self, model, numbers):
        expected = answers(model, numbers)
        numbers.pad_token = None
        assert answers(model, numbers) == expected

    def test_text_is_decoded_and_stripped(self, model, monkeypatch, tokenizer):
        spoken = torch.tensor([[70, 3 + ord(" "), 3 + ord("h"), 3 + ord("i"), 3 + ord("\n"), 1, 0]])
        monkeypatch.setattr(model, "generate", lambda **options: spoken)
        assert answers(model, tokenizer, prompts=[[70]]) == ["hi"]


class TestSampling:
    def test_is_reproducible(self, model, numbers):
        assert answers(model, numbers, SAMPLING, seed=3) == answers(model, numbers, SAMPLING, seed=3)

    def test_depends_on_the_seed(self, model, numbers):
        assert answers(model, numbers, SAMPLING, seed=3) != answers(model, numbers, SAMPLING, seed=4)

    def test_takes_the_seed_of_the_decoding(self, model, numbers):
        assert answers(model, numbers, SAMPLING) == answers(model, numbers, SAMPLING, seed=10)

    @pytest.mark.parametrize(
        "narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}], ids=["top_k", "top_p", "temperature"]
    )
    def test_narrowed_to_one_token_is_greedy(self, model, numbers, narrow):
        decoding = Decoding(**{"max_new_tokens": 12, "temperature": 1.0, **narrow})
        assert answers(model, numbers, decoding) == answers(model, numbers)

    @pytest.mark.parametrize(
        "own", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 0.9}, {"typical_p": 0.1}], ids=lambda own: next(iter(own))
    )
    def test_the_models_own_settings_do_not_leak(self, model, numbers, own):
        expected = answers(model, numbers, SAMPLING)
        for name, value in own.items():
            setattr(model.generation_config, name, value)
        assert answers(model, numbers, SAMPLING) == expected


class TestNoRepeatedNgram:
    PROMPTS = ([3, 4, 3, 4, 3], [5, 6, 7, 5, 6])

    def test_equals_a_loop_that_skips_what_would_repeat(self, numbers):
        model = lively_model(vocab_size=12)
        expected = [text(argmax_loop(model, prompt, [1], steps=20, no_repeat=2)) for prompt in self.PROMPTS]
        assert expected != [text(argmax_loop(model, prompt, [1], steps=20)) for prompt in self.PROMPTS]
        decoding = Decoding(max_new_tokens=20, no_repeat_ngram_size=2)
        assert answers(model, numbers, decoding, prompts=self.PROMPTS) == expected


@pytest.mark.parametrize("decoding", [GREEDY, SAMPLING], ids=["greedy", "sampling"])
class TestWhatGenerateLeaves:
    def test_global_random_state(self, model, numbers, decoding):
        torch.manual_seed(7)
        expected = torch.rand(3)
        torch.manual_seed(7)
        answers(model, numbers, decoding)
        assert torch.equal(torch.rand(3), expected)

    def test_mode_of_every_module(self, model, numbers, decoding):
        model.train()
        model.model.layers[0].eval()
        before = {name: module.training for name, module in model.named_modules()}
        answers(model, numbers, decoding)
        assert {name: module.training for name, module in model.named_modules()} == before

    def test_mode_after_an_error(self, model, numbers, decoding, monkeypatch):
        def fail(**options):
            raise RuntimeError("out of memory")

        model.train()
        monkeypatch.setattr(model, "generate", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            answers(model, numbers, decoding)
        assert all(module.training for module in model.modules())


def test_dropout_is_off_while_a_model_in_training_answers(numbers):
    model = gpt2_with_dropout()
    trained = answers(model, numbers)
    assert trained == answers(model.eval(), numbers)


@pytest.mark.parametrize(
    ("own", "ends"), [(None, [1]), (1, [1]), (5, [1, 5]), ([7, 5], [1, 5, 7])], ids=["none", "same", "other", "list"]
)
def test_end_tokens(model, tokenizer, own, ends):
    model.generation_config.eos_token_id = own
    assert end_tokens(model, tokenizer) == ends


@pytest.mark.parametrize("wrong", [{"max_new_tokens": 0}, {"temperature": -0.1}], ids=["no_tokens", "temperature"])
def test_decoding_out_of_range(wrong):
    with pytest.raises(ValueError, match="expected max_new_tokens >= 1 and temperature >= 0"):
        Decoding(**wrong)


def test_paper_decoding():
    assert (PAPER_DECODING.temperature, PAPER_DECODING.no_repeat_ngram_size) == (0.01, 6)
    assert (PAPER_DECODING.max_new_tokens, PAPER_DECODING.seed) == (256, 10)


class TestNegativeLogLikelihood:
    def test_equals_the_loss_of_the_model_row_by_row(self, model, tokenizer):
        batch = batch_of_rows(tokenizer)
        found = negative_log_likelihood(logits_of(model, batch), batch["labels"])
        for row in range(5):
            length = batch["attention_mask"][row].sum()
            ids, labels = batch["input_ids"][row : row + 1, :length], batch["labels"][row : row + 1, :length]
            expected = model(input_ids=ids, labels=labels).loss.item()
            assert (found.sums[row] / found.tokens[row]).item() == pytest.approx(expected, rel=1e-5)

    def test_counts_the_response_and_the_end(self, model, tokenizer):
        batch = batch_of_rows(tokenizer)
        found = negative_log_likelihood(logits_of(model, batch), batch["labels"])
        assert found.tokens.tolist() == [len(row["output"]) + 1 for row in make_rows(5)]

    def test_a_row_without_response_has_no_loss(self):
        labels = torch.tensor([[-100, -100], [-100, 2]])
        found = negative_log_likelihood(torch.zeros(2, 2, 4), labels)
        assert found.tokens.tolist() == [0, 1]
        assert found.sums.tolist() == [0, pytest.approx(1.3862943611)]

    def test_bf16_logits_are_summed_in_fp32(self):
        torch.manual_seed(0)
        logits, labels = torch.randn(2, 6, 50).bfloat16(), torch.randint(50, (2, 6))
        found = negative_log_likelihood(logits, labels)
        expected = [
            -sum(references.softmax(logits[row, place])[labels[row, place + 1]].log() for place in range(5))
            for row in range(2)
        ]
        assert found.sums.tolist() == pytest.approx([float(value) for value in expected], rel=1e-5)


class TestDivergenceFromTeacher:
    def test_equals_a_plain_sum(self, model, tokenizer):
        batch = batch_of_rows(tokenizer)
        student, teacher = logits_of(model, batch), logits_of(lively_model(seed=1), batch)
        expected = [0.0] * 5
        for row, place in references.response_positions(batch["labels"]):
            p, q = references.softmax(teacher[row, place]), references.softmax(student[row, place])
            expected[row] += references.forward_kl(p, q).item()
        found = divergence_from_teacher(student, teacher, batch["labels"])
        assert found.sums.tolist() == pytest.approx(expected, rel=1e-4)
        assert found.tokens.tolist() == [len(row["output"]) + 1 for row in make_rows(5)]

    def test_of_a_model_from_itself_is_zero(self, model, tokenizer):
        batch = batch_of_rows(tokenizer)
        logits = logits_of(model, batch)
        assert divergence_from_teacher(logits, logits, batch["labels"]).sums.tolist() == [0] * 5


class TestRougeL:
    @pytest.mark.parametrize(
        ("truth", "answer", "expected"),
        [
            ("testing one two", "testing", 1 / 2),
            ("testing one two", "testing two", 4 / 5),
            ("testing one two", "two one", 2 / 5),
            ("The quick brown fox jumps over the lazy dog", "The quick brown dog jumps on the log.", 10 / 17),
            ("the runners ran", "the runner ran", 1.0),
            ("The Cat!", "the cat", 1.0),
            ("a b c", "a b c", 1.0),
            ("one two", "three four", 0.0),
            ("one", "", 0.0),
            ("é", "é", 0.0),
        ],
        ids=["one_word", "gap", "order", "readme", "stemmed", "case", "copy", "nothing", "empty", "no_latin_letters"],
    )
    def test_by_hand(self, truth, answer, expected):
        assert rouge_l(truth, answer) == pytest.approx(expected)

    def test_equals_the_scorer_of_google(self):
        rng = random.Random(0)
        scorer = RougeScorer(["rougeL"], use_stemmer=True)
        words = ["running", "runs", "Cats", "cat", "of", "a", "7", "nations"]
        for _ in range(100):
            truth, answer = (" ".join(rng.choices(words, k=rng.randint(0, 9))) for _ in range(2))
            assert rouge_l(truth, answer) == scorer.score(truth, answer)["rougeL"].fmeasure
