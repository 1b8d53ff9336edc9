import numpy as np
import pytest
import references
import torch
from hypothesis import given
from hypothesis import strategies as st

from srd_lightning.evaluation.calibration import binned, calibration_error
from srd_lightning.evaluation.next_token import agreement, likelihood

CONFIDENCE = st.floats(1e-6, 1) | st.sampled_from([0.25, 0.5, 0.75, 1.0])  # borders of bins


@given(st.lists(st.tuples(CONFIDENCE, st.booleans()), min_size=1, max_size=20), st.sampled_from([1, 4, 8]))
def test_calibration_error_is_that_of_a_plain_loop(predictions, bins):
    confidence, right = (np.array(column, dtype=np.float64) for column in zip(*predictions, strict=True))
    sums = binned(confidence, right, bins)
    assert float(calibration_error(sums)) == pytest.approx(references.calibration_error(predictions, bins), abs=1e-9)
    half = len(predictions) // 2
    parts = binned(confidence[:half], right[:half], bins) + binned(confidence[half:], right[half:], bins)
    np.testing.assert_allclose(parts, sums, atol=1e-12)


def test_who_is_right_as_often_as_confident_is_calibrated():
    assert float(calibration_error(binned(np.full(10, 0.7), np.array([1.0] * 7 + [0.0] * 3)))) == pytest.approx(0)


@pytest.mark.parametrize("vocabulary", [None, 5])
def test_of_each_position_what_its_probabilities_say(vocabulary):
    torch.manual_seed(0)
    tokens, student, teacher = torch.randint(5, (9,)), torch.randn(9, 7) * 2, torch.randn(9, 7) * 2
    found, near = likelihood(tokens, student), agreement(teacher, student, vocabulary)
    for row in range(9):
        q = references.softmax(student[row])
        expected = [-q[tokens[row]].log(), float(q.max() == q[tokens[row]]), q.max()]
        assert found[row].tolist() == pytest.approx([float(value) for value in expected], rel=1e-5)
        p, q = (references.softmax(logits[row, :vocabulary]) for logits in (teacher, student))
        expected = [float(references.forward_kl(p, q)), float(p.max(0).indices == q.max(0).indices)]
        assert near[row].tolist() == pytest.approx(expected, rel=1e-5)
