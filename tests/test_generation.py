import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from tiny import lively_model
from torch.nn.parallel import DistributedDataParallel
from transformers import ByT5Tokenizer, GPT2Config, GPT2LMHeadModel, Lfm2Config, Lfm2ForCausalLM

from srd_lightning.errors import SettingError
from srd_lightning.models import generation
from srd_lightning.models.generation import PAPER_DECODING, Decoding, end_tokens, generate

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
        assert made[0].sequences.tolist() == [PROMPTS[0] + free[: free.index(free[2]) + 1]]

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
        monkeypatch.setattr(model, "generate", lambda **options: SimpleNamespace(sequences=spoken))
        assert answers(model, tokenizer, prompts=[[70]]) == ["hi"]


class TestRounds:
    """Rows leave the batch when they have ended."""

    @pytest.fixture(params=[1, 2, 5, 16])
    def steps_per_round(self, request, monkeypatch):
        monkeypatch.setattr(generation, "ROUND", request.param)
        return request.param

    @pytest.fixture
    def ends_early(self, model):
        """A model that ends its answers at different steps; returns them, made one by one."""
        end = argmax_loop(model, PROMPTS[0], [], steps=12)[2]
        model.generation_config.eos_token_id = end
        expected = [argmax_loop(model, prompt, [1, end], steps=12) for prompt in PROMPTS]
        assert len({len(ids) for ids in expected}) > 1
        return expected

    def test_answers_are_those_of_each_row_alone(self, steps_per_round, model, numbers, ends_early):
        assert answers(model, numbers) == [text(ids) for ids in ends_early]

    def test_rows_that_have_ended_are_not_computed_any_more(self, model, numbers, ends_early, monkeypatch):
        monkeypatch.setattr(generation, "ROUND", 1)
        sizes, generate_tokens = [], model.generate
        monkeypatch.setattr(
            model, "generate", lambda **given: sizes.append(len(given["input_ids"])) or generate_tokens(**given)
        )
        answers(model, numbers)
        assert sizes == [sum(len(ids) >= step for ids in ends_early) for step in range(12)]

    def test_limits_of_each_row(self, steps_per_round, model, numbers):
        limits = [3, 1, 12, 7, 5]
        expected = [
            text(argmax_loop(model, prompt, [1], steps=limit)) for prompt, limit in zip(PROMPTS, limits, strict=True)
        ]
        assert answers(model, numbers, limits=limits) == expected

    def test_no_repeated_ngram_looks_back_over_rounds(self, steps_per_round, model, numbers):
        expected = [text(argmax_loop(model, [5], [1], steps=20, no_repeat=2))]
        decoding = Decoding(max_new_tokens=20, no_repeat_ngram_size=2)
        assert answers(model, numbers, decoding, prompts=[[5]]) == expected

    def test_a_model_without_cache(self, steps_per_round, model, numbers):
        expected = answers(model, numbers)
        model.config.use_cache = False
        assert answers(model, numbers) == expected


def hybrid():
    """A model some of whose layers keep states instead of keys and values."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}
    config = Lfm2Config(**sizes, **heads, eos_token_id=1, pad_token_id=0, bos_token_id=None, initializer_range=0.3)
    return Lfm2ForCausalLM(config).eval()


def test_a_model_that_keeps_states(numbers, monkeypatch):
    model, prompts = hybrid(), [PROMPTS[0]] * 3
    monkeypatch.setattr(generation, "ROUND", 2)
    limits = [2, 9, 5]
    expected = [text(argmax_loop(model, PROMPTS[0], [1], limit)) for limit in limits]
    assert answers(model, numbers, prompts=prompts, limits=limits) == expected


class TestLimits:
    def test_without_a_ratio(self):
        assert Decoding(max_new_tokens=9).limits([1, 50]) == [9, 9]

    def test_with_a_ratio(self):
        assert Decoding(max_new_tokens=40, max_length_ratio=1.5).limits([1, 5, 6, 7, 26, 27, 100]) == [
            8, 8, 9, 11, 39, 40, 40
        ]  # fmt: skip

    def test_no_answer_is_longer_than_it_may_be(self):
        assert Decoding(max_new_tokens=4, max_length_ratio=1.5).limits([1, 100]) == [4, 4]


@pytest.mark.parametrize(("bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_bf16_is_what_answers_are_computed_in(model, numbers, bf16, dtype):
    seen = set()
    model.lm_head.register_forward_hook(lambda module, hidden, logits: seen.add(logits.dtype))
    answers(model, numbers, Decoding(max_new_tokens=3, bf16=bf16))
    assert seen == {dtype}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_model_that_answers_in_bf16_is_averaged_by_ddp_as_before(model, numbers):
    """Its parameters must not change their type, even for a while: autograd forgets DDP's hooks with them."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        replica, reduced = DistributedDataParallel(model.train()), []

        def average(state, bucket):
            reduced.append(bucket.index())
            done = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        replica.register_comm_hook(None, average)
        counts = []
        for _ in range(2):
            reduced.clear()
            replica(torch.tensor([PROMPTS[0]])).logits.sum().backward()
            counts.append(len(reduced))
            answers(model, numbers, Decoding(max_new_tokens=3, bf16=True))
    finally:
        dist.destroy_process_group()
    assert counts[0] > 0
    assert counts[1] == counts[0]


def test_a_compiled_body_is_not_compiled_again_for_answers(model, numbers):
    expected, compiled = answers(model, numbers), []
    model.base_model.compile(backend=lambda graph, _: compiled.append(graph) or graph)
    assert answers(model, numbers) == expected
    assert not compiled
    model(torch.ones(1, 4, dtype=torch.int64))
    assert compiled, "elsewhere it is as it was"


def test_tied_weights_are_one_in_bf16_too(numbers):
    model = lively_model(tie_word_embeddings=True)
    seen = []
    model.lm_head.register_forward_hook(lambda module, *_: seen.append(module.weight.dtype))
    answers(model, numbers, Decoding(max_new_tokens=2, bf16=True))
    assert set(seen) == {torch.bfloat16}
    assert model.lm_head.weight is model.model.embed_tokens.weight


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


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, but is 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number of at least 1, but is 2.5"),
        ({"temperature": -0.1}, r"temperature must be 0 \(greedy\) or positive, finite too, but is -0.1"),
        ({"temperature": math.nan}, "temperature must be .* but is nan"),
        ({"top_k": -1}, "top_k must be a whole number of at least 0, but is -1"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], where 1 is all tokens, but is 0.0"),
        ({"top_p": 1.5}, "top_p must lie in"),
        ({"no_repeat_ngram_size": -6}, "no_repeat_ngram_size must be a whole number of at least 0"),
        ({"max_length_ratio": 0.0}, "max_length_ratio must be positive"),
    ],
    ids=str,
)
def test_decoding_out_of_range(wrong, message):
    with pytest.raises(SettingError, match=f"decoding: {message}"):
        Decoding(**wrong)


def test_paper_decoding():
    assert (PAPER_DECODING.temperature, PAPER_DECODING.no_repeat_ngram_size) == (0.01, 6)
    assert (PAPER_DECODING.max_new_tokens, PAPER_DECODING.seed) == (256, 10)
