"""The Triton kernel, run on a CPU by Triton's interpreter (which rounds to bf16 towards zero, unlike a GPU).

``make kernel`` runs these tests: they need Triton beside the torch for CPUs that the other tests use.
"""

import subprocess
import sys

import pytest
import references
import torch
from test_objective import FP32, LOSSES_AND_OWN, Case, Own, relative
from tiny import LOSSES

from srd_lightning.losses import ForwardKL, SkewForwardKL, SkewReverseKL, chunked, token_loss
from srd_lightning.losses.head import Head
from srd_lightning.losses.token_loss import TokenLoss
from srd_lightning.losses.top_k import TopKTeacher
from srd_lightning.teacher.live import TopK

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter computes what is masked, too
]
each_loss = pytest.mark.parametrize(("make_loss", "reference"), LOSSES.values(), ids=LOSSES)
PLAIN = {"temperature": 1.0, "kd_weight": 0.5, "scale": 1.0, "soft_cap": None}


@pytest.fixture
def kernel(monkeypatch):
    """The module, with blocks so small that some tokens' rows take several."""
    from srd_lightning.losses.triton import kernel

    monkeypatch.setattr(kernel, "LARGEST_BLOCK", 128)
    return kernel


def some(tokens, vocabulary, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (2 * torch.randn(2, tokens, vocabulary, generator=generator)).to(dtype)
    return logits, teacher, torch.randint(vocabulary, (tokens,), generator=generator)


def by_reference(reference, logits, teacher, targets, temperature, kd_weight, scale, soft_cap):
    """Return CE, T² D and the gradient of their weighted sum, in float64, by autograd of loops."""
    leaf = logits.double().requires_grad_()
    student = leaf * scale
    if soft_cap is not None:
        student = soft_cap * torch.tanh(student / soft_cap)
    ce = torch.stack([-references.softmax(row)[target].log() for row, target in zip(student, targets, strict=True)])
    pairs = zip(teacher, student, strict=True)
    kd = [reference(references.softmax(p, temperature), references.softmax(q, temperature)) for p, q in pairs]
    ce, kd = ce.sum(), torch.stack(kd).sum() * temperature**2
    ((1 - kd_weight) * ce + kd_weight * kd).backward()
    return torch.stack([ce * (kd_weight < 1), kd]).detach(), leaf.grad


@each_loss
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"kd_weight": 1.0, "temperature": 2.0},
        {"kd_weight": 0.3, "temperature": 1.5, "scale": 0.6},
        {"temperature": 0.7, "scale": 1.3, "soft_cap": 4.0},
    ],
    ids=str,
)
@pytest.mark.parametrize(("tokens", "vocabulary"), [(3, 300), (1, 37)])
def test_value_and_gradient_are_those_of_the_reference(kernel, make_loss, reference, change, tokens, vocabulary):
    settings = {**PLAIN, **change}
    logits, teacher, targets = some(tokens, vocabulary)
    expected, gradient = by_reference(reference, logits, teacher, targets, **settings)
    loss = make_loss(temperature=settings.pop("temperature"))
    values = kernel.to_gradient(TokenLoss(loss, **settings), logits, teacher, targets)
    assert relative(values, expected) < FP32
    assert relative(logits, gradient) < FP32


@each_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_half_precision_only_the_gradient_is_rounded(kernel, make_loss, reference, dtype):
    logits, teacher, targets = some(3, 300, dtype)
    expected, gradient = by_reference(reference, logits, teacher, targets, **PLAIN)
    values = kernel.to_gradient(TokenLoss(make_loss(), 0.5), logits, teacher, targets)
    assert relative(values, expected) < FP32
    assert logits.dtype == dtype
    assert relative(logits, gradient) < torch.finfo(dtype).eps


@each_loss
@pytest.mark.parametrize("kd_weight", [0.5, 1.0])
def test_forbidden_tokens_count_as_elsewhere(kernel, make_loss, reference, kd_weight):
    """A whole block of the student's too, and large logits; as the plain way has it in float64."""
    logits, teacher, targets = some(4, 300)
    logits[0, :128], teacher[1, 5:250], logits[2, 7], teacher[2, 7] = (-torch.inf,) * 4
    logits[3] *= 1e3
    targets[0] = 299
    exact = logits.double()
    cost = TokenLoss(make_loss(temperature=1.5), kd_weight)
    expected = token_loss.to_gradient(cost, exact, teacher.double(), targets)
    assert relative(kernel.to_gradient(cost, logits, teacher, targets), expected) < FP32
    assert relative(logits, exact) < 1e-4  # logits of 6,000 are known to 5e-4 only


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("of", ["student", "teacher"])
@each_loss
def test_numbers_that_are_none_are_not_lost(kernel, make_loss, reference, bad, of):
    logits, teacher, targets = some(2, 300)
    (logits if of == "student" else teacher)[1, 200] = bad
    values = kernel.to_gradient(TokenLoss(make_loss(), 1.0), logits, teacher, targets)
    assert not values[1].isfinite()
    assert logits[0].isfinite().all()


