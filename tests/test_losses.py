import math
from functools import partial

import pytest
import references
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import LOSSES
from torch.nn import functional as F

from srd_lightning.errors import SettingError
from srd_lightning.losses import (
    DistillationLoss,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
    cross_entropy,
    divergences,
    response_mask,
)
from srd_lightning.losses.checks import check_loss

DIVERGENCES = {
    "forward_kl": divergences.forward_kl,
    "reverse_kl": divergences.reverse_kl,
    "jensen_shannon": partial(divergences.jensen_shannon, beta=0.3),
    "total_variation": divergences.total_variation,
    "skew_forward_kl": partial(divergences.skew_forward_kl, alpha=0.2),
    "skew_reverse_kl": partial(divergences.skew_reverse_kl, alpha=0.2),
}
each_loss = pytest.mark.parametrize("make_loss", [make_loss for make_loss, _ in LOSSES.values()], ids=LOSSES)
each_loss_and_reference = pytest.mark.parametrize(("make_loss", "reference"), LOSSES.values(), ids=LOSSES)
each_divergence = pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
garbage = pytest.mark.parametrize("fill", [math.inf, -math.inf, math.nan], ids=["inf", "minus_inf", "nan"])


def random_batch(shape=(3, 7, 31), dtype=torch.float32, scale=2.0):
    """Student logits, teacher logits, and labels of which about a third is masked."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (scale * torch.randn(2, *shape, generator=generator)).to(dtype)
    labels = torch.randint(shape[-1], shape[:2], generator=generator)
    labels[torch.rand(shape[:2], generator=generator) < 0.35] = -100
    labels[-1, -1] = 0
    return student, teacher, labels


def value_and_gradient(loss_fn, student, *others):
    student = student.detach().clone().requires_grad_()
    value = loss_fn(student, *others)
    value.backward()
    return value.detach(), student.grad


def is_masked(labels):
    masked = torch.ones(labels.shape, dtype=torch.bool)
    for row, position in references.response_positions(labels):
        masked[row, position] = False
    return masked


@st.composite
def two_distributions(draw):
    """Two lists of log-probabilities over one small vocabulary, as float64 ``[1, V]``."""
    size = draw(st.integers(2, 8))
    logits = st.lists(st.floats(-20, 20), min_size=size, max_size=size)
    return [torch.tensor([draw(logits)], dtype=torch.float64).log_softmax(-1) for _ in range(2)]


# Against references


# A gradient in bf16 has 8 significant bits; everything else is as exact as fp32.
@pytest.mark.parametrize(
    ("dtype", "gradient_rtol"), [(torch.float32, 1e-4), (torch.bfloat16, 2**-8)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("shape", [(3, 7, 31), (1, 2, 2), (2, 5, 1001)], ids=["3x7x31", "1x2x2", "2x5x1001"])
@pytest.mark.parametrize("temperature", [1.0, 1.5, 2.0])
@each_loss_and_reference
def test_value_and_gradient_equal_the_float64_reference(make_loss, reference, temperature, shape, dtype, gradient_rtol):
    batch = random_batch(shape, dtype)
    value, gradient = value_and_gradient(make_loss(temperature=temperature), *batch)
    expected, expected_gradient = value_and_gradient(
        partial(references.distillation_loss, reference, temperature=temperature), batch[0].double(), *batch[1:]
    )
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6, check_dtype=False)
    torch.testing.assert_close(gradient, expected_gradient, rtol=gradient_rtol, atol=1e-7, check_dtype=False)


@each_loss_and_reference
def test_without_scaling_by_temperature(make_loss, reference):
    batch = random_batch()
    value = make_loss(temperature=2.0, scale_by_temperature=False)(*batch)
    expected = references.distillation_loss(reference, *batch, temperature=2.0, scale_by_temperature=False)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6, check_dtype=False)


@each_loss_and_reference
def test_temperature_can_be_changed_after_construction(make_loss, reference):
    batch = random_batch()
    loss_fn = make_loss(temperature=1.0)
    loss_fn.temperature = 1.5
    expected = references.distillation_loss(reference, *batch, temperature=1.5)
    torch.testing.assert_close(loss_fn(*batch), expected, rtol=1e-5, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize(
    ("loss_fn", "expected"),
    [
        (ForwardKL(), math.log(5 / 3)),
        (ReverseKL(), 0.9 * math.log(9 / 5) + 0.1 * math.log(1 / 5)),
        (TotalVariation(), 0.4),
        (
            JensenShannon(),
            0.25 * math.log(5 / 7) + 0.25 * math.log(5 / 3) + 0.45 * math.log(9 / 7) + 0.05 * math.log(1 / 3),
        ),
        (
            JensenShannon(beta=0.1),
            0.05 * math.log(50 / 86) + 0.05 * math.log(50 / 14) + 0.81 * math.log(90 / 86) + 0.09 * math.log(10 / 14),
        ),
        (SkewForwardKL(), 0.5 * math.log(50 / 86) + 0.5 * math.log(50 / 14)),
        (SkewReverseKL(), 0.9 * math.log(90 / 54) + 0.1 * math.log(10 / 46)),
    ],
    ids=[
        "forward",
        "reverse",
        "total_variation",
        "jensen_shannon",
        "jensen_shannon_paper",
        "skew_forward",
        "skew_reverse",
    ],
)
def test_worked_by_hand(loss_fn, expected):
    teacher, student = torch.tensor([[[0.5, 0.5], [1, 1]]]).log(), torch.tensor([[[0.9, 0.1], [1, 1]]]).log()
    assert loss_fn(student, teacher, torch.tensor([[-100, 0]])).item() == pytest.approx(expected, rel=1e-5)


def test_forward_kl_equals_torch_kl_div():
    student, teacher, labels = random_batch()
    kept = ~is_masked(labels)
    pointwise = F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="none")
    torch.testing.assert_close(ForwardKL()(student, teacher, labels), pointwise.sum(-1)[kept].mean())


@each_loss
def test_gradcheck(make_loss):
    student, teacher, labels = random_batch((2, 4, 5), torch.float64)
    loss_fn = make_loss(temperature=1.5)
    assert torch.autograd.gradcheck(lambda logits: loss_fn(logits, teacher, labels), student.requires_grad_())


@each_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
def test_value_is_fp32_and_gradient_has_the_type_of_the_logits(make_loss, dtype):
    value, gradient = value_and_gradient(make_loss(), *random_batch(dtype=dtype))
    assert (value.dtype, value.shape) == (torch.float32, ())
    assert gradient.dtype == dtype


# Identities


@each_divergence
@given(pair=two_distributions())
def test_divergence_is_never_negative(divergence, pair):
    assert divergence(*pair).item() >= -1e-12


@each_divergence
@given(pair=two_distributions())
def test_divergence_is_zero_when_equal(divergence, pair):
    assert divergence(pair[0], pair[0]).item() == pytest.approx(0, abs=1e-12)


@given(pair=two_distributions())
def test_jensen_shannon_at_one_half_is_symmetric_and_at_most_ln_2(pair):
    p, q = pair
    value = divergences.jensen_shannon(p, q, beta=0.5).item()
    assert value == pytest.approx(divergences.jensen_shannon(q, p, beta=0.5).item(), abs=1e-12)
    assert value <= math.log(2) + 1e-12


@given(pair=two_distributions(), beta=st.floats(0.01, 0.99))
def test_jensen_shannon_with_the_models_swapped_is_the_other_beta(pair, beta):
    p, q = pair
    swapped = divergences.jensen_shannon(q, p, beta=1 - beta).item()
    assert divergences.jensen_shannon(p, q, beta=beta).item() == pytest.approx(swapped, abs=1e-9)


@given(pair=two_distributions())
def test_total_variation_is_symmetric_and_at_most_1(pair):
    p, q = pair
    value = divergences.total_variation(p, q).item()
    assert value == pytest.approx(divergences.total_variation(q, p).item(), abs=1e-12)
    assert value <= 1 + 1e-12


@given(pair=two_distributions())
def test_forward_kl_with_the_models_swapped_is_reverse_kl(pair):
    p, q = pair
    assert divergences.forward_kl(p, q).item() == pytest.approx(divergences.reverse_kl(q, p).item(), abs=1e-12)


@pytest.mark.parametrize(
    ("skew", "plain"),
    [
        (divergences.skew_forward_kl, divergences.forward_kl),
        (divergences.skew_reverse_kl, divergences.reverse_kl),
    ],
    ids=["forward", "reverse"],
)
@given(pair=two_distributions())
def test_skew_of_nothing_is_the_plain_kl(skew, plain, pair):
    assert skew(*pair, alpha=0.0).item() == pytest.approx(plain(*pair).item(), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(
    ("skew", "plain"), [(SkewForwardKL, ForwardKL), (SkewReverseKL, ReverseKL)], ids=["forward", "reverse"]
)
def test_skew_loss_takes_alpha_zero(skew, plain):
    batch = random_batch()
    torch.testing.assert_close(skew(alpha=0)(*batch), plain()(*batch), rtol=0, atol=0)


# Masks


def test_response_mask_marks_the_positions_before_response_tokens():
    labels = torch.tensor([[-100, -100, 7, 8], [5, -100, -100, 6]])
    assert response_mask(labels).tolist() == [[False, True, True], [False, False, True]]


@each_loss
@garbage
def test_masked_positions_change_neither_value_nor_gradient(make_loss, fill):
    student, teacher, labels = random_batch()
    masked = is_masked(labels)
    expected, expected_gradient = value_and_gradient(make_loss(), student, teacher, labels)
    student[masked], teacher[masked] = fill, fill
    value, gradient = value_and_gradient(make_loss(), student, teacher, labels)
    torch.testing.assert_close(value, expected, rtol=0, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=0)
    assert (gradient[masked] == 0).all()
    assert (gradient[~masked] != 0).any()


@each_loss
@pytest.mark.parametrize("fill", [0.0, math.inf, math.nan], ids=["zeros", "inf", "nan"])
@pytest.mark.parametrize("first_label", [-100, 3], ids=["all_masked", "only_the_first_token"])
def test_no_response_token_gives_a_zero_with_zero_gradients(make_loss, fill, first_label):
    logits = torch.full((2, 4, 5), fill)
    labels = torch.full((2, 4), -100)
    labels[:, 0] = first_label
    value, gradient = value_and_gradient(make_loss(), logits, logits, labels)
    assert value == 0
    assert (gradient == 0).all()


@each_loss
def test_ignore_index_can_be_another_number(make_loss):
    student, teacher, labels = random_batch()
    expected = make_loss()(student, teacher, labels)
    value = make_loss(ignore_index=-1)(student, teacher, labels.where(labels != -100, -1))
    torch.testing.assert_close(value, expected, rtol=0, atol=0)


# Ugly logits


@each_loss
def test_tokens_that_both_models_forbid_are_as_if_absent(make_loss):
    student, teacher, labels = random_batch()
    kept = [token for token in range(31) if token not in (3, 7, 30)]
    expected, expected_gradient = value_and_gradient(make_loss(), student[..., kept], teacher[..., kept], labels)
    student[..., [3, 7, 30]], teacher[..., [3, 7, 30]] = -math.inf, -math.inf
    value, gradient = value_and_gradient(make_loss(), student, teacher, labels)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient[..., kept], expected_gradient)
    assert (gradient[..., [3, 7, 30]] == 0).all()


@pytest.mark.parametrize(
    ("loss_fn", "expected"),
    [
        (ForwardKL(), 300),
        (ReverseKL(), 300),
        (JensenShannon(), math.log(2)),
        (TotalVariation(), 1),
        (SkewForwardKL(), math.log(10)),
        (SkewReverseKL(), math.log(10)),
    ],
    ids=LOSSES,
)
def test_two_models_sure_of_different_tokens(loss_fn, expected):
    student, teacher = torch.tensor([[[300.0, 0.0]] * 2]), torch.tensor([[[0.0, 300.0]] * 2])
    value, gradient = value_and_gradient(loss_fn, student, teacher, torch.tensor([[-100, 0]]))
    assert value.item() == pytest.approx(expected, rel=1e-6)
    assert gradient.isfinite().all()


@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_extreme_logits_stay_finite(make_loss, dtype):
    value, gradient = value_and_gradient(make_loss(), *random_batch(dtype=dtype, scale=300.0))
    assert 0 < value < math.inf
    assert gradient.isfinite().all()


# A loss of one's own, and errors


def test_a_loss_of_ones_own_is_one_method():
    class SquaredDifference(DistillationLoss):
        def divergence(self, teacher_logp, student_logp):
            return (teacher_logp - student_logp).square().mean(-1)

    batch = random_batch()
    expected = references.distillation_loss(lambda p, q: (p.log() - q.log()).square().mean(), *batch, temperature=2.0)
    torch.testing.assert_close(
        SquaredDifference(temperature=2.0)(*batch), expected, rtol=1e-5, atol=0, check_dtype=False
    )


def test_a_loss_without_the_method_names_itself():
    class Unfinished(DistillationLoss):
        pass

    with pytest.raises(NotImplementedError, match="Unfinished must define divergence"):
        Unfinished()(*random_batch())


def test_refuses_two_vocabularies():
    student, teacher, labels = random_batch()
    with pytest.raises(ValueError, match=r"\[3, 7, 30\] and \[3, 7, 31\]; .* same vocabulary"):
        ForwardKL()(student[..., :-1], teacher, labels)


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan, math.inf, "2", True])
def test_refuses_a_temperature_that_is_not_positive_also_later(temperature):
    message = f"temperature must be positive and finite, but is {temperature!r}"
    with pytest.raises(SettingError, match=message):
        JensenShannon(temperature=temperature)
    loss = ForwardKL()
    with pytest.raises(SettingError, match=message):
        loss.temperature = temperature
    assert loss.temperature == 1


@pytest.mark.parametrize("beta", [-0.1, 0.0, 1.0, 1.1])
def test_refuses_beta_outside_its_range(beta):
    with pytest.raises(ValueError, match=f"beta must lie between 0 and 1, but is {beta}"):
        JensenShannon(beta=beta)


@pytest.mark.parametrize("make_loss", [SkewForwardKL, SkewReverseKL])
@pytest.mark.parametrize("alpha", [-0.1, 1.0, 1.1])
def test_refuses_alpha_outside_its_range(make_loss, alpha):
    with pytest.raises(ValueError, match=rf"alpha must lie in \[0, 1\), but is {alpha}"):
        make_loss(alpha=alpha)


class OfAll(DistillationLoss):
    """Returns what it is given a function for."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def divergence(self, teacher_logp, student_logp):
        return self.make((teacher_logp - student_logp).square())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (torch.mean, r"of shape \[3\] for 3 tokens, but returned torch.float32 of shape \[\]"),
        (lambda values: values, r"torch.float32 of shape \[3, 7\]; sum over the vocabulary"),
        (lambda values: values.sum(0), r"torch.float32 of shape \[7\]"),
        (lambda values: values.sum(-1, keepdim=True), r"torch.float32 of shape \[3, 1\]"),
        (lambda values: None, "but returned None"),
        (lambda values: values.sum(-1).tolist(), r"but returned \[\d"),
        (lambda values: values.sum(-1) > 0, "torch.bool of shape"),
        (lambda values: values.sum(-1).detach(), "without a gradient; compute them from student_logp"),
        (lambda values: values.sum(-1) * torch.nan, "gives values that are NaN or infinite for two ordinary"),
        (lambda values: (values - values).sqrt().sum(-1), "gives gradients that are NaN or infinite"),
    ],
    ids=["scalar", "per_entry", "per_vocabulary", "kept_dimension", "none", "list", "bool", "detached", "nan", "sqrt"],
)
def test_a_divergence_that_is_not_one_value_per_token_is_named(make, said):
    with pytest.raises(SettingError, match=f"OfAll.*{said}"):
        check_loss(OfAll(make))


