import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import references
import torch
from tiny import PLAIN, in_other_order, make_rows, tokenised

from srd_lightning.criteria import (
    AnswerLength,
    Column,
    Criterion,
    NegativeLogLikelihood,
    Perplexity,
    RankSurprisalRatio,
    RougeL,
)
from srd_lightning.criteria import base as criteria_base
from srd_lightning.curation.curator import rank
from srd_lightning.curation.external_scores import read_scores
from srd_lightning.curation.reflection import Reflector, pinned_threads
from srd_lightning.curation.score_store import stored_scores
from srd_lightning.curation.student_source import ReflectingStudent
from srd_lightning.data.tokenization import ids_of
from srd_lightning.errors import DataError, ModelError, StorageError
from srd_lightning.evaluation.text_metrics import rouge_l
from srd_lightning.models.generation import Decoding, generate, generate_ids

GREEDY = Decoding(max_new_tokens=6)
SAMPLING = Decoding(max_new_tokens=6, temperature=1.0)
PAPER = [RougeL(), NegativeLogLikelihood()]
CPU = torch.device("cpu")
both = pytest.mark.parametrize("decoding", [GREEDY, SAMPLING], ids=["greedy", "sampling"])


@pytest.fixture
def score(model, tokenizer, data, tmp_path):
    """Reflect with these settings; returns the scores of each row by id."""

    def run(folder="scores", rows=data, decoding=GREEDY, criteria=PAPER, tokens=1):
        student, reflector = ReflectingStudent(model, None, tokenizer, PLAIN), Reflector(criteria, decoding, tokens, 1)
        fingerprint = reflector.fingerprint(rows, model, student)
        scores = reflector.scores(rows, model, student, tmp_path / folder, fingerprint)
        ids = ids_of(rows).to_pylist()
        return {
            row_id: {name: values[row] for name, values in scores.columns.items()} for row, row_id in enumerate(ids)
        }

    return run


def files(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.*") if path.is_file()}


def let_only(monkeypatch, batches):
    """Let generation fail after this many batches."""
    left = iter(range(batches))

    def answer(*arguments, **options):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return generate_ids(*arguments, **options)

    monkeypatch.setattr(criteria_base, "generate_ids", answer)


class TestReflector:
    def test_scores_are_those_of_each_row_alone(self, score, model, tokenizer, data):
        scores = score()
        assert sorted(scores) == sorted(data["id"])
        for row in data:
            ids = torch.tensor([row["input_ids"]])
            labels = ids.masked_fill(torch.arange(ids.shape[1]) < row["prompt_length"], -100)
            (answer,) = generate(model, tokenizer, [row["input_ids"][: row["prompt_length"]]], GREEDY)
            assert scores[row["id"]]["nll"] == pytest.approx(model(input_ids=ids, labels=labels).loss.item(), rel=1e-5)
            assert scores[row["id"]]["rouge_l"] == rouge_l(row["response"], answer)

    @pytest.mark.parametrize("tokens", [60, 200, 10_000])
    def test_batches_do_not_matter(self, score, tokens):
        found, expected = score("a", tokens=tokens), score("b")
        for row, scores in found.items():
            assert scores["nll"] == pytest.approx(expected[row]["nll"], rel=1e-5)
            assert scores["rouge_l"] == expected[row]["rouge_l"]

    @both
    def test_order_of_the_rows_does_not_matter(self, score, data, decoding, tmp_path):
        found = score("a", rows=in_other_order(data), decoding=decoding, tokens=100)
        assert found == score("b", decoding=decoding, tokens=100)
        assert files(tmp_path / "a") == files(tmp_path / "b")

    def test_a_second_run_of_other_order_and_batches_computes_nothing(self, score, data, monkeypatch, model):
        scores = score(tokens=100)
        monkeypatch.setattr(model, "forward", None)
        assert score(rows=in_other_order(data), tokens=50) == scores

    def test_a_second_run_writes_nothing_and_moves_no_model(self, score, monkeypatch, model, tmp_path):
        score()
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "scores").glob("[!.]*.*")}
        monkeypatch.setattr(model, "to", None)
        score()
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "scores").glob("[!.]*.*")} == before

    def test_a_criterion_added_later_takes_the_answers_that_are_there(self, score, monkeypatch, tmp_path):
        expected = score("at once", criteria=[*PAPER, AnswerLength(), RankSurprisalRatio()], tokens=100)
        score("later", tokens=100)
        monkeypatch.setattr(criteria_base, "generate_ids", None)
        assert score("later", criteria=[*PAPER, AnswerLength(), RankSurprisalRatio()], tokens=100) == expected
        assert files(tmp_path / "later") == files(tmp_path / "at once")

    def test_no_answers_where_no_criterion_asks_for_them(self, score, monkeypatch):
        monkeypatch.setattr(criteria_base, "generate_ids", None)
        assert {tuple(scores) for scores in score(criteria=[Perplexity()]).values()} == {("perplexity",)}

    def test_another_student_is_refused(self, score, model):
        score()
        with torch.no_grad():
            model.lm_head.weight[3, 5] += 1e-4
        with pytest.raises(StorageError, match="made with another student"):
            score()

    def test_one_changed_row_is_noticed(self, score, tokenizer):
        score()
        rows = make_rows(20)
        rows[7]["output"] += "!"
        with pytest.raises(StorageError, match="made with another rows"):
            score(rows=tokenised(tokenizer, rows))

    def test_the_model_is_back_where_it_was(self, score, model):
        model.train()
        score()
        assert next(model.parameters()).device == CPU
        assert all(module.training for module in model.modules())


