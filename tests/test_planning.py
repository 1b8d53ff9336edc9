"""What `srd plan` says is what `srd fit` then does; what it costs follows from measured pieces."""

import json
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.demos.boring_classes import BoringDataModule
from tiny import QUIET, make_rows, tiny_model
from transformers import ByT5Tokenizer

from srd_lightning import GKD, Decoding, KDLightningModule, RuntimeBenchmark, SRDDataModule, cli
from srd_lightning.cli import SRDTrainer
from srd_lightning.curriculum.steps import EpochSteps, epochs_of_run
from srd_lightning.data.families import DECODER, EncoderDecoder
from srd_lightning.errors import SettingError
from srd_lightning.planning.clock import Prices, Throughput
from srd_lightning.planning.cost import (
    Rate,
    Work,
    answering,
    batch_sizes,
    correlated_order,
    evenly,
    rank_correlation,
    rate_of,
)
from srd_lightning.planning.memory import Sizes, memory_of
from srd_lightning.planning.plan import known_prices, plan_of
from srd_lightning.planning.reflecting import work_of
from srd_lightning.planning.schedule import Stage, validations_of
from srd_lightning.planning.sizes import state_per_byte
from srd_lightning.planning.survey import Caching, Reflection, Seen

DEBUG = Path(__file__).parents[1] / "configs" / "debug.yaml"
KNOWN = "--throughput={train: 1000, reflect: 100, cache: 5000}"


class TestRates:
    def test_a_line_is_found(self):
        pieces = [Work(2, 100), Work(1, 400), Work(4, 50)]
        seconds = [2 * 0.5 + 100 * 0.01, 0.5 + 400 * 0.01, 4 * 0.5 + 50 * 0.01]
        assert rate_of(pieces, seconds) == pytest.approx((0.5, 0.01))
        assert Rate(0.5, 0.01).seconds(Work(3, 200)) == pytest.approx(3.5)

    def test_neither_part_is_negative(self):
        """The line through both points has a negative price per pass; of positions alone it is Σst / Σt² = 5 / 5."""
        assert rate_of([Work(1, 1), Work(1, 2)], [0.6, 2.2]) == pytest.approx((0.0, 1.0))
        assert rate_of([Work(1, 10), Work(1, 20)], [5.0, 3.0]) == pytest.approx((4.0, 0.0))

    def test_pieces_of_one_kind_cost_by_position(self):
        assert rate_of([Work(1, 8), Work(1, 8)], [2.0, 4.0]) == pytest.approx((0.0, 3 / 8))


@given(st.integers(1, 40), st.integers(1, 40))
def test_places_are_spread(number, of):
    places = evenly(number, of)
    assert len(set(places)) == len(places) == min(number, of)
    assert all(0 <= place < of for place in places)
    if of >= 2 * number and number in (1, 3, 7, 15):  # each of as many equal parts has one, give or take a border
        assert np.abs(np.diff([0, *sorted(places), of]) - of / (number + 1)).max() <= 1


@given(st.lists(st.integers(1, 50), min_size=1, max_size=9), st.integers(1, 16))
def test_answers_are_written_as_a_loop_would_write_them(answers, at_once):
    steps, positions, running = 0, 0, list(answers)
    while running:
        for _ in range(at_once):
            if not any(left > 0 for left in running):
                break
            steps, positions = steps + 1, positions + len(running)
            running = [left - 1 for left in running]
        running = [left for left in running if left > 0]
    assert answering(answers, at_once) == Work(steps, positions)


def test_work_of_a_reflected_batch():
    """Two prompts of at most 5 tokens are read, answers of 3 and 2 written in 3 steps, and 2 rows of at most 9 read."""
    assert work_of([5, 4], [9, 6], [3, 2]) == Work(1 + 3 + 1, 2 * 5 + 2 * 3 + 2 * 9)
    assert work_of([5, 4], [9, 6], []) == Work(1, 18)


