import json
import os
import re
import signal
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import python
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from rich.console import Console

from srd_lightning.errors import MissingDataError, SettingError, SRDError, StorageError
from srd_lightning.studies import commands
from srd_lightning.studies.curves import Curve, read_curves
from srd_lightning.studies.intervals import paired_interval
from srd_lightning.studies.moved_config import moved, root_of
from srd_lightning.studies.plan import Study, read_study
from srd_lightning.studies.run_files import last_metrics
from srd_lightning.studies.study_run import StudyRun
from srd_lightning.studies.summary import Runs, markdown_table, summarize, write_summary

ROOT = Path(__file__).parents[1]
STAND_IN = (sys.executable, "-I", "-S", str(Path(__file__).parent / "stand_ins" / "srd_in_no_time.py"))
QUICK = {
    "arms": {"slow": [], "fast": ["--model.fall=2"]},
    "base": ["--data.scores={study}/scores-{seed}"],
    "seeds": [0, 1],
    "commands": ["fit --logs={run}", "evaluate"],
}


def write(study, path):
    path.write_text(yaml.safe_dump(study, sort_keys=False))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def runs_of(folder, **changes):
    return StudyRun(Study(**{**QUICK, **changes}), folder, Console(quiet=True), STAND_IN)


def calls(folder):
    path = folder / "calls.txt"
    return path.read_text().splitlines() if path.exists() else []


ALL_CALLS = [
    f"{command} {arm} {seed}" for seed in (0, 1) for arm in ("slow", "fast") for command in ("fit", "evaluate")
]


class TestPlan:
    def test_a_file_is_read(self, here):
        write({**QUICK, "reach": {"val_nll": 8}}, here / "study.yaml")
        assert read_study(here / "study.yaml") == Study(**QUICK, reach={"val_nll": 8.0})

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"arms": {}}, "at least one arm"),
            ({"seeds": []}, "at least one arm, one seed"),
            ({"arms": {"a/b": []}}, "arms are folders.*'a/b'"),
            ({"arms": {"..": []}}, "arms are folders"),
            ({"baseline": "none"}, r"baseline must be one of the arms \(slow, fast\), but is 'none'"),
            ({"arm": {"a": []}}, "is not a study:.*arm"),
            ({"seeds": ["x"]}, "is not a study:.*seeds"),
        ],
    )
    def test_what_cannot_be_is_refused(self, changes, said, here):
        write({**QUICK, **changes}, here / "study.yaml")
        with pytest.raises(SettingError, match=said):
            read_study(here / "study.yaml")

    def test_what_is_not_there_is_named(self, here):
        with pytest.raises(MissingDataError, match=r"study\.yaml"):
            read_study(here / "study.yaml")
        (here / "study.yaml").write_text("{")
        with pytest.raises(SettingError, match=r"study\.yaml is not a study"):
            read_study(here / "study.yaml")
        with pytest.raises(MissingDataError, match=r"there is no file base\.yaml"):
            runs_of(here / "s", base=["base.yaml"])

    def test_arguments_are_those_of_base_arm_and_command_in_this_order(self):
        _, cell, *_ = Study(**QUICK).cells(Path("s"))
        run = "s/cells/fast/seed-0"
        own = [f"--trainer.default_root_dir={run}", "--seed_everything=0"]
        settings = ["--data.scores=s/scores-0", "--model.fall=2"]
        assert cell.arguments() == [["fit", *settings, f"--logs={run}", *own], ["evaluate", *settings, *own]]

    def test_every_recipe_writes_into_the_folder_of_its_cell(self):
        for path in (ROOT / "configs").glob("*.yaml"):
            text = path.read_text()
            root, before = root_of(text), yaml.safe_load(text)
            if root is None:
                continue
            after = yaml.safe_load(moved(text, root, Path("elsewhere")))
            assert root not in json.dumps(after["trainer"])
            assert json.dumps(after).replace("elsewhere", root) == json.dumps(before)
            assert after.get("data") == before.get("data")

    def test_paths_of_others_stay(self):
        text = (
            "data: {data: runs/a/x}\ntrainer:\n  default_root_dir: runs/a # here\n  x: [runs/ab, runs/a/b, 'runs/a']\n"
        )
        assert moved(text, "runs/a", Path("b")) == (
            'data: {data: runs/a/x}\ntrainer:\n  default_root_dir: "b" # here\n  x: [runs/ab, "b/b", "b"]\n'
        )

    def test_the_study_of_the_manual_is_one(self, here):
        plan, of_cells = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "studies.md").read_text(), re.DOTALL)
        write({**yaml.safe_load(plan), **yaml.safe_load(of_cells)}, here / "study.yaml")
        found = read_study(here / "study.yaml")
        assert found.commands == Study(arms={"any": []}).commands
        assert found.baseline_arm == "forward"
        assert found.reach == {"val_nll": 1.5}


