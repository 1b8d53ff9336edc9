import math
import weakref
from functools import partial

import pytest
import references
import torch
from tiny import LOSSES
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from srd_lightning.curriculum.staged_values import assign
from srd_lightning.errors import SettingError
from srd_lightning.losses import (
    TAID,
    ContrastivePair,
    DistillationLoss,
    ForwardKL,
    JensenShannon,
    SkewForwardKL,
    SkewReverseKL,
    chunked,
    cross_entropy,
    log_probabilities,
    token_loss,
)
from srd_lightning.losses.chunked import chunked_objective
from srd_lightning.losses.head import Head
from srd_lightning.losses.top_k import TopKTeacher
from srd_lightning.teacher.live import TopK


class Own(DistillationLoss):
    """A loss of somebody's own: only its divergence is known."""

    def divergence(self, teacher_logp, student_logp):
        return (teacher_logp.exp().sqrt() - student_logp.exp().sqrt()).square().sum(-1)


def hellinger(p, q):
    return (p.sqrt() - q.sqrt()).square().sum()


LOSSES_AND_OWN = {
    **LOSSES,
    "skew_forward_kl_at_0": (partial(SkewForwardKL, alpha=0.0), references.forward_kl),
    "own": (Own, hellinger),
}
each_loss = pytest.mark.parametrize(("make_loss", "reference"), LOSSES_AND_OWN.values(), ids=LOSSES_AND_OWN)
TOKENS, VOCABULARY, WIDTH, TEACHER_WIDTH = 21, 37, 8, 6
FP32, FP64 = ((TOKENS + VOCABULARY) * torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64))
"""How far results may be off, relative to the largest: sums over tokens and vocabulary, each term rounded once."""
BF16 = 2 * torch.finfo(torch.bfloat16).eps
"""How far a loss may be off whose logits were rounded to bf16."""


class Case:
    """Hidden states, heads and targets, in float64; leaves in any type."""

    def __init__(self, dtype=torch.float32, scale=1.0, soft_cap=None, bias=True):
        generator = torch.Generator().manual_seed(0)

        def random(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).double()

        self.hidden, self.weight = random(TOKENS, WIDTH), random(VOCABULARY, WIDTH)
        self.bias = random(VOCABULARY) if bias else None
        self.teacher = random(TOKENS, TEACHER_WIDTH) @ random(TEACHER_WIDTH, VOCABULARY)
        self.targets = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
        self.dtype, self.scale, self.soft_cap = dtype, scale, soft_cap

    def leaves(self, dtype):
        tensors = [self.hidden, self.weight] + ([] if self.bias is None else [self.bias])
        return [tensor.detach().to(dtype, copy=True).requires_grad_() for tensor in tensors]

    def chunked(self, loss, kd_weight, teacher=None, **options):
        leaves = self.leaves(self.dtype)
        teacher = teacher or self.teacher.to(self.dtype).__getitem__
        head = Head(*leaves[1:], scale=self.scale, soft_cap=self.soft_cap)
        result = chunked_objective(leaves[0], head, self.targets, loss, teacher, kd_weight, **options)
        result.loss.backward()
        return result, [leaf.grad for leaf in leaves]

    def expected(self, reference, kd_weight, temperature):
        hidden, weight, *bias = leaves = self.leaves(torch.float64)
        logits = (hidden @ weight.T + (bias[0] if bias else 0.0)) * self.scale
        if self.soft_cap is not None:
            logits = self.soft_cap * torch.tanh(logits / self.soft_cap)
        last = torch.zeros(1, VOCABULARY, dtype=torch.float64)
        student, teacher = (torch.cat([values, last])[None] for values in (logits, self.teacher))
        labels = torch.cat([torch.tensor([-100]), self.targets])[None]
        kd = references.distillation_loss(reference, student, teacher, labels, temperature)
        ce = torch.stack(
            [-references.softmax(row)[target].log() for row, target in zip(logits, self.targets, strict=True)]
        ).mean()
        ((1 - kd_weight) * ce + kd_weight * kd).backward()
        return (
            ((1 - kd_weight) * ce + kd_weight * kd).detach(),
            ce.detach(),
            kd.detach(),
            [leaf.grad for leaf in leaves],
        )


def relative(found, expected):
    return float((found.double() - expected).abs().max() / expected.abs().max())


