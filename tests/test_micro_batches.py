import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import lively_model, make_rows, tiny_model, tokenised
from torch.utils._python_dispatch import TorchDispatchMode

from srd_lightning.data.batches import collate
from srd_lightning.data.layout import FIRST, LaidOut, lay_out
from srd_lightning.losses import ForwardKL
from srd_lightning.losses.chunked import Objective
from srd_lightning.training.micro_batches import in_parts
from srd_lightning.training.step import DistillationStep


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 40), st.booleans())
def test_parts_hold_every_row_once_and_stay_below_the_bound(lengths, max_tokens, pads_left):
    width = max(lengths)
    rows = [[0] * (width - length) + [1] * length for length in lengths]
    mask = torch.tensor(rows if pads_left else [row[::-1] for row in rows])
    ids = mask * torch.arange(1, len(lengths) + 1)[:, None]
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask == 1, -100), "extra": "kept"}
    codes = torch.arange(mask.numel()).view(mask.shape)
    brought_along = codes[mask == 1]  # by all tokens, also those that are not learnt
    batch[FIRST] = mask.sum(1).cumsum(0) - mask.sum(1)
    layout = lay_out(batch, max_tokens=max_tokens)
    parts = LaidOut(batch, layout).parts()
    assert sorted(row for part in layout.parts for row in part.rows.tolist()) == list(range(len(lengths)))
    assert sorted(token for part in parts for token in part.layout.tokens.tolist()) == sorted(layout.tokens.tolist())
    assert sum(int(part["attention_mask"].sum()) for part in parts) == sum(lengths)
    for part, (rows_of_part, width, _) in zip(parts, layout.parts, strict=True):
        assert part["input_ids"].numel() <= max_tokens or len(part["input_ids"]) == 1
        assert torch.equal(part["input_ids"].amax(1), rows_of_part + 1)
        own = codes[rows_of_part, :width].flatten()[part.layout.positions + 1]
        assert torch.equal(part.layout.targets, ids.flatten()[own])
        assert torch.equal(brought_along[part.layout.tokens], own)
        assert part["extra"] == "kept"
    if not pads_left:
        assert sum(part["input_ids"].numel() for part in parts) <= mask.numel()


@pytest.mark.parametrize("chunk", [None, 8], ids=["all logits", "chunked"])
def test_parts_give_the_gradient_of_the_whole(chunk, tokenizer):
    batch = collate(tokenised(tokenizer, make_rows(7)).to_list(), pad_token_id=0)
    found = []
    for max_tokens in (None, 40):
        student = lively_model(0).train()
        step = DistillationStep(chunk, micro_batch_tokens=max_tokens).attach(student, lively_model(1))
        objective = step.objective(batch, ForwardKL(1.5), 0.6)
        (objective.loss * 2).backward()  # as accumulation or a scaler would have it
        found.append((objective, [parameter.grad for parameter in student.parameters()]))
    assert len(lay_out(batch, max_tokens=40).parts) > 2
    (whole, expected), (split, gradients) = found
    torch.testing.assert_close(tuple(split), tuple(whole))
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


class HeadCasts(TorchDispatchMode):
    """Counts how often something of the head's size is rounded to bf16."""

    count = 0

    def __torch_dispatch__(self, operation, types, arguments=(), settings=None):
        result = operation(*arguments, **(settings or {}))
        if operation == torch.ops.aten._to_copy.default and result.dtype == torch.bfloat16:
            self.count += result.shape == (384, 32)
        return result


def test_the_head_is_cast_once_for_all_parts(tokenizer, monkeypatch):
    batch = collate(tokenised(tokenizer, make_rows(7)).to_list(), pad_token_id=0)
    found = []
    for once in (True, False):
        student, teacher = lively_model(0).train(), lively_model(1).to(torch.bfloat16)
        step = DistillationStep(micro_batch_tokens=40).attach(student, teacher)
        step.objective(batch, ForwardKL(), 0.6)  # looks at the models
        if not once:
            monkeypatch.setattr(step, "_cast_head", lambda device: None)
        with torch.autocast("cpu", torch.bfloat16), HeadCasts() as casts:
            objective = step.objective(batch, ForwardKL(1.5), 0.6)
        objective.loss.backward()
        found.append((casts.count, objective.loss, [parameter.grad for parameter in student.parameters()]))
    (once, *results), (often, *others) = found
    assert once == 1 < often == len(lay_out(batch, max_tokens=40).parts)
    torch.testing.assert_close(results, others, rtol=0, atol=0)


class Weighed(ForwardKL):
    """Learns by what it is weighed."""

    def __init__(self):
        super().__init__()
        self.share = torch.nn.Parameter(torch.ones(()))

    def divergence(self, teacher_logp, student_logp):
        return self.share * super().divergence(teacher_logp, student_logp)


def test_a_loss_with_weights_of_its_own_gets_their_gradient(tokenizer):
    batch = collate(tokenised(tokenizer, make_rows(7)).to_list(), pad_token_id=0)
    gradients = []
    for max_tokens in (None, 40):
        loss = Weighed()
        step = DistillationStep(None, micro_batch_tokens=max_tokens).attach(lively_model(0), lively_model(1))
        step.objective(batch, loss, 0.5).loss.backward()
        gradients.append(loss.share.grad)
    assert gradients[0] != 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=0)


def test_tied_heads_get_both_gradients(tokenizer):
    batch = collate(tokenised(tokenizer, make_rows(4)).to_list(), pad_token_id=0)
    student = tiny_model(0, tie_word_embeddings=True).train()
    plain = copy.deepcopy(student)
    step = DistillationStep(8, micro_batch_tokens=40).attach(student, None)
    step.objective(batch, ForwardKL(), 0.0).loss.backward()
    plain(**batch).loss.backward()
    torch.testing.assert_close(student.lm_head.weight.grad, plain.lm_head.weight.grad, rtol=1e-4, atol=1e-6)


def test_without_gradients_parts_are_just_added(tokenizer):
    batch = collate(tokenised(tokenizer, make_rows(7)).to_list(), pad_token_id=0)
    models = lively_model(0).eval(), lively_model(1).eval()
    whole = DistillationStep().attach(*models).objective(batch, ForwardKL(), 0.5)
    with torch.inference_mode():
        found = DistillationStep(micro_batch_tokens=40).attach(*models).objective(batch, ForwardKL(), 0.5)
    assert not found.loss.requires_grad
    torch.testing.assert_close(tuple(found), tuple(value.detach() for value in whole))


def test_gradients_that_autograd_shares_are_not_mixed_up():
    class Sum(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))

    model = Sum()
    values = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 20.0, 30.0])]

    def objective(value, only_second):
        loss = ((0 if only_second else model.first) + model.second).sum() + 0 * value.sum()
        loss = loss + (value * model.second).sum()
        return Objective(loss, loss, loss)

    in_parts(
        [lambda: objective(values[0], False), lambda: objective(values[1], True)], model.parameters()
    ).loss.backward()
    assert model.first.grad.tolist() == [1, 1, 1]
    assert model.second.grad.tolist() == [1 + 1 + 11, 1 + 1 + 22, 1 + 1 + 33]


def test_it_says_that_it_cannot_be_differentiated_twice():
    model = torch.nn.Linear(1, 1)

    def objective():

        loss = model(torch.ones(1)).sum()
        return Objective(loss, loss, loss)

    loss = in_parts([objective, objective], model.parameters()).loss
    loss.backward(retain_graph=True)
    assert model.weight.grad == 2
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        loss.backward()