class TestRun:
    def test_all_cells_are_run_once(self, here):
        runs_of(here / "s").run()
        assert calls(here) == ALL_CALLS
        runs_of(here / "s").run()
        assert calls(here) == ALL_CALLS
        results = list(map(json.loads, (here / "s" / "results.jsonl").read_text().splitlines()))
        assert [(result["arm"], result["seed"]) for result in results] == [
            ("slow", 0), ("fast", 0), ("slow", 1), ("fast", 1)
        ]  # fmt: skip
        assert results[1]["metrics"] == {"val_nll": 4.0, "val_rouge_l": 0.3, "nll": -2 / 3, "rouge_l": 0.5}
        assert results[1]["settings"] == ["--data.scores={study}/scores-{seed}", "--model.fall=2"]
        assert results[1].keys() >= {"versions", "hardware"}
        for command in results[1]["commands"]:
            assert command["seconds"] >= 0 < command["peak_memory_bytes"]

    def test_arms_and_seeds_come_later(self, here):
        runs_of(here / "s", seeds=[1]).run()
        runs_of(here / "s", arms={**QUICK["arms"], "new": []}).run()
        assert len(calls(here)) == len(set(calls(here))) == 2 * 3 * 2

    def test_a_cell_with_other_settings_is_refused_before_any_is_run(self, here):
        runs_of(here / "s", seeds=[1]).run()
        with pytest.raises(SettingError, match="seed-1 was run with other settings than slow, seed 1 has now"):
            runs_of(here / "s", base=[])
        assert len(calls(here)) == 4

    def test_a_changed_configuration_is_another_setting(self, here):
        (here / "base.yaml").write_text("model: {fall: 1}")
        runs_of(here / "s", base=["base.yaml"]).run()
        (here / "base.yaml").write_text("model: {fall: 3}")
        with pytest.raises(SettingError, match="other settings"):
            runs_of(here / "s", base=["base.yaml"])

    def test_a_folder_may_be_moved(self, here):
        runs_of(here / "s").run()
        (here / "s").rename(here / "moved")
        assert all(run.finished for run in runs_of(here / "moved").cells)

    @pytest.mark.parametrize(
        ("file", "said"),
        [("fail", "ended with 1 .*: srd fit: error: model.fall is to fall"), ("kill", "ended with -9 ")],
    )
    def test_a_command_that_fails_is_named_and_run_again(self, file, said, here):
        (here / file).touch()
        with pytest.raises(SRDError, match=f"4 of 4 cells failed; .*slow, seed 0: srd fit {said}"):
            runs_of(here / "s").run()
        assert calls(here) == [call for call in ALL_CALLS if "fit" in call]
        (here / file).unlink()
        runs_of(here / "s").run()
        assert calls(here)[4:] == ALL_CALLS

    def test_what_a_cell_has_done_is_not_done_again(self, here):
        with pytest.raises(SRDError, match="predict"):
            runs_of(here / "s", commands=["fit", "predict"]).run()
        (here / "calls.txt").unlink()
        with pytest.raises(SRDError, match="there is no split predict"):
            runs_of(here / "s", commands=["fit", "predict"]).run()
        assert calls(here) == [f"predict {arm} {seed}" for seed in (0, 1) for arm in ("slow", "fast")]
        assert (here / "s" / "cells" / "slow" / "seed-0" / "1-predict.log").exists()

    def test_no_cell_is_begun_that_would_not_end_in_time(self, here):
        runs_of(here / "s", seeds=[0]).run()
        for record in (here / "s").rglob("cell.json"):
            found = json.loads(record.read_text())
            for command in found["commands"]:
                command["seconds"] = 50.0 if found["arm"] == "slow" else 5.0
            record.write_text(json.dumps(found))
        runs = runs_of(here / "s")
        assert [runs.expected_seconds(run) for run in runs.cells] == [0.0, 0.0, 100.0, 10.0]
        (here / "calls.txt").unlink()
        runs.run(seconds=60)
        assert calls(here) == ["fit fast 1", "evaluate fast 1"]

    def test_two_share_the_cells(self, here):
        one, other = runs_of(here / "s"), runs_of(here / "s")
        with one.cells[0].locked() as lock:
            assert lock is not None
            other.run()
        assert [call for call in calls(here) if "slow 0" in call] == []
        one.run()
        assert sorted(calls(here)) == sorted(ALL_CALLS)

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
    def test_what_is_stopped_goes_on_later(self, number, here, capfd):
        write(QUICK, here / "study.yaml")
        (here / "wait").touch()
        running = get_context("fork").Process(target=commands.study, args=(["study.yaml", "--folder=s"], STAND_IN))
        running.start()
        while not (here / "waiting").exists():
            assert running.is_alive()
            time.sleep(0.01)
        os.kill(running.pid, number)
        running.join()
        assert running.exitcode == {signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}[number]
        command, others = int((here / "waiting").read_text()), runs_of(here / "s")
        (here / "wait").unlink()
        if number == signal.SIGTERM:
            assert "0 of 4 cells are finished" in capfd.readouterr().err
            assert not Path(f"/proc/{command}").exists()
        else:  # its command goes on, and still has the cell
            others.run()
            assert "slow 0" not in {call.partition(" ")[2] for call in calls(here)[1:]}
            os.kill(command, signal.SIGKILL)
            while Path(f"/proc/{command}").exists():
                time.sleep(0.01)
        others.run()
        assert sorted(calls(here)) == sorted(["fit slow 0", *ALL_CALLS])


