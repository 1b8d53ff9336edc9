import gc
import math
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import references
import torch
from datasets import Dataset
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF
from tiny import PLAIN, lively_model, make_rows, tiny_model, tokenised
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from srd_lightning import cli, criteria
from srd_lightning.criteria import (
    AnswerLength,
    Bleu,
    ChrF,
    Column,
    Criterion,
    ExactMatch,
    InstructionFollowingDifficulty,
    NegativeLogLikelihood,
    NumericAnswer,
    Perplexity,
    RankSurprisalRatio,
    ResponseLength,
    RougeL,
    TeacherKL,
    check_criteria,
)
from srd_lightning.criteria import base as criteria_base
from srd_lightning.criteria.base import ReflectionBatch, score_batch
from srd_lightning.curation.reflection import Reflector
from srd_lightning.curation.student_source import ReflectingStudent
from srd_lightning.data.tokenization import tokenize
from srd_lightning.errors import SettingError
from srd_lightning.evaluation.text_metrics import same_number
from srd_lightning.models.generation import Decoding
from srd_lightning.models.pretrained import Pretrained

ROOT = Path(__file__).parents[1]
GREEDY = Decoding(max_new_tokens=6)
PAIRS = [
    ("The quick brown fox jumps over the lazy dog", "The quick brown dog jumps on the log."),
    ("Der Hund bellt laut.", "Der Hund bellt nicht."),
    ("one two three", "two three four five"),
    ("the cat sat on the mat", "the cat sat on the mat"),
    ("yes", "no"),
    ("yes", ""),
]
ANSWERS = ["ab0", "Say 1", "", "abab ab3!", "12", "no. no", "There are 12."]
"""To the rows of `data`."""
EXACT = 1e-10  # what float64 leaves of the order of sums
KINDS = [
    kind
    for kind in vars(criteria).values()
    if isinstance(kind, type) and issubclass(kind, Criterion) and kind is not Criterion
]
SCORING = [kind for kind in KINDS if kind is not Column]
OF_LOGITS = [NegativeLogLikelihood, Perplexity, RankSurprisalRatio, InstructionFollowingDifficulty, TeacherKL]
each_criterion = pytest.mark.parametrize("kind", KINDS)
each_that_scores = pytest.mark.parametrize("kind", SCORING)
each_of_logits = pytest.mark.parametrize("kind", OF_LOGITS)


@pytest.fixture
def model():
    return lively_model().double()


@pytest.fixture
def data(tokenizer):
    rows = [*make_rows(6), {"instruction": "How many?", "output": "There are 12 of them."}]
    return tokenised(tokenizer, rows)


@pytest.fixture
def seen(model, tokenizer, data):
    """What the model makes of all rows in one batch; takes other models, rows and answers."""

    def see(model=model, rows=None, answers=None):
        return ReflectionBatch(model, tokenizer, rows or data.to_list(), GREEDY, answers=answers)

    return see


def make(kind, **options):
    """Make a criterion anew, its teacher as well."""
    if kind is TeacherKL:
        options = {"teacher": lively_model(seed=1), **options}
    if kind is Column:
        options = {"column": "made_elsewhere", "higher_is_easier": True, **options}
    return kind(**options)


def scores(criterion, reflected):
    """Return the scores as `reflect` stores them."""
    return [row[criterion.column] for row in score_batch(reflected, [criterion])]


def of_texts(criterion, *pairs):
    """Score (reference response, answer) pairs without a model."""
    rows = [{"id": str(number), "response": truth} for number, (truth, _) in enumerate(pairs)]
    return scores(
        criterion, ReflectionBatch(nn.Identity(), None, rows, GREEDY, answers=[answer for _, answer in pairs])
    )


