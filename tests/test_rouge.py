import random

import lightning as L
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.demos.boring_classes import BoringModel
from rouge_score.rouge_scorer import RougeScorer
from tiny import QUIET

from srd_lightning import RougeL
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


class TestRougeLMetric:
    ANSWERS = ("testing", "two one", "a b c", "")
    REFERENCES = ("testing one two", "testing one two", "a b c", "one")
    MEAN = (1 / 2 + 2 / 5 + 1 + 0) / 4

    def test_is_the_mean_over_all_batches(self):
        metric = RougeL()
        metric.update(self.ANSWERS[:3], self.REFERENCES[:3])
        metric.update([], [])
        metric.update(self.ANSWERS[3], self.REFERENCES[3])
        assert float(metric.compute()) == pytest.approx(self.MEAN)
        metric.reset()
        assert metric.compute().isnan()

    def test_adds_up_over_ranks(self):
        ranks = [RougeL(), RougeL()]
        for rank, metric in enumerate(ranks):
            metric.update(self.ANSWERS[3 * rank : 3 + rank], self.REFERENCES[3 * rank : 3 + rank])
        states = iter([[metric.total for metric in ranks], [metric.weight for metric in ranks]])
        ranks[0].sync(dist_sync_fn=lambda *_, **__: next(states), distributed_available=lambda: True)
        assert float(ranks[0].total / ranks[0].weight) == pytest.approx(self.MEAN)

    def test_in_a_module_of_ones_own(self, tmp_path):
        class Answering(BoringModel):
            def __init__(self):
                super().__init__()
                self.rouge_l = RougeL()

            def validation_step(self, batch, batch_idx):
                self.rouge_l.update(TestRougeLMetric.ANSWERS[batch_idx], TestRougeLMetric.REFERENCES[batch_idx])
                self.log("val_rouge_l", self.rouge_l)

        trainer = L.Trainer(limit_val_batches=4, default_root_dir=tmp_path, **QUIET)
        (found,) = trainer.validate(Answering(), verbose=False)
        assert found["val_rouge_l"] == pytest.approx(self.MEAN)

    def test_unequal_numbers_are_refused(self):
        with pytest.raises(ValueError, match="zip"):
            RougeL().update(["a", "b"], ["a"])
