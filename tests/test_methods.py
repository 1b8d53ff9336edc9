"""Losses beside the six: each against its own formula, in value and gradient, however it is computed."""

import math
import re
import weakref
from functools import partial
from pathlib import Path

import pytest
import references
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from tiny import lively_model, make_rows, tokenised
from transformers import ByT5Tokenizer

from srd_lightning import (
    TAID,
    AdaptiveKL,
    AlphaBeta,
    AuxiliaryLoss,
    ContrastivePair,
    Curriculum,
    Decoding,
    DistillationLoss,
    ForwardKL,
    Head,
    Hellinger,
    ReverseKL,
    Selected,
    SkewForwardKL,
    SkewReverseKL,
    TokenScore,
    TokenTemperature,
    chunked_objective,
)
from srd_lightning.data.batches import collate
from srd_lightning.errors import SettingError
from srd_lightning.losses import look_ahead
from srd_lightning.losses.checks import check_loss
from srd_lightning.losses.paper import (
    PaperForwardKL,
    PaperJensenShannon,
    PaperReverseKL,
    PaperSkewForwardKL,
    PaperSkewReverseKL,
    PaperTotalVariation,
)
from srd_lightning.models.generation import PAPER_DECODING
from srd_lightning.teacher.live import TopK
from srd_lightning.training.compatibility import check_likeliest
from srd_lightning.training.step import DistillationStep

ROWS = [5, 0, 9, 7]
TOKENS, VOCABULARY, WIDTH = sum(ROWS), 17, 6


def of_each_token(divergence, student, teacher, rows, temperature):
    """Return the mean over tokens, in float64, times the temperature squared."""
    return references.chosen_by_row(divergence, student, teacher, rows, temperature)


PLAIN = {
    "alpha_beta": (lambda temperature: AlphaBeta(temperature=temperature), references.alpha_beta),
    "alpha_beta_0_1": (partial(AlphaBeta, 0.0, 0.5), partial(references.alpha_beta, alpha=0.0, beta=0.5)),
    "alpha_beta_1_0": (partial(AlphaBeta, 0.5, 0.0), partial(references.alpha_beta, alpha=0.5, beta=0.0)),
    "adaptive_kl": (lambda temperature: AdaptiveKL(temperature=temperature), references.adaptive_kl),
    "adaptive_kl_small_head": (partial(AdaptiveKL, 0.01), partial(references.adaptive_kl, head=0.01)),
    "taid": (lambda temperature: TAID(ForwardKL(temperature)), references.taid),
    "contrastive": (
        lambda temperature: ContrastivePair(SkewForwardKL(0.1, temperature), b=1.4),
        lambda p, q: 0.6 * references.skew_forward_kl(p, q),
    ),
    "contrastive_own": (
        lambda temperature: ContrastivePair(SkewForwardKL(0.1, temperature), b=1.4).for_batch(own_text=True),
        lambda p, q: 1.4 * references.skew_reverse_kl(p, q),
    ),
}
CHOOSING = {
    "selected": (
        lambda temperature: Selected(ReverseKL(temperature), share=0.4),
        partial(references.chosen_by_row, references.reverse_kl, share=0.4),
    ),
    "warmed": (
        lambda temperature: TokenTemperature(ForwardKL(temperature), 0.5),
        partial(references.chosen_by_row, references.forward_kl, strength=0.5),
    ),
    "selected_and_warmed": (
        lambda temperature: Selected(TokenTemperature(ReverseKL(temperature), 0.5), Hellinger(), 0.5),
        partial(references.chosen_by_row, references.reverse_kl, share=0.5, by=references.hellinger, strength=0.5),
    ),
    "selected_taid": (
        lambda temperature: Selected(TAID(ForwardKL(temperature)), share=0.2),
        partial(references.chosen_by_row, references.taid, share=0.2),
    ),
}
METHODS = {
    **{name: (make, partial(of_each_token, reference)) for name, (make, reference) in PLAIN.items()},
    **CHOOSING,
}
each_method = pytest.mark.parametrize(("make_loss", "reference"), METHODS.values(), ids=METHODS)


