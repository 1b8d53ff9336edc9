"""The same training on one process and on two, under every strategy: real processes, over gloo."""

import pytest
from conftest import remembered, train_equally

SAME = 1e-5
"""Between losses of each step, and between weights at the end, in fp32."""
NEAR = 5e-3
"""The same in bf16-mixed, whose products have three digits."""
TRAINER = {"gradient_clip_val": 1.0, "accumulate_grad_batches": 2}


def run(folder, devices, strategy, **settings):
    return train_equally(folder, devices, strategy, {"trainer": TRAINER, **settings})


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process does under some settings."""
    return remembered(run, tmp_path_factory.mktemp("alone"))


def check(alone, found, tolerance, same_rows=False):
    """Compare the loss of every step, the measures, the answers and the weights."""
    (one,), weights = alone
    records, found_weights = found
    assert one["in_parts"]
    for record in records:
        assert record["losses"] == pytest.approx(one["losses"], abs=tolerance)
        expected = {name: one["metrics"][name] for name in record["metrics"]}
        assert record["metrics"] == pytest.approx(expected, abs=tolerance)
        assert record["in_parts"]
    if "answers" in records[0]:
        answers = [row for record in records[: 1 if same_rows else None] for row in record["answers"]]
        assert sorted(answers, key=str) == sorted(one["answers"], key=str)
    assert found_weights.keys() == weights.keys()
    for name, weight in weights.items():
        assert (found_weights[name] - weight).abs().max() <= tolerance, name


SHARDED = {"teacher_placement": "shard", "activation_checkpointing": True}
CACHED = {"teacher_cache": "hidden", "teacher_cache_dtype": "float32"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "settings", "model"),
    [
        ("ddp", {}, {}),
        ("ddp", {"teacher_placement": "shard"}, {}),
        ("ddp", {"micro_batch_tokens": 90}, {"tied": True}),
        ("fsdp1", {}, {}),
        ("fsdp1", SHARDED, {"tied": True}),
        ("fsdp1", {}, {"lora": True}),
        ("fsdp2", {}, {}),
        ("fsdp2", SHARDED, {"tied": True}),
        ("fsdp2", {"teacher_placement": "offload"}, {"lora": True}),
        ("fsdp2", CACHED, {}),
        ("fsdp2_and_tensors", {}, {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value)) or "plain",
)
def test_two_processes_train_as_one_does(strategy, settings, model, alone, tmp_path):
    found = run(tmp_path / "two", 2, strategy, **settings, **model)
    check(alone(**model), found, SAME, same_rows=strategy == "fsdp2_and_tensors")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_process_may_have_no_token_to_learn_from(strategy, alone, tmp_path):
    found = run(tmp_path / "two", 2, strategy, muted=True)
    check(alone(muted=True), found, SAME)
    assert sum(record["silent_batches"] for record in found[0]) > 5


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp1", "fsdp2"])
def test_two_processes_train_as_one_does_in_half_precision(strategy, alone, tmp_path):
    settings = {"trainer": {**TRAINER, "precision": "bf16-mixed"}}
    check(alone(**settings), run(tmp_path / "two", 2, strategy, **settings), NEAR)


@pytest.mark.slow
def test_a_step_is_the_same_in_one_batch_or_in_two(alone, tmp_path):
    """Of accumulated batches, that with more tokens weighs more."""
    in_order = {"group_by_length": False}
    one, weights = alone(trainer={"gradient_clip_val": 1.0}, data=in_order)
    halves = {"trainer": TRAINER, "data": {**in_order, "batch_size": 2}}
    (two,), found = run(tmp_path / "two", 1, "auto", **halves)
    assert (len(one[0]["losses"]), len(two["losses"])) == (3 + 5 + 8 + 8, 5 + 10 + 15 + 15)
    for name, weight in weights.items():
        assert (found[name] - weight).abs().max() <= SAME, name


def test_a_sharded_student_cannot_go_in_parts(tmp_path):
    with pytest.raises(AssertionError, match=r"micro_batch_tokens needs a student whose weights are whole"):
        run(tmp_path / "two", 2, "fsdp2", micro_batch_tokens=90)


def test_a_teacher_cannot_be_spread_over_one_process(tmp_path):
    with pytest.raises(AssertionError, match=r"teacher_placement shard needs a strategy of several processes"):
        run(tmp_path / "one", 1, "auto", teacher_placement="shard")
