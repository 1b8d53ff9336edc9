"""Gradients of accumulated batches against those of one batch with all their tokens."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from srd_lightning.training.token_normalizer import TokenNormalizer

batches = st.lists(st.lists(st.floats(-9, 9, width=32), max_size=6), min_size=1, max_size=5)


@given(batches, st.integers(0, 2))
def test_every_token_of_a_step_weighs_the_same(values, missing):
    """``missing`` batches lack at the end of an epoch, but Lightning divides as if they were there."""
    accumulated = len(values) + missing
    weight, mean = nn.Parameter(torch.ones(())), TokenNormalizer()
    for batch in values:
        tokens = torch.tensor(batch)
        total = (weight * tokens).sum()
        divisor = mean.divisor(torch.tensor(len(batch)), accumulated)
        (total / divisor / accumulated).backward()
        own = mean.of_batch((total.detach() / divisor)[None])
        expected = sum(batch) / max(len(batch), 1)
        torch.testing.assert_close(float(own), expected, rtol=1e-4, atol=1e-4)
    mean.correct([weight])
    every = [value for batch in values for value in batch]
    torch.testing.assert_close(float(weight.grad), sum(every) / max(len(every), 1), rtol=1e-4, atol=1e-4)


def test_a_step_begins_anew_after_each_correction_and_without_accumulation():
    mean = TokenNormalizer()
    assert [float(mean.divisor(torch.tensor(tokens))) for tokens in (3, 5)] == [3, 5]
    assert [float(mean.divisor(torch.tensor(tokens), accumulated=2)) for tokens in (7, 9)] == [7, 7]
    mean.correct([])
    assert float(mean.divisor(torch.tensor(4), accumulated=2)) == 4