@pytest.mark.parametrize("family", [DECODER, EncoderDecoder(decoder_start_token_id=0)])
def test_sizes_are_those_of_the_batches_that_are_made(family):
    rows = [
        {"input_ids": list(range(5, 5 + n)), "prompt_length": p} for n, p in [(7, 3), (4, 1), (9, 8), (5, 2), (6, 5)]
    ]
    lengths, prompts = (np.array(some) for some in ([7, 4, 9, 5, 6], [3, 1, 8, 2, 5]))
    order = np.array([4, 0, 2, 1, 3])
    tokens, positions = batch_sizes(order, 2, family.padded_apart(prompts, lengths), multiple_of=4)
    for number, first in enumerate(range(0, 5, 2)):
        batch = family.collate([rows[place] for place in order[first : first + 2]], 0, 4)
        texts = [batch["attention_mask"]] + ([batch["labels"] != -100] if family != DECODER else [])
        assert positions[number] == sum(text.numel() for text in texts)
        assert tokens[number] == sum(int(text.sum()) for text in texts)


def test_an_order_is_as_correlated_as_it_should_be():
    values = np.random.default_rng(1).integers(0, 400, 4000)
    for wanted in (-0.9, -0.3, 0.0, 0.6):
        order = correlated_order(values, wanted)
        assert sorted(order) == list(range(4000))
        places = np.empty(4000)
        places[order] = np.arange(4000)
        assert rank_correlation(values, places) == pytest.approx(wanted, abs=0.05)


def test_epochs_of_a_run():
    """Epochs of 3, 3, 6, 6, … batches, of which 2 make a step; from epoch 3 on each is one; 9 steps are all."""
    found = epochs_of_run(lambda epoch: 3 if epoch < 2 else 6, {0: 2, 3: 1}, max_epochs=-1, max_steps=9)
    assert found == [EpochSteps(0, 3, 3, 2), EpochSteps(1, 3, 3, 2), EpochSteps(2, 6, 6, 3), EpochSteps(3, 6, 2, 2)]
    assert [epoch.batches for epoch in epochs_of_run(lambda _: 5, {0: 1}, 2, limit=0.5)] == [2, 2]
    assert [epoch.batches for epoch in epochs_of_run(lambda _: 5, {0: 1}, 2, limit=9)] == [5, 5]


def test_validations():
    epochs = [EpochSteps(0, 4, 4, 4), EpochSteps(1, 4, 4, 4), EpochSteps(2, 8, 5, 5)]
    assert validations_of(epochs, 1, 1.0) == [1, 1, 0]
    assert validations_of(epochs, 2, 1.0) == [0, 1, 0]
    assert validations_of(epochs, 1, 0.25) == [4, 4, 2]
    assert validations_of(epochs, None, 3) == [1, 1, 2]  # after 3, 6, 9 and 12 batches of 13


def test_memory_by_hand():
    sizes = Sizes(
        student=4000, trained=3000, state=2.0, teacher=9000, ranks=2, teacher_ranks=3, positions=10, layers=4, width=8,
        vocabulary=100, chunk=6, teachers=1, itemsize=2, checkpointing=False,
    )  # fmt: skip
    memory = memory_of(sizes)
    assert (memory.parameters, memory.gradients, memory.optimizer, memory.teacher) == (2000, 1500, 3000, 3000)
    assert memory.activations == 10 * 8 * 4 * 17 * 2
    assert memory.logits == 6 * 100 * 2 * 4
    assert memory.total == 2000 + 1500 + 3000 + 3000 + 10880 + 4800
    checkpointed = memory_of(Sizes(**{**vars(sizes), "checkpointing": True, "teachers": 0}))
    assert (checkpointed.activations, checkpointed.logits) == (10 * 8 * (4 + 17) * 2, 6 * 100 * 4)


@pytest.mark.parametrize(
    ("make", "state"),
    [
        (torch.optim.AdamW, 2.0),
        (lambda weights: torch.optim.SGD(weights, lr=0.1), 0.0),
        (lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9), 1.0),
        (lambda weights: 1 / 0, 2.0),  # one that needs a GPU
    ],
)
def test_state_of_an_optimizer(make, state):
    assert state_per_byte(make, torch.float32) == state