@pytest.mark.parametrize("make", [torch.mean, lambda values: None], ids=["scalar", "none"])
def test_it_is_named_too_where_all_logits_are_made(make):
    student, teacher, labels = random_batch()
    with pytest.raises(SettingError, match=r"OfAll.divergence must return one floating-point value per token"):
        OfAll(make)(student.requires_grad_(), teacher, labels)


def test_a_loss_for_one_vocabulary_is_left_to_the_first_batch():
    weights = torch.rand(31)
    check_loss(OfAll(lambda values: (values * weights).sum(-1)))
    assert OfAll(lambda values: (values * weights).sum(-1))(*random_batch()) > 0


def test_a_gradient_of_another_shape_is_named():
    class Short(ForwardKL):
        def value_and_gradient(self, teacher_logp, student_logp):
            value, gradient = super().value_and_gradient(teacher_logp, student_logp)
            return value, gradient[:, :-1]

    with pytest.raises(SettingError, match=r"Short.value_and_gradient must .* \[3, 7\].* but returned \[3, 6\]"):
        check_loss(Short())


def test_a_loss_that_changes_what_it_is_given_is_named():
    """The gradient of the cross-entropy is made of it afterwards."""

    class Overwrites(ForwardKL):
        def value_and_gradient(self, teacher_logp, student_logp):
            value = self.divergence(teacher_logp, student_logp)
            return value, student_logp.exp_() - teacher_logp.exp()

    with pytest.raises(SettingError, match=r"Overwrites\.value_and_gradient must not change student_logp"):
        check_loss(Overwrites())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bf16", "fp64"])
