import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import references
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from srd_lightning.ranking import reciprocal_rank_fusion

GOLDEN = json.loads((Path(__file__).parent / "golden" / "ranking_12_rows.json").read_text())

# So few rows that two different sets of ranks never sum to the same fused score.
few_values = st.integers(0, 3)
rows_of_two = st.lists(st.tuples(few_values, few_values), min_size=1, max_size=16)
rows_of_three = st.lists(st.tuples(few_values, few_values, few_values), min_size=1, max_size=9)
both_ties = pytest.mark.parametrize("ties", ["average", "order"])


def columns(rows):
    return [list(column) for column in zip(*rows, strict=True)]


@both_ties
def test_golden_file_worked_by_hand(ties):
    rouge_l = [row["rouge_l"] for row in GOLDEN["rows"]]
    nll = torch.tensor([row["nll"] for row in GOLDEN["rows"]])
    assert reciprocal_rank_fusion(rouge_l, -nll, ties=ties).tolist() == GOLDEN["easiest_first"][ties]


def test_order_ties_equal_the_papers_chained_sorts_on_500_tied_cases():
    for seed in range(500):
        generator = random.Random(seed)
        num_rows, num_values = generator.randint(1, 40), generator.randint(1, 8)
        rouge_l = [generator.randint(0, num_values) / num_values for _ in range(num_rows)]
        loss = [generator.randint(0, num_values) / 2 for _ in range(num_rows)]
        order = reciprocal_rank_fusion(rouge_l, [-value for value in loss], ties="order")
        assert order.tolist() == references.chained_sorts(rouge_l, loss), f"seed {seed}"


@pytest.mark.parametrize("k", [60, 1], ids=["paper_k", "small_k"])
@settings(deadline=None)
@given(rows=st.lists(st.tuples(few_values, few_values), min_size=1, max_size=40))
def test_order_ties_equal_the_chained_sorts_for_any_k(rows, k):
    rouge_l, ease = columns(rows)
    expected = references.chained_sorts(rouge_l, [-value for value in ease], k=k)
    assert reciprocal_rank_fusion(rouge_l, ease, k=k, ties="order").tolist() == expected


@settings(deadline=None)
@given(rows=rows_of_two)
def test_average_ties_equal_exact_fusion_of_two_criteria(rows):
    ease = columns(rows)
    assert reciprocal_rank_fusion(*ease).tolist() == references.average_rank_fusion(*ease)


def test_average_ties_with_a_small_k_favour_the_first_rank():
    first, second = [4, 3, 2, 1], [1, 3, 4, 2]
    assert reciprocal_rank_fusion(first, second, k=60).tolist() == [2, 1, 0, 3]
    assert reciprocal_rank_fusion(first, second, k=1).tolist() == [2, 0, 1, 3]


@settings(deadline=None)
@given(rows=rows_of_three)
def test_average_ties_equal_exact_fusion_of_three_criteria(rows):
    ease = columns(rows)
    assert reciprocal_rank_fusion(*ease).tolist() == references.average_rank_fusion(*ease)


@settings(deadline=None)
@given(values=st.lists(few_values, min_size=1, max_size=40))
def test_one_criterion_is_a_stable_descending_sort(values):
    expected = sorted(range(len(values)), key=lambda row: values[row], reverse=True)
    assert reciprocal_rank_fusion(values).tolist() == expected


@both_ties
@settings(deadline=None)
@given(rows=st.lists(st.tuples(st.floats(allow_nan=False), st.floats(allow_nan=False)), min_size=1))
def test_is_a_permutation(rows, ties):
    order = reciprocal_rank_fusion(*columns(rows), ties=ties)
    assert sorted(order.tolist()) == list(range(len(rows)))