@both
class TestAStoppedRun:
    def test_loses_the_batch_in_hand_only_and_gives_the_same_files(self, score, monkeypatch, tmp_path, decoding):
        expected = score("whole", decoding=decoding)
        with monkeypatch.context() as patch:
            let_only(patch, batches=13)
            with pytest.raises(KeyboardInterrupt):
                score(decoding=decoding)
        let_only(monkeypatch, batches=7)  # of 20
        assert score(decoding=decoding) == expected
        assert files(tmp_path / "scores") == files(tmp_path / "whole")

    def test_that_was_killed_while_it_tidied(self, score, monkeypatch, tmp_path, decoding):
        score("whole", decoding=decoding)
        with monkeypatch.context() as patch:
            patch.setattr("srd_lightning.curation.score_store.ScoreStore.compact", None)
            with pytest.raises(TypeError):
                score(decoding=decoding)
        assert len(files(tmp_path / "scores")) > 2
        monkeypatch.setattr(criteria_base, "generate_ids", None)
        score(decoding=decoding)
        assert files(tmp_path / "scores") == files(tmp_path / "whole")

    def test_a_damaged_part_is_made_again(self, score, tmp_path, decoding):
        expected = score(decoding=decoding)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("srd_lightning.curation.score_store.ROWS_PER_SHARD", 6)
            score("parts", decoding=decoding)
        parts = sorted((tmp_path / "parts").glob("part-*"))
        assert len(parts) == 4
        parts[1].write_bytes(parts[1].read_bytes()[:-30])
        let = pytest.MonkeyPatch()
        let_only(let, batches=6)
        with pytest.warns(UserWarning, match=f"{parts[1].name} is damaged"):
            assert score("parts", decoding=decoding) == expected
        let.undo()


