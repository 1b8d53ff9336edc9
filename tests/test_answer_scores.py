"""What the answers of a test are worth: each score against what it must be, code under its limits, whole test runs."""

import contextlib
import itertools
import time
from types import SimpleNamespace

import pytest
from lightning import Trainer
from sacrebleu.metrics import BLEU, CHRF
from tiny import QUIET, make_rows, tiny_model
from transformers import ByT5Tokenizer

from srd_lightning import AnswerScore, AnswerScores, Decoding, KDLightningModule, SRDDataModule
from srd_lightning.distributed.process_group import Ranks
from srd_lightning.errors import DataError, SettingError
from srd_lightning.evaluation import code_tests
from srd_lightning.evaluation.answer_scores import CorpusBleu, CorpusChrF, ExactAccuracy, NumericAccuracy
from srd_lightning.evaluation.code_tests import PassAtK, code_of, pass_at_k

PROMPT = "Write a function that adds two numbers.\nassert add(1, 2) == 3\nassert add(0, 0) == 0\n"
RIGHT = "def add(a, b):\n    return a + b"


def row(response, answer, prompt=""):
    return {"prompt": prompt, "response": response, "answer": answer}


ROWS = [
    row("the cat sat on the mat", "the cat sat on a mat"),
    row("It is 4.", "4 it is"),
    row("a b c d e", "a b c d e"),
]


def test_shares_of_right_answers():
    assert (
        NumericAccuracy().score([row("#### 7", "7."), row("#### 7", "8"), row("7", "seven"), row("7", "1 + 6 = 7")])
        == 0.5
    )
    assert ExactAccuracy().score(ROWS) == pytest.approx(1 / 3)


def test_scores_of_translation_are_of_all_rows_together():
    answers, references = [found["answer"] for found in ROWS], [[found["response"] for found in ROWS]]
    assert CorpusBleu().score(ROWS) == pytest.approx(BLEU().corpus_score(answers, references).score)
    assert CorpusChrF().score(ROWS) == pytest.approx(CHRF().corpus_score(answers, references).score)
    assert CorpusChrF(word_order=2).score(ROWS) == pytest.approx(
        CHRF(word_order=2).corpus_score(answers, references).score
    )
    one = [BLEU(effective_order=True).sentence_score(found["answer"], [found["response"]]).score for found in ROWS]
    assert CorpusBleu().score(ROWS) != pytest.approx(sum(one) / 3, rel=0.01)


def test_another_tokenizer_of_bleu():
    with pytest.raises(SettingError, match="sacrebleu has no tokenize 'none_such' here"):
        CorpusBleu("none_such")
    assert CorpusBleu("char").score(ROWS) != CorpusBleu().score(ROWS)


class TestPassAtK:
    def passes(self, code, tests=("assert True",), **limits):
        return PassAtK(**limits).passes(code, tests)

    @pytest.mark.parametrize(
        ("code", "passes"),
        [
            (RIGHT, True),
            (RIGHT.replace("+", "-"), False),
            ("def add(a, b):", False),
            (f"{RIGHT}\nimport sys; sys.exit(0)", False),
            (f"{RIGHT}\nraise SystemExit", False),
            (f"{RIGHT}\nprint(input())", False),
            (f"{RIGHT}\nprint('a' * 10_000_000)", True),
            (f"{RIGHT}\ns = '\ud83d'", True),
            ("import os; os._exit(0)", False),
            ("import os; os.write(1, b'0' * 64); os._exit(0)", False),
            ("import os; os.execlp('true', 'true')", False),
        ],
        ids=[
            "right",
            "wrong",
            "no_code",
            "exit",
            "system_exit",
            "asks",
            "talks",
            "surrogate",
            "ends",
            "lies",
            "becomes",
        ],
    )
    def test_code_and_its_tests(self, code, passes):
        assert self.passes(code, code_tests.TEST.findall(PROMPT)) is passes

    def test_it_ends_in_time(self, monkeypatch):
        monkeypatch.setattr(code_tests, "GRACE", 0)
        start = time.monotonic()
        assert not self.passes("import time; time.sleep(600)", seconds=1)
        assert not self.passes("import subprocess; subprocess.run(['sleep', '600'])", seconds=1)
        assert time.monotonic() - start < 300

    def test_it_ends_when_it_has_had_its_share_of_the_processor(self):
        assert not self.passes("while True: pass", seconds=1)

    def test_memory(self):
        assert self.passes("b'a' * 2**24", memory_mb=256)
        assert not self.passes("b'a' * 2**29", memory_mb=256)

    def test_files(self):
        assert self.passes("import os; assert os.listdir() == []; open('a', 'w').write('b')")
        assert not self.passes("file = open('a', 'wb'); file.write(bytes(2**21)); file.flush()")

    def test_the_environment_is_not_ours(self, monkeypatch):
        monkeypatch.setenv("SECRET", "1")
        assert self.passes("import os; assert 'SECRET' not in os.environ")

    @pytest.mark.skipif(not code_tests.without_network(), reason="unshare cannot cut off the network here")
    def test_the_network_is_out_of_reach(self):
        assert self.passes("import socket; assert [name for _, name in socket.if_nameindex()] == ['lo']")

    def test_where_the_network_cannot_be_cut_off_it_is_said(self, monkeypatch):
        monkeypatch.setattr(code_tests, "without_network", lambda: ())
        with pytest.warns(UserWarning, match="with the network within its reach"):
            PassAtK().check([PROMPT])

    def test_code_between_fences(self):
        assert code_of(f"Here:\n```python\n{RIGHT}\n```\nand\n```\nx\n```") == f"{RIGHT}\n"
        assert code_of(RIGHT) == RIGHT

    @pytest.mark.parametrize(("answers", "right", "k"), [(4, 1, 1), (4, 2, 2), (5, 0, 3), (3, 3, 2), (6, 2, 5)])
    def test_the_estimate_is_the_share_of_choices_with_a_right_one(self, answers, right, k):
        choices = list(itertools.combinations(range(answers), k))
        expected = sum(any(answer < right for answer in choice) for choice in choices) / len(choices)
        assert pass_at_k(answers, right, k) == pytest.approx(expected)

    def test_several_answers_to_each_prompt(self):
        other = PROMPT.replace("add", "plus")
        rows = [row("", RIGHT, PROMPT), row("", "1", PROMPT), row("", "2", PROMPT), row("", "3", PROMPT)]
        rows += [row("", RIGHT.replace("add", "plus"), other)] * 2
        assert PassAtK().score(rows) == pytest.approx((1 / 4 + 1) / 2)
        assert PassAtK(k=2).score(rows) == pytest.approx((1 / 2 + 1) / 2)
        assert (PassAtK().name, PassAtK(k=2).name) == ("pass_at_1", "pass_at_2")

    def test_prompts_that_cannot_be_scored(self):
        with pytest.raises(DataError, match="but 'Write a function' has none"):
            PassAtK().check(["Write a function"])
        with pytest.raises(DataError, match=r"the test 'assert f.1. == 2<.im_end.>' is no Python"):
            PassAtK().check(["Write f\nassert f(1) == 2<|im_end|>\n"])
        with pytest.raises(DataError, match=r"PassAtK.k=2. needs 2 answers .* stands in 1 test rows"):
            PassAtK(k=2).check([PROMPT])
        PassAtK(k=2).check([PROMPT, PROMPT])

    def test_settings_out_of_range(self):
        with pytest.raises(SettingError, match=r"at least 1, but has k=0, seconds=0\.5"):
            PassAtK(k=0, seconds=0.5)


