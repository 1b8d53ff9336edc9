"""``srd fit --model.student A --model.teacher B --data.data C``, and what helps to come so far."""

import csv
import functools
import json
import shutil
import subprocess
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from conftest import of_project, run_cli
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import Namespace
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.demos.boring_classes import BoringModel
from safetensors.torch import load_file
from tiny import QUIET, make_rows, tiny_model
from transformers import AutoModelForCausalLM, ByT5Tokenizer

from srd_lightning import (
    Decoding,
    HuggingFaceExport,
    HyperparameterScheduler,
    KDLightningModule,
    Pretrained,
    ReverseKL,
    RuntimeBenchmark,
    SRDDataModule,
    cli,
    default_callbacks,
)
from srd_lightning.callbacks.hyperparameters import over_stages
from srd_lightning.command import doctor
from srd_lightning.command import init as init_command
from srd_lightning.command.unsaid import of_the_device
from srd_lightning.curriculum.curriculum import paper_schedule, value_at
from srd_lightning.errors import SettingError

LINE = ["fit", "--model.student", "small", "--model.teacher", "large", "--data.data", "train.jsonl"]
QUICK = ["--trainer.max_epochs=4", "--data.decoding.max_new_tokens=2", "--trainer.enable_progress_bar=false"]
QUICK += ["--data.batch_size=4"]
"""Four epochs of 12 rows: 3, 6, 9 and 9 of them, so 1, 2, 3 and 3 steps."""


