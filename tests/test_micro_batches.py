import copy

import pytest
import torch
from conftest import lively_model, make_rows, tiny_model, tokenised
from hypothesis import given, settings
from hypothesis import strategies as st

from srd_lightning.losses import ForwardKL, response_mask
from srd_lightning.micro_batches import in_parts, micro_batches
from srd_lightning.rows import collate
from srd_lightning.step import Step


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 40), st.booleans())
@settings(deadline=None)
def test_parts_hold_every_row_once_and_stay_below_the_bound(lengths, max_tokens, pads_left):
    width = max(lengths)
    rows = [[0] * (width - length) + [1] * length for length in lengths]
    mask = torch.tensor(rows if pads_left else [row[::-1] for row in rows])
    ids = mask * torch.arange(1, len(lengths) + 1)[:, None]
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids, "extra": torch.arange(len(lengths))}
    parts = micro_batches(batch, max_tokens)
    assert sorted(torch.cat([part["extra"] for part in parts]).tolist()) == list(range(len(lengths)))
    assert sum(int(part["attention_mask"].sum()) for part in parts) == sum(lengths)
    for part in parts:
        assert part["input_ids"].numel() <= max_tokens or len(part["input_ids"]) == 1
        assert torch.equal(part["input_ids"].amax(1), part["extra"] + 1)
    if not pads_left:
        assert sum(part["input_ids"].numel() for part in parts) <= mask.numel()


@pytest.mark.parametrize("chunk", [None, 8], ids=["all logits", "chunked"])
def test_parts_give_the_gradient_of_the_whole(chunk, tokenizer):
    batch = collate(tokenised(tokenizer, make_rows(7)).to_list(), pad_token_id=0)
    found = []
    for max_tokens in (10**6, 40):
        student = lively_model(0).train()
        step = Step(student, lively_model(1), None, chunk, packing=False)
        tokens = response_mask(batch["labels"]).sum()

        def part(rows, step=step, tokens=tokens):
            return lambda: step.objective(rows, ForwardKL(1.5), 0.6, tokens)

        parts = micro_batches(batch, max_tokens)
        assert (len(parts) > 1) == (max_tokens == 40)
        objective = in_parts([part(rows) for rows in parts], student)
        (objective.loss * 2).backward()  # as accumulation or a scaler would have it
        found.append((objective, [parameter.grad for parameter in student.parameters()]))
    (whole, expected), (split, gradients) = found
    torch.testing.assert_close(tuple(split), tuple(whole))
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


def test_tied_heads_get_both_gradients(tokenizer):
    batch = collate(tokenised(tokenizer, make_rows(4)).to_list(), pad_token_id=0)
    student = tiny_model(0, tie_word_embeddings=True).train()
    plain = copy.deepcopy(student)
    step = Step(student, None, None, 8, packing=False)
    tokens = response_mask(batch["labels"]).sum()
    parts = micro_batches(batch, 40)
    in_parts(
        [lambda rows=rows: step.objective(rows, ForwardKL(), 0.0, tokens) for rows in parts], student
    ).loss.backward()
    plain(**batch).loss.backward()
    torch.testing.assert_close(student.lm_head.weight.grad, plain.lm_head.weight.grad, rtol=1e-4, atol=1e-6)


def test_it_says_that_it_cannot_be_differentiated_twice():
    model = torch.nn.Linear(1, 1)

    def objective():
        from srd_lightning.objective import Objective

        loss = model(torch.ones(1)).sum()
        return Objective(loss, loss, loss)

    loss = in_parts([objective, objective], model).loss
    loss.backward(retain_graph=True)
    assert model.weight.grad == 2
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        loss.backward()