class Rows(AnswerScore):
    """Keeps what it is given."""

    name = "rows"

    def score(self, rows):
        self.rows = rows
        return len(rows)


class TestCallback:
    def run(self, scores, rows, **settings):
        module = KDLightningModule(tiny_model(), kd_weight=0.0, decoding=Decoding(max_new_tokens=3, **settings))
        data = SRDDataModule({"test": rows}, ByT5Tokenizer(), eval_batch_size=2)
        trainer = Trainer(**QUIET, callbacks=[AnswerScores(scores)])
        return trainer.test(module, data, verbose=False)[0], trainer, module, data

    def test_each_row_is_scored_once_and_logged(self):
        score = Rows()
        for _ in range(2):  # a second test begins anew
            found, *_ = self.run([score, NumericAccuracy()], make_rows(5))
        assert found["test_rows"] == 5
        assert found["test_numeric_accuracy"] == 0
        assert sorted(row["response"] for row in score.rows) == sorted(row["output"] for row in make_rows(5))
        assert {*found} == {"test_rows", "test_numeric_accuracy", "test_nll", "test_rouge_l"}

    def test_rows_that_repeat_a_prompt_are_answered_anew(self):
        score = Rows()
        self.run([score], [make_rows(1)[0]] * 6, temperature=1.0)
        assert len({row["answer"] for row in score.rows}) > 3

    def test_what_cannot_be_scored_is_said_before_a_row_is_answered(self, monkeypatch):
        monkeypatch.setattr("srd_lightning.evaluation.answers.generate", None)
        with pytest.raises(DataError, match="begin with assert for its tests"):
            self.run([PassAtK()], make_rows(2))

    def test_another_module(self):
        class Other(KDLightningModule):
            def test_step(self, batch, batch_idx):
                return None

        data = SRDDataModule({"test": make_rows(2)}, ByT5Tokenizer())
        with pytest.raises(SettingError, match="that of Other returned a NoneType"):
            Trainer(**QUIET, callbacks=[AnswerScores([Rows()])]).test(Other(tiny_model(), kd_weight=0.0), data)

    def test_scores_that_are_none_or_share_a_name(self):
        with pytest.raises(SettingError, match="scores must be AnswerScore objects"):
            AnswerScores([NumericAccuracy])
        with pytest.raises(SettingError, match="but chrf is there twice"):
            AnswerScores([CorpusChrF(), CorpusChrF(2)])
        score = Rows()
        score.name = "rouge_l"
        with pytest.raises(SettingError, match="but rouge_l is there twice"):
            AnswerScores([score])


def test_ranks_wait_without_a_time_limit_for_what_the_first_scores(monkeypatch):
    class Team(Ranks):
        waits = False

        @contextlib.contextmanager
        def work_then_wait(self):
            Team.waits = True
            yield lambda: None
            Team.waits = False

    class Slow(AnswerScore):
        name = "slow"

        def score(self, rows):
            return float(Team.waits)

    monkeypatch.setattr("srd_lightning.callbacks.answer_scores.Ranks", Team)
    scores, logged = AnswerScores([Slow()]), {}
    module = SimpleNamespace(log=logged.__setitem__)
    scores.on_test_batch_end(None, module, {"answers": [{"prompt": "", "response": "", "answer": ""}]}, None, 0)
    scores.on_test_epoch_end(None, module)
    assert logged == {"test_slow": 1.0}