def line(folder, *more):
    """Run the line in a folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return cli.run([*LINE, *QUICK, *more])


def instead_of_fit(monkeypatch):
    """Let nothing be trained; return a list that gets each ``ckpt_path``."""
    seen = []

    @functools.wraps(cli.SRDTrainer.fit)  # of which settings are made
    def fit(*_, ckpt_path, **__):
        seen.append(ckpt_path)

    monkeypatch.setattr(cli.SRDTrainer, "fit", fit)
    return seen


def weights(folder):
    (found,) = Path(folder).glob("runs/*/student/model.safetensors")
    return load_file(found)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """What a user has: two models and some rows."""
    folder = tmp_path_factory.mktemp("home")
    for seed, name in enumerate(("small", "large")):
        tiny_model(seed).save_pretrained(folder / name)
        ByT5Tokenizer().save_pretrained(folder / name)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(12)))
    return folder


@pytest.fixture(scope="module")
def run(home, tmp_path_factory):
    """A run of the line in a folder of its own; the folder, and what the run had."""
    folder = tmp_path_factory.mktemp("run") / "here"
    shutil.copytree(home, folder)
    return folder, line(folder)


def test_two_models_and_data_are_enough(run):
    folder, done = run
    (root,) = (path for path in (folder / "runs").iterdir() if path.name != ".shared")
    assert root.name.startswith("small_large_train_")
    assert AutoModelForCausalLM.from_pretrained(root / "student").num_parameters() == tiny_model().num_parameters()
    stages = json.loads((root / "runtime.json").read_text())["stages"]
    assert [(stage["first_epoch"], stage["rows"], stage["steps"]) for stage in stages] == [
        (0, 3, 1),
        (1, 6, 2),
        (2, 9, 6),
    ]
    (table,) = root.glob("logs/version_0/metrics.csv")
    with table.open() as file:
        rows = [row for row in csv.DictReader(file) if row["schedule/kd_weight"]]
    by_epoch = [(float(row["schedule/loss.temperature"]), float(row["schedule/kd_weight"])) for row in rows]
    assert by_epoch == [pytest.approx(pair) for pair in [(1.0, 0.8), (1.5, 0.9), (2.0, 1.0), (2.0, 1.0)]]
    assert done.trainer.gradient_clip_val == 1.0
    assert done.model.restart_lr_each_stage
    scheduler = done.model.lr_scheduler(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1e-4), 7)
    assert (type(scheduler).__name__, scheduler.T_max, scheduler.eta_min) == ("CosineAnnealingLR", 7, 1e-7)


def test_the_same_line_again_says_that_it_is_done(run, monkeypatch, caplog):
    monkeypatch.setattr(SRDDataModule, "setup", None)  # nothing begins
    with caplog.at_level("INFO"):
        line(run[0], "--trainer.logger=false")  # which changes nothing of what comes out
    assert "was finished on" in caplog.text


def test_other_settings_are_another_run_with_the_same_scores(run, tmp_path, monkeypatch):
    folder, first = run
    shutil.copytree(folder, tmp_path / "copy", symlinks=True)
    monkeypatch.setattr("srd_lightning.criteria.base.generate_ids", None)  # nobody reflects any more
    other = line(tmp_path / "copy", "--model.optimizer.lr=1e-3")
    assert other.trainer.default_root_dir != first.trainer.default_root_dir
    assert other.datamodule.curation.scored == 0
    assert other.trainer.global_step == 9


def test_other_rows_in_the_same_file_are_another_run(run, tmp_path, monkeypatch):
    shutil.copytree(run[0], tmp_path / "copy", symlinks=True)
    before = line(tmp_path / "copy").folder.path
    with (tmp_path / "copy" / "train.jsonl").open("a") as file:
        file.write('{"instruction": "Say more.", "output": "More."}\n')
    instead_of_fit(monkeypatch)
    assert line(tmp_path / "copy").folder.path != before


def test_curate_goes_to_the_folder_of_fit(run, tmp_path, monkeypatch):
    shutil.copytree(run[0], tmp_path / "copy", symlinks=True)
    monkeypatch.chdir(tmp_path / "copy")
    curated = cli.run(["curate", *LINE[1:], *QUICK])
    assert curated.trainer.default_root_dir.endswith(run[1].trainer.default_root_dir)
    assert curated.datamodule.schedule == {0: 0.25, 1: 0.5, 2: 0.75}
    assert curated.datamodule.curation.scored == 0


def test_a_killed_run_goes_on_with_the_same_line_to_the_same_weights(home, run, tmp_path):
    folder = tmp_path / "here"
    shutil.copytree(home, folder)
    done = subprocess.run(**of_project("killed", 5, *LINE, *QUICK), cwd=folder, capture_output=True, check=False)
    assert done.returncode == -9, done.stderr
    assert not list(folder.glob("runs/*/student"))
    code, _, said = run_cli([*LINE, *QUICK], folder)
    assert code == 0, said
    assert "Restored all states from the checkpoint" in said
    expected = weights(run[0])
    found = weights(folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_folder_that_is_named_begins_anew(home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    seen = instead_of_fit(monkeypatch)
    cli.run([*LINE, f"--trainer.default_root_dir={tmp_path}"])
    cli.run([*LINE, f"--trainer.default_root_dir={tmp_path}", "--ckpt_path=last"])
    assert seen == [None, "last"]


def kinds(*options):
    own = {"OneLineSummary", "SettingsFile"}
    found = [type(one).__name__ for one in cli.parse([*LINE[1:], *options]).trainer.callbacks]
    return {name for name in found if name[0] != "_" and name not in own}


def test_a_default_is_there_unless_it_is_replaced_or_left_out():
    every = {
        "HyperparameterScheduler",
        "CurriculumCallback",
        "RuntimeBenchmark",
        "ResumeCheckpoint",
        "HuggingFaceExport",
    }
    assert kinds() >= every
    assert not kinds("--trainer.enable_checkpointing=false") & {"ResumeCheckpoint", "ModelCheckpoint"}
    assert not kinds("--defaults=null") & every
    assert kinds("--defaults=[ResumeCheckpoint]") & every == {"ResumeCheckpoint"}
    named = ["--trainer.callbacks=HuggingFaceExport", "--trainer.callbacks.dirpath=mine"]
    callbacks = cli.parse([*LINE[1:], *named]).trainer.callbacks
    assert [one.dirpath for one in callbacks if isinstance(one, HuggingFaceExport)] == [Path("mine")]
    assert kinds(*named) >= every


def test_what_is_said_stays_as_it_is():
    run = cli.parse(
        [*LINE[1:], "--trainer.max_steps=5", "--trainer.gradient_clip_val=0.5", "--model.lr_scheduler=LinearLR"]
    )
    assert run.trainer.max_epochs is None
    assert run.trainer.gradient_clip_val == 0.5
    assert not run.model.restart_lr_each_stage
    run = cli.parse(LINE[1:])
    assert (run.trainer.max_epochs, run.datamodule.batch_size) == (24, 16)


@pytest.mark.parametrize(
    ("precision", "accelerator", "gpu", "units", "expected"),
    [
        (None, "auto", True, True, "bf16-mixed"),
        (None, "gpu", True, True, "bf16-mixed"),
        (None, "auto", True, False, None),
        (None, "auto", False, False, None),
        (None, "cpu", True, True, None),
        ("32-true", "auto", True, True, None),
    ],
)
def test_bfloat16_only_where_a_gpu_has_units_for_it(precision, accelerator, gpu, units, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated: units)
    settings = Namespace(precision=precision, accelerator=accelerator)
    assert of_the_device(settings).get("trainer", {}).get("precision") == expected


@pytest.mark.parametrize(
    "options",
    [
        ["--model.student", "a", "--model.teacher", "b"],
        ["--config", "models.yaml"],
    ],
    ids=" ".join,
)
def test_a_text_is_a_model(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("models.yaml").write_text("model: {student: a, teacher: b}\n")
    settings = [*options, "--data.data=x.jsonl", "--model.teacher.dtype=bfloat16"]
    models = cli.parse(settings).model.models_by_name()
    assert models == {"student": Pretrained("a"), "teacher": Pretrained("b", dtype="bfloat16")}


def test_a_text_is_a_model_in_python():
    expected = {"student": Pretrained("a"), "teacher": Pretrained("b")}
    assert KDLightningModule("a", "b").models_by_name() == expected
    assert SRDDataModule("x.jsonl", student="a").student == Pretrained("a")


def test_the_papers_stages():
    assert paper_schedule(24) == {0: 0.25, 8: 0.5, 16: 0.75}
    assert paper_schedule(12) == {0: 0.25, 4: 0.5, 8: 0.75}
    assert paper_schedule(2) == {0: 0.5, 1: 0.75}
    assert paper_schedule(None) == paper_schedule(-1) == paper_schedule(24)
    assert over_stages(1.0, 2.0, [0, 8, 16]) == {0: 1.0, 8: 1.5, 16: 2.0}
    assert over_stages(0.7, 1.0, [0, 8, 16, 24]) == {0: 0.7, 8: 0.8, 16: 0.9, 24: 1.0}


@given(st.integers(3, 200))
def test_stages_have_a_third_of_the_epochs(epochs):
    shares = [value_at(paper_schedule(epochs), epoch) for epoch in range(epochs)]
    lengths = [shares.count(share) for share in (0.25, 0.5, 0.75)]
    assert sum(lengths) == epochs
    assert shares == sorted(shares)
    assert max(lengths) - min(lengths) <= 1
    assert lengths[2] == max(lengths)


def test_a_refresh_is_held_against_the_stages_of_the_run(student, rows):
    data = SRDDataModule(rows, ByT5Tokenizer(), student, refresh=[5])  # perhaps a stage begins there
    with pytest.raises(SettingError, match=r"which are \[8, 16\], but names \[5\]"):
        data.setup("fit")


def fitted(student, teacher, rows, folder, *callbacks, **settings):
    """Train for three epochs in Python; return temperature and weight of each epoch, and the module."""
    seen = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, module, *_):
            if trainer.is_last_batch:
                seen.append((module.loss.temperature, module.kd_weight))

    options = {**QUIET, "max_epochs": 3, "default_root_dir": folder, "callbacks": [*callbacks, Watch()]}
    schedule = settings.pop("schedule", None)
    module = KDLightningModule(student, teacher, **settings)
    data = SRDDataModule(rows[:8], ByT5Tokenizer(), schedule=schedule, decoding=Decoding(max_new_tokens=2))
    L.Trainer(**options).fit(module, datamodule=data)
    return seen, module


def test_what_was_set_is_not_staged(student, teacher, rows, tmp_path):
    seen, module = fitted(student, teacher, rows, tmp_path, HyperparameterScheduler(), kd_weight=0.6)
    assert seen == [(1.0, 0.6), (1.5, 0.6), (2.0, 0.6)]
    assert (module.loss.temperature, module.kd_weight) == (1.0, 0.6)  # as before, for a run that may come
    other = HyperparameterScheduler({"kd_weight": {0: 0.3}})
    seen, _ = fitted(
        student, teacher, rows, tmp_path, other, HyperparameterScheduler(), loss=ReverseKL(temperature=3.0)
    )
    assert seen == [(3.0, 0.3)] * 3


def test_a_single_stage_is_not_staged(student, teacher, rows, tmp_path):
    seen, _ = fitted(student, teacher, rows, tmp_path, HyperparameterScheduler(), schedule={0: 1.0})
    assert seen == [(1.0, 1.0)] * 3


def test_stages_without_a_curriculum_are_refused(tmp_path):
    trainer = L.Trainer(**QUIET, max_epochs=1, default_root_dir=tmp_path, callbacks=[HyperparameterScheduler()])
    with pytest.raises(SettingError, match="follows the stages of a curriculum, but there is none"):
        trainer.fit(BoringModel())


def test_defaults_in_python():
    own = (LearningRateMonitor(), RuntimeBenchmark("mine.json"))
    callbacks = default_callbacks(*own)
    assert callbacks[:2] == list(own)
    assert [type(one).__name__ for one in callbacks[2:]] == [
        "HyperparameterScheduler",
        "CurriculumCallback",
        "ResumeCheckpoint",
        "HuggingFaceExport",
    ]


ANSWERS = ["--student=small", "--teacher=large", "--data=train.jsonl", "--epochs=3"]


def test_init_writes_a_recipe_that_runs(home, tmp_path, monkeypatch):
    shutil.copytree(home, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    init_command.main(["mine.yaml", *ANSWERS, "--devices=1"])
    run = cli.run(["fit", "--config=mine.yaml", *QUICK[1:]])
    assert run.datamodule.schedule == {0: 0.25, 1: 0.5, 2: 0.75}
    assert run.trainer.global_step == 1 + 2 + 3
    assert list(Path("runs").glob("small_large_train_*/student/model.safetensors"))
    with pytest.raises(SettingError, match=r"mine.yaml is there already"):
        init_command.main(["mine.yaml", *ANSWERS])


def test_what_init_comments_out_can_be_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    init_command.main([*ANSWERS])
    text = "\n".join(
        line.replace("# ", "", 1) if line.startswith(" ") and line.lstrip().startswith("# ") else line
        for line in Path("recipe.yaml").read_text().splitlines()
    )
    Path("all.yaml").write_text(text)
    assert set(yaml.safe_load(text)["model"]) == {
        *yaml.safe_load(Path("recipe.yaml").read_text())["model"],
        "loss",
        "micro_batch_tokens",
    }
    run = cli.parse(["--config=all.yaml"])
    assert isinstance(run.model.loss, ReverseKL)
    assert run.model.models_by_name()["teacher"].dtype == "bfloat16"
    assert run.trainer.default_root_dir.endswith("mine")


def test_init_asks_what_was_not_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    said = iter(["", "org/model: 'x'", "b", "c.jsonl", "", "7"])
    monkeypatch.setattr("builtins.input", lambda question: next(said))
    init_command.main([])
    recipe = yaml.safe_load(Path("recipe.yaml").read_text())
    assert recipe["model"]["student"] == {"name": "org/model: 'x'"}
    assert recipe["data"]["data"] == {"train": "c.jsonl"}
    assert recipe["trainer"] == {"max_epochs": 7, "devices": "auto"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--student=a"], "say --teacher"),
        ([*ANSWERS, "--epochs=0"], "epochs must be a whole number from 1, but is 0"),
        ([*ANSWERS, "--devices=two"], "devices must be a whole number from 1, but is two"),
        (["--pupil=a"], "unrecognized arguments: --pupil=a; srd init --help"),
    ],
    ids=lambda value: None if isinstance(value, list) else value,
)
def test_init_refuses(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    with pytest.raises(SettingError, match=message):
        init_command.main(arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("units", [True, False, None])
def test_doctor_says_what_there_is(units, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(doctor, "has_bf16_units", lambda _: units)
    monkeypatch.setattr("urllib.request.urlopen", None)  # it asks nobody
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "peft" else "1.2.3")
    doctor.main([])
    said = " ".join(capsys.readouterr().out.split())
    assert "torch │ 1.2.3" in said
    assert "lora │ lacks peft: pip install 'srd-lightning[lora]'" in said
    assert "none that torch can use" in said
    assert ("over thirty times slower" in said) is (units is not True)


def test_doctor_asks_the_hub_where_that_is_wanted(monkeypatch, capsys):
    def refuse(*_, **__):
        raise OSError("no way")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    doctor.main(["--hub"])
    assert "cannot be reached" in " ".join(capsys.readouterr().out.split())


def test_init_and_doctor_are_subcommands(tmp_path):
    code, out, error = run_cli(["init", *ANSWERS], tmp_path)
    assert (code, out) == (0, "recipe.yaml is written; srd fit --config recipe.yaml\n"), error
    code, out, error = run_cli(["init", *ANSWERS], tmp_path)
    assert (code, error) == (2, "srd init: error: recipe.yaml is there already; name another file, or move it away\n")
    assert run_cli(["doctor"], tmp_path)[0] == 0
