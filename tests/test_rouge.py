import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from srd_lightning.evaluation.text_metrics import rouge_l


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

    @given(st.text(alphabet="aeiknrstgd ied'-7é\n", max_size=80), st.text(alphabet="aeiknrstgd ied'-7é\n", max_size=80))
    def test_equals_the_scorer_of_google_on_any_text(self, truth, answer):
        expected = RougeScorer(["rougeL"], use_stemmer=True).score(truth, answer)["rougeL"].fmeasure
        assert rouge_l(truth, answer) == pytest.approx(expected, abs=1e-12)