def seen(**other):
    """What a run does: 2 epochs of 3 batches, 1 of 6; 8 batches of reflection, 2 of the cache, 5 of validation."""
    stages = [Stage(0, 3, 2, 6, 6, 500, 600, 2), Stage(2, 6, 1, 6, 3, 900, 1000, 1)]
    return Seen(
        **{
            "reports": {},
            "rows": 8,
            "kept": 6,
            "exact": True,
            "stages": stages,
            "reflection": Reflection(8, Work(40, 800), 300, 90, 200, {2: 4}, Work(20, 400)),
            "caching": Caching("kind", 6, 90, 720, Work(2, 400)),
            "validation": Work(5, 500),
            "sanity": 2,
            "all_data": Work(24, 2400),
            "all_steps": 18,
            "all_caching": Work(3, 600),
            "largest": 99,
            "batches": [],
            "held_out": [],
            **other,
        }
    )


def test_costs_by_hand():
    prices = Prices(Rate(0.1, 0.01), 3.0, Rate(0.5, 0.01), 1.0, Rate(0.2, 0.001), 0.1, 0.25, Rate(0.0, 0.002), 0.5)
    memory = memory_of(Sizes(8, 8, 1.0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 4, False))
    made = plan_of(seen(), prices, memory, None, 2, "wall")
    assert made.seconds.curation == pytest.approx(3 + (40 * 0.1 + 800 * 0.01) / 2)
    assert made.seconds.refresh == pytest.approx((20 * 0.1 + 400 * 0.01) / 2)
    assert made.seconds.cache == pytest.approx(1 + (2 * 0.5 + 400 * 0.01) / 2)
    first, second = (stage.seconds for stage in made.seen.stages)
    assert first == pytest.approx(2 * 0.25 + 6 * 0.2 + 600 * 0.001 + 6 * 0.1)
    assert second == pytest.approx(0.25 + 6 * 0.2 + 1000 * 0.001 + 3 * 0.1)
    assert made.seconds.validation == pytest.approx(3 * 1.5 + 0.5 + 2 / 5 * 1.0)
    trained = 3 * 0.25 + 24 * 0.2 + 2400 * 0.001 + 18 * 0.1
    assert made.all_data.total == pytest.approx(trained + 1 + (3 * 0.5 + 600 * 0.01) / 2 + made.seconds.validation)
    assert made.ratio == pytest.approx(made.seconds.total / made.all_data.total)