class TestReadScores:
    @pytest.fixture
    def write(self, tmp_path):
        def write(**columns):
            pq.write_table(pa.table(columns), tmp_path / "scores.parquet")
            return tmp_path / "scores.parquet"

        return write

    @pytest.fixture
    def rows(self, tokenizer):
        rows = [{"id": number, "instruction": "Say.", "output": text} for number, text in enumerate(["one", "two"])]
        return tokenised(tokenizer, rows)

    def test_by_id(self, write, rows, tokenizer):
        path = write(id=["1", "9", "0"], nll=[1.5, 9.9, 0.5], judge=[3, 9, 4])
        found = read_scores(path, rows, [NegativeLogLikelihood(), Column("judge", True)], tokenizer)
        assert {name: values.tolist() for name, values in found.columns.items()} == {"nll": [0.5, 1.5], "judge": [4, 3]}

    def test_ids_that_are_numbers(self, write, rows, tokenizer):
        found = read_scores(write(id=[1, 0], nll=[1.5, 0.5]), rows, [NegativeLogLikelihood()], tokenizer)
        assert found.columns["nll"].tolist() == [0.5, 1.5]

    def test_criteria_of_answers_are_computed_here(self, write, rows, tokenizer):
        path = write(id=["0", "1"], answer=["One!", "three"], nll=[0.5, 1.5])
        assert read_scores(path, rows, PAPER, tokenizer).columns["rouge_l"].tolist() == [1.0, 0.0]

    def test_a_row_without_score_is_named(self, write, rows, tokenizer):
        with pytest.raises(ValueError, match="has no nll for 1 of 2 rows, '1' among them; score every row"):
            read_scores(write(id=["0"], nll=[0.5]), rows, [NegativeLogLikelihood()], tokenizer)

    def test_a_row_without_answer_is_named(self, write, rows, tokenizer):
        with pytest.raises(ValueError, match="has no rouge_l for 1 of 2 rows, '0' among them"):
            read_scores(write(id=["1"], answer=["x"]), rows, [RougeL()], tokenizer)

    @pytest.mark.parametrize("columns", [{"nll": [0.5, 1.5]}, {"answer": ["a", "b"]}], ids=["no_answer", "no_student"])
    def test_a_criterion_that_cannot_be_computed_is_named(self, write, rows, tokenizer, columns):
        wanted = RougeL() if "nll" in columns else NegativeLogLikelihood()
        with pytest.raises(ValueError, match=f"has no column '{wanted.column}' for {type(wanted).__name__}, only id"):
            read_scores(write(id=["0", "1"], **columns), rows, [wanted], tokenizer)

    def test_a_file_without_ids(self, write, rows, tokenizer):
        with pytest.raises(ValueError, match="must have the column `id`, but has nll"):
            read_scores(write(nll=[0.5]), rows, PAPER, tokenizer)

    def test_the_same_score_may_stand_twice(self, write, rows, tokenizer):
        path = write(id=["1", "0", "1"], nll=[1.5, 0.5, 1.5])
        assert read_scores(path, rows, [NegativeLogLikelihood()], tokenizer).columns["nll"].tolist() == [0.5, 1.5]

    @pytest.mark.parametrize(
        ("columns", "name"),
        [
            ({"nll": [1.5, 0.5, 2.5]}, "nll"),
            ({"nll": [1.5, 0.5, 1.5], "answer": ["a", "b", "c"]}, "answer"),
        ],
        ids=["score", "answer"],
    )
    def test_two_scores_for_one_row_are_refused(self, write, rows, tokenizer, columns, name):
        path = write(id=["1", "0", "1"], **columns)
        with pytest.raises(DataError, match=f"has more than one {name} for 1 rows, '1' among them; keep one"):
            read_scores(path, rows, [NegativeLogLikelihood()], tokenizer)

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("scores.csv", "id,nll,answer\n1,1.5,two\n0,.5,one\n"),
            ("scores.tsv", "id\tnll\tanswer\n1\t1.5\ttwo\n0\t.5\tone\n"),
            ("scores.jsonl", '{"id": 1, "nll": 1.5, "answer": "two"}\n{"id": 0, "nll": 0.5, "answer": "one"}\n'),
            ("scores.json", '[{"id": 1, "nll": 1.5, "answer": "two"}, {"id": 0, "nll": 0.5, "answer": "one"}]'),
        ],
    )
    def test_other_forms_of_file(self, tmp_path, rows, tokenizer, name, text, monkeypatch):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        (tmp_path / name).write_text(text)
        found = read_scores(tmp_path / name, rows, PAPER, tokenizer)
        assert (found.columns["nll"].tolist(), found.columns["rouge_l"].tolist()) == ([0.5, 1.5], [1.0, 1.0])
        assert found.answers(pa.array(["1"])) == {"1": "two"}

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            ({"id": [["0"], ["1"]], "nll": [0.5, 1.5]}, "ids must be text or numbers, but are list"),
            ({"id": ["0", "1"], "nll": ["a", "b"]}, "the column 'nll' must hold numbers, but does not: .*'[ab]'"),
            ({"id": ["0", "1"], "nll": [[0.5], [1.5]]}, "the column 'nll' must hold numbers"),
            ({"id": ["0", "1"], "nll": [0.5, float("nan")]}, "has no nll for 1 of 2 rows, '1' among them"),
            ({"id": [None, "1"], "nll": [0.5, 1.5]}, "has no nll for 1 of 2 rows, '0' among them"),
        ],
        ids=["ids", "texts", "lists", "nan", "null_id"],
    )
    def test_what_is_no_score_is_refused(self, write, rows, tokenizer, columns, message):
        with pytest.raises(DataError, match=message):
            read_scores(write(**columns), rows, [NegativeLogLikelihood()], tokenizer)

    def test_a_file_that_is_cut(self, write, rows, tokenizer):
        path = write(id=["0"], nll=[0.5])
        path.write_bytes(path.read_bytes()[:30])
        with pytest.raises(DataError, match=r"scores\.parquet cannot be read as parquet"):
            read_scores(path, rows, [NegativeLogLikelihood()], tokenizer)


