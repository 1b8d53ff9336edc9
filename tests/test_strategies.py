"""The same training on one rank and on two, under every strategy: real processes, over gloo."""

import pytest
import torch
from conftest import remembered, train_equally

SAME = 100 * torch.finfo(torch.float32).eps
"""Between losses of each step, and between weights at the end: sums of a hundred terms in another order; a share of
numbers above one."""
NEAR = 2 * torch.finfo(torch.bfloat16).eps
"""The same in bf16-mixed: a product or two that is rounded the other way."""
TRAINER = {"gradient_clip_val": 1.0, "accumulate_grad_batches": 2}


def run(folder, devices, strategy, **settings):
    return train_equally(folder, devices, strategy, {"trainer": TRAINER, **settings})


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one rank does under some settings."""
    return remembered(run, tmp_path_factory.mktemp("alone"))


def check(alone, found, tolerance, same_answers=True):
    """Compare the loss of every step, the measures, the answers (or only to what they are) and the weights."""
    (one,), weights = alone
    records, found_weights = found
    assert one["in_parts"]
    for record in records:
        assert record["losses"] == pytest.approx(one["losses"], abs=tolerance, rel=tolerance)
        expected = {name: one["metrics"][name] for name in record["metrics"]}
        if "rollouts/kept" in expected:  # each keeps what it has written
            expected["rollouts/kept"] /= len(records)
        assert record["metrics"] == pytest.approx(expected, abs=tolerance, rel=tolerance)
        assert record["in_parts"]
        assert record["auxiliary"] == pytest.approx(one["auxiliary"], abs=tolerance)
        assert [record.get(name) for name in ("own", "shares")] == [one.get(name) for name in ("own", "shares")]
    if "answers" in records[0]:
        answers = [row for record in records for row in record["answers"]]
        rows = [{name: row[name] for name in row if same_answers or name != "answer"} for row in answers]
        known = [{name: row[name] for name in row if same_answers or name != "answer"} for row in one["answers"]]
        assert sorted(rows, key=str) == sorted(known, key=str)
    assert found_weights.keys() == weights.keys()
    for name, weight in weights.items():
        assert (found_weights[name] - weight).abs().max() <= tolerance, name


SHARDED = {"teacher_placement": "shard", "activation_checkpointing": True}
CACHED = {"teacher_cache": {"kind": "hidden", "dtype": "float32"}}


MUTED = {"tied": True, "muted": True, "own_text": "gkd"}
"""Some batches of a process have no token to learn from, the student's head is its embedding, and it answers half of
the batches, greedily."""
LEARNT = {"learnt_loss": True}
"""The distillation loss has weights of its own, which are compared too."""
AUXILIARY = {"auxiliary": True, "muted": True}
"""A loss of hidden states with weights of its own, which are compared too; some batches have no token for it."""


ENCODER_DECODER = {"encoder_decoder": True}


@pytest.mark.parametrize(
    ("strategy", "settings", "model", "precision"),
    [
        ("fsdp2", {**SHARDED, **CACHED}, ENCODER_DECODER, "32-true"),
        ("ddp", {}, ENCODER_DECODER, "32-true"),
        ("ddp", {"teacher_placement": "shard"}, AUXILIARY, "32-true"),
        ("ddp", {"micro_batch_tokens": 90}, MUTED, "32-true"),
        ("ddp", {}, {}, "bf16-mixed"),
        ("fsdp1", SHARDED, MUTED, "32-true"),
        ("fsdp1", {}, {"lora": True}, "bf16-mixed"),
        ("fsdp2", {**SHARDED, "reflects_sharded": True}, MUTED, "32-true"),
        ("fsdp2", {"teacher_placement": "offload"}, {"lora": True}, "bf16-mixed"),
        ("fsdp2", {}, {"warmed": True}, "32-true"),
        ("fsdp2", {}, LEARNT, "32-true"),
        ("fsdp2", {**CACHED, "teacher_placement": "shard"}, AUXILIARY, "32-true"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value)) or "plain",
)
def test_two_processes_train_as_one_does(strategy, settings, model, precision, alone, tmp_path):
    """Pairs of what may go together, not all of it; what is plain under DDP and FSDP2 is in the tests of overlays."""
    alike = {**model, "trainer": {**TRAINER, "precision": precision}}
    found = run(tmp_path / "two", 2, strategy, **settings, **alike)
    tolerance = SAME if precision == "32-true" else NEAR
    in_autocast = strategy == "fsdp2" and precision != "32-true"  # where a whole model is rounded, and a shard before
    check(alone(**alike), found, tolerance, same_answers=not in_autocast)
    if "muted" in model:
        assert sum(record["silent_batches"] for record in found[0]) > 5


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("method", ["minillm", "distillm", "replay"])
def test_two_processes_train_on_the_students_text_as_one_does(method, strategy, alone, tmp_path):
    """Where the likeliest tokens are taken: sampling is seeded by the rank. (GKD is above, with the muted rows.)"""
    settings = {"own_text": method, "fits_only": True}
    expected = alone(**settings)
    check(expected, run(tmp_path / "two", 2, strategy, **settings), SAME)
    (one,), _ = expected
    assert set(one["own"]) == {True, False}
    assert one["shares"] == (pytest.approx([0.2, 0.5, 0.8]) if method == "distillm" else [None] * 3)


def test_each_process_draws_from_the_texts_that_it_has_written(tmp_path):
    """So what is drawn is not what one process would draw; but all draw, or all write, and make the same steps."""
    records, _ = run(tmp_path / "two", 2, "ddp", own_text="distillm that draws", fits_only=True)
    first, second = records
    for name in ("losses", "own"):
        assert first[name] == second[name]
    drawn = [[was_drawn for _, _, was_drawn in record["asked"]] for record in records]
    assert drawn[0] == drawn[1]
    assert 2 < sum(drawn[0]) < len(drawn[0])
    for record in records:
        for kept, texts, was_drawn in record["asked"]:
            assert not was_drawn or all(text in kept for text in texts)
    assert [texts for _, texts, _ in first["asked"]] != [texts for _, texts, _ in second["asked"]]


def test_a_step_is_the_same_in_one_batch_or_in_two(alone, tmp_path):
    """Of accumulated batches, that with more tokens weighs more."""
    in_order = {"group_by_length": False}
    one, weights = alone(trainer={"gradient_clip_val": 1.0}, data=in_order)
    halves = {"trainer": TRAINER, "data": {**in_order, "batch_size": 2}}
    (two,), found = run(tmp_path / "two", 1, "auto", **halves)
    assert len(one[0]["losses"]) == 3 + 5 + 8
    assert two["losses"] == pytest.approx(one[0]["losses"], abs=SAME)
    for name, weight in weights.items():
        assert (found[name] - weight).abs().max() <= SAME, name


def test_a_sharded_student_cannot_go_in_parts(tmp_path):
    with pytest.raises(AssertionError, match=r"micro_batch_tokens needs a student whose weights are whole"):
        run(tmp_path / "two", 2, "fsdp2", micro_batch_tokens=90)


def test_a_teacher_cannot_be_spread_over_one_process(tmp_path):
    with pytest.raises(AssertionError, match=r"teacher_placement shard needs a strategy of several ranks"):
        run(tmp_path / "one", 1, "auto", teacher_placement="shard")