@each_loss
@pytest.mark.parametrize("kd_weight", [0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("chunk", [1, 4, 20, 21, 64])
def test_chunked_equals_the_float64_reference_in_value_and_all_gradients(
    make_loss, reference, kd_weight, temperature, chunk
):
    case = Case()
    found, gradients = case.chunked(make_loss(temperature=temperature), kd_weight, chunk=chunk)
    loss, ce, kd, expected = case.expected(reference, kd_weight, temperature)
    assert relative(found.loss.detach(), loss) < FP32
    assert relative(found.kd, kd) < FP32
    assert kd_weight == 1 or relative(found.ce, ce) < FP32
    assert max(relative(*pair) for pair in zip(gradients, expected, strict=True)) < FP32


@each_loss
@pytest.mark.parametrize("options", [{"scale": 0.3}, {"soft_cap": 2.0}, {"scale": 1.5, "soft_cap": 3.0, "bias": False}])
def test_heads_that_scale_or_cap_their_logits(make_loss, reference, options):
    case = Case(**options)
    found, gradients = case.chunked(make_loss(temperature=1.5), 0.6, chunk=4)
    loss, _, _, expected = case.expected(reference, 0.6, 1.5)
    assert relative(found.loss.detach(), loss) < FP32
    assert max(relative(*pair) for pair in zip(gradients, expected, strict=True)) < FP32


@each_loss
def test_float64_agrees_to_rounding(make_loss, reference):
    case = Case(torch.float64)
    found, gradients = case.chunked(make_loss(temperature=2.0), 0.6, chunk=5)
    loss, _, _, expected = case.expected(reference, 0.6, 2.0)
    assert relative(found.loss.detach(), loss) < FP64
    assert max(relative(*pair) for pair in zip(gradients, expected, strict=True)) < FP64


@each_loss
def test_bf16_stays_within_a_bound_of_float64(make_loss, reference):
    """Inputs are exact in bf16; logits and gradients are rounded to 8 bits once each, sums are in fp32."""
    case = Case(torch.bfloat16, bias=False)
    found, gradients = case.chunked(make_loss(temperature=1.5), 0.6, chunk=4)
    loss, _, _, expected = case.expected(reference, 0.6, 1.5)
    assert found.loss.dtype == torch.float32
    assert relative(found.loss.detach(), loss) < BF16
    assert max(relative(*pair) for pair in zip(gradients, expected, strict=True)) < 2 * BF16


@each_loss
@pytest.mark.parametrize("kd_weight", [0.5, 1.0])
def test_bf16_is_as_near_to_float64_as_all_logits_in_bf16(make_loss, reference, kd_weight):
    """What is left is the rounding of the logits by the product that makes them: for total variation it may be much."""
    if make_loss is Own:
        return
    generator = torch.Generator().manual_seed(0)
    hidden, weight, teacher_hidden = (torch.randn(shape, 32, generator=generator) for shape in (24, 500, 24))
    teacher = (hidden + 0.5 * teacher_hidden).bfloat16() @ (0.3 * weight).bfloat16().T
    targets = torch.randint(500, (24,), generator=generator)
    labels = torch.cat([torch.tensor([-100]), targets])[None]
    loss = make_loss()

    def in_chunks(hidden, weight):
        return chunked_objective(hidden, Head(weight), targets, loss, teacher.__getitem__, kd_weight, chunk=5).loss

    def whole(hidden, weight):
        student, last = hidden @ weight.T, torch.zeros(1, 500, dtype=hidden.dtype)
        student, other = (torch.cat([values.to(hidden.dtype), last])[None] for values in (student, teacher))
        return (1 - kd_weight) * cross_entropy(student, labels) + kd_weight * loss(student, other, labels)

    def gradients(make, dtype):
        leaves = [values.bfloat16().to(dtype).requires_grad_() for values in (hidden, 0.3 * weight)]
        make(*leaves).backward()
        return [leaf.grad.double() for leaf in leaves]

    in_bf16 = (gradients(make, torch.bfloat16) for make in (in_chunks, whole))
    for found, other, expected in zip(*in_bf16, gradients(whole, torch.float64), strict=True):
        off, others_off = ((values - expected).norm() / expected.norm() for values in (found, other))
        assert off < 1.3 * others_off + 2**-8


def test_under_autocast_products_are_in_bf16_and_the_gradient_of_the_head_is_summed_in_fp32():
    case = Case(bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        found, gradients = case.chunked(ForwardKL(1.5), 0.6, chunk=4)
    exact, expected = case.chunked(ForwardKL(1.5), 0.6, chunk=4)
    assert [gradient.dtype for gradient in gradients] == [torch.float32] * 2
    assert 1e-5 < relative(found.loss.detach(), exact.loss.detach()) < BF16
    assert max(relative(*pair) for pair in zip(gradients, expected, strict=True)) < 2 * BF16


def refuse(tokens):
    raise AssertionError("the teacher was asked")


@pytest.mark.parametrize("teacher", [None, refuse], ids=["none", "there"])
def test_without_weight_the_teacher_is_not_asked(teacher):
    case = Case()
    leaves = case.leaves(torch.float32)
    found = chunked_objective(leaves[0], Head(*leaves[1:]), case.targets, ForwardKL(), teacher, 0.0)
    _, ce, _, _ = case.expected(references.forward_kl, 0.0, 1.0)
    assert relative(found.loss.detach(), ce) < FP32
    assert found.kd == 0


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_without_weight_there_is_no_cross_entropy(temperature):
    found, _ = Case().chunked(ForwardKL(temperature), 1.0)
    assert found.ce == 0
    assert found.loss == found.kd > 0


@pytest.mark.parametrize("tokens", [0, 1, 2])
def test_sums_are_divided_by_the_number_of_tokens(tokens):
    """Each costs ln 2; where there is none, nothing is divided by 0."""
    targets = torch.zeros(tokens, dtype=torch.int64)
    found = chunked_objective(torch.ones(tokens, 1), Head(torch.zeros(2, 1)), targets, ForwardKL(), None, 0.0)
    assert float(found.ce) == pytest.approx(math.log(2) if tokens else 0)


def test_gradients_of_the_head_are_summed_in_fp32():
    """Each token adds 1 / 256 of the first, which a sum in bf16 would round away."""
    tokens = 513
    hidden = torch.ones(tokens, 1, dtype=torch.bfloat16)
    weight, bias = (torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True) for shape in ((2, 1), (2,)))
    targets = torch.zeros(tokens, dtype=torch.int64)
    loss = chunked_objective(hidden, Head(weight, bias), targets, ForwardKL(), None, 0.0, num_tokens=1, chunk=1).loss
    loss.backward()  # the gradient of each token by its logits is (-0.5, 0.5)
    for gradient in (weight.grad[:, 0], bias.grad):
        assert gradient.tolist() == [-256.0, 256.0]  # 256.5 in 8 bits; bf16 would have stopped at 128


@pytest.mark.parametrize("forbids", ["student", "teacher"])
@each_loss
def test_tokens_that_one_model_forbids_leave_the_objective_finite(make_loss, reference, forbids):
    if make_loss is Own:  # its square root has no derivative at 0
        return
    case = Case()
    hidden, weight, bias = case.leaves(torch.float32)
    teacher = case.teacher.float()
    if forbids == "student":
        bias = bias.detach().clone()
        bias[3] = -torch.inf
        case.targets[case.targets == 3] = 4
    else:
        teacher[:, 3] = -torch.inf
    found = chunked_objective(hidden, Head(weight, bias), case.targets, make_loss(), teacher.__getitem__, 0.5, chunk=4)
    found.loss.backward()
    assert all(values.isfinite().all() for values in (*found, hidden.grad, weight.grad))


def test_a_target_that_the_student_forbids_is_infinite_as_it_is_of_all_logits():
    hidden, weight = torch.ones(2, 1), torch.tensor([[1.0], [-torch.inf], [0.5]])
    found = chunked_objective(hidden, Head(weight), torch.tensor([0, 1]), ForwardKL(), None, 0.0)
    assert found.ce == torch.inf


class TestLikeliest:
    """What is known of a teacher by some of its tokens is a distribution, whatever the student says of the others."""

    @pytest.mark.parametrize("others", [0.0, -30.0, -1e4, -1e8, -3e38, -torch.inf])
    @pytest.mark.parametrize("temperature", [1.0, 1.7])
    def test_probabilities_sum_to_one(self, others, temperature):
        teacher, student = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0))
        teacher[:, :3] += 10  # these are kept
        student[:, 3:] = others
        best, ids, rest = TopK(3)._observe(teacher)
        found = TopKTeacher(best, ids.long(), rest).at(temperature, log_probabilities(student, temperature))
        torch.testing.assert_close(found.exp().sum(-1), torch.ones(5), rtol=1e-5, atol=0)
        value, gradient = ForwardKL().value_and_gradient(found, log_probabilities(student, temperature))
        assert (value > 0).all()
        assert gradient.isfinite().all()

    @pytest.mark.parametrize("temperature", [0.55, 0.7, 0.85, 1.2, 1.67, 2.5, 3.5])
    @pytest.mark.parametrize("sharpness", [1.0, 2.0, 3.5])
    def test_between_the_kept_temperatures_the_rest_keeps_its_mass(self, temperature, sharpness):
        """Zipf's law with noise over 5,000 tokens, of which 16 are kept; straight lines were off by up to 0.25."""
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(8, 5000, generator=generator) - 0.6 * torch.arange(1, 5001).log()
        logits = sharpness * logits
        best, ids, rest = TopK(16)._observe(logits)
        likeliest = TopKTeacher(best, ids.long(), rest)
        found = likeliest.at(temperature, torch.zeros(8, 5000).log_softmax(-1)).double()
        true = (logits.double() / temperature).log_softmax(-1)
        kept = torch.zeros(8, 5000, dtype=torch.bool).scatter_(1, likeliest.ids, True)
        rest, expected = (logp.exp().masked_fill(kept, 0).sum(-1) for logp in (found, true))
        assert ((rest / expected).log().abs() < 0.06).all()

    @pytest.mark.parametrize("temperature", [0.4, 4.5])
    def test_other_temperatures_are_refused(self, temperature):
        best, ids, rest = TopK(2)._observe(torch.zeros(1, 4))
        likeliest = TopKTeacher(best, ids.long(), rest)
        with pytest.raises(SettingError, match=f"from 0.5 to 4, but the loss is at {temperature}"):
            likeliest.at(temperature, torch.zeros(1, 4).log_softmax(-1))


