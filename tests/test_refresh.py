import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import references
import torch
from conftest import PROJECTS, records_of, run_project
from datasets import Dataset
from transformers import ByT5Tokenizer

from srd_lightning import ALPACA, Curriculum
from srd_lightning.criteria import NegativeLogLikelihood
from srd_lightning.curation.curator import Curator, StagedRows
from srd_lightning.curation.result import CurationResult
from srd_lightning.curation.score_store import Scores
from srd_lightning.evaluation.text_metrics import rouge_l
from srd_lightning.models.generation import generate

sys.path.insert(0, str(PROJECTS))
import distil
import refresh as project


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refresh")
    trainer, recorder = project.main(folder)
    return folder, trainer, recorder


def resumed(whole_run, tmp_path, epoch):
    """Go on after an epoch, in a copy of the folder."""
    shutil.copytree(whole_run[0], tmp_path / "copy")
    return project.main(tmp_path / "copy", checkpoint=str(tmp_path / "copy" / "checkpoints" / f"epoch={epoch}.ckpt"))


def order_by_hand(student, rows):
    """Rank rows by a student's answers and losses, one by one."""
    tokenizer, scores = ByT5Tokenizer(), {}
    for row in rows:
        prompt, response = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ALPACA(row))
        ids = torch.tensor([[*prompt, *response, 1]])
        labels = ids.masked_fill(torch.arange(ids.shape[1]) < len(prompt), -100)
        (answer,) = generate(student, tokenizer, [prompt], project.DECODING)
        with torch.no_grad():
            scores[str(row["id"])] = rouge_l(row["output"], answer), -student(ids, labels=labels).loss.item()
    ids = sorted(scores)
    order = references.average_rank_fusion([scores[row][0] for row in ids], [scores[row][1] for row in ids])
    return [int(ids[row]) for row in order]


def test_rows_still_to_come_are_ordered_by_the_student_as_trained_so_far(whole_run):
    _, _, recorder = whole_run
    rows, orders = distil.make_rows(), recorder.orders
    for epoch, seen in ((1, 10), (3, 20)):
        student = distil.tiny(0)
        student.load_state_dict(recorder.students[epoch])
        before = orders[epoch - 1]
        assert orders[epoch][:seen] == before[:seen]
        assert orders[epoch][seen:] == order_by_hand(student, [rows[row] for row in before[seen:]])
        assert orders[epoch] != before
    assert orders[1] == orders[2]
    assert orders[3] == orders[4]


def test_the_student_goes_on_training_as_if_nothing_had_been_asked(whole_run):
    _, trainer, _ = whole_run
    assert trainer.lightning_module.student.training
    assert trainer.global_step == references.count_steps([10, 20, 20, 30, 30], 3)


@pytest.mark.parametrize("epoch", [0, 1, 2, 3])
def test_a_resumed_run_ends_as_the_whole_one(whole_run, tmp_path, epoch):
    _, whole, recorder = whole_run
    trainer, again = resumed(whole_run, tmp_path, epoch)
    assert again.orders == {later: recorder.orders[later] for later in range(epoch + 1, 5)}
    expected = whole.lightning_module.student.state_dict()
    for name, weight in trainer.lightning_module.student.state_dict().items():
        assert torch.equal(weight, expected[name])


def test_scores_of_an_earlier_refreshment_that_are_gone(whole_run, tmp_path):
    shutil.copytree(whole_run[0], tmp_path / "copy")
    (gone,) = (tmp_path / "copy" / "scores").glob("epoch-1-*")
    shutil.rmtree(gone)
    with pytest.raises(ValueError, match=f"are not in .*{gone.name} any more"):
        project.main(tmp_path / "copy", checkpoint=str(tmp_path / "copy" / "checkpoints" / "epoch=1.ckpt"))


def run(folder, *arguments):
    folder.mkdir(exist_ok=True)
    run_project("refresh", folder, 2, *arguments, ranks=2)
    first, second = records_of(folder, 2)
    assert first == second
    return first


