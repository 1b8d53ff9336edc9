import json
import math
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import references
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from srd_lightning.curriculum.ranking import reciprocal_rank_fusion

GOLDEN = json.loads((Path(__file__).parent / "golden" / "ranking_12_rows.json").read_text())

# So few rows, and so uneven weights, that two different sets of ranks never sum to the same fused score.
few_values = st.integers(0, 3)
rows_of_two = st.lists(st.tuples(few_values, few_values), min_size=1, max_size=16)
rows_of_three = st.lists(st.tuples(few_values, few_values, few_values), min_size=1, max_size=9)
TWO_WEIGHTS = (1, 2.7)
THREE_WEIGHTS = (1, 2.71, 7.13)
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


@pytest.mark.parametrize("weights", [(1, 1), TWO_WEIGHTS], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("k", [60, 1], ids=["paper_k", "small_k"])
@given(rows=st.lists(st.tuples(few_values, few_values), min_size=1, max_size=40))
def test_order_ties_equal_the_chained_sorts_for_any_k_and_weights(rows, k, weights):
    rouge_l, ease = columns(rows)
    expected = references.chained_sorts(rouge_l, [-value for value in ease], k=k, weights=weights)
    assert reciprocal_rank_fusion(rouge_l, ease, k=k, weights=weights, ties="order").tolist() == expected


@pytest.mark.parametrize("weights", [None, TWO_WEIGHTS])
@given(rows=rows_of_two)
def test_average_ties_equal_exact_fusion_of_two_criteria(rows, weights):
    ease = columns(rows)
    expected = references.average_rank_fusion(*ease, weights=weights)
    assert reciprocal_rank_fusion(*ease, weights=weights).tolist() == expected


def test_average_ties_with_a_small_k_favour_the_first_rank():
    first, second = [4, 3, 2, 1], [1, 3, 4, 2]
    assert reciprocal_rank_fusion(first, second, k=60).tolist() == [2, 1, 0, 3]
    assert reciprocal_rank_fusion(first, second, k=1).tolist() == [2, 0, 1, 3]


@pytest.mark.parametrize("weights", [None, THREE_WEIGHTS])
@given(rows=rows_of_three)
def test_average_ties_equal_exact_fusion_of_three_criteria(rows, weights):
    ease = columns(rows)
    expected = references.average_rank_fusion(*ease, weights=weights)
    assert reciprocal_rank_fusion(*ease, weights=weights).tolist() == expected


def test_average_ties_equal_unique_and_lexsort_bit_for_bit_on_400_tied_cases():
    for seed in range(400):
        generator = np.random.default_rng(seed)
        num_rows, num_criteria = generator.integers(1, 600), generator.integers(1, 5)
        grids = [np.append(np.linspace(-1, 1, generator.integers(1, 60)), [np.inf, -np.inf]) for _ in range(4)]
        criteria = [generator.choice(grid, num_rows) for grid in grids[:num_criteria]]
        if seed % 3 == 0:
            criteria[-1] = generator.standard_normal(num_rows)
        weights = [1.0] * num_criteria if seed % 2 else list(generator.uniform(0.5, 2, num_criteria))
        k = generator.choice([0, 1, 60, 12.5])
        expected = references.unique_and_lexsort(criteria, k, weights)
        assert reciprocal_rank_fusion(*criteria, k=k, weights=weights).tolist() == expected, f"seed {seed}"


def test_rows_equal_in_everything_keep_their_order_however_many():
    rouge_l, nll = [0.0, 1.0] * 2_000, [3.0, 2.0] * 2_000
    odd, even = list(range(1, 4_000, 2)), list(range(0, 4_000, 2))
    assert reciprocal_rank_fusion(rouge_l, np.negative(nll)).tolist() == odd + even


def test_zeros_of_either_sign_are_one_value():
    assert reciprocal_rank_fusion([0.0, -0.0], [1, 2]).tolist() == [1, 0]
    assert reciprocal_rank_fusion([-0.0, 0.0] * 50).tolist() == list(range(100))


@pytest.mark.parametrize(
    ("ties", "weights", "expected"),
    [
        ("average", None, [0, 2, 1]),
        ("average", (2, 1), [0, 1, 2]),
        ("average", (1, 2), [2, 1, 0]),
        ("order", None, [2, 0, 1]),
        ("order", (2, 1), [0, 1, 2]),
        ("order", (1, 2), [2, 1, 0]),
    ],
)
def test_the_heavier_of_two_opposite_criteria_decides(ties, weights, expected):
    # Ranks 1, 2, 3 and 3, 2, 1: at equal weights 1/61 + 1/63 > 2/62, so the middle row is last.
    assert reciprocal_rank_fusion([3, 2, 1], [1, 2, 3], weights=weights, ties=ties).tolist() == expected


@both_ties
@pytest.mark.parametrize("weight", [0.125, 1, 1024])
@settings(max_examples=50)
@given(rows=st.lists(st.tuples(few_values, few_values, few_values), min_size=1, max_size=40))
def test_equal_weights_are_as_good_as_none(rows, weight, ties):
    ease = columns(rows)
    expected = reciprocal_rank_fusion(*ease, ties=ties).tolist()
    assert reciprocal_rank_fusion(*ease, weights=[weight] * 3, ties=ties).tolist() == expected


@pytest.mark.filterwarnings("error")
@both_ties
def test_takes_files_that_are_mapped_for_reading_only(tmp_path, ties):
    generator = np.random.default_rng(0)
    rouge_l, nll = generator.random(500).round(1), generator.random(500)
    np.save(tmp_path / "rouge_l.npy", rouge_l)
    mapped = np.load(tmp_path / "rouge_l.npy", mmap_mode="r")
    expected = reciprocal_rank_fusion(rouge_l.tolist(), (-nll).tolist(), ties=ties)
    torch.testing.assert_close(reciprocal_rank_fusion(mapped, -nll, ties=ties), expected, rtol=0, atol=0)


def test_memory_stays_below_eight_times_one_criterion():
    generator = np.random.default_rng(0)
    rouge_l, ease = generator.random(200_000).round(3), generator.random(200_000)
    tracemalloc.start()
    reciprocal_rank_fusion(rouge_l, ease)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * rouge_l.nbytes


@given(values=st.lists(few_values, min_size=1, max_size=40))
def test_one_criterion_is_a_stable_descending_sort(values):
    expected = sorted(range(len(values)), key=lambda row: values[row], reverse=True)
    assert reciprocal_rank_fusion(values).tolist() == expected


@both_ties
@given(rows=st.lists(st.tuples(st.floats(allow_nan=False), st.floats(allow_nan=False)), min_size=1))
def test_is_a_permutation(rows, ties):
    order = reciprocal_rank_fusion(*columns(rows), ties=ties)
    assert sorted(order.tolist()) == list(range(len(rows)))


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
@settings(max_examples=50)
@given(rows=st.lists(st.tuples(st.integers(-6, 6), st.integers(-6, 6)), min_size=1, max_size=40))
def test_only_the_order_within_a_criterion_matters(rows, rescale, ties):
    first, second = columns(rows)
    expected = reciprocal_rank_fusion(first, second, ties=ties).tolist()
    assert reciprocal_rank_fusion([rescale(value) for value in first], second, ties=ties).tolist() == expected
    assert reciprocal_rank_fusion(first, [rescale(value) for value in second], ties=ties).tolist() == expected


@both_ties
@given(rows=st.lists(st.tuples(few_values, few_values), min_size=2, max_size=40))
def test_a_row_better_on_both_is_never_later(rows, ties):
    order = reciprocal_rank_fusion(*columns(rows), ties=ties).tolist()
    sequence = [rows[row] for row in order]
    for position, later in enumerate(sequence):
        for earlier in sequence[:position]:
            assert not (later[0] > earlier[0] and later[1] > earlier[1])


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


@pytest.mark.parametrize("weights", [None, (1.7, 1.7, 1.7)], ids=["unweighted", "equal_weights"])
def test_the_same_ranks_tie_in_whichever_order_floats_are_added(weights):
    # Row j of part p has the ranks j, 100 + j and 200 + j, of which each part takes another one first.
    ease = [[-(100 * ((part + shift) % 3) + row) for part in range(3) for row in range(100)] for shift in range(3)]
    order = reciprocal_rank_fusion(*ease, weights=weights).tolist()
    assert order == [100 * part + row for row in range(100) for part in range(3)]


@pytest.mark.parametrize(
    "convert",
    [
        list,
        tuple,
        np.array,
        lambda values: np.array(values, dtype=np.float32),
        torch.tensor,
        lambda v: torch.tensor(v).double(),
        lambda v: torch.tensor(v).bfloat16(),
        lambda v: torch.tensor(v, requires_grad=True),
    ],
    ids=["list", "tuple", "numpy", "numpy_float32", "tensor", "tensor_float64", "tensor_bfloat16", "tensor_with_grad"],
)
@both_ties
def test_takes_any_array_and_returns_int64(convert, ties):
    order = reciprocal_rank_fusion(convert([0.1, 0.9, 0.5]), convert([-3.0, -1.0, -2.5]), ties=ties)
    torch.testing.assert_close(order, torch.tensor([1, 2, 0]), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("ease", "keywords", "message"),
    [
        pytest.param([], {}, "at least one criterion", id="no_criterion"),
        pytest.param([[1, 2, 3], [1, 2]], {}, r"criterion 1 must have shape \[3\] .* has \[2\]", id="unequal_lengths"),
        pytest.param([[[1, 2], [3, 4]]], {}, r"criterion 0 must have shape .* has \[2, 2\]", id="two_dimensional"),
        pytest.param([[1, 2, 3], [1, math.nan, math.nan]], {}, "criterion 1 is NaN for 2 of 3 rows", id="nan"),
        pytest.param([[1, 2]], {"ties": "random"}, "'random'", id="unknown_ties"),
        pytest.param(
            [[1, 2], [1, 2]],
            {"weights": [1]},
            r"one positive weight for each of 2 criteria, but got \[1\]",
            id="too_few_weights",
        ),
        pytest.param([[1, 2]], {"weights": []}, r"each of 1 criteria, but got \[\]", id="no_weights"),
        pytest.param(
            [[1, 2], [1, 2]],
            {"weights": (1, 0)},
            r"one positive weight .* got \[1, 0\]; leave a criterion out",
            id="weight_zero",
        ),
        pytest.param([[1, 2], [1, 2]], {"weights": [-1, 1]}, r"got \[-1, 1\]", id="weight_negative"),
        pytest.param([[1, 2]], {"weights": [math.nan]}, r"got \[nan\]", id="weight_nan"),
        pytest.param([[1, 2]], {"weights": [math.inf], "ties": "order"}, r"got \[inf\]", id="weight_infinite"),
    ],
)
def test_refuses(ease, keywords, message):
    with pytest.raises(ValueError, match=message):
        reciprocal_rank_fusion(*ease, **keywords)