def test_a_batch_without_responses_is_a_zero_that_is_connected():
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.ones(5, 4, requires_grad=True)
    nothing = torch.zeros(0, dtype=torch.int64)
    loss = chunked_objective(hidden, Head(weight), nothing, ForwardKL(), torch.zeros(0, 5).__getitem__, 0.5).loss
    loss.backward()
    assert loss == 0
    assert torch.equal(weight.grad, torch.zeros(5, 4))


def test_parts_of_a_batch_add_up_to_the_whole():
    case = Case()
    whole, _ = case.chunked(ForwardKL(), 0.5)
    hidden, weight, bias = case.leaves(torch.float32)
    teacher = case.teacher.float()
    parts = [slice(0, 5), slice(5, TOKENS)]
    total = sum(
        chunked_objective(
            hidden[part], Head(weight, bias), case.targets[part], ForwardKL(), teacher[part].__getitem__, 0.5, TOKENS
        ).loss
        for part in parts
    )
    torch.testing.assert_close(total, whole.loss)


def test_extreme_logits_give_finite_losses_and_gradients():
    """Where both distributions are zero, 0 * inf must not come out."""
    for make_loss, _ in LOSSES_AND_OWN.values():
        if make_loss is Own:  # its square root has no derivative at 0
            continue
        hidden = (torch.eye(4)[:3] * 1e4).requires_grad_()
        weight = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
        teacher = torch.randn(3, 9, generator=torch.Generator().manual_seed(1)) * 1e4
        teacher[:, 2] = -torch.inf
        targets = torch.zeros(3, dtype=torch.int64)
        loss = chunked_objective(hidden, Head(weight), targets, make_loss(), teacher.__getitem__, 0.5).loss
        loss.backward()
        assert all(torch.isfinite(values).all() for values in (loss, hidden.grad, weight.grad))