def test_two_processes_sharded_or_not_and_resumed(tmp_path):
    """Students of DDP and of FSDP2 have the same weights, and so the same names and orders."""
    expected = run(tmp_path / "ddp", "ddp")
    assert expected["orders"]["0"] != expected["orders"]["1"] != expected["orders"]["3"]
    assert run(tmp_path / "fsdp2", "fsdp2") == expected
    shutil.rmtree(next((tmp_path / "fsdp2" / "scores").glob("epoch-3-*")))
    again = run(tmp_path / "fsdp2", "fsdp2", str(tmp_path / "fsdp2" / "checkpoints" / "epoch=1.ckpt"))
    assert again["generations"] == expected["generations"]
    assert again["orders"] == {epoch: expected["orders"][epoch] for epoch in ("2", "3", "4")}


CURATOR = Curator({0: 0.4, 8: 0.6, 16: 0.8}, [NegativeLogLikelihood()], refresh=[16, 8])
IDS = list("abcde")


@pytest.fixture
def staged(monkeypatch):
    """Five rows in the order 4 2 0 1 3; where the student is asked again, later letters are easier."""
    order = torch.tensor([4, 2, 0, 1, 3])
    scores = Scores({"nll": np.zeros(5)}, Path("scores"), 5, None, None)
    result = CurationResult(IDS, scores.columns, {}, order, Curriculum(order, CURATOR.schedule), {}, 1.0, 5, scores)
    asked = []

    def again(curator, rows, student, root, first):
        asked.append((first, rows["id"][:]))
        nll = np.array([-float(ord(row)) for row in rows["id"]])
        return Scores({"nll": nll}, root / f"epoch-{first}", len(rows), None, None)

    monkeypatch.setattr(Curator, "scores_again", again)
    return StagedRows(CURATOR, Dataset.from_dict({"id": IDS}), None, None, result), asked


class TestStagedRows:
    def test_by_hand(self, staged):
        rows, asked = staged
        orders = []
        for epoch in (0, 7, 8, 9, 16, 17):
            rows.refresh(epoch)
            orders.append("".join(map(str, rows.curriculum.order.tolist())))
        assert asked == [(8, list("abd")), (16, list("ba"))]
        assert orders == ["42013", "42013", "42310", "42310", "42310", "42310"]
        assert rows.generations == {8: "epoch-8", 16: "epoch-16"}
        assert dict(rows.curriculum.schedule) == CURATOR.schedule

    def test_a_run_that_is_resumed_late_makes_up_for_all(self, staged, monkeypatch):
        rows, asked = staged
        rows.resume({8: "first", 16: "second"})
        read, found = [], iter([np.array([0.2, 0.3, 0.1]), np.array([0.5, 0.4])])

        def stored(folder, to_come, criteria):
            read.append((folder.as_posix(), to_come["id"][:]))
            return Scores({"nll": next(found)}, folder, len(to_come), None, None)

        monkeypatch.setattr("srd_lightning.curation.curator.stored_scores", stored)
        rows.refresh(20)
        assert (asked, read) == ([], [("scores/first", list("abd")), ("scores/second", list("ab"))])
        assert rows.curriculum.order.tolist() == [4, 2, 3, 1, 0]

    def test_a_checkpoint_that_knows_nothing_of_it(self, staged):
        with pytest.raises(ValueError, match=r"does not say in which order.*from the end of epoch 7"):
            staged[0].refresh(9)


@pytest.mark.parametrize("epochs", [[0], [8, 9], [-1]])
def test_epochs_that_begin_no_later_stage(epochs):
    with pytest.raises(ValueError, match=r"first epochs of later stages, which are \[8, 16\], but names"):
        Curator({0: 0.25, 8: 0.5, 16: 0.75}, refresh=epochs)


def test_where_nothing_is_ranked():
    with pytest.raises(ValueError, match="needs a schedule that ranks rows"):
        Curator({0: 1.0, 8: 1.0}, refresh=[8])