def predictions(model, ids, start):
    """Return (probabilities, token) for every token from ``start`` on, of the model on this row alone, not padded."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0]
    return [(references.softmax(logits[place - 1]), ids[place]) for place in range(start, len(ids))]


def losses(model, ids, start):
    return [-math.log(probabilities[token]) for probabilities, token in predictions(model, ids, start)]


def mean(values):
    return sum(values) / len(values)


class TestNegativeLogLikelihood:
    def test_is_the_mean_over_the_response_and_its_end(self, model, tokenizer, data, seen):
        expected = []
        for row in data:
            found = losses(model, row["input_ids"], row["prompt_length"])
            assert len(found) == len(row["response"]) + 1
            assert row["input_ids"][-1] == tokenizer.eos_token_id
            expected.append(mean(found))
        assert scores(NegativeLogLikelihood(), seen()) == pytest.approx(expected, rel=EXACT)

    def test_a_response_that_was_cut_has_no_end(self, model, tokenizer, seen):
        cut, _ = tokenize(Dataset.from_list(make_rows(5)), tokenizer, PLAIN, max_length=12, max_prompt_length=10)
        expected = [mean(losses(model, row["input_ids"], row["prompt_length"])) for row in cut]
        assert any(row["input_ids"][-1] != tokenizer.eos_token_id for row in cut)
        assert scores(NegativeLogLikelihood(), seen(rows=cut.to_list())) == pytest.approx(expected, rel=EXACT)


class TestPerplexity:
    def test_is_the_inverse_geometric_mean_of_the_probabilities(self, model, data, seen):
        expected = []
        for row in data:
            found = predictions(model, row["input_ids"], row["prompt_length"])
            product = math.prod(float(probabilities[token]) for probabilities, token in found)
            expected.append(product ** (-1 / len(found)))
        assert scores(Perplexity(), seen()) == pytest.approx(expected, rel=EXACT)

    def test_is_finite_for_a_student_that_is_quite_wrong(self, model, seen):
        with torch.no_grad():
            model.lm_head.weight *= 1e4
        assert min(scores(NegativeLogLikelihood(), seen())) > 710  # more than exp can take
        assert all(math.isfinite(score) for score in scores(Perplexity(), seen()))


class Says(nn.Module):
    """A model that gives these likelihoods at each position, whatever it reads."""

    def __init__(self, likelihoods):
        super().__init__()
        self.head = nn.Identity()
        self.logits = nn.Parameter(torch.tensor([likelihoods]).log(), requires_grad=False)

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(logits=self.head(self.logits))


class TestRankSurprisalRatio:
    @pytest.mark.parametrize("options", [{}, {"max_rank": 1}, {"max_rank": 60}, {"max_rank": 200}], ids=str)
    def test_is_the_summed_rank_over_the_summed_loss(self, model, data, seen, options):
        expected, ranks = [], []
        for row in data:
            found = predictions(model, row["input_ids"], row["prompt_length"])
            ranks.append([place_of(token, probabilities) for probabilities, token in found])
            clipped = [min(rank, options.get("max_rank", 100)) for rank in ranks[-1]]
            expected.append(sum(clipped) / sum(losses(model, row["input_ids"], row["prompt_length"])))
        assert min(map(min, ranks)) < 60 < 200 < max(map(max, ranks))
        assert scores(RankSurprisalRatio(**options), seen()) == pytest.approx(expected, rel=EXACT)

    @pytest.mark.parametrize(("max_rank", "summed_rank"), [(1, 2), (2, 3), (100, 3)])
    def test_by_hand(self, seen, max_rank, summed_rank):
        likelihoods = [[1 / 2, 1 / 4, 1 / 8, 1 / 8], [3 / 4, 1 / 8, 1 / 16, 1 / 16], [1 / 4] * 4]
        reflected = seen(Says(likelihoods), [{"id": "a", "input_ids": [3, 0, 1], "prompt_length": 1}])
        found = scores(RankSurprisalRatio(max_rank), reflected)  # the likeliest of 1/2, and the second of 1/8
        assert found == pytest.approx([summed_rank / (math.log(2) + math.log(8))])

    def test_rank_one_is_the_likeliest(self, model, tokenizer, seen):
        prompt = tokenizer("Say").input_ids
        (answer,) = model.generate(torch.tensor([prompt]), max_new_tokens=5, do_sample=False, eos_token_id=None)
        rows = [{"id": "a", "input_ids": answer.tolist(), "prompt_length": len(prompt)}]
        assert seen(rows=rows).token_ranks.tolist() == [1] * 5

    def test_is_finite_for_a_student_that_is_quite_sure(self, seen):
        reflected = seen(Says([[1.0, 1e-300], [0.5, 0.5]]), [{"id": "a", "input_ids": [3, 0], "prompt_length": 1}])
        assert scores(NegativeLogLikelihood(), reflected) == [0]
        assert math.isfinite(scores(RankSurprisalRatio(), reflected)[0])


def place_of(token, probabilities):
    """Return the place of a token, from 1, in the list of all, likeliest first."""
    likeliest_first = sorted(range(len(probabilities)), key=lambda other: probabilities[other], reverse=True)
    return likeliest_first.index(token) + 1


class TestInstructionFollowingDifficulty:
    def test_is_the_loss_with_the_prompt_over_the_loss_after_the_end_token(self, model, tokenizer, data, seen):
        assert tokenizer.bos_token_id is None
        found = scores(InstructionFollowingDifficulty(), seen())
        assert found == pytest.approx(ifd(model, data, tokenizer.eos_token_id), rel=EXACT)

    def test_is_the_loss_with_the_prompt_over_the_loss_after_the_beginning_token(self, model, tokenizer, data, seen):
        before = scores(InstructionFollowingDifficulty(), seen())
        tokenizer.bos_token = "<extra_id_3>"
        found = scores(InstructionFollowingDifficulty(), seen())
        assert found == pytest.approx(ifd(model, data, tokenizer.bos_token_id), rel=EXACT)
        assert all(abs(new - old) > 1e-3 for new, old in zip(found, before, strict=True))

    def test_a_beginning_token_of_number_zero_is_one(self, model, tokenizer, data, seen):
        tokenizer.bos_token = tokenizer.pad_token
        assert tokenizer.bos_token_id == 0
        assert scores(InstructionFollowingDifficulty(), seen()) == pytest.approx(ifd(model, data, 0), rel=EXACT)


def ifd(model, data, first):
    responses = [(row["input_ids"], row["prompt_length"]) for row in data]
    return [mean(losses(model, ids, start)) / mean(losses(model, [first, *ids[start:]], 1)) for ids, start in responses]


class TestTeacherKL:
    @pytest.fixture
    def teacher(self):
        return lively_model(seed=1).double()

    def kl(self, teacher, student, data):
        """Return KL(teacher ‖ student) of each row, one token at a time."""
        expected = []
        for row in data:
            ps, qs = (predictions(model, row["input_ids"], row["prompt_length"]) for model in (teacher, student))
            expected.append(mean([references.forward_kl(p, q).item() for (p, _), (q, _) in zip(ps, qs, strict=True)]))
        return expected

    def test_is_the_mean_over_the_response(self, model, teacher, data, seen):
        expected = self.kl(teacher, model, data)
        assert scores(TeacherKL(teacher), seen()) == pytest.approx(expected, rel=EXACT)
        assert expected != pytest.approx(self.kl(model, teacher, data), rel=0.01)

    def test_is_zero_where_the_student_is_the_teacher(self, model, seen):
        assert scores(TeacherKL(model), seen()) == [0] * 7

    def test_of_a_teacher_in_a_folder(self, model, teacher, data, seen, tmp_path):
        teacher.save_pretrained(tmp_path)
        found = scores(TeacherKL(Pretrained(str(tmp_path), dtype="float64")), seen())
        assert found == pytest.approx(self.kl(teacher, model, data), rel=EXACT)

    def test_a_teacher_in_a_folder_is_loaded_when_needed_and_freed(self, seen, in_folder):
        criterion = TeacherKL(in_folder.teacher)
        criterion.settings()
        assert in_folder.loaded == []
        first, second = (scores(criterion, seen()) for _ in range(2))
        (held,) = in_folder.loaded
        assert held() is not None
        criterion.finish()
        gc.collect()
        assert held() is None
        assert first == second == scores(criterion, seen())
        assert len(in_folder.loaded) == 2

    def test_reflection_frees_the_teacher(self, model, tokenizer, data, in_folder, tmp_path):
        student = ReflectingStudent(model, None, tokenizer, PLAIN)
        reflector = Reflector([TeacherKL(in_folder.teacher)], GREEDY, tokens_per_batch=100, threads=1)
        reflector.scores(data, model, student, tmp_path / "scores", {})
        gc.collect()
        assert [held() for held in in_folder.loaded] == [None]

    @pytest.fixture
    def in_folder(self, tmp_path, monkeypatch):
        """A teacher in a folder, and weak references to what is loaded from there."""
        lively_model(seed=1).save_pretrained(tmp_path / "teacher")
        load = Pretrained.model

        folder = SimpleNamespace(teacher=Pretrained(str(tmp_path / "teacher")), loaded=[])

        def watched(self):
            model = load(self)
            folder.loaded.append(weakref.ref(model))
            return model

        monkeypatch.setattr(Pretrained, "model", watched)
        return folder

    def test_a_teacher_that_was_passed_stays(self, teacher, seen):
        criterion = TeacherKL(teacher)
        first = scores(criterion, seen())
        criterion.finish()
        assert scores(criterion, seen()) == first

    def test_dropout_is_off_for_a_teacher_left_in_train_mode(self, model, seen):
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=384, n_embd=32, n_layer=2, n_head=2, eos_token_id=1, bos_token_id=None)
        teacher = GPT2LMHeadModel(config).train()
        found = scores(TeacherKL(teacher), seen())
        assert all(module.training for module in teacher.modules())
        assert found == scores(TeacherKL(teacher.eval()), seen())

    def test_settings_tell_teachers_apart_by_their_weights(self):
        before, same, other = (TeacherKL(lively_model(seed)).settings() for seed in (1, 1, 2))
        assert before == same != other
        changed = lively_model(seed=1)
        with torch.no_grad():
            changed.lm_head.weight[3, 5] += 1e-4
        assert TeacherKL(changed).settings() not in (before, other)

    def test_settings_tell_teachers_in_folders_apart_by_their_names(self):
        before = TeacherKL(Pretrained("a")).settings()
        assert before == TeacherKL(Pretrained("a")).settings()
        assert (
            len({before, TeacherKL(Pretrained("b")).settings(), TeacherKL(Pretrained("a", revision="1")).settings()})
            == 3
        )

    def test_settings_are_the_same_while_the_teacher_is_loaded(self, seen, in_folder):
        criterion = TeacherKL(in_folder.teacher)
        before = criterion.settings()
        scores(criterion, seen())
        assert criterion.settings() == before


class TestLengths:
    def test_answers_are_counted_in_words(self):
        pairs = [("x", "one two  three\nfour"), ("x", ""), ("x", " five, six. "), ("x", "it's")]
        assert of_texts(AnswerLength(), *pairs) == [4, 0, 2, 1]

    def test_responses_are_counted_in_tokens_with_their_end(self, tokenizer, seen):
        rows = [{"instruction": "A much longer prompt", "output": text} for text in ("a", "abcd efg", "é")]
        rows = tokenised(tokenizer, rows).to_list()
        assert scores(ResponseLength(), seen(rows=rows)) == [2, 9, 3]  # tokens are bytes


class TestAnswersAgainstResponses:
    def test_rouge_l_is_that_of_the_reference(self):
        scorer = RougeScorer(["rougeL"], use_stemmer=True)
        expected = [scorer.score(truth, answer)["rougeL"].fmeasure for truth, answer in PAIRS]
        assert of_texts(RougeL(), *PAIRS) == pytest.approx(expected, abs=1e-12)

    def test_chrf_is_that_of_a_corpus_of_one(self):
        expected = [CHRF().corpus_score([answer], [[truth]]).score for truth, answer in PAIRS]
        assert of_texts(ChrF(), *PAIRS) == pytest.approx(expected)

    def test_chrf_by_hand(self):
        # Of abcd, ab has all 1-grams and 2-grams right and finds 1/2 and 1/3 of them; recall counts four times.
        precision, recall = 1, (1 / 2 + 1 / 3) / 2
        expected = 100 * 5 * precision * recall / (4 * precision + recall)
        assert of_texts(ChrF(), ("abcd", "ab")) == pytest.approx([expected])

    def test_bleu_is_that_of_a_corpus_of_one(self):
        metric = BLEU(effective_order=True)
        expected = [metric.corpus_score([answer], [[truth]]).score for truth, answer in PAIRS]
        assert of_texts(Bleu(), *PAIRS) == pytest.approx(expected)

    def test_bleu_by_hand(self):
        pairs = [("the cat sat down", "the cat sat"), ("the cat sat", "the cat sat"), ("a b c d e", "a b c x d")]
        short = math.exp(1 - 4 / 3)  # all n-grams are right; a word is missing
        changed = (4 / 5 * 2 / 4 * 1 / 3 * 1 / 4) ** (1 / 4)  # no 4-gram is right: half of one, of two
        assert of_texts(Bleu(), *pairs) == pytest.approx([100 * short, 100, 100 * changed])

    @pytest.mark.parametrize("kind", [ChrF, Bleu])
    def test_without_sacrebleu_the_extra_is_named(self, kind, monkeypatch):
        monkeypatch.setitem(sys.modules, "sacrebleu", None)
        with pytest.raises(SettingError, match=r'pip install "srd-lightning\[translation\]"'):
            kind()


class TestExactMatch:
    @pytest.mark.parametrize(
        ("truth", "answer", "expected"),
        [
            ("Paris", "Paris", 1),
            ("Paris", "paris.", 1),
            ("New York, USA", '  "new york\nUSA!"', 1),
            ("été", "Été", 1),
            ("3.5", "3.5!", 1),
            ("Straße", "STRASSE", 1),
            ("+", "-", 0),
            ("कि", "कु", 0),
            ("cafe\u0301", "cafe", 0),
            ("Paris", "Lyon", 0),
            ("Paris", "It is Paris", 0),
            ("a b", "b a", 0),
            ("a b", "a b b", 0),
            ("a b", "ab", 0),
            ("3.5", "35", 0),
            ("été", "ete", 0),
            ("Paris", "", 0),
        ],
    )
    def test_by_hand(self, truth, answer, expected):
        assert of_texts(ExactMatch(), (truth, answer)) == [expected]


class TestNumericAnswer:
    @pytest.mark.parametrize(
        ("truth", "answer"),
        [
            ("42", "42"),
            ("0.5", ".5"),
            ("4", "It is GPT-4"),
            ("5", "3-5"),
            ("-3", "−3"),
            ("He has 6 * 7 = 42 left.\n#### 42", "It is 42."),
            ("#### 42", "The answer is 42, I think"),
            ("#### 42", "First 3, then 7, in the end 42"),
            ("1,200", "1200"),
            ("1200", "1,200,"),
            ("1,234,567.5", "1234567.50"),
            ("2.50", "$2.5"),
            ("0.5", "0.50 litres"),
            ("-3", "It is -3."),
            ("-3", "5 - 8 = -3"),
            ("2", "3-1 = 2"),
            ("0", "-0"),
            ("50", "50%"),
            ("042", "42"),
        ],
    )
    def test_same(self, truth, answer):
        assert same_number(truth, answer) is True
        assert of_texts(NumericAnswer(), (truth, answer)) == [1]

    @pytest.mark.parametrize(
        ("truth", "answer"),
        [
            ("42", "43"),
            ("#### 42", "42 and then 7"),
            ("#### 42", "none"),
            ("none", "42"),
            ("none", "none"),
            ("42", ""),
            ("3", "-3"),
            ("2.5", "2"),
            ("2.5", "25"),
            ("1.234", "1,234"),
            ("1200", "200"),
            ("0.001", "0.002"),
            ("1000000", "1000001"),
            ("1000000000", "1000000001"),
        ],
    )
    def test_different(self, truth, answer):
        assert same_number(truth, answer) is False
        assert of_texts(NumericAnswer(), (truth, answer)) == [0]


class TestColumn:
    def test_names_what_stands_in_a_file(self):
        column = Column("judge", higher_is_easier=True, weight=3.0)
        assert (column.column, column.higher_is_easier, column.weight) == ("judge", True, 3.0)
        assert column.from_answers is False

    def test_two_stand_side_by_side(self):
        first, second = Column("judge", higher_is_easier=True), Column("length", higher_is_easier=False)
        assert (first.column, first.higher_is_easier) == ("judge", True)
        assert (second.column, second.higher_is_easier) == ("length", False)
        assert first.settings() != second.settings()

    def test_cannot_be_computed(self, seen):
        with pytest.raises(ValueError, match="scores of 'judge' are read from a file"):
            scores(Column("judge", higher_is_easier=True), seen())


class Shouting(Criterion):
    column, higher_is_easier = "shouting", False

    def __init__(self, sign="!", weight=1.0):
        super().__init__(weight)
        self.sign = sign

    def scores(self, reflected):
        return [answer.count(self.sign) for answer in reflected.answers]


class TestCriterionOfOnesOwn:
    def test_scores_stand_beside_the_others(self, seen):
        found = score_batch(seen(answers=["!", "no", "a!b!!", "", "?", "!!", "x"]), [Shouting(), AnswerLength()])
        assert [row["shouting"] for row in found] == [1, 0, 3, 0, 0, 2, 0]
        assert [row["answer_length"] for row in found] == [1, 1, 1, 0, 1, 1, 1]

    def test_its_own_arguments_are_its_settings(self):
        assert Shouting().settings() == Shouting(weight=3.0).settings()
        assert Shouting().settings() != Shouting("?").settings()
        assert "Shouting" in Shouting().settings()

    def test_needs_neither_a_constructor_nor_more_attributes(self, seen):
        class Silence(Criterion):
            column, higher_is_easier = "silence", True

            def scores(self, reflected):
                return [not answer for answer in reflected.answers]

        criterion = Silence()
        assert (criterion.weight, criterion.from_answers) == (1.0, False)
        assert scores(criterion, seen(answers=["a", "", "b", "", "", "c", "d"])) == [0, 1, 0, 1, 1, 0, 0]
        criterion.finish()

    def test_must_define_scores(self, seen):
        class Nothing(Criterion):
            column, higher_is_easier = "nothing", True

        with pytest.raises(NotImplementedError, match=r"Nothing must define scores\(reflected\)"):
            scores(Nothing(), seen())


class TestCheckCriteria:
    def test_two_of_one_column(self):
        with pytest.raises(ValueError, match="not called id, answer, cut, but rank_surprisal_ratio stands in"):
            check_criteria([RougeL(), RankSurprisalRatio(), RankSurprisalRatio(max_rank=5)])

    def test_two_of_one_kind_with_columns_of_their_own(self):
        other = RankSurprisalRatio(max_rank=5)
        other.column = "other"
        assert check_criteria([RankSurprisalRatio(), other])[1] is other

    @pytest.mark.parametrize("name", ["id", "answer"])
    def test_names_that_are_taken(self, name):
        with pytest.raises(ValueError, match=f"{name} stands in"):
            check_criteria([Column(name, higher_is_easier=True)])

    @pytest.mark.parametrize("weight", [0.0, -1.0, math.nan])
    def test_weights(self, weight):
        with pytest.raises(ValueError, match="weights of criteria must be positive, but those of rouge_l are not"):
            check_criteria([RougeL(weight=weight), NegativeLogLikelihood()])


class TestSettings:
    class Judge(Criterion):
        column, higher_is_easier = "judge", True

        def __init__(self, judge):
            super().__init__()
            self.judge = judge

    def test_of_a_model_are_its_weights(self):
        first, other = (tiny_model(seed) for seed in (0, 1))
        assert self.Judge(first).settings() == self.Judge(tiny_model(0)).settings() != self.Judge(other).settings()

    def test_that_would_be_others_in_every_run_are_refused(self):
        with pytest.raises(ValueError, match=r"another in every run; define settings\(\)"):
            self.Judge(object()).settings()


def test_a_teacher_with_another_vocabulary(seen):
    with pytest.raises(ValueError, match="logits of 384 and 400 tokens; TeacherKL needs"):
        scores(TeacherKL(tiny_model(vocab_size=400)), seen())


class TestEveryCriterion:
    def test_columns_are_unique(self):
        assert len({make(kind).column for kind in KINDS}) == len(KINDS) == 13

    def test_those_that_measure_success_are_easier_where_they_are_higher(self):
        higher = {kind for kind in SCORING if make(kind).higher_is_easier}
        assert higher == {RougeL, ExactMatch, NumericAnswer, ChrF, Bleu}
        for kind in higher:
            right, wrong = of_texts(kind(), ("12 red cats", "12 red cats"), ("12 red cats", "7"))
            assert right > wrong

    @each_criterion
    def test_weight_changes_neither_settings_nor_scores(self, kind, seen):
        light, heavy = make(kind), make(kind, weight=2.5)
        assert (light.weight, heavy.weight) == (1.0, 2.5)
        assert light.settings() == heavy.settings()
        if kind is not Column:
            assert scores(light, seen(answers=ANSWERS)) == scores(heavy, seen(answers=ANSWERS))

    @each_criterion
    def test_settings_are_those_of_another_that_is_made_alike(self, kind):
        assert make(kind).settings() == make(kind).settings()
        assert "0x" not in make(kind).settings()  # an address in memory

    @each_that_scores
    def test_settings_stay_as_they_are_while_it_scores(self, kind, seen):
        criterion = make(kind)
        before = criterion.settings()
        scores(criterion, seen(answers=ANSWERS))
        assert criterion.settings() == before

    def test_settings_tell_them_apart(self):
        assert len({make(kind).settings() for kind in KINDS}) == len(KINDS)
        assert RankSurprisalRatio(50).settings() != RankSurprisalRatio().settings()
        assert RankSurprisalRatio(100).settings() == RankSurprisalRatio().settings()

    @each_that_scores
    def test_from_answers_says_whether_answers_will_do(self, kind, seen):
        criterion, no_student = make(kind), seen(nn.Identity(), answers=ANSWERS)
        if criterion.from_answers:
            assert scores(criterion, no_student) == scores(criterion, seen(answers=ANSWERS))
        else:
            with pytest.raises(StopIteration):  # no parameters
                scores(criterion, no_student)

    @each_of_logits
    def test_no_answer_is_generated_for_those_that_look_at_logits(self, kind, seen):
        reflected = seen()
        scores(make(kind), reflected)
        assert "answers" not in vars(reflected)

    @each_that_scores
    def test_batches_do_not_matter(self, kind, data, seen):
        criterion, model, rows = make(kind), lively_model(), data.to_list()
        expected = [scores(criterion, seen(model, [row], [text]))[0] for row, text in zip(rows, ANSWERS, strict=True)]
        assert len(set(expected)) > 1
        assert scores(criterion, seen(model, rows[::-1], ANSWERS[::-1])) == pytest.approx(expected[::-1], rel=1e-5)
        for part in (slice(0, 3), slice(3, 7)):
            assert scores(criterion, seen(model, rows[part], ANSWERS[part])) == pytest.approx(expected[part], rel=1e-5)

    @each_of_logits
    def test_few_rows_at_a_time_give_the_same(self, kind, seen, monkeypatch):
        expected = scores(make(kind), seen())
        sizes, response_logits = [], criteria_base.response_logits

        def watched(model, batch):
            sizes.append(batch["input_ids"].numel())
            return response_logits(model, batch)

        monkeypatch.setattr(criteria_base, "SCORED_AT_ONCE", 40)
        monkeypatch.setattr(criteria_base, "response_logits", watched)
        assert scores(make(kind), seen()) == pytest.approx(expected, rel=1e-5)
        assert len(sizes) > 1
        assert max(sizes) <= 40


class TestCommandLine:
    @pytest.fixture
    def parse(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        config = ["--config", str(ROOT / "configs" / "debug.yaml")]
        return lambda text: cli.parse([*config, f"--data.criteria={text}"]).datamodule.curator.criteria

    def test_short_and_full_names(self, parse):
        first, second, third, fourth = parse(
            "[{class_path: RougeL}, "
            "{class_path: srd_lightning.criteria.RankSurprisalRatio, init_args: {max_rank: 50, weight: 0.5}}, "
            "{class_path: Column, init_args: {column: judge, higher_is_easier: true}}, "
            "{class_path: TeacherKL, init_args: {teacher: {class_path: Pretrained, init_args: {name: gpt2}}}}]"
        )
        assert [type(first), type(second), type(third), type(fourth)] == [RougeL, RankSurprisalRatio, Column, TeacherKL]
        assert (first.weight, second.weight, second.max_rank) == (1.0, 0.5, 50)
        assert (third.column, third.higher_is_easier) == ("judge", True)
        assert fourth.teacher == Pretrained("gpt2")

    def test_every_short_name(self, parse):
        arguments = {
            Column: "{column: judge, higher_is_easier: true}",
            TeacherKL: "{teacher: {class_path: Pretrained, init_args: {name: gpt2}}}",
        }
        entries = [f"{{class_path: {kind.__name__}, init_args: {arguments.get(kind, '{}')}}}" for kind in KINDS]
        assert [type(criterion) for criterion in parse(f"[{', '.join(entries)}]")] == KINDS

    def test_what_is_no_criterion_is_refused(self, parse):
        with pytest.raises(SettingError, match=r"data\.criteria: .*Identity is not one of its classes"):
            parse("[{class_path: torch.nn.Identity}]")