def case(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, WIDTH, generator=generator, dtype=torch.float64) for n in (TOKENS, VOCABULARY))
    teacher = 2 * torch.randn(TOKENS, VOCABULARY, generator=generator, dtype=torch.float64)
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    return [values.to(dtype) for values in (hidden, head, teacher)], targets


def gradients(objective, *leaves):
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    value = objective(*leaves)
    value.backward()
    return value.detach(), [leaf.grad for leaf in leaves]


def expected(reference, kd_weight, temperature):
    (hidden, head, teacher), targets = case()

    def objective(hidden, head):
        logits = hidden @ head.T
        ce = torch.stack([-references.softmax(row)[target].log() for row, target in zip(logits, targets, strict=True)])
        return (1 - kd_weight) * ce.mean() + kd_weight * reference(logits, teacher, ROWS, temperature)

    return gradients(objective, hidden, head)


@each_method
@pytest.mark.parametrize("kd_weight", [0.3, 1.0])
@pytest.mark.parametrize(("temperature", "chunk"), [(1.0, 4), (1.7, None), (1.7, 1), (1.7, 64)])
def test_value_and_gradients_are_those_of_loops_in_float64(make_loss, reference, kd_weight, temperature, chunk):
    (hidden, head, teacher), targets = case()
    loss = make_loss(temperature)

    def objective(hidden, head):
        if chunk is not None:
            options = {"chunk": chunk, "rows": ROWS}
            return chunked_objective(hidden, Head(head), targets, loss, teacher.__getitem__, kd_weight, **options).loss
        logits = hidden @ head.T
        ce = torch.nn.functional.cross_entropy(logits, targets)
        return (1 - kd_weight) * ce + kd_weight * loss.of_tokens(logits, teacher, torch.tensor(TOKENS), ROWS)

    torch.testing.assert_close(
        gradients(objective, hidden, head), expected(reference, kd_weight, temperature), rtol=1e-9, atol=1e-11
    )


@each_method
def test_fp32_agrees_to_rounding(make_loss, reference):
    (hidden, head, teacher), targets = case(torch.float32)

    def objective(hidden, head):
        return chunked_objective(
            hidden, Head(head), targets, make_loss(1.5), teacher.__getitem__, 0.6, chunk=5, rows=ROWS
        ).loss

    found, of_found = gradients(objective, hidden, head)
    value, of_value = expected(reference, 0.6, 1.5)
    assert float(found) == pytest.approx(float(value), rel=1e-5)
    for gradient, other in zip(of_found, of_value, strict=True):
        assert (gradient - other).abs().max() < 1e-5 * other.abs().max()


def batch_of(number=7):
    return collate(tokenised(ByT5Tokenizer(), make_rows(number)).to_list(), pad_token_id=0)


@pytest.fixture(scope="module")
def stepped():
    """The loss and the gradients of a step, by loss and by how it is computed."""
    batch, teacher = batch_of(), lively_model(1)

    def step(make_loss, **options):
        student = lively_model(0)
        objective = DistillationStep(**options).attach(student, teacher).objective(batch, make_loss(1.5), 0.6)
        objective.loss.backward()
        return float(objective.loss.detach()), [weight.grad for weight in student.parameters()]

    return step


@pytest.mark.parametrize("name", ["alpha_beta", "adaptive_kl", "taid", *CHOOSING])
def test_a_step_is_the_same_in_chunks_in_parts_packed_and_of_all_logits(name, stepped):
    make_loss, _ = METHODS[name]
    value, weights = stepped(make_loss, chunk=None)
    for options in ({"chunk": 5}, {"micro_batch_tokens": 40}, {"packing": True, "micro_batch_tokens": 40}):
        found, gradients = stepped(make_loss, **options)
        assert found == pytest.approx(value, rel=1e-5)
        for gradient, expected in zip(gradients, weights, strict=True):
            assert (gradient - expected).abs().max() <= 1e-4 * expected.abs().max()


