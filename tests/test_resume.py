"""Runs that are killed, or told to end, and resumed: as if nothing had happened."""

import json
import signal
import subprocess

import pytest
import torch
from conftest import HANGS, of_launcher, run_project

from srd_lightning.checkpoints.consolidate import main as consolidate

LAST_BATCHES = [1, 5, 9, 14]
"""Of the epochs, which have 2, 4, 4 and 5 batches."""
SAME = 100 * torch.finfo(torch.float32).eps
"""How far sizes of weights may be apart that other numbers of ranks have trained."""


def run(folder, runs):
    """Run one after the other; return how their processes ended."""
    folder.mkdir(exist_ok=True)
    run_project("resume", folder, json.dumps(runs))
    return json.loads((folder / "ends.json").read_text())


def seen_by(folder, devices=1):
    """Return what each rank saw in each of the runs."""
    processes = []
    for rank in range(devices):
        runs = []
        for line in (folder / f"seen-{rank}.jsonl").read_text().splitlines():
            seen = json.loads(line)
            runs.append([]) if "run" in seen else runs[-1].append(seen)
        processes.append(runs)
    return processes


def of_kind(kind, seen):
    return {entry[kind]: entry for entry in seen if kind in entry}


def assert_as_the_whole_run(whole, runs):
    """All that was seen is what the uninterrupted run saw, in the same order, up to the same weights."""
    for run in runs:
        for kind in ("batch", "validated"):
            expected, found = of_kind(kind, whole), of_kind(kind, run)
            assert found == {number: expected[number] for number in found}
            assert list(found) == sorted(found)
    assert runs[-1][-1] == whole[-1]
    assert "weights" in whole[-1]