class TestStoredScores:
    def test_are_read_without_a_student(self, score, data, tmp_path):
        expected = score()
        found = stored_scores(tmp_path / "scores", in_other_order(data), PAPER).columns["nll"]
        assert dict(zip(in_other_order(data)["id"], found, strict=True)) == {
            row: scores["nll"] for row, scores in expected.items()
        }

    def test_that_are_gone(self, data, tmp_path):
        with pytest.raises(ValueError, match="are not in"):
            stored_scores(tmp_path / "gone", data, PAPER)

    def test_that_are_not_all_there(self, score, data, tmp_path):
        score(rows=data.select(range(19)))
        with pytest.raises(ValueError, match="some of the scores"):
            stored_scores(tmp_path / "scores", data, PAPER)


COLUMNS = {"rouge_l": np.array([0.0, 0.5, 0.0, 0.5, 1.0]), "nll": np.array([2.0, 1.0, 2.0, 1.0, 3.0])}


class TestRank:
    def test_directions_and_weights(self):
        ids = pa.array([str(row) for row in range(5)])
        weighted = [RougeL(weight=3.0), NegativeLogLikelihood()]
        ease = [COLUMNS["rouge_l"].tolist(), (-COLUMNS["nll"]).tolist()]
        for criteria, weights in ((PAPER, None), (weighted, [3.0, 1.0])):
            expected = references.average_rank_fusion(*ease, weights=weights)
            assert rank(COLUMNS, criteria, ids, "average").tolist() == expected
        only = rank(COLUMNS, [NegativeLogLikelihood()], ids, "average")
        assert only.tolist() == [1, 3, 0, 2, 4]

    def test_rows_that_no_score_tells_apart_stand_by_id(self):
        ids = pa.array(["e", "d", "a", "b", "c"])
        assert rank(COLUMNS, PAPER, ids, "average").tolist() == [3, 1, 4, 2, 0]

    def test_or_by_their_place_in_the_file(self):
        ids = pa.array(["e", "d", "a", "b", "c"])
        assert rank(COLUMNS, PAPER, ids, "order").tolist() == references.chained_sorts(
            COLUMNS["rouge_l"].tolist(), COLUMNS["nll"].tolist()
        )

    @pytest.mark.parametrize("seed", range(20))
    def test_does_not_depend_on_the_order_of_the_file(self, seed):
        rng = np.random.default_rng(seed)
        columns = {"rouge_l": rng.integers(0, 3, 40) / 2, "nll": rng.integers(0, 4, 40) / 3}
        ids, other = np.array([f"{row:02}" for row in range(40)]), rng.permutation(40)
        expected = ids[rank(columns, PAPER, pa.array(ids), "average").numpy()]
        found = rank({name: values[other] for name, values in columns.items()}, PAPER, pa.array(ids[other]), "average")
        assert ids[other][found.numpy()].tolist() == expected.tolist()

    def test_a_score_that_is_no_number_is_named(self):
        columns = {**COLUMNS, "nll": np.array([1.0, np.nan, 2.0, np.nan, 0.0])}
        with pytest.raises(ValueError, match="nll is NaN for 2 of 5 rows, 'b' among them"):
            rank(columns, PAPER, pa.array(list("abcde")), "average")

    def test_one_row(self):
        columns = {name: values[:1] for name, values in COLUMNS.items()}
        assert rank(columns, PAPER, pa.array(["a"]), "average").tolist() == [0]


class TestACriterionThatGivesNaN:
    class Broken(Criterion):
        column, higher_is_easier = "broken", True

        def scores(self, reflected):
            return [float("nan")] * len(reflected.rows)

    def test_is_named_when_rows_are_ranked(self, score, data):
        columns = {"broken": np.array([scores["broken"] for scores in score(criteria=[self.Broken()]).values()])}
        with pytest.raises(ModelError, match="broken is NaN for all 20 rows, so it is not the rows but the student"):
            rank(columns, [self.Broken()], ids_of(data), "average")


def test_threads_are_pinned_and_given_back():
    before = torch.get_num_threads()
    with pinned_threads(3, CPU):
        assert torch.get_num_threads() == 3
    assert torch.get_num_threads() == before