def test_a_target_outside_the_vocabulary_is_no_number(kernel):
    logits, teacher, targets = some(1, 37)
    assert kernel.to_gradient(TokenLoss(ForwardKL(), 0.5), logits, teacher, targets + 37)[0].isnan()


def test_cross_entropy_alone(kernel):
    logits, teacher, targets = some(3, 300)
    expected, gradient = by_reference(references.forward_kl, logits, teacher, targets, **{**PLAIN, "kd_weight": 0.0})
    values = kernel.to_gradient(TokenLoss(ForwardKL(2.0), 0.0), logits, None, targets)
    assert values[1] == 0
    assert relative(values[:1], expected[:1]) < FP32
    assert relative(logits, gradient) < FP32


@pytest.mark.parametrize("make_loss", [SkewForwardKL, SkewReverseKL])
def test_without_a_share_a_skewed_divergence_is_the_plain_one(kernel, make_loss):
    logits, teacher, targets = some(2, 37)
    exact, cost = logits.double(), TokenLoss(make_loss(alpha=0), 1.0)
    expected = token_loss.to_gradient(cost, exact, teacher.double(), targets)
    assert relative(kernel.to_gradient(cost, logits, teacher, targets), expected) < FP32
    assert relative(logits, exact) < FP32


class TestLikeliest:
    """A teacher whose likeliest tokens are known: distributions over these and one more, which is all others."""

    @pytest.fixture
    def top_k(self, kernel):
        from srd_lightning.losses.triton import top_k

        return top_k

    @each_loss
    @pytest.mark.parametrize(("temperature", "kd_weight", "scale"), [(1.0, 0.5, 1.0), (2.0, 0.3, 0.7), (2.0, 1.0, 1.0)])
    def test_value_and_gradient_are_those_of_the_reference(
        self, top_k, make_loss, reference, temperature, kd_weight, scale
    ):
        logits, teacher, targets = some(2, 300)
        targets[0] = teacher[0].argmax()  # one of the likeliest
        best, ids, rest = TopK(5)._observe(teacher)
        leaf = logits.double().requires_grad_()
        ce = kd = torch.zeros((), dtype=torch.float64)
        for row, others, kept, target in zip(leaf * scale, teacher, ids.long(), targets, strict=True):
            p, q = references.softmax(others, temperature), references.softmax(row, temperature)
            p, q = (torch.cat([values[kept], (values.sum() - values[kept].sum())[None]]) for values in (p, q))
            ce, kd = ce - references.softmax(row)[target].log(), kd + reference(p, q) * temperature**2
        ((1 - kd_weight) * ce + kd_weight * kd).backward()
        cost = TokenLoss(make_loss(temperature=temperature), kd_weight, scale)
        values = top_k.to_gradient(cost, logits, TopKTeacher(best, ids.long(), rest), targets)
        assert relative(values, torch.stack([ce * (kd_weight < 1), kd]).detach()) < FP32
        assert relative(logits, leaf.grad) < FP32

    @each_loss
    def test_others_that_are_all_forbidden_leave_all_finite(self, top_k, make_loss, reference):
        logits, teacher, targets = some(1, 300)
        best, ids, rest = TopK(3)._observe(teacher)
        kept, targets[0] = logits[0, ids[0].long()], ids[0, 0]
        logits.fill_(-torch.inf)[0, ids[0].long()] = kept
        exact, cost, likeliest = logits.double(), TokenLoss(make_loss(), 0.5), TopKTeacher(best, ids.long(), rest)
        expected = token_loss.to_gradient(cost, exact, TopKTeacher(best.double(), ids.long(), rest.double()), targets)
        found = top_k.to_gradient(cost, logits, likeliest, targets)
        assert relative(found, expected) < 1e-3  # they are e^-10000 together, not each
        assert logits.isfinite().all()  # the plain way gives some to tokens that are forbidden
        assert relative(logits[0, ids[0].long()], exact[0, ids[0].long()]) < FP32


