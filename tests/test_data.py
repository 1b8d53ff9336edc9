import json
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from tiny import PLAIN, make_rows, tiny_model

from srd_lightning import Decoding, SRDDataModule
from srd_lightning.criteria import Column, NegativeLogLikelihood, ResponseLength
from srd_lightning.curriculum.ranking import HardToEasy, RandomOrder, RandomSubset

ROWS = [{"id": number, **row} for number, row in enumerate(make_rows(20))]


@pytest.fixture
def make(tokenizer, tmp_path, monkeypatch):
    """Return a data module that is set up; scores go to a temporary folder."""
    monkeypatch.chdir(tmp_path)

    def make(data=ROWS, **options):
        options = {"schedule": {0: 0.25, 1: 0.75}, "decoding": Decoding(max_new_tokens=4), **options}
        module = SRDDataModule(data, tokenizer, tiny_model(initializer_range=0.3), PLAIN, **options)
        module.setup("fit")
        return module

    return make


@pytest.fixture
def scores_file(tmp_path):
    """A file in which row 0 is the easiest and row 19 the hardest."""
    pq.write_table(pa.table({"id": list(range(20)), "judge": np.arange(20) / 2}), tmp_path / "scores.parquet")
    return {"scores": str(tmp_path / "scores.parquet"), "criteria": [Column("judge", higher_is_easier=False)]}


class TestCriteria:
    def test_any_subset(self, make):
        lengths = make(criteria=[ResponseLength()]).curation
        assert list(lengths.columns) == ["response_length"]
        outputs = [len(row["output"]) for row in ROWS]
        assert [outputs[row] for row in lengths.order] == sorted(outputs)

    def test_weights(self, make):
        criteria = [ResponseLength(weight=1e9), NegativeLogLikelihood()]
        outputs = [len(row["output"]) for row in ROWS]
        assert [outputs[row] for row in make(criteria=criteria).curation.order] == sorted(outputs)

    def test_scores_from_elsewhere_need_no_student(self, tokenizer, scores_file):
        module = SRDDataModule(ROWS, tokenizer, template=PLAIN, schedule={0: 0.25, 1: 0.75}, **scores_file)
        module.setup("fit")
        assert module.curriculum.order.tolist() == list(range(20))
        assert module.curation.scored == 0


class TestArrangement:
    def test_of_the_paper(self, make, scores_file):
        assert make(**scores_file).curriculum.order.tolist() == list(range(20))

    def test_hard_to_easy(self, make, scores_file):
        order = make(arrangement=HardToEasy(), **scores_file).curriculum.order.tolist()
        assert order == [*range(14, -1, -1), *range(15, 20)]

    def test_random_order_keeps_the_same_rows(self, make, scores_file):
        order = make(arrangement=RandomOrder(), **scores_file).curriculum.order.tolist()
        assert sorted(order[:15]) == list(range(15)) != order[:15]

    def test_random_subset_is_of_the_same_size_from_easy_to_hard(self, make, scores_file):
        module = make(arrangement=RandomSubset(), **scores_file)
        kept = module.curriculum.rows(1).tolist()
        assert len(kept) == 15
        assert kept == sorted(kept) != list(range(15))
        assert module.curation.order.tolist() == list(range(20))


class TestHygiene:
    DATA = {  # noqa: RUF012
        "train": [*ROWS, {"id": 20, "instruction": "SAY, 3!", "output": "again"}],
        "test": [{"instruction": "say 3", "output": "x"}, {"instruction": "say 99", "output": "x"}],
        "validation": [{"instruction": "Say 7?", "output": "x"}],
    }

    def test_is_reported(self, make, caplog):
        with caplog.at_level("INFO"):
            module = make(self.DATA)
        assert len(module.rows["train"]) == 21
        assert "train: 1 of 21 prompts repeat that of an earlier row" in caplog.text
        assert "test: 1 of its 2 prompts also in train, in 2 of 21 rows" in caplog.text
        assert "validation: 1 of its 1 prompts also in train, in 1 of 21 rows" in caplog.text

    def test_contaminated_rows_are_dropped_and_counted(self, make):
        module = make(self.DATA, decontaminate=True)
        assert module.rows["train"]["id"][:] == [str(row) for row in range(20) if row not in (3, 7)]
        assert dict(module.curation.dropped) == {"prompt of test": 2, "prompt of validation": 1}
        assert module.curation.rows == len(module.curriculum.order) == 18