LOGGED = "epoch,seconds,step,train_loss,val_nll\n"


def run_with(folder, **versions):
    for version, text in versions.items():
        (folder / "logs" / version).mkdir(parents=True)
        (folder / "logs" / version / "metrics.csv").write_text(text)
    return folder


class TestCurves:
    def test_they_are_read_from_the_logger(self, tmp_path):
        text = LOGGED + "0,1.5,0,3.0,\n0,2.5,1,,7.0\n0,,2,,6.5\n"
        curves = read_curves(run_with(tmp_path, version_0=text))
        assert curves.keys() == {"train_loss", "val_nll"}
        assert curves["val_nll"].steps.tolist() == [2, 3]
        np.testing.assert_equal(curves["val_nll"].seconds, [2.5, np.nan])
        assert curves["val_nll"].values.tolist() == [7.0, 6.5]

    def test_a_resumed_run_takes_the_place_of_what_it_repeats(self, tmp_path):
        first = LOGGED + "".join(f"0,{step},{step},1,{step}\n" for step in range(4))
        later = {f"version_{number}": LOGGED + f"0,9,{step},1,-1\n" for number, step in ((2, 2), (10, 3))}
        folder = run_with(tmp_path, version_0=first, **later, version_11="epoch,step,test_nll\n0,0,5\n")
        assert read_curves(folder)["val_nll"].values.tolist() == [0, 1, -1, -1]
        assert last_metrics(folder) == {"val_nll": -1, "test_nll": 5}

    def test_what_is_no_log_is_named(self, tmp_path):
        with pytest.raises(StorageError, match=r"metrics.csv cannot be read \(could not convert.*CSVLogger"):
            read_curves(run_with(tmp_path, version_0="step,x\n1,a\n"))

    def test_a_folder_without_logs_has_none(self, tmp_path):
        assert read_curves(tmp_path) == {}

    CURVE = Curve(np.array([10.0, 20, 30, 40]), np.array([1.0, 2, 4, 8]), np.array([9.0, 7, 8, 5]))

    @pytest.mark.parametrize(
        ("value", "steps", "seconds"),
        [(10, 10, 1), (9, 10, 1), (8, 15, 1.5), (7, 20, 2), (6.5, 35, 6), (5, 40, 8), (4, None, None)],
    )
    def test_where_a_value_is_reached_by_hand(self, value, steps, seconds):
        assert self.CURVE.reaches(value, "steps", higher=False) == steps
        assert self.CURVE.reaches(value, "seconds", higher=False) == seconds

    def test_more_may_be_better(self):
        rising = Curve(self.CURVE.steps, self.CURVE.seconds, -self.CURVE.values)
        assert rising.reaches(-6.5, "steps", higher=True) == 35
        assert rising.reaches(-4, "steps", higher=True) is None

    @given(st.floats(10, 40))
    def test_what_is_reached_is_there(self, place):
        value = self.CURVE.at(place, "steps")
        reached = self.CURVE.reaches(value, "steps", higher=False)
        assert reached <= place + 1e-9
        assert self.CURVE.at(reached, "steps") == pytest.approx(value)

    def test_nothing_is_known_outside(self):
        assert self.CURVE.at(9, "steps") is None
        assert self.CURVE.at(41, "steps") is None