@settings(deadline=None)
@given(rows=st.lists(st.tuples(few_values, few_values), min_size=1, max_size=40), data=st.data())
def test_average_ties_ignore_the_order_of_the_file(rows, data):
    shuffled = data.draw(st.permutations(rows))
    sequence = [rows[row] for row in reciprocal_rank_fusion(*columns(rows))]
    assert [shuffled[row] for row in reciprocal_rank_fusion(*columns(shuffled))] == sequence


@both_ties
@pytest.mark.parametrize(
    "rescale",
    [math.exp, lambda value: value**3, lambda value: value / 7 - 100],
    ids=["exponential", "cube", "linear"],
)
@settings(deadline=None, max_examples=50)
@given(rows=st.lists(st.tuples(st.integers(-6, 6), st.integers(-6, 6)), min_size=1, max_size=40))
def test_only_the_order_within_a_criterion_matters(rows, rescale, ties):
    first, second = columns(rows)
    expected = reciprocal_rank_fusion(first, second, ties=ties).tolist()
    assert reciprocal_rank_fusion([rescale(value) for value in first], second, ties=ties).tolist() == expected
    assert reciprocal_rank_fusion(first, [rescale(value) for value in second], ties=ties).tolist() == expected


@both_ties
@settings(deadline=None)
@given(rows=st.lists(st.tuples(few_values, few_values), min_size=2, max_size=40))
def test_a_row_better_on_both_is_never_later(rows, ties):
    order = reciprocal_rank_fusion(*columns(rows), ties=ties).tolist()
    sequence = [rows[row] for row in order]
    for position, later in enumerate(sequence):
        for earlier in sequence[:position]:
            assert not (later[0] > earlier[0] and later[1] > earlier[1])


@settings(deadline=None)
@given(rows=rows_of_three, data=st.data())
def test_the_order_of_three_criteria_moves_only_rows_of_equal_fused_score(rows, data):
    ease = columns(rows)
    fused = references.fused_scores(*ease)
    order = reciprocal_rank_fusion(*data.draw(st.permutations(ease)))
    assert [fused[row] for row in order] == sorted(fused, reverse=True)


def test_the_same_ranks_in_other_criteria_tie_and_the_first_criterion_decides():
    rows = [(1, 2, 3), (2, 3, 1), (3, 1, 2), (1, 3, 2), (2, 1, 3), (3, 2, 1)]
    order = reciprocal_rank_fusion(*columns(rows))
    assert [rows[row] for row in order] == [(3, 2, 1), (3, 1, 2), (2, 3, 1), (2, 1, 3), (1, 3, 2), (1, 2, 3)]


@pytest.mark.parametrize(
    "convert",
    [
        list,
        tuple,
        np.array,
        lambda values: np.array(values, dtype=np.float32),
        torch.tensor,
        lambda v: torch.tensor(v).double(),
    ],
    ids=["list", "tuple", "numpy", "numpy_float32", "tensor", "tensor_float64"],
)
@both_ties
def test_takes_any_array_and_returns_int64(convert, ties):
    order = reciprocal_rank_fusion(convert([0.1, 0.9, 0.5]), convert([-3.0, -1.0, -2.5]), ties=ties)
    torch.testing.assert_close(order, torch.tensor([1, 2, 0]), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("ease", "keywords", "message"),
    [
        ([], {}, "at least one criterion"),
        ([[1, 2, 3], [1, 2]], {}, r"criterion 1 must have shape \[3\] .* has \[2\]"),
        ([[[1, 2], [3, 4]]], {}, r"criterion 0 must have shape .* has \[2, 2\]"),
        ([[1, 2, 3], [1, math.nan, math.nan]], {}, "criterion 1 is NaN for 2 of 3 rows"),
        ([[1, 2]], {"ties": "random"}, "'random'"),
    ],
    ids=["no_criterion", "unequal_lengths", "two_dimensional", "nan", "unknown_ties"],
)
def test_refuses(ease, keywords, message):
    with pytest.raises(ValueError, match=message):
        reciprocal_rank_fusion(*ease, **keywords)
