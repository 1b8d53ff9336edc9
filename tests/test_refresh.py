import shutil
import sys

import numpy as np
import pytest
import references
import torch
from conftest import PROJECTS, records_of, run_project
from datasets import Dataset
from transformers import ByT5Tokenizer

from srd_lightning import ALPACA, Curriculum
from srd_lightning.criteria import NegativeLogLikelihood
from srd_lightning.curation.curator import Curator, Refresher, rearranged
from srd_lightning.curation.score_store import Scores
from srd_lightning.evaluation.text_metrics import rouge_l
from srd_lightning.models.generation import generate

sys.path.insert(0, str(PROJECTS))
import distil
import refresh as project

pytestmark = pytest.mark.xdist_group("processes")


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


CURRICULUM = Curriculum(torch.tensor([4, 2, 0, 1, 3]), {0: 0.4, 8: 0.8})


class TestRefresher:
    @pytest.mark.parametrize("epochs", [[0], [8, 9], [-1]])
    def test_epochs_that_begin_no_later_stage(self, epochs):
        with pytest.raises(ValueError, match=r"first epochs of later stages, which are \[8, 16\], but names"):
            Refresher(epochs, {0: 0.25, 8: 0.5, 16: 0.75})

    def test_where_nothing_is_ranked(self):
        with pytest.raises(ValueError, match="needs a schedule that ranks rows"):
            Refresher([8], {0: 1.0, 8: 1.0})

    def test_is_due_once(self):
        refresher = Refresher([16, 8], {0: 0.25, 8: 0.5, 16: 0.75})
        assert [refresher.due(epoch) for epoch in (0, 7, 8, 9, 16, 17)] == [[], [], [8], [], [16], []]

    def test_a_run_that_is_resumed_late_makes_up_for_all(self):
        assert Refresher([16, 8], {0: 0.25, 8: 0.5, 16: 0.75}).due(20) == [8, 16]

    def test_a_checkpoint_that_knows_nothing_of_it(self, tmp_path):
        refresher = Refresher([8], CURRICULUM.schedule)
        with pytest.raises(ValueError, match=r"does not say in which order.*from the end of epoch 7"):
            refresher.refresh(
                CURRICULUM, 9, Curator({0: 0.4, 8: 0.8}), Dataset.from_dict({"id": list("abcde")}), None, tmp_path
            )


def test_rearranged_by_hand():
    rows = Dataset.from_dict({"id": list("abd")})  # those still to come: rows 0, 1 and 3
    curator = Curator({0: 0.4, 8: 0.8}, [NegativeLogLikelihood()])
    scores = Scores({"nll": np.array([0.2, 0.3, 0.1])}, None, 3, None)
    found = rearranged(CURRICULUM, 8, curator, rows, scores)
    assert found.order.tolist() == [4, 2, 3, 0, 1]
    assert dict(found.schedule) == {0: 0.4, 8: 0.8}