class TestTrainLoader:
    """Thirty rows of thirty lengths."""

    ROWS = [{"id": row, "instruction": "Say.", "output": "a" * (1 + 7 * row % 30)} for row in range(30)]  # noqa: RUF012

    def batches(self, module):
        return [batch["attention_mask"].sum(dim=1).tolist() for batch in module.train_dataloader()]

    @pytest.mark.parametrize("grouped", [True, False])
    def test_has_the_rows_of_the_epoch_once(self, make, grouped):
        module = make(self.ROWS, group_by_length=grouped, criteria=[ResponseLength()], batch_size=4)
        assert len(module.train_dataloader()) == 2
        lengths = sorted(length for batch in self.batches(module) for length in batch)
        assert lengths == [len("Say.") + output + 1 for output in range(1, 8)]  # the shortest quarter, and the end

    def test_rows_of_like_length_stand_together(self, make):
        grouped = self.batches(make(self.ROWS, schedule={0: 1.0}, batch_size=2))
        plain = self.batches(make(self.ROWS, schedule={0: 1.0}, batch_size=2, group_by_length=False))
        assert all(abs(a - b) == 1 for a, b in grouped)
        assert sorted(chain(*grouped)) == sorted(chain(*plain))
        assert np.mean([abs(a - b) for a, b in plain]) > 5

    def test_a_batch_is_a_multiple_wide(self, make):
        widths = {
            batch["input_ids"].shape[1]
            for module in [make(self.ROWS, schedule={0: 1.0}, batch_size=2, pad_to_multiple_of=16)]
            for batch in [*module.train_dataloader(), *module._eval_loader("train")]
        }
        assert widths == {16, 32, 48}


def test_a_second_run_tokenises_nothing(make, monkeypatch):
    first = make({"train": ROWS, "validation": ROWS[:5]})
    monkeypatch.setattr("srd_lightning.data.tokenization._tokenize_batch", None)
    again = make({"train": ROWS, "validation": ROWS[:5]})
    for split in ("train", "validation"):
        assert again.rows[split].to_list() == first.rows[split].to_list()
        assert again.reports[split] == first.reports[split]


class TestReport:
    def test_is_shown_and_written(self, make):
        module = make()
        console = Console(width=160, record=True)
        module.report(console)
        shown = console.export_text()
        assert "15 of 20 ranked rows kept" in shown
        folder = module.curation.scores.folder
        assert json.loads((folder / "curation.json").read_text())["kept"] == 15
        text = (folder / "curation.md").read_text()
        hardest = str(module.curation.order[-1].item())
        (answer,) = module.curation.scores.answers(pa.array([hardest])).values()
        assert text.count("Student's answer:") == 6
        assert answer.splitlines()[0].strip() in text
        assert pq.read_table(folder / "ranking.parquet").num_rows == 20
        assert (folder / "curation.png").stat().st_size > 10_000

    def test_of_all_rows_says_so(self, make):
        module = make(schedule={0: 1.0})
        console = Console(record=True)
        module.report(console)
        assert "all 20 rows are trained on from the start" in console.export_text()


def test_wrong_settings_are_named_before_anything_runs(tokenizer):
    with pytest.raises(ValueError, match="reflection_tokens=0"):
        SRDDataModule(ROWS, tokenizer, reflection_tokens=0)
    with pytest.raises(ValueError, match="reflection_threads=0"):
        SRDDataModule(ROWS, tokenizer, reflection_threads=0)
    with pytest.raises(ValueError, match="pad_to_multiple_of=0"):
        SRDDataModule(ROWS, tokenizer, pad_to_multiple_of=0)
    with pytest.raises(ValueError, match="first epochs of later stages"):
        SRDDataModule(ROWS, tokenizer, schedule={0: 0.5, 8: 0.75}, refresh=[3])
