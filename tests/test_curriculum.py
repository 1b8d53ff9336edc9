import pickle
from itertools import pairwise

import pytest
import references
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, DistributedSampler

from srd_lightning.curriculum import PAPER_SCHEDULE, Curriculum, check_schedule, value_at
from srd_lightning.errors import DataError, SettingError

DOLLY_ROWS = 11_435
EPOCHS = range(30)


@st.composite
def curricula(draw):
    """A curriculum of up to 300 shuffled rows, with stages of whole percents."""
    order = draw(st.permutations(range(draw(st.integers(100, 300)))))
    starts = [0, *sorted(draw(st.sets(st.integers(1, 25), max_size=4)))]
    percents = sorted(draw(st.lists(st.integers(1, 100), min_size=len(starts), max_size=len(starts))))
    return Curriculum(
        torch.tensor(order), {start: percent / 100 for start, percent in zip(starts, percents, strict=True)}
    )


@given(curriculum=curricula())
def test_every_pool_is_a_prefix_of_the_next(curriculum):
    pools = [curriculum.rows(epoch).tolist() for epoch in EPOCHS]
    for pool, following in pairwise(pools):
        assert following[: len(pool)] == pool


@given(curriculum=curricula())
def test_every_pool_is_the_easiest_share_of_the_order(curriculum):
    order = curriculum.order.tolist()
    for epoch in EPOCHS:
        fraction = references.staged_value(curriculum.schedule, epoch)
        assert curriculum.rows(epoch).tolist() == order[: references.stage_size(fraction, len(order))]
        assert curriculum.size(epoch) == len(curriculum.rows(epoch))


def test_last_pool_is_the_kept_share():
    order = torch.tensor([5, 2, 7, 0, 1, 6, 4, 3])
    assert Curriculum(order, {0: 0.25, 2: 0.75}).rows(epoch=1_000).tolist() == [5, 2, 7, 0, 1, 6]


@given(
    curriculum=curricula(),
    batch_size=st.integers(1, 40),
    max_epochs=st.integers(0, 30),
    world_size=st.integers(1, 5),
    accumulate=st.integers(1, 5),
)
def test_num_steps_equals_counted_batches(curriculum, batch_size, max_epochs, world_size, accumulate):
    sizes = [len(curriculum.rows(epoch)) for epoch in range(max_epochs)]
    expected = references.count_steps(sizes, batch_size, world_size, accumulate)
    assert curriculum.num_steps(batch_size, max_epochs, world_size, accumulate) == expected


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_epoch_steps_equal_the_batches_of_a_distributed_loader(batch_size, world_size):
    curriculum = Curriculum(torch.arange(67), {0: 0.5})
    subset = curriculum.subset(range(67), epoch=0)
    sampler = DistributedSampler(subset, num_replicas=world_size, rank=0)
    expected = len(list(DataLoader(subset, batch_size=batch_size, sampler=sampler)))
    assert curriculum.epoch_steps(0, batch_size, world_size) == expected


def test_last_optimizer_step_of_an_epoch_may_have_fewer_batches():
    curriculum = Curriculum(torch.arange(10), {0: 1.0})
    assert curriculum.num_steps(batch_size=2, max_epochs=3, accumulate=2) == 3 * 3


def test_dolly_with_the_papers_schedule():
    curriculum = Curriculum(torch.arange(DOLLY_ROWS), PAPER_SCHEDULE)
    assert [curriculum.size(epoch) for epoch in (0, 7, 8, 15, 16, 23)] == [2858, 2858, 5717, 5717, 8576, 8576]
    assert curriculum.num_steps(batch_size=16, max_epochs=24) == 8 * (179 + 358 + 536) == 8_584


def test_default_schedule_is_the_papers():
    assert Curriculum(torch.arange(8)).schedule == {0: 0.25, 8: 0.5, 16: 0.75}


@pytest.mark.parametrize(
    ("fraction", "num_rows", "expected"),
    [(0.29, 100, 29), (0.57, 100, 57), (1 / 3, 9, 3), (1.0, 7, 7), (0.999, 1000, 999), (0.25, 7, 1)],
)
def test_a_size_is_rounded_down_but_not_by_float_noise(fraction, num_rows, expected):
    assert Curriculum(torch.arange(num_rows), {0: fraction}).size(0) == expected


@pytest.mark.parametrize(
    ("arguments", "schedule"),
    [
        ({}, {0: 0.25, 8: 0.5, 16: 0.75}),
        ({"num_stages": 4, "keep": 1.0, "epochs_per_stage": 2}, {0: 0.25, 2: 0.5, 4: 0.75, 6: 1.0}),
        ({"num_stages": 1, "keep": 0.5}, {0: 0.5}),
    ],
    ids=["paper", "four_stages", "one_stage"],
)
def test_uniform_equals_the_schedule_written_out(arguments, schedule):
    assert Curriculum.uniform(torch.arange(100), **arguments).schedule == pytest.approx(schedule)


@given(num_stages=st.integers(1, 8), kept_eighths=st.integers(1, 8))
def test_uniform_stages_grow_by_equal_whole_shares(num_stages, kept_eighths):
    share = 7 * kept_eighths
    curriculum = Curriculum.uniform(torch.arange(8 * 7 * num_stages), num_stages, kept_eighths / 8, epochs_per_stage=3)
    assert [curriculum.size(3 * stage) for stage in range(num_stages)] == [
        share * (stage + 1) for stage in range(num_stages)
    ]


@pytest.mark.parametrize(("epoch", "stage"), [(0, 0), (7, 0), (8, 1), (15, 1), (16, 2), (400, 2)])
def test_stage_begins_at_its_epoch(epoch, stage):
    assert Curriculum(torch.arange(8)).stage(epoch) == stage