@each_method
def test_a_loss_by_itself_takes_the_rows_of_its_labels(make_loss, reference):
    (hidden, head, teacher), _ = case()
    student, labels, places = hidden @ head.T, torch.full((4, 10), -100), iter(range(TOKENS))
    whole = [torch.full((4, 10, VOCABULARY), math.nan, dtype=torch.float64) for _ in range(2)]
    for row, length in enumerate(ROWS):
        for position, place in zip(range(length), places, strict=False):
            labels[row, position + 1] = 3
            whole[0][row, position], whole[1][row, position] = student[place], teacher[place]
        places = iter(range(sum(ROWS[: row + 1]), TOKENS))
    torch.testing.assert_close(make_loss(1.5)(*whole, labels), reference(student, teacher, ROWS, 1.5))


def test_no_token_is_a_zero_that_is_connected():
    hidden, head = torch.zeros(0, 3, requires_grad=True), torch.ones(4, 3, requires_grad=True)
    nothing = torch.zeros(0, dtype=torch.int64)
    loss = Selected(TokenTemperature())
    found = chunked_objective(hidden, Head(head), nothing, loss, torch.zeros(0, 4).__getitem__, 0.5, rows=[0]).loss
    found.backward()
    assert found == 0
    assert torch.equal(head.grad, torch.zeros(4, 3))


# Identities and properties


def of_tokens(loss):
    (hidden, head, teacher), _ = case()
    return gradients(lambda logits: loss.of_tokens(logits, teacher, torch.tensor(TOKENS), ROWS), hidden @ head.T)