def test_values_of_another_precision_are_summed_in_at_least_fp32(dtype):
    batch = random_batch()
    exact = OfAll(lambda values: values.sum(-1))(*batch)
    rounded = OfAll(lambda values: values.sum(-1).to(dtype))(*batch)
    assert rounded.dtype == torch.promote_types(torch.float32, dtype)
    assert rounded.item() == pytest.approx(exact.item(), rel=2**-9)


@each_loss
def test_the_losses_pass_their_own_check(make_loss):
    check_loss(make_loss())


# Tokens that a model forbids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("who", ["student", "teacher"])
@each_loss
def test_tokens_that_one_model_forbids_leave_value_and_gradient_finite(make_loss, who, dtype):
    """A reverse KL is infinite there: it counts a probability of 0 as e^-10000, and so says how much is too much."""
    student, teacher, labels = random_batch((3, 7, 31), dtype)
    forbidding, other = (student, teacher) if who == "student" else (teacher, student)
    forbidding[..., 5] = -math.inf
    value, gradient = value_and_gradient(make_loss(), student, teacher, labels)
    assert value.isfinite()
    assert gradient.isfinite().all()
    if make_loss is (ForwardKL if who == "student" else ReverseKL):
        kept = ~is_masked(labels)
        p, q = (logits.double()[kept].log_softmax(-1) for logits in (other, forbidding))
        q[:, 5] = -1e4
        assert value == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)