@pytest.mark.parametrize(("epoch", "value"), [(0, 1.0), (7, 1.0), (8, 1.5), (15, 1.5), (16, 2.0), (99, 2.0)])
@pytest.mark.parametrize("schedule", [{0: 1.0, 8: 1.5, 16: 2.0}, {16: 2.0, 0: 1.0, 8: 1.5}], ids=["sorted", "unsorted"])
def test_value_holds_until_the_next_key(schedule, epoch, value):
    assert value_at(schedule, epoch) == value


def test_schedule_may_be_written_in_any_order():
    assert list(Curriculum(torch.arange(8), {8: 0.5, 0: 0.25}).schedule.items()) == [(0, 0.25), (8, 0.5)]


def test_later_changes_of_the_given_schedule_have_no_effect():
    schedule = {0: 0.5}
    curriculum = Curriculum(torch.arange(8), schedule)
    schedule[0] = 1.0
    assert curriculum.size(0) == 4


def test_subset_holds_the_items_of_the_epoch():
    dataset = ["zero", "one", "two", "three"]
    curriculum = Curriculum(torch.tensor([3, 0, 2, 1]), {0: 0.25, 1: 0.75})
    assert list(curriculum.subset(dataset, epoch=0)) == ["three"]
    assert list(curriculum.subset(dataset, epoch=1)) == ["three", "zero", "two"]


def test_subset_holds_plain_integers_of_eight_bytes_that_pickle():
    indices = Curriculum(torch.arange(1_000).flip(0), {0: 0.5}).subset(range(1_000), epoch=0).indices
    assert {type(row) for row in indices} == {int}
    assert memoryview(indices).nbytes == 8 * 500
    assert list(pickle.loads(pickle.dumps(indices))) == list(range(999, 499, -1))


@given(order=st.lists(st.integers(0, 60), min_size=1, max_size=30))
def test_names_every_row_once_wherever_the_rows_lie(order):
    repeats = sum(row in order[:position] for position, row in enumerate(order))
    if repeats:
        with pytest.raises(ValueError, match=rf"but {repeats} of {len(order)} entries repeat one"):
            Curriculum(torch.tensor(order), {0: 1.0})
    else:
        assert Curriculum(torch.tensor(order), {0: 1.0}).rows(0).tolist() == order


def test_rows_are_int64_also_from_a_list():
    torch.testing.assert_close(Curriculum([2, 0, 1], {0: 1.0}).rows(0), torch.tensor([2, 0, 1]), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("order", "schedule", "message"),
    [
        (torch.arange(8), {}, "must begin at epoch 0"),
        (torch.arange(8), {1: 0.5}, r"must begin at epoch 0, but its epochs are \[1\]"),
        (torch.arange(8), {-1: 0.25, 0: 0.5}, r"its epochs are \[-1, 0\]"),
        (torch.arange(8), {0: 0.5, 8: 0.25}, r"must not shrink, but its fractions are \[0.5, 0.25\]"),
        (torch.arange(8), {0: 0.0}, r"must lie in \(0, 1\]"),
        (torch.arange(8), {0: -0.5}, r"must lie in \(0, 1\]"),
        (torch.arange(8), {0: 0.5, 8: 1.5}, r"must lie in \(0, 1\], but they are \[0.5, 1.5\]"),
        (torch.arange(8), {0: float("nan")}, r"must lie in \(0, 1\]"),
        (torch.tensor([0, 1, 1, 2, 2, 2]), {0: 0.5}, "3 of 6 entries repeat one"),
        (torch.arange(8), {0: 0.1, 8: 0.5}, "first stage holds no row: 0.1 of 8 rows"),
        (torch.arange(0), {0: 1.0}, "no row is left to train on"),
        ([], {0: 1.0}, "no row is left to train on"),
        (torch.tensor([0, -1, 1]), {0: 1.0}, "row numbers from 0, but holds -1"),
        (torch.tensor([0.3, 0.9, 0.5]), {0: 1.0}, "holds fractions, as scores are; make one by reciprocal_rank_fusion"),
        (torch.arange(8).reshape(2, 4), {0: 0.5}, r"one dimension, but has shape \[2, 4\]"),
    ],
    ids=[
        "empty_schedule",
        "no_epoch_0",
        "negative_epoch",
        "shrinking",
        "fraction_zero",
        "fraction_negative",
        "fraction_above_one",
        "fraction_nan",
        "repeated_rows",
        "empty_first_stage",
        "no_rows",
        "no_rows_in_a_list",
        "negative_row",
        "scores",
        "two_dimensional",
    ],
)
def test_refuses(order, schedule, message):
    with pytest.raises(ValueError, match=message):
        Curriculum(order, schedule)


def test_check_schedule_names_what_it_checks():
    with pytest.raises(ValueError, match="temperature must begin at epoch 0"):
        check_schedule({3: 1.0}, name="temperature")


def test_an_order_of_other_rows_is_refused():
    """It would fail only when the last stage begins."""
    curriculum = Curriculum(torch.tensor([0, 1, 8]), {0: 0.5, 4: 1.0})
    with pytest.raises(DataError, match="the order names row 8, but the data set has 8 rows; it was made of other"):
        curriculum.subset(range(8), epoch=0)


@pytest.mark.parametrize("wrong", [{"num_stages": 0}, {"epochs_per_stage": 0}])
def test_uniform_stages_have_a_number_and_a_length(wrong):
    """With no epochs per stage the last one would silently be all."""
    with pytest.raises(SettingError, match="num_stages and epochs_per_stage must be at least 1, but are"):
        Curriculum.uniform(torch.arange(8), **wrong)