class TestObjective:
    """In `chunked_objective`, where the kernel does what it can."""

    @pytest.fixture
    def calls(self, kernel, monkeypatch):
        """The numbers of tokens of which it was given the logits."""
        found, run = [], kernel.to_gradient

        def noted(cost, logits, *others):
            found.append(len(logits))
            return run(cost, logits, *others)

        from srd_lightning.losses.triton import choice

        choice._tried.cache_clear()
        monkeypatch.setattr(kernel, "to_gradient", noted)
        monkeypatch.setattr(chunked, "has_kernel", lambda device: True)
        return found

    @pytest.mark.parametrize("name", LOSSES_AND_OWN)
    @pytest.mark.parametrize("head", [{"bias": False}, {"scale": 0.3, "soft_cap": 2.0}], ids=str)
    def test_the_objective_is_that_of_the_reference(self, calls, name, head):
        make_loss, reference = LOSSES_AND_OWN[name]
        case = Case(**head)
        found, gradients = case.chunked(make_loss(temperature=1.5), 0.6, chunk=20)
        loss, _, _, expected = case.expected(reference, 0.6, 1.5)
        assert calls == ([] if make_loss is Own else [3, 20, 1])  # 3 to try it
        assert relative(found.loss.detach(), loss) < FP32
        assert max(relative(*pair) for pair in zip(gradients, expected, strict=True)) < FP32

    @each_loss
    def test_in_bf16_gradients_are_within_four_percent(self, calls, make_loss, reference):
        case = Case(torch.bfloat16, bias=False)
        found, gradients = case.chunked(make_loss(temperature=1.5), 0.6)
        loss, _, _, expected = case.expected(reference, 0.6, 1.5)
        assert calls == [3, 21]
        assert relative(found.loss.detach(), loss) < 0.01
        for gradient, exact in zip(gradients, expected, strict=True):
            assert float((gradient.double() - exact).norm() / exact.norm()) < 0.04

    def test_a_teacher_whose_likeliest_tokens_are_known(self, calls, monkeypatch):
        from srd_lightning.losses.triton import top_k

        ran, run = [], top_k.to_gradient
        monkeypatch.setattr(top_k, "to_gradient", lambda *given: ran.append(len(given[1])) or run(*given))
        case = Case()
        best, ids, rest = TopK(4)._observe(case.teacher.float())
        (loss, gradients), (plain, expected) = (
            chunked_by(case, TopKTeacher(best, ids.long(), rest), dtype) for dtype in (torch.float32, torch.float64)
        )
        assert (calls, ran) == ([], [3, 20, 1])
        assert relative(loss, plain) < FP32
        assert max(relative(*pair) for pair in zip(gradients, expected, strict=True)) < FP32

    def test_float64_goes_the_plain_way(self, calls):
        Case(torch.float64).chunked(ForwardKL(), 0.5)
        assert calls == []

    def test_a_kernel_that_is_wrong_is_told_of_and_left_out(self, calls, kernel, monkeypatch):
        monkeypatch.setattr(kernel, "forward_kl", kernel.reverse_kl)
        with pytest.warns(UserWarning, match="without its Triton kernel, which takes more time and memory: it is off"):
            found, _ = Case().chunked(ForwardKL(), 0.5)
        assert calls == [3]
        assert relative(found.loss.detach(), Case().expected(references.forward_kl, 0.5, 1.0)[0]) < FP32

    def test_a_kernel_that_does_not_compile_is_told_of_and_left_out(self, calls, kernel, monkeypatch):
        monkeypatch.setattr(kernel, "one_token", {})
        with pytest.warns(UserWarning, match="it cannot be run here"):
            Case().chunked(ForwardKL(), 0.5)


def chunked_by(case, likeliest, dtype):
    """Return the loss and the gradients of a case whose teacher is known by some tokens."""
    leaves = case.leaves(dtype)
    teacher = TopKTeacher(likeliest.logp.to(dtype), likeliest.ids, likeliest.rest.to(dtype))
    loss = chunked.chunked_objective(
        leaves[0],
        Head(*leaves[1:]),
        case.targets,
        ForwardKL(1.5),
        lambda some: TopKTeacher(*(values[some] for values in teacher)),
        0.6,
        chunk=20,
    ).loss
    return loss.detach(), torch.autograd.grad(loss, leaves)


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from srd_lightning.losses.triton import kernel
from srd_lightning.losses.triton import top_k

TYPES = dict.fromkeys(("students", "teachers"), "*bf16") | {"targets": "*i64"}
TYPES |= dict.fromkeys(("values", "plain", "tempered", "weights"), "*fp32")
TYPES |= dict.fromkeys(("student_stride", "teacher_stride", "stride", "vocabulary"), "i32")

def build(function, **fixed):
    types = {name: "constexpr" if name in fixed else TYPES.get(name, "fp32") for name in function.arg_names}
    source = ASTSource(function, types, {(function.arg_names.index(name),): value for name, value in fixed.items()})
    found = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 16})
    assert f".entry {function.__name__}" in found.asm["ptx"] and found.asm["cubin"]

build(top_k.sum_up, block=4096)
build(top_k.overwrite, block=4096)
for terms in (kernel.forward_kl, kernel.reverse_kl, kernel.jensen_shannon, kernel.total_variation,
              kernel.skew_forward_kl, kernel.skew_reverse_kl):
    build(kernel.one_token, terms=terms, needs_sum=True, capped=True, taught=True, block=4096)
    print(terms.__name__)
"""


def test_it_compiles_for_a_gpu_with_temperature_weights_and_share_given_at_run_time(monkeypatch, tmp_path):
    """To PTX and a binary for an H100, without one: all numbers are arguments of type fp32, so none is compiled in."""
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, check=False)
    assert done.stdout.split() == list(LOSSES), done.stderr
