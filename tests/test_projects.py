"""Whole projects, run as their owners would, on one rank and on two (DDP over gloo)."""

import math
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import references
import torch
from conftest import PROJECTS, records_of, run_project

from srd_lightning import ALPACA

SAME = 100 * torch.finfo(torch.float32).eps
"""Between sums of a hundred terms in fp32, in another order."""
both = pytest.mark.parametrize("devices", [1, 2], ids=["one_process", "two_processes"])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a function that runs a project once; it returns what each rank saw, and the folder of the run."""
    known = {}

    def of(project, devices):
        if (project, devices) not in known:
            folder = tmp_path_factory.mktemp(project)
            run_project("drive", project, devices, folder, ranks=devices)
            known[project, devices] = records_of(folder, devices), folder
        return known[project, devices]

    return of


def rows_by_epoch(records):
    """Return the rows of each epoch over all ranks, each row once, and the number of rows with repeats."""
    seen = {}
    for record in records:
        for epoch, rows in record["epochs"].items():
            seen.setdefault(int(epoch), []).extend(map(tuple, rows))
    return {epoch: set(rows) for epoch, rows in seen.items()}, {epoch: len(rows) for epoch, rows in seen.items()}


def byte_ids(text):
    return [byte + 3 for byte in text.encode()]


def expected_pools(folder, rows, schedule, epochs):
    """Rank the stored scores with plain loops, and return the token ids of each epoch's rows."""
    scores = {s["id"]: s for part in folder.glob("part-*.parquet") for s in pq.read_table(part).to_pylist()}
    ordered = sorted(rows, key=lambda row: str(row["id"]))
    rouge_l = [scores[str(row["id"])]["rouge_l"] for row in ordered]
    ease = [-scores[str(row["id"])]["nll"] for row in ordered]
    easiest_first = [ordered[position] for position in references.average_rank_fusion(rouge_l, ease)]
    pools = {}
    for epoch in range(epochs):
        size = references.stage_size(references.staged_value(schedule, epoch), len(rows))
        examples = [ALPACA(row) for row in easiest_first[:size]]
        pools[epoch] = {(*byte_ids(prompt), *byte_ids(response), 1) for prompt, response in examples}
    return pools


@both
def test_every_epoch_trains_on_the_planned_rows_for_the_planned_steps(devices, run):
    sys.path.insert(0, str(PROJECTS))
    import distil

    records, folder = run("distil", devices)
    pools = expected_pools(folder / "scores", distil.make_rows(), distil.SCHEDULE, epochs=5)
    seen, counts = rows_by_epoch(records)
    assert seen == pools
    assert counts == {epoch: math.ceil(len(pool) / devices) * devices for epoch, pool in pools.items()}

    steps = references.count_steps([len(pool) for pool in pools.values()], 3, world_size=devices, accumulate=2)
    assert [record["steps"] for record in records] == [steps] * devices
    falling = [1e-3 * (1 - step / steps) for step in range(steps)]
    for record in records:
        assert record["learning_rates"] == pytest.approx(falling, abs=1e-9)
    assert {"val_nll", "val_kl", "train_kd"} <= set(records[0]["metrics"])
    assert len({record["weights"] for record in records}) == 1


def test_two_processes_reflect_as_one_does(run):
    scores = []
    for devices in (1, 2):
        _, folder = run("distil", devices)
        parts = (folder / "scores").glob("part-*.parquet")
        scores.append({row["id"]: row for part in parts for row in pq.read_table(part).to_pylist()})
    assert len(scores[0]) == 41
    assert scores[0] == scores[1]


def test_two_processes_measure_as_one_does(run):
    one, *two = (record["metrics"] for devices in (1, 2) for record in run("evaluate", devices)[0])
    assert set(one) == {"test_nll", "test_kl", "test_rouge_l"}
    assert two == [pytest.approx(one, rel=SAME)] * 2


@both
def test_a_cached_teacher_trains_as_a_live_one_does(devices, run):
    (live, _), (cached, home) = run("distil", devices), run("cached", devices)
    for one, other in zip(live, cached, strict=True):
        assert one["epochs"] == other["epochs"]
        assert one["weights"] == pytest.approx(other["weights"], rel=SAME)
        assert one["metrics"] == pytest.approx(other["metrics"], rel=1e-4)
    (folder,) = (home / "teacher").iterdir()
    assert not list(folder.glob(".signs-*"))
    shards = [pa.ipc.open_file(shard).read_all() for shard in folder.glob("part-*.arrow")]
    assert len(shards) == devices
    assert sum(len(shard) for shard in shards) == math.floor(0.75 * 41) + 5


@both
def test_own_module_takes_our_data(devices, run):
    records, _ = run("own_module", devices)
    seen, _ = rows_by_epoch(records)
    assert [len(rows) for rows in seen.values()] == [6, 6, 9, 9]
    assert seen[0] < seen[2]
    assert records[0]["steps"] == references.count_steps([6, 6, 9, 9], 2, world_size=devices)
    assert "val_loss" in records[0]["metrics"]


@both
def test_own_module_and_data_gain_the_curriculum(devices, run):
    records, _ = run("own_both", devices)
    seen, _ = rows_by_epoch(records)
    assert seen == {epoch: {(float(n),) for n in range(size)} for epoch, size in enumerate([5, 10, 10, 18])}
    assert records[0]["steps"] == references.count_steps([5, 10, 10, 18], 3, world_size=devices)


@both
def test_own_data_with_our_module(devices, run):
    records, _ = run("own_data", devices)
    seen, _ = rows_by_epoch(records)
    assert seen[0] == {(n, n + 1, n + 2, n + 1, n) for n in range(2, 12)}
    assert {"val_nll", "val_kl", "train_kd", "train_ce"} <= set(records[0]["metrics"])


@both
def test_own_scores(devices, run):
    """7 n mod 12 mistakes in row n: six of the rows have fewer than 6."""
    sys.path.insert(0, str(PROJECTS))
    import distil

    records, _ = run("own_scores", devices)
    seen, _ = rows_by_epoch(records)
    tokens = [
        tuple(byte_ids(example.prompt) + byte_ids(example.response) + [1])
        for example in map(ALPACA, distil.make_rows())
    ]
    assert seen[0] == {tokens[n] for n in range(12) if 7 * n % 12 < 6}
    assert seen[1] == set(tokens[:12])
    assert records[0]["steps"] == references.count_steps([6, 12], 2, world_size=devices)


def test_own_command_line_with_classes_that_derive_from_ours(run):
    records, _ = run("own_cli", 1)
    seen, _ = rows_by_epoch(records)
    assert [len(rows) for rows in seen.values()] == [6, 12]
    assert seen[0] < seen[1]
    assert records[0]["steps"] == references.count_steps([6, 12], 2)
    assert {"squares", "train_kd"} <= set(records[0]["metrics"])
