import pytest
import references
import torch
from tiny import lively_model

ROWS = [
    {"input_ids": [5, 6, 7, 8, 9, 1], "prompt_length": 2},
    {"input_ids": [9, 8, 7, 1], "prompt_length": 1},
    {"input_ids": [4, 5, 6, 7, 1], "prompt_length": 4},
]


@pytest.fixture
def student():
    return lively_model(seed=0)


@pytest.fixture
def teacher():
    return lively_model(seed=1)


def logits_one_by_one(model):
    """The logits of each row, computed without padding."""
    return [model(torch.tensor([row["input_ids"]])).logits for row in ROWS]


def labels_of(row):
    return [-100] * row["prompt_length"] + row["input_ids"][row["prompt_length"] :]


def concatenated(student, teacher):
    """Logits and labels of all rows one after the other, as one row. No row's end predicts the next one's prompt."""
    labels = torch.tensor([[label for row in ROWS for label in labels_of(row)]])
    with torch.no_grad():
        return torch.cat(logits_one_by_one(student), 1), torch.cat(logits_one_by_one(teacher), 1), labels


@pytest.mark.parametrize("length", [None, 6, 11], ids=["longest", "exact", "padded"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_papers_step_is_the_distillation_loss(student, teacher, temperature, length):
    loss = references.paper_step(student, teacher, ROWS, 0, temperature, kd_weight=1.0, length=length)
    expected = references.distillation_loss(references.forward_kl, *concatenated(student, teacher), temperature)
    assert expected > 0.1
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_papers_step_weighs_cross_entropy(student, teacher):
    def step(kd_weight):
        return references.paper_step(student, teacher, ROWS, 0, 2.0, kd_weight, length=8)

    logits, _, labels = concatenated(student, teacher)
    chosen = [
        -references.softmax(logits[row, position])[labels[row, position + 1]].log()
        for row, position in references.response_positions(labels)
    ]
    assert step(0.0).item() == pytest.approx(torch.stack(chosen).mean().item(), abs=1e-5)
    assert step(0.25).item() == pytest.approx(0.75 * step(0.0).item() + 0.25 * step(1.0).item(), abs=1e-5)


def test_the_papers_step_trains_the_student_only(student, teacher):
    references.paper_step(student, teacher, ROWS, 0, 1.0, kd_weight=0.5).backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())