class TestInterval:
    DIFFERENCES = st.integers(1, 4).flatmap(lambda seeds: arrays.arrays(float, (seeds, 6), elements=st.floats(-9, 9)))

    @given(DIFFERENCES)
    def test_it_lies_within_the_values_and_moves_with_them(self, differences):
        low, high = paired_interval(differences)
        assert differences.min() - 1e-9 <= low <= high <= differences.max() + 1e-9
        assert paired_interval(differences + 1) == pytest.approx((low + 1, high + 1))
        assert paired_interval(-differences) == pytest.approx((-high, -low))

    def test_of_one_seed_it_is_that_of_the_normal_distribution(self):
        values = np.random.default_rng(0).normal(3, 2, size=(1, 400))
        half = 1.96 * values.std() / np.sqrt(400)
        assert paired_interval(values) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.04)

    def test_of_few_runs_it_is_that_of_student(self):  # 4 +- t(2) * 2 / sqrt(3), with t(2) = 4.303
        assert paired_interval(np.array([[2.0], [4], [6]])) == pytest.approx((4 - 4.9687, 4 + 4.9687), abs=1e-4)

    def test_rows_weigh_as_much_as_they_have_tokens(self):
        values, tokens = np.random.default_rng(1).normal(size=(1, 300)), np.array([1.0] * 200 + [5.0] * 100)
        low, high = paired_interval(values, tokens)
        mean = np.average(values[0], weights=tokens)
        half = 1.96 * np.sqrt(np.sum((tokens * (values[0] - mean)) ** 2)) / tokens.sum()  # of the linearised ratio
        assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.02)

    def test_seeds_count_as_rows_do(self):
        between = np.array([[-1.0] * 50, [1.0] * 50])  # rows say the same, seeds do not
        assert paired_interval(between) == (-1, 1)

    def test_of_one_difference_there_is_none(self):
        assert paired_interval(np.array([[1.0]])) is None


class TestSummary:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory):
        return tmp_path_factory.mktemp("summary") / "s"

    @pytest.fixture(scope="class")
    def outcomes(self, folder):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder.parent)
            runs = runs_of(folder)
            runs.run()
        found = write_summary(Study(**QUICK), Runs(runs.write_results(), folder, "slow", {"val_nll": 8.5}))
        return {(outcome.measure, outcome.arm): outcome for outcome in found}

    def test_each_row_is_paired(self, outcomes):  # fast: of 1, 2 and 3 tokens -2, -1, 0 and -1, 0, 1; slow: 1 more
        fast = outcomes["nll", "fast"]
        assert (fast.seeds, fast.difference, fast.low, fast.high, fast.rows) == (2, -1, -1, -1, 3)
        assert fast.mean == pytest.approx(np.mean([-2 / 3, 1 / 3]))
        assert fast.sd == pytest.approx(np.std([-1, 0], ddof=1))
        assert outcomes["nll", "slow"].difference is None

    def test_curves_are_compared_at_equal_places(self, outcomes):  # 10, 8, 6, 4 and 10, 9, 8, 7, one more for seed 1
        assert outcomes["val_nll at 4 steps", "slow"].mean == 7.5
        assert outcomes["val_nll at 4 s", "fast"].mean == 4.5
        assert outcomes["val_nll at 4 s", "fast"].difference == -3

    def test_seconds_until_a_value_is_reached(self, outcomes):
        assert outcomes["s until val_nll 8.5", "slow"].mean == np.mean([2.5, 3.5])
        assert outcomes["s until val_nll 8.5", "fast"].mean == np.mean([1.75, 2.25])
        assert outcomes["steps until val_rouge_l 0.3", "fast"].mean == 4

    def test_it_is_written(self, outcomes, folder):
        text = (folder / "summary.md").read_text()
        assert "| nll | fast | 2 | -0.1667 | 0.71 | -1 | -1 to -1 |" in text
        assert (folder / "summary.png").read_bytes().startswith(b"\x89PNG")
        assert json.loads((folder / "summary.json").read_text())["baseline"] == "slow"

    def test_without_a_baseline_there_are_no_differences(self, here):
        runs = runs_of(here / "s", arms={"alone": []}, seeds=[0])
        runs.run()
        outcomes = summarize(Runs(runs.write_results(), here / "s", "gone", {}))
        assert {outcome.difference for outcome in outcomes} == {None}
        assert "val_nll until" not in markdown_table(outcomes)


def test_a_real_cell_is_run(here):
    config = ROOT / "configs" / "debug.yaml"
    study = Study(
        arms={"quick": [str(config), "--trainer.max_epochs=2"]},
        commands=["fit --trainer.logger=CSVLogger --trainer.logger.save_dir={run} --trainer.callbacks+=TrainingClock"],
    )
    runs = StudyRun(study, here / "s", Console(quiet=True), (python(), "-m", "srd_lightning"))
    runs.run()
    (result,) = runs.write_results()
    assert result["metrics"].keys() == {"val_nll", "val_kl"}
    run = here / "s" / "cells" / "quick" / "seed-0"
    assert (run / "student" / "model.safetensors").exists()
    assert (run / "runtime.json").exists()
    assert not (here / "runs").exists()
    seconds = read_curves(run)["val_nll"].seconds
    assert 0 < seconds[0] < seconds[1]
