import math

import numpy as np
import pytest
import references
from hypothesis import given
from hypothesis import strategies as st

from srd_lightning.errors import DataError
from srd_lightning.evaluation.bootstrap import bootstrap_interval, bounds, paired_difference

VALUES = st.lists(st.floats(-5, 5), min_size=1, max_size=12)


class TestBootstrapInterval:
    @given(VALUES, st.integers(0, 3))
    def test_is_that_of_a_plain_loop_over_the_same_draws(self, values, seed):
        weights, draws = [1.0 + row % 3 for row in range(len(values))], np.random.default_rng(seed)
        means = references.resampled_means(values, weights, 21, lambda number: draws.integers(number, size=number))
        found = bootstrap_interval(values, weights, confidence=0.9, resamples=21, seed=seed)
        # of 21 sorted statistics the quantiles at 5 and 95 % are the second and the last but one
        assert found == pytest.approx((np.average(values, weights=weights), means[1], means[-2]), abs=1e-12)

    def test_of_ones_and_zeros_is_that_of_the_binomial_distribution(self):
        number, share = 60, 0.25
        chances = [
            math.comb(number, k) * share**k * (1 - share) ** (number - k) for k in range(number + 1)
        ]  # of k ones in a resample
        below = np.cumsum(chances)
        expected = [float(np.searchsorted(below, tail)) / number for tail in (0.025, 0.975)]
        values = [1.0] * int(share * number) + [0.0] * int((1 - share) * number)
        found = bootstrap_interval(values, resamples=20_000)
        assert found.mean == share
        assert [found.low, found.high] == pytest.approx(expected, abs=1 / number + 1e-9)

    def test_a_weight_is_that_many_rows(self):
        assert bootstrap_interval([2.0, 5.0], [3, 1]).mean == bootstrap_interval([2.0, 2.0, 2.0, 5.0]).mean == 2.75

    @pytest.mark.parametrize(("values", "weights"), [([], None), ([1.0, math.nan], None), ([1.0], [1.0, 2.0])])
    def test_what_has_no_mean_is_refused(self, values, weights):
        with pytest.raises(DataError, match=r"values must be finite|each value needs a weight"):
            bootstrap_interval(values, weights)

    def test_more_confidence_is_wider(self):
        statistics = np.arange(101.0)
        assert bounds(statistics, 0.8) == pytest.approx((10, 90))
        assert bounds(statistics, 0.5) == pytest.approx((25, 75))


class TestPairedDifference:
    @given(VALUES, st.floats(-3, 3))
    def test_leaves_nothing_of_how_hard_rows_are(self, values, shift):
        shifted = [value + shift for value in values]
        assert paired_difference(shifted, values, resamples=9) == pytest.approx((shift,) * 3, abs=1e-9)

    def test_changes_sign_with_its_sides(self):
        random = np.random.default_rng(1)
        first, second = random.random(30), random.random(30)
        one, other = paired_difference(first, second), paired_difference(second, first)
        assert (one.mean, one.low, one.high) == pytest.approx((-other.mean, -other.high, -other.low))

    def test_is_narrower_than_the_difference_of_two_intervals(self):
        hard = np.random.default_rng(2).random(50)
        better = hard + np.random.default_rng(3).random(50) / 20
        found, alone = paired_difference(better, hard), bootstrap_interval(hard)
        assert found.low > 0
        assert found.high - found.low < (alone.high - alone.low) / 5

    def test_other_rows_are_refused(self):
        with pytest.raises(DataError, match="of the same rows, but there are 2 and 1"):
            paired_difference([1, 2], [1])