def test_no_gradient_is_made_of_a_head_that_is_frozen():
    case = Case()
    hidden, weight, bias = case.leaves(torch.float32)
    head = Head(weight.detach(), bias.detach())
    loss = chunked_objective(hidden, head, case.targets, ForwardKL(), case.teacher.float().__getitem__, 0.5).loss
    with LargestTensor() as largest:
        loss.backward()
    assert largest.numel <= hidden.numel()
    _, expected = case.chunked(ForwardKL(), 0.5)
    torch.testing.assert_close(hidden.grad, expected[0])


class LargestTensor(TorchDispatchMode):
    """Knows the largest tensor that was made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result


@each_loss
@pytest.mark.parametrize("tokens", [64, 512])
def test_no_tensor_grows_with_tokens_times_vocabulary(make_loss, reference, tokens):
    vocabulary, width, chunk = 200, 2, 16
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    teacher_hidden, teacher_weight = torch.randn(tokens, width), torch.randn(vocabulary, width)
    with LargestTensor() as largest:
        loss = chunked_objective(
            hidden,
            Head(weight),
            torch.zeros(tokens, dtype=torch.int64),
            make_loss(),
            lambda some: Head(teacher_weight)(teacher_hidden[some]),
            0.5,
            chunk=chunk,
        ).loss
        loss.backward()
    assert largest.numel == chunk * vocabulary


def test_logits_of_a_teacher_are_gone_before_there_are_the_next(monkeypatch):
    monkeypatch.setattr(chunked, "TEACHER_TOKENS", 4)
    case, made, held = Case(), [], []

    def teacher(some):
        held.append([logits() is not None for logits in made])
        logits = case.teacher[some].float()
        made.append(weakref.ref(logits.untyped_storage()))
        return logits

    case.chunked(ForwardKL(), 0.5, teacher=teacher, chunk=8)
    assert len(held) == 6
    assert not any(map(any, held))


@pytest.fixture
def compilations(monkeypatch):
    """Count what is compiled; only the graphs are made."""
    counter, compile = CompileCounterWithBackend("eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile(function, backend=counter))
    token_loss.compiled.cache_clear()
    torch.compiler.reset()
    yield counter
    token_loss.compiled.cache_clear()


@pytest.mark.parametrize("likeliest", [False, True], ids=["live", "topk"])
@pytest.mark.parametrize("make_loss", [ForwardKL, partial(JensenShannon, beta=0.3)], ids=["fkl", "jsd"])
def test_stages_of_temperature_and_share_are_compiled_once(compilations, make_loss, likeliest):
    case, loss, counted = Case(), make_loss(), []
    kept = TopK(5).observe(case.teacher, Head(torch.eye(VOCABULARY, dtype=torch.float64)))
    kept = kept["teacher_logp"], kept["teacher_ids"].long(), kept["teacher_rest"]
    options = {"teacher": lambda some: TopKTeacher(*(values[some] for values in kept))} if likeliest else {}
    for temperature, kd_weight in ((1.0, 0.5), (1.5, 0.5), (1.5, 0.9), (2.0, 0.0001), (1.0, 0.7)):
        loss.temperature = temperature
        found, gradients = case.chunked(loss, kd_weight, chunk=TOKENS, compile=True, **options)
        expected, expected_gradients = case.chunked(loss, kd_weight, chunk=TOKENS, **options)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradients, expected_gradients)
        counted.append(compilations.frame_count)
    assert counted[0] > 0
    assert counted == [counted[0]] * 5


@pytest.mark.parametrize(
    ("make_loss", "name", "values"),
    [
        (SkewForwardKL, "alpha", (0.1, 0.3, 0.0)),
        (SkewReverseKL, "alpha", (0.1, 0.3, 0.0)),
        (JensenShannon, "beta", (0.1, 0.3, 0.5)),
        (lambda: ContrastivePair(TAID(SkewForwardKL(0.1))), "loss.t", (0.1, 0.3, 1.0)),
        (lambda: ContrastivePair(TAID(SkewForwardKL(0.1))), "loss.loss.alpha", (0.1, 0.4, 0.2)),
    ],
    ids=["sfkl", "srkl", "jsd", "taid", "inside"],
)
def test_stages_of_a_losss_own_numbers_are_compiled_once(compilations, make_loss, name, values):
    case, loss, counted = Case(), make_loss(), []
    for value in values:
        assign(loss, name, value)
        found, gradients = case.chunked(loss, 0.5, chunk=TOKENS, compile=True)
        expected, expected_gradients = case.chunked(loss, 0.5, chunk=TOKENS)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradients, expected_gradients)
        counted.append(compilations.frame_count)
    assert counted[0] > 0
    assert counted == [counted[0]] * 3


def test_it_says_that_it_cannot_be_differentiated_twice():
    case = Case()
    hidden, weight, _ = case.leaves(torch.float32)
    loss = chunked_objective(
        hidden, Head(weight), case.targets, ForwardKL(), case.teacher.float().__getitem__, 0.5
    ).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bf16", "fp64"])
def test_a_loss_of_ones_own_may_return_another_precision(dtype):
    class Rounded(ForwardKL):
        def divergence(self, teacher_logp, student_logp):
            return super().divergence(teacher_logp, student_logp).to(dtype)

    found, gradients = Case().chunked(Rounded(), 0.5)
    exact, expected = Case().chunked(ForwardKL(), 0.5)
    assert found.loss.dtype == torch.float32
    assert found.kd.item() == pytest.approx(exact.kd.item(), rel=2**-9)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)


def test_a_loss_derived_from_another_does_not_inherit_its_gradient():
    class Half(ForwardKL):
        def divergence(self, teacher_logp, student_logp):
            return super().divergence(teacher_logp, student_logp) / 2

    case = Case()
    found, gradients = case.chunked(Half(), 1.0)
    whole, expected = case.chunked(ForwardKL(), 1.0)
    torch.testing.assert_close(found.loss * 2, whole.loss)
    torch.testing.assert_close(gradients[0] * 2, expected[0])
