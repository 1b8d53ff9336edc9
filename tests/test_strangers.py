"""Projects that train with other loops, trainers and packages than Lightning's, and what of ours they take."""

import importlib.util
import json
import math

import pytest
import references
import torch
from conftest import PROJECTS, records_of, run_project
from torch.utils.data import DistributedSampler

from srd_lightning import Curriculum, CurriculumSampler, CurriculumTrainerCallback, WholeRunSampler, order_by_id
from srd_lightning.errors import DataError, SettingError

both = pytest.mark.parametrize("devices", [1, 2], ids=["one_process", "two_processes"])
needs_accelerate = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None,
    reason="accelerate is not installed, which transformers.Trainer needs too",
)
SIZES = [5, 10, 10, 18]


@both
@pytest.mark.parametrize(
    "project", ["plain_loop", "own_fabric", pytest.param("own_accelerate", marks=needs_accelerate)]
)
def test_loops_of_others_see_the_planned_rows(project, devices, tmp_path):
    """Accelerate deals whole batches, and fills up with rows from the beginning: it may show more of them twice."""
    run_project(project, tmp_path, ranks=devices)
    records = records_of(tmp_path, devices)
    for epoch, size in enumerate(SIZES):
        rows = [row for record in records for (row,) in record["epochs"][str(epoch)]]
        assert set(rows) == set(range(size))
        if project != "own_accelerate" or devices == 1:
            assert len(rows) == math.ceil(size / devices) * devices
    if project != "own_accelerate":
        steps = references.count_steps(SIZES, 3, world_size=devices)
        assert [record["steps"] for record in records] == [steps] * devices


@pytest.mark.parametrize("project", ["own_fabric", pytest.param("own_accelerate", marks=needs_accelerate)])
def test_loops_of_others_that_are_resumed_see_the_rows_of_their_epoch(project, tmp_path):
    """Both would tell a sampler that has ``set_epoch`` that it is the first one."""
    for folder, first in ((tmp_path / "whole", 0), (tmp_path / "resumed", 2)):
        folder.mkdir()
        run_project(project, folder, first)
    (whole,), (resumed,) = records_of(tmp_path / "whole", 1), records_of(tmp_path / "resumed", 1)
    assert resumed["epochs"] == {epoch: whole["epochs"][epoch] for epoch in ("2", "3")}


@needs_accelerate
@both
def test_the_trainer_of_transformers(devices, tmp_path):
    """Each epoch has its rows, its temperature and whole steps; the learning rate falls over all of them to 0."""
    run_project("hf_trainer", tmp_path, ranks=devices)
    sizes, per_step = [4, 8, 8, 12], 4 * devices
    expected = [(epoch, 1.0 if epoch == 0 else 1.5 if epoch < 3 else 2.0) for epoch in range(4)]
    steps_of = [math.ceil(size / per_step) for size in sizes]
    for record in (records := records_of(tmp_path, devices)):
        assert record["steps"] == sum(steps_of)
        assert record["logged"] == [epoch for epoch, count in enumerate(steps_of) for _ in range(count)]
        assert [(epoch, value) for epoch, _, value, _ in record["seen"]] == [
            pair for pair, count in zip(expected, steps_of, strict=True) for _ in range(count)
        ]
        rates = [rate for _, _, _, rate in record["seen"]]
        assert rates == pytest.approx([0.1 * (1 - step / len(rates)) for step in range(len(rates))])
    for epoch, size in enumerate(sizes):
        rows = [row for record in records for of, step, _, _ in record["seen"] if of == epoch for row in step]
        assert set(rows) == set(range(size))
        assert len(rows) == steps_of[epoch] * per_step


