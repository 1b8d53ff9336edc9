from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from srd_lightning.curriculum.ranking import (
    Arrangement,
    EasyToHard,
    HardToEasy,
    RandomOrder,
    RandomSubset,
    arranged,
)
from srd_lightning.errors import SettingError

ORDER = torch.tensor([5, 2, 7, 0, 1, 6, 4, 3])


@st.composite
def ranked_rows(draw):
    """An order of up to 60 rows and how many of them are kept."""
    order = draw(st.permutations(range(draw(st.integers(1, 60)))))
    return torch.tensor(order), draw(st.integers(1, len(order)))


seeds = st.integers(0, 2**32)


def test_easy_to_hard_is_the_order_itself():
    assert EasyToHard()(ORDER, kept=6).tolist() == [5, 2, 7, 0, 1, 6, 4, 3]


def test_hard_to_easy_turns_the_kept_rows_around():
    assert HardToEasy()(ORDER, kept=6).tolist() == [6, 1, 0, 7, 2, 5, 4, 3]
    assert HardToEasy()(ORDER, kept=8).tolist() == [3, 4, 6, 1, 0, 7, 2, 5]


@given(rows=ranked_rows(), seed=seeds)
def test_every_arrangement_is_a_permutation(rows, seed):
    order, kept = rows
    for arrangement in (EasyToHard(), HardToEasy(), RandomOrder(seed), RandomSubset(seed)):
        arranged = arrangement(order, kept)
        assert arranged.dtype == torch.int64
        assert sorted(arranged.tolist()) == list(range(len(order)))


@given(rows=ranked_rows(), seed=seeds)
def test_random_order_keeps_the_easiest_rows_and_leaves_the_others(rows, seed):
    order, kept = rows
    arranged = RandomOrder(seed)(order, kept).tolist()
    assert set(arranged[:kept]) == set(order[:kept].tolist())
    assert arranged[kept:] == order[kept:].tolist()


@given(rows=ranked_rows(), seed=seeds)
def test_random_subset_enters_easy_to_hard(rows, seed):
    order, kept = rows
    place = {row: position for position, row in enumerate(order.tolist())}
    places = [place[row] for row in RandomSubset(seed)(order, kept).tolist()]
    assert places[:kept] == sorted(places[:kept])
    assert places[kept:] == sorted(places[kept:])


def test_random_order_puts_every_row_everywhere_equally_often():
    first = Counter(int(RandomOrder(seed)(ORDER, kept=4)[0]) for seed in range(2_000))
    assert set(first) == {5, 2, 7, 0}
    assert all(400 < count < 600 for count in first.values())  # 500 expected, 5 standard deviations are 97


def test_random_subset_keeps_every_row_equally_often():
    kept = Counter(row for seed in range(2_000) for row in RandomSubset(seed)(ORDER, kept=6)[:6].tolist())
    assert set(kept) == set(range(8))
    assert all(1_400 < count < 1_600 for count in kept.values())  # 1500 expected, 5 standard deviations are 97


@pytest.mark.parametrize("arrangement", [RandomOrder, RandomSubset])
def test_the_seed_decides(arrangement):
    order = torch.arange(100)
    assert arrangement(7)(order, 50).tolist() == arrangement(7)(order, 50).tolist()
    assert arrangement()(order, 50).tolist() == arrangement(0)(order, 50).tolist() != arrangement(7)(order, 50).tolist()


@pytest.mark.parametrize("arrangement", [RandomOrder(), RandomSubset()], ids=["random_order", "random_subset"])
def test_the_global_random_state_neither_matters_nor_changes(arrangement):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    arranged = arrangement(ORDER, 6).tolist()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert arrangement(ORDER, 6).tolist() == arranged


@pytest.mark.parametrize(
    "arrangement",
    [EasyToHard(), HardToEasy(), RandomOrder(), RandomSubset()],
    ids=["easy_to_hard", "hard_to_easy", "random_order", "random_subset"],
)
def test_the_given_order_is_left_as_it_was(arrangement):
    order = ORDER.clone()
    arrangement(order, 6)
    assert torch.equal(order, ORDER)


def test_an_own_arrangement_must_say_how_it_arranges():
    with pytest.raises(TypeError, match="__call__"):
        type("Nothing", (Arrangement,), {})()


class Cuts(Arrangement):
    """Forgets what is dropped: its half would be halved again."""

    def __call__(self, order, kept):
        return order[:kept]


class Repeats(Arrangement):
    def __call__(self, order, kept):
        return order[:1].expand(len(order))


@pytest.mark.parametrize(("own", "said"), [(Cuts(), r"shape \[4\]"), (Repeats(), "others")])
def test_an_arrangement_that_is_none_is_refused(own, said):
    name = type(own).__name__
    with pytest.raises(SettingError, match=f"{name} must return the 8 row numbers .* but returned {said}; those that"):
        arranged(own, torch.arange(8), kept=4)


def test_an_arrangement_may_work_in_place():
    class Turns(Arrangement):
        def __call__(self, order, kept):
            order[:kept] = order[:kept].flip(0)
            return order

    order = torch.arange(4)
    assert arranged(Turns(), order, kept=3).tolist() == [2, 1, 0, 3]
    assert order.tolist() == [0, 1, 2, 3]