@pytest.mark.parametrize(
    ("loss", "other", "tolerance"),
    [
        (AlphaBeta(1.0, 0.0), ForwardKL(), 1e-12),
        (AlphaBeta(0.0, 1.0), ReverseKL(), 1e-12),
        (AlphaBeta(1.0, 1e-6), ForwardKL(), 1e-4),
        (AlphaBeta(1e-6, 1.0), ReverseKL(), 1e-4),
        (TAID(ReverseKL(), t=1.0), ReverseKL(), 1e-12),
        (Selected(ForwardKL(2.0), share=1.0), ForwardKL(2.0), 1e-12),
        (TokenTemperature(ForwardKL(2.0), strength=0.0), ForwardKL(2.0), 1e-12),
        (ContrastivePair(b=1.0), SkewForwardKL(), 1e-12),
        (ContrastivePair(b=1.0).for_batch(own_text=True), SkewReverseKL(), 1e-12),
        (ForwardKL().for_batch(own_text=True), ForwardKL(), 0.0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, DistillationLoss) else "",
)
def test_what_a_loss_comes_to_at_its_ends(loss, other, tolerance):
    torch.testing.assert_close(of_tokens(loss), of_tokens(other), rtol=tolerance, atol=tolerance)


def test_a_target_that_has_not_moved_teaches_nothing():
    value, (gradient,) = of_tokens(TAID(t=0.0))
    assert abs(value) < 1e-15
    assert gradient.abs().max() < 1e-15


logits = st.lists(st.floats(-20, 20), min_size=2, max_size=8)


@given(st.data(), st.sampled_from([AlphaBeta(), AlphaBeta(1, 1), AlphaBeta(0, 2), AdaptiveKL(), TAID()]))
def test_a_divergence_is_never_negative_and_0_where_two_are_equal(data, loss):
    size = data.draw(st.integers(2, 8))
    some = st.lists(st.floats(-20, 20), min_size=size, max_size=size)
    p, q = (torch.tensor([data.draw(some)], dtype=torch.float64).log_softmax(-1) for _ in range(2))
    value, gradient = loss.value_and_gradient(p, q.clone())
    assert value >= -1e-12
    assert abs(float(gradient.sum())) < 1e-9  # logits that all rise say the same
    value, gradient = loss.value_and_gradient(p, p.clone())
    assert abs(value) < 1e-12
    assert gradient.abs().max() < 1e-9


@pytest.mark.parametrize("who", ["student", "teacher"])
@each_method
def test_tokens_that_one_model_forbids_leave_value_and_gradient_finite(make_loss, reference, who):
    (hidden, head, teacher), _ = case(torch.float32)
    student = hidden @ head.T
    (student if who == "student" else teacher)[:, 5] = -math.inf
    value, (gradient,) = gradients(
        lambda logits: make_loss(1.0).of_tokens(logits, teacher, torch.tensor(TOKENS), ROWS), student
    )
    assert value.isfinite()
    assert gradient.isfinite().all()


# What is chosen, and what that saves


def test_the_teacher_is_asked_for_chosen_tokens_only_and_others_have_no_gradient():
    (hidden, head, teacher), targets = case()
    asked = []

    def of(tokens):
        asked.append(len(teacher[tokens]))
        return teacher[tokens]

    def objective(hidden, head):
        return chunked_objective(hidden, Head(head), targets, Selected(share=0.2), of, 1.0, chunk=4, rows=ROWS).loss

    _, (of_hidden, _) = gradients(objective, hidden, head)
    assert sum(asked) == 1 + 2 + 2  # of 5, 9 and 7
    assert int((of_hidden.abs().sum(1) > 0).sum()) == 5
    plan = Selected(share=0.2).plan(torch.arange(1.0, TOKENS + 1)[None], ROWS)
    assert plan.weights.tolist() == [0, 0, 0, 0, 5, *[0] * 7, 4.5, 4.5, *[0] * 5, 3.5, 3.5]
    assert (plan.chosen, plan.order()[:5].tolist()) == (5, [4, 12, 13, 19, 20])


def test_looking_ahead_holds_the_teachers_logits_of_one_slice_at_a_time(monkeypatch):
    (hidden, head, teacher), targets = case()
    monkeypatch.setattr(look_ahead, "TEACHER_TOKENS", 3)
    given = []

    def of(tokens):
        assert all(logits() is None for logits in given)
        logits = teacher[tokens].clone()
        given.append(weakref.ref(logits))
        assert len(logits) <= 4
        return logits

    chunked_objective(hidden, Head(head), targets, Selected(by=Hellinger()), of, 1.0, chunk=4, rows=ROWS)
    assert len(given) == 7 + 2  # 21 tokens, then the 5 chosen ones


def test_likeliest_tokens_can_be_chosen_among_but_not_warmed():
    (hidden, head, teacher), targets = case(torch.float32)
    known = TopK(VOCABULARY).logits(dict(zip(TopK().fields, TopK(VOCABULARY)._observe(teacher), strict=True)), None)
    values = [
        chunked_objective(hidden, Head(head), targets, Selected(by=Hellinger()), given, 0.5, rows=ROWS).loss
        for given in (known, teacher.__getitem__)
    ]
    torch.testing.assert_close(*values)
    check_likeliest([], Selected(), "auto")
    with pytest.raises(SettingError, match="topk knows one temperature for all tokens"):
        check_likeliest([], Selected(TokenTemperature()), "auto")


class Whole(DistillationLoss):
    def forward(self, student_logits, teacher_logits, labels):
        return student_logits.sum()


class Mean(TokenScore):
    def __call__(self, teacher_logp, student_logp):
        return student_logp.mean()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: AlphaBeta(-0.1), "alpha must lie at 0 or above, but is -0.1"),
        (lambda: AlphaBeta(0.0, 0.0), "alpha and beta must not both be 0"),
        (lambda: AdaptiveKL(1.0), "head must lie between 0 and 1, but is 1.0"),
        (lambda: TAID(t=1.1), r"t must lie in \[0, 1\], but is 1.1"),
        (lambda: ContrastivePair(b=2.5), r"b must lie in \[0, 2\], but is 2.5"),
        (lambda: Selected(share=0.0), r"share must lie in \(0, 1\], but is 0.0"),
        (lambda: TokenTemperature(strength=-1.0), "strength must lie at 0 or above, but is -1.0"),
        (lambda: Selected(Whole()), "Selected is made of losses that define divergence only, .* but is given Whole"),
        (lambda: TAID("ForwardKL"), "TAID is made of losses that define divergence only"),
        (lambda: ContrastivePair(on_own=Whole()), "ContrastivePair is made of losses"),
        (lambda: TAID(Selected()), "TAID is made of .* but is given Selected; one that chooses among tokens,"),
        (lambda: TAID(TokenTemperature()), "TAID is made of losses that define divergence only"),
        (lambda: ContrastivePair(Selected()), "ContrastivePair is made of losses that define divergence only"),
        (lambda: ContrastivePair(on_own=Selected()), "ContrastivePair is made of losses that define divergence only"),
        (lambda: Selected(ContrastivePair()), "Selected is made of losses that define divergence only"),
        (lambda: TAID(ContrastivePair()), "TAID is made of losses that define divergence only"),
        (lambda: TokenTemperature(Selected()), "TokenTemperature stands inside a Selected, not around it"),
        (lambda: of_tokens(Selected(by=Mean())), r"Mean must return one score per token, of shape \[21\], but"),
        (lambda: of_tokens(Selected(by=TokenScore())), r"TokenScore must define __call__"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_what_is_refused(make, said):
    with pytest.raises((SettingError, NotImplementedError), match=said):
        make()


@each_method
def test_temperature_is_that_of_the_loss_inside_and_all_pass_the_check_before_training(make_loss, reference):
    loss = make_loss(1.0)
    loss.temperature = 3.0
    innermost = [part for part in loss.modules() if isinstance(part, DistillationLoss)][-1]
    assert innermost.temperature == loss.temperature == 3.0
    with pytest.raises(SettingError, match="temperature must be positive"):
        loss.temperature = 0.0
    check_loss(loss)


# The paper's code, to the letter

PAPER = {
    "tfkl": PaperForwardKL,
    "trkl": PaperReverseKL,
    "tjsd": PaperJensenShannon,
    "ttvd": PaperTotalVariation,
    "tsfkl": PaperSkewForwardKL,
    "tsrkl": PaperSkewReverseKL,
}


@pytest.mark.parametrize("temperature", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("name", PAPER)
def test_losses_to_the_letter(name, temperature):
    (hidden, head, teacher), targets = case()

    def letter(logits):
        tokens = zip(teacher, logits, strict=True)
        pairs = [(references.softmax(p, temperature), references.softmax(q, temperature)) for p, q in tokens]
        return torch.stack([references.paper_loss(name, p, q, temperature) for p, q in pairs]).mean()

    loss = PAPER[name](temperature)
    by_letter = gradients(letter, hidden @ head.T)
    found = gradients(lambda logits: loss.of_tokens(logits, teacher, torch.tensor(TOKENS)), hidden @ head.T)
    torch.testing.assert_close(found, by_letter, rtol=1e-10, atol=1e-12)
    in_chunks = gradients(
        lambda logits: (
            chunked_objective(
                logits, Head(torch.eye(VOCABULARY).double()), targets, loss, teacher.__getitem__, 1.0, chunk=4
            ).loss
        ),
        hidden @ head.T,
    )
    torch.testing.assert_close(in_chunks, by_letter, rtol=1e-10, atol=1e-12)


def test_stages_of_the_paper_hold_so_many_rows_as_theirs():
    """Of Dolly's 11,435; theirs are cuts of whole quarters, ours shares of all."""
    recipe = yaml.safe_load((Path(__file__).parents[1] / "configs" / "paper.yaml").read_text())
    curriculum = Curriculum(torch.arange(11_435), recipe["data"]["schedule"])
    assert [curriculum.size(epoch) for epoch in (0, 8, 16)] == [(stage + 1) * (11_435 // 4) for stage in range(3)]
    assert Decoding(**recipe["data"]["decoding"]) == PAPER_DECODING


def test_the_settings_of_the_manual_make_these_losses():
    page = (Path(__file__).parents[1] / "docs" / "methods.md").read_text()
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--loss", type=DistillationLoss)
    parser.add_argument("--auxiliary", type=list[AuxiliaryLoss])
    given = {name: value for block in blocks for name, value in block["model"].items()}
    made = parser.instantiate(parser.parse_object(given))
    assert isinstance(made.loss.loss.loss, ReverseKL)
    assert isinstance(made.loss.by, Hellinger)
    assert made.loss.loss.strength == 0.5
    assert (made.auxiliary[0].student_layers, made.auxiliary[0].teacher_layers) == ((6, -1), (24, -1))