def test_known_throughput_by_hand():
    """All that the answers may be is 200 tokens, at 50 a second."""
    prices = known_prices(seen(), Throughput(train=100, reflect=50, cache=200))
    assert prices.reflect.seconds(seen().reflection.work) == pytest.approx(200 / 50)
    assert prices.cache.seconds(Work(2, 400)) == pytest.approx(2)
    assert prices.batch.seconds(Work(6, 600)) == pytest.approx(6)
    assert prices.validate.seconds(Work(5, 600)) == pytest.approx(2)
    with pytest.raises(SettingError, match="throughput says nothing of cache, which this run needs"):
        known_prices(seen(), Throughput(train=100, reflect=50))
    with pytest.raises(SettingError, match="train must be a positive number of tokens a second, but is 0"):
        Throughput(train=0)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Folder of runs that share the scores of one reflection, and a file of rows, one of them too long."""
    folder = tmp_path_factory.mktemp("planned")
    rows = [*make_rows(13), {"instruction": "long " * 60, "output": "a"}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def line(home, *more):
    rows = home / "rows.jsonl"
    options = [f"--data.data={{train: {rows}, validation: {rows}}}", f"--trainer.default_root_dir={home / 'run'}"]
    return ["--config", str(DEBUG), *options, "--trainer.enable_progress_bar=false", *more]


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "settings",
    [
        ["--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=0.5", "--trainer.max_epochs=3"],
        ["--trainer.max_steps=6", "--trainer.accumulate_grad_batches=2", "--data.group_by_length=false"],
        [
            "--data.schedule={0: 0.5, 2: 0.8, 3: 1.0}",
            "--trainer.max_epochs=4",
            "--trainer.limit_train_batches=3",
            "--trainer.check_val_every_n_epoch=2",
            "--data.batch_size=3",
            "--data.pad_to_multiple_of=16",
        ],
    ],
    ids=["accumulated", "max_steps", "schedule"],
)
def test_what_is_planned_is_what_is_done(home, settings, monkeypatch):
    validated, start = [], RuntimeBenchmark.on_validation_start

    def counted(self, trainer, module):
        start(self, trainer, module)
        validated.append(trainer.sanity_checking)

    monkeypatch.setattr(RuntimeBenchmark, "on_validation_start", counted)
    fitted = cli.run(["fit", *line(home, *settings)])
    report = json.loads((home / "run" / "runtime.json").read_text())
    before = files(home)
    cli.run(["plan", *line(home, *settings), KNOWN, f"--json={home.with_suffix('.json')}"])
    assert files(home) == before
    plan = json.loads(home.with_suffix(".json").read_text())
    names = ("first_epoch", "rows", "steps", "tokens", "positions")
    assert [[stage[name] for name in names] for stage in plan["stages"]] == [
        [stage[name] for name in names] for stage in report["stages"]
    ]
    assert plan["exact"]
    assert plan["steps"] == fitted.trainer.global_step
    assert (plan["rows"], plan["kept"]) == (report["curation"]["rows"], report["curation"]["kept"])
    assert plan["splits"]["train"] == {"rows": 14, "dropped": {"prompt over 256 tokens": 1}, "cut": 0}
    assert plan["reflection"]["rows"] == 0
    assert sum(stage["validations"] for stage in plan["stages"]) == validated.count(False)
    student = fitted.model.student
    assert plan["memory"]["parameters"] == sum(weight.numel() for weight in student.parameters()) * 4
    assert plan["memory"]["optimizer"] == 2 * plan["memory"]["gradients"] == 2 * plan["memory"]["parameters"]


def test_before_anything_was_done(home, tmp_path, monkeypatch):
    """Without scores rows and steps are those of the run, and the cache takes what it will take on disk."""
    monkeypatch.chdir(tmp_path)
    settings = line(home, "--trainer.max_epochs=3", "--trainer.default_root_dir=run")
    planned = cli.run(["plan", *settings, "--calibrate.seconds=0.1", "--clock=processor", "--json=plan.json"])
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["plan.json"]
    assert planned.trainer.global_step > 2
    plan = json.loads(Path("plan.json").read_text())
    assert plan["reflection"]["rows"] == 13
    assert 0 < plan["reflection"]["answer_tokens"] <= plan["reflection"]["most_answer_tokens"] == 13 * 8
    assert [plan["prices"][name] for name in ("reflect", "cache", "batch", "validate")] != [[0, 0]] * 4
    parts = ("curation", "cache", "training", "validation")
    assert all(plan["seconds"][part] > 0 for part in parts)
    assert plan["seconds"]["total"] == pytest.approx(sum(plan["seconds"][part] for part in parts))

    fitted = cli.run(["fit", *settings])
    report = fitted.datamodule.curation
    assert (plan["kept"], plan["left_out"]) == (report.kept, report.rows - report.kept)
    done = json.loads(Path("run/runtime.json").read_text())["stages"]
    assert [(stage["rows"], stage["steps"]) for stage in plan["stages"]] == [
        (one["rows"], one["steps"]) for one in done
    ]
    shards = [pa.ipc.open_file(pa.memory_map(str(path))).read_all() for path in tmp_path.glob("run/teacher/*/*.arrow")]
    values = [value for shard in shards for value in shard["teacher_hidden"].to_pylist()]
    assert plan["cache"]["rows"] == sum(map(len, shards))
    cli.run(
        ["plan", *settings, "--model.teacher_cache={kind: hidden, dir: again}", KNOWN, "--json=plan.json"]
    )  # with the scores
    assert json.loads(Path("plan.json").read_text())["cache"]["bytes"] == sum(map(len, values))


def planned_with(folder, *settings):
    recipe = yaml.safe_load(DEBUG.read_text())
    recipe["data"] |= {"data": make_rows(5), "decoding": {"max_new_tokens": 7}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    root = f"--trainer.default_root_dir={folder / 'run'}"
    cli.run(["plan", "--config", str(folder / "recipe.yaml"), root, *settings, f"--json={folder / 'plan.json'}"])
    return json.loads((folder / "plan.json").read_text())


def test_prompts_answers_and_refreshes_are_counted(tmp_path):
    settings = ["--data.schedule={0: 0.4, 1: 0.6, 4: 1.0}", "--data.refresh=[1, 4]", "--trainer.max_epochs=2"]
    plan = planned_with(tmp_path, *settings, KNOWN)
    rows = SRDDataModule(make_rows(5), tokenizer=ByT5Tokenizer())
    rows.read_rows("fit")
    assert plan["reflection"]["prompt_tokens"] == sum(rows.rows["train"]["prompt_length"])
    assert plan["reflection"]["most_answer_tokens"] == 5 * 7
    assert plan["reflection"]["refreshes"] == {"1": 3}  # of 5 rows 2 have entered; epoch 4 is never reached
    assert plan["seconds"]["refresh"] > 0
    assert not plan["exact"]


def test_zero_configuration_finds_the_scores_of_other_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("small", "large")):
        tiny_model(seed).save_pretrained(name)
        ByT5Tokenizer().save_pretrained(name)
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(8)))
    of_run = ["--model.student", "small", "--model.teacher", "large", "--data.data", "train.jsonl"]
    of_run += ["--data.decoding.max_new_tokens=2"]
    cli.run(["plan", *of_run, KNOWN, "--json=before.json"])
    assert not Path("runs").exists()
    cli.run(["curate", *of_run])
    cli.run(["plan", *of_run, "--throughput={train: 10}", "--json=after.json"])
    before, after = (json.loads(Path(name).read_text()) for name in ("before.json", "after.json"))
    assert (before["reflection"]["rows"], after["reflection"]["rows"]) == (8, 0)
    assert [stage["epochs"] for stage in after["stages"]] == [8, 8, 8]


def module(**settings):
    return KDLightningModule(tiny_model(0), tiny_model(1), tokenizer=ByT5Tokenizer(), **settings)


def test_what_cannot_be_planned_is_refused(tmp_path):
    data = SRDDataModule(make_rows(4), tokenizer=ByT5Tokenizer())
    for model, of_run, settings, says in (
        (module(), BoringDataModule(), {}, "a plan needs an SRDDataModule, whose rows it can count, but got a Boring"),
        (L.LightningModule(), data, {}, "a plan needs a KDLightningModule"),
        (module(), data, {"max_time": "00:01:00:00"}, "this one ends by trainer.max_time"),
    ):
        trainer = SRDTrainer(max_epochs=1, default_root_dir=tmp_path, **QUIET, **settings)
        with pytest.raises(SettingError, match=says):
            trainer.plan(model, of_run)
    assert not list(tmp_path.iterdir())


def test_own_text_is_written_while_it_is_tried(tmp_path):
    data = SRDDataModule(make_rows(4), tokenizer=ByT5Tokenizer(), schedule={0: 1.0}, batch_size=2)
    model = module(rollouts=GKD(share=1.0, decoding=Decoding(max_new_tokens=2)))
    plan = SRDTrainer(max_epochs=1, default_root_dir=tmp_path, **QUIET).plan(model, data)
    assert model.generation_seconds > 0
    assert plan.steps == 2
    assert SimpleNamespace(**vars(plan.seen)).exact