# Cross-entropy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_cross_entropy_equals_torch_on_the_response(dtype):
    logits, _, labels = random_batch(dtype=dtype)
    positions = references.response_positions(labels)
    selected = torch.stack([logits[row, position] for row, position in positions]).float()
    targets = torch.stack([labels[row, position + 1] for row, position in positions])
    torch.testing.assert_close(cross_entropy(logits, labels), F.cross_entropy(selected, targets))
    assert cross_entropy(logits, labels.int()) == cross_entropy(logits, labels)


def test_cross_entropy_ignore_index_can_be_another_number():
    logits, _, labels = random_batch()
    value = cross_entropy(logits, labels.where(labels != -100, 0), ignore_index=0)
    expected = cross_entropy(logits, labels.where(labels != 0, -100))
    torch.testing.assert_close(value, expected, rtol=0, atol=0)


@garbage
def test_cross_entropy_ignores_masked_positions(fill):
    logits, _, labels = random_batch()
    masked = is_masked(labels)
    expected, expected_gradient = value_and_gradient(cross_entropy, logits, labels)
    logits[masked] = fill
    value, gradient = value_and_gradient(cross_entropy, logits, labels)
    torch.testing.assert_close(value, expected, rtol=0, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=0)


@pytest.mark.parametrize("fill", [0.0, math.inf, math.nan], ids=["zeros", "inf", "nan"])
def test_cross_entropy_of_no_response_token_is_a_zero_with_zero_gradients(fill):
    value, gradient = value_and_gradient(cross_entropy, torch.full((2, 4, 5), fill), torch.full((2, 4), -100))
    assert value == 0
    assert (gradient == 0).all()