def batches(runs):
    """Return first and last batch of each run."""
    return [(min(found), max(found)) if (found := of_kind("batch", run)) else None for run in runs]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What processes see in a run that nothing interrupts, by strategy, in a folder beside which others find scores."""
    root, found = tmp_path_factory.mktemp("resume"), {}

    def of(strategy):
        if strategy not in found:
            devices = 1 if strategy == "auto" else 2
            assert run(root / strategy, [{"devices": devices, "strategy": strategy}]) == [[0] * devices]
            found[strategy] = [runs[0] for runs in seen_by(root / strategy, devices)]
        return root, found[strategy]

    return of


@pytest.mark.parametrize("strategy", ["auto", "fsdp1", "fsdp2"])  # the others are told to end, below
def test_a_run_that_is_killed_again_and_again(whole, strategy):
    root, expected = whole(strategy)
    devices = len(expected)
    first = {"devices": devices, "strategy": strategy}
    ends = run(
        root / f"killed-{strategy}",
        [
            {**first, "stop": {"at": {"step": 3}}},
            {**first, "stop": {"at": {"saving": 5}}},  # half a file, on the last batch before the rows grow
            {
                **first,
                "stop": {"at": {"validation": 2}, "rank": devices - 1},
            },  # after the last batch before the rows grow
            {**first, "stop": {"at": {"saving": 8}}},
            {**first, "seed": 7, "data": {"num_workers": 1}},
        ],
    )
    assert all(-signal.SIGKILL in processes for processes in ends[:-1])
    assert ends[-1] == [0] * devices
    for rank, runs in enumerate(seen_by(root / f"killed-{strategy}", devices)):
        assert_as_the_whole_run(expected[rank], runs)
        assert batches(runs) == [(0, 7), (6, 9), (8, 9), (10, 14), (14, 14)]
        assert [list(of_kind("validated", run)) for run in runs] == [[0, 1], [1], [], [2], [3]]
    (kept,) = (root / f"killed-{strategy}" / "checkpoints").iterdir()
    assert kept.name == "epoch=3-step=8.ckpt"
    assert kept.is_dir() == strategy.startswith("fsdp")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_run_that_is_told_to_end(whole, strategy):
    root, expected = whole(strategy)
    devices, folder = len(expected), root / f"told-{strategy}"
    first, saves = {"devices": devices, "strategy": strategy}, {"every_n_train_steps": 100}
    ends = run(
        folder,
        [
            {**first, "saves": saves, "stop": {"at": {"step": 3}, "how": "TERM", "rank": devices - 1}},
            {**first, "saves": saves, "stop": {"at": {"validation": 2}, "how": "TERM"}},
            {**first, "saves": saves},
        ],
    )
    assert ends == [[143] * devices, [143] * devices, [0] * devices]
    for rank, runs in enumerate(seen_by(folder, devices)):
        assert_as_the_whole_run(expected[rank], runs)
        assert batches(runs) == [(0, 7), (8, 9), (10, 14)]  # steps 4 and 5 are whole, and so is the validation
        assert [list(of_kind("validated", run)) for run in runs] == [[0, 1], [2], [3]]
        assert not any("weights" in entry for run in runs[:-1] for entry in run)


def test_the_launcher_waits_for_all_when_the_first_process_is_told_to_end(whole):
    root, expected = whole("ddp")
    (root / "launched").mkdir()
    launcher = of_launcher("resume", root / "launched")
    done = subprocess.run(**launcher, capture_output=True, timeout=HANGS, check=False)
    assert done.returncode == 143
    assert "SIGTERM: saved after step 4" in done.stderr
    assert [path.name for path in (root / "launched" / "checkpoints").iterdir()] == ["epoch=2-step=4.ckpt"]
    assert run(root / "launched", [{"devices": 2, "strategy": "ddp"}]) == [[0, 0]]
    for rank, runs in enumerate(seen_by(root / "launched", 2)):
        assert_as_the_whole_run(expected[rank], runs)
        assert batches(runs) == [(0, 7), (8, 14)]


@pytest.mark.parametrize(
    ("rollouts", "strategy"), [("gkd", "ddp"), ("distillm", "fsdp2"), ("minillm", "ddp"), ("replay", "ddp")]
)
def test_texts_of_the_student_go_on_in_every_rank(tmp_path, rollouts, strategy):
    """The rows that are compared are those that it wrote, or that were drawn from what each rank had kept."""
    settings = {"devices": 2, "strategy": strategy, "rollouts": rollouts, "max_epochs": 3}
    run(tmp_path / "whole", [{**settings, "saves": {"save_top_k": -1}}])
    (middle,) = (tmp_path / "whole" / "checkpoints").glob("*-step=3.ckpt")
    run(tmp_path / "resumed", [{**settings, "ckpt_path": str(middle)}])
    for rank in (0, 1):
        (whole,), (resumed,) = seen_by(tmp_path / "whole", 2)[rank], seen_by(tmp_path / "resumed", 2)[rank]
        assert_as_the_whole_run(whole, [resumed])
        assert batches([resumed]) == [(6, 9)]


def test_another_number_of_processes_goes_on_with_the_same_rows_in_each_step(whole):
    root, (expected,) = whole("auto")
    folder = root / "others"
    two = {"devices": 2, "strategy": "ddp"}
    run(folder, [{"stop": {"at": {"step": 3}}}, {**two, "stop": {"at": {"step": 6}}}, {}])
    (one, second, third), (also_second,) = seen_by(folder, 2)
    assert batches([one, second, third]) == [(0, 7), (6, 13), (12, 14)]
    expected = {number: sorted(entry["ids"]) for number, entry in of_kind("batch", expected).items()}
    for number, entry in of_kind("batch", one + third).items():
        assert sorted(entry["ids"]) == expected[number]
    for number, entry in of_kind("batch", second).items():
        assert sorted(entry["ids"] + of_kind("batch", also_second)[number]["ids"]) == expected[number]


def test_one_process_goes_on_from_a_sharded_checkpoint_that_was_made_one_file(tmp_path):
    settings = {"devices": 2, "strategy": "fsdp2", "dropout": 0.0}
    run(tmp_path / "whole", [{**settings, "saves": {"save_top_k": -1}}])
    sharded, file = tmp_path / "whole" / "checkpoints" / "epoch=2-step=4.ckpt", tmp_path / "one" / "file.ckpt"
    consolidate([str(sharded), str(file)])
    assert [path.name for path in file.parent.iterdir()] == ["file.ckpt"]
    run(tmp_path / "one", [{"dropout": 0.0, "ckpt_path": str(file)}])
    (((*_, expected),), _), (((*batches_of_one, found),),) = seen_by(tmp_path / "whole", 2), seen_by(tmp_path / "one")
    assert list(of_kind("batch", batches_of_one)) == list(range(8, 15))
    assert found["size"] == pytest.approx(expected["size"], rel=SAME)


def test_sharded_processes_go_on_from_the_file_of_one(tmp_path):
    run(tmp_path / "whole", [{"dropout": 0.0}])
    sharded = {"devices": 2, "strategy": "fsdp2", "dropout": 0.0}
    run(tmp_path / "both", [{"dropout": 0.0, "stop": {"at": {"step": 3}}}, sharded])
    (((*_, expected),),), ((_, second), _) = seen_by(tmp_path / "whole"), seen_by(tmp_path / "both", 2)
    assert batches([second]) == [(6, 14)]
    assert second[-1]["size"] == pytest.approx(expected["size"], rel=SAME)