@needs_accelerate
def test_the_trainer_of_transformers_goes_on_where_it_was(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder, *stop in ((whole,), (parts, 4), (parts,)):
        folder.mkdir(exist_ok=True)
        run_project("hf_trainer", folder, *stop)
    (one,), (other,) = records_of(whole, 1), records_of(parts, 1)
    assert other["seen"] == one["seen"][3:]  # saved every third step
    assert other["weights"] == one["weights"]


@needs_accelerate
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_train_epochs": 2}, "the trainer plans 16 steps, but the 4 epochs of the curriculum are 8; .* to 1"),
        ({"max_steps": 5}, "the trainer plans 5 steps, but the 4 epochs of the curriculum are 8"),
        ({"gradient_accumulation_steps": 1}, r"takes 2 rows a step .* made for 4; set its rows_per_step to 2"),
    ],
    ids=["epochs", "steps", "accumulation"],
)
def test_a_trainer_that_plans_otherwise_is_refused_before_a_step(options, said, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(PROJECTS)
    import hf_trainer

    with pytest.raises(SettingError, match=said) as refused:
        hf_trainer.main(tmp_path, **options)
    assert "\n" not in str(refused.value)


@needs_accelerate
def test_a_trainer_that_reads_other_rows_is_refused(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(PROJECTS)
    import hf_trainer

    monkeypatch.delattr(hf_trainer.Distiller, "_get_train_sampler")
    with pytest.raises(SettingError, match=r"does not read the rows of the WholeRunSampler; let its _get_train_samp"):
        hf_trainer.main(tmp_path)


def test_two_packages_that_are_called_lightning(tmp_path):
    run_project("two_lightnings", tmp_path)
    said = json.loads((tmp_path / "said.json").read_text())
    instead = "write `import lightning.pytorch as pl` in place of `import pytorch_lightning as pl`, everywhere"
    for case in ("our module in their trainer", "their module with our data"):
        result, (warning,) = said[case]
        assert result.startswith("TypeError: `model` must be")  # Lightning's, before anything of ours is asked
        assert warning.endswith(instead)
    for case in ("our data in their trainer", "their data with our module"):
        result, _ = said[case]
        assert result.startswith("SettingError: the ")
        assert result.endswith(instead)
    assert said["our callback in their trainer"] == [4 + 7, []]


class TestCurriculumSampler:
    CURRICULUM = Curriculum(torch.tensor([3, 0, 7, 2, 1, 5, 6, 4]), {0: 0.5, 2: 0.9})

    @pytest.mark.parametrize("ranks", [1, 2, 3])
    @pytest.mark.parametrize("epoch", [0, 1, 2])
    def test_rows_are_dealt_as_torch_deals_those_of_the_epoch(self, epoch, ranks):
        for rank in range(ranks):
            pool = self.CURRICULUM.subset(range(8), epoch)
            expected = DistributedSampler(pool, ranks, rank, shuffle=True, seed=3)
            expected.set_epoch(epoch)
            sampler = CurriculumSampler(self.CURRICULUM, ranks, rank, seed=3)
            sampler.epoch = epoch
            assert list(sampler) == [pool[place] for place in expected]
            assert len(sampler) == len(expected)

    def test_a_whole_run_is_its_epochs_in_whole_steps(self):
        run, expected = WholeRunSampler(CurriculumSampler(self.CURRICULUM), 3, rows_per_step=3), []
        for epoch in range(3):
            sampler = CurriculumSampler(self.CURRICULUM)
            sampler.epoch = epoch
            rows = list(sampler)
            expected += [*rows, *rows[: -len(rows) % 3]]
        assert list(run) == list(run) == expected
        assert len(run) == len(expected) == 3 * run.steps == 3 * self.CURRICULUM.num_steps(3, max_epochs=3)
        assert [run.epoch_of(step) for step in range(run.steps + 1)] == [0, 0, 1, 1, 2, 2, 2, 2]

    def test_a_step_with_more_rows_than_an_epoch(self):
        run = WholeRunSampler(CurriculumSampler(Curriculum(torch.arange(4), {0: 0.5})), 1, rows_per_step=5)
        rows = list(run)
        assert rows == [*rows[:2], *rows[:2], rows[0]]

    @pytest.mark.parametrize(
        ("make", "said"),
        [
            (lambda c: CurriculumSampler(c, 2, 2), "rank must be one of 2, from 0, but is 2"),
            (lambda c: WholeRunSampler(CurriculumSampler(c, 2, 1), 3, 4), "its sampler deals them to 2; leave num_rep"),
            (lambda c: WholeRunSampler(CurriculumSampler(c), 0, 4), "must be at least 1, but are 0 and 4"),
        ],
        ids=["rank", "ranks", "epochs"],
    )
    def test_what_cannot_be(self, make, said):
        with pytest.raises(SettingError, match=said):
            make(self.CURRICULUM)

    def test_values_that_the_holder_does_not_take(self):
        run = WholeRunSampler(CurriculumSampler(self.CURRICULUM), 3, rows_per_step=3)
        with pytest.raises(SettingError, match="Linear has no attribute 'temperature' to schedule"):
            CurriculumTrainerCallback(run, torch.nn.Linear(1, 1), {"temperature": {0: 1.0}})


class TestOrderById:
    def test_rows_are_found_by_id(self):
        assert order_by_id(["9", 4, "x"], ["a", "x", 9, "4"]).tolist() == [2, 3, 1]

    @pytest.mark.parametrize(
        ("ranked", "ids", "said"),
        [
            (["a", "a"], ["a"], "1 of 2 in the ranking stand there before"),
            (["a"], ["a", "b", "a"], "1 of 3 in the data set stand there before"),
            (["a", "b", "c"], ["a"], "the ranking has 2 ids that the data set has not, such as 'b'"),
        ],
    )
    def test_what_cannot_be(self, ranked, ids, said):
        with pytest.raises(DataError, match=said):
            order_by_id(ranked, ids)
