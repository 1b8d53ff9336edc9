import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import run_cli
from families import tiny as encoder_decoder
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningCLI
from tiny import make_rows, tiny_model
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, ByT5Tokenizer

from srd_lightning import HuggingFaceExport, JensenShannon, ReverseKL, cli
from srd_lightning.command import settings_help

ROOT = Path(__file__).parents[1]
CONFIGS = [
    path
    for path in sorted((ROOT / "configs").rglob("*.yaml"))
    if "data" in yaml.safe_load(path.read_text()).get("data", {})
]
"""Recipes; what is put on top of them has tests of its own."""
each_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A folder to run in, with a tiny student and teacher, two more that are encoder-decoders, and some rows."""
    monkeypatch.chdir(tmp_path)
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}\n{% endfor %}"
    for name, seed in (("student", 0), ("teacher", 1)):
        tiny_model(seed).save_pretrained(tmp_path / name)
        encoder_decoder("t5", seed).save_pretrained(tmp_path / f"t5-{name}")
        for folder in (name, f"t5-{name}"):
            tokenizer.save_pretrained(tmp_path / folder)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(16)))
    return tmp_path


def tiny_options(path):
    """Return what turns a recipe for real models into one for tiny ones, leaving the rest as it is."""
    models = yaml.safe_load(path.read_text())["model"]
    named = {part: models.get(part) for part in ("student", "teacher")}
    named = {part: one if isinstance(one, str) else (one or {}).get("name") for part, one in named.items()}
    kind = "t5-" if "t5" in (named["student"] or "") else ""
    options = ["--data.data={train: rows.jsonl, validation: rows.jsonl, test: rows.jsonl}"]
    options += [f"--model.{part}.name={kind}{part}" for part, name in named.items() if name]
    options += ["--model.student.keep_layers=null"] if named["student"] else []
    return [*options, "--data.decoding.max_new_tokens=2", "--data.max_length=512", "--data.max_prompt_length=400"]


def test_there_are_configurations():
    assert {path.stem for path in CONFIGS} >= {"debug", "quickstart", "gpt2_dolly"}


@each_config
def test_configuration_is_read_as_it_stands(config, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.parse(["--config", str(config)]).trainer.max_epochs >= 1


@each_config
@pytest.mark.filterwarnings("ignore:.*never hold")
def test_configuration_trains(config, tiny):
    options = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
    run = cli.run(["fit", "--config", str(config), "--trainer.accelerator=cpu", *tiny_options(config), *options])
    assert run.trainer.global_step >= 1
    (exported,) = (callback for callback in run.trainer.callbacks if isinstance(callback, HuggingFaceExport))
    kind = AutoModelForSeq2SeqLM if "t5" in config.stem else AutoModelForCausalLM
    assert kind.from_pretrained(exported.folder(run.trainer)).num_parameters() > 0


@each_config
def test_commands_in_its_head_are_read(config, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    commands = re.findall(r"^#   (?:\S.* && )?srd (?:fit|test) (.*?)(?: +# .*)?$", config.read_text(), re.MULTILINE)
    assert commands
    for arguments in commands:
        assert cli.parse(shlex.split(arguments)).datamodule.data


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ("qwen2.5_gsm8k", {"numeric_accuracy"}),
        ("qwen2.5_coder_mbpp", {"pass_at_1"}),
        ("mt5_iwslt", {"bleu", "chrf"}),
    ],
)
def test_configuration_scores_its_answers(config, names, tiny):
    path = ROOT / "configs" / f"{config}.yaml"
    rows = [{"instruction": f"Add {n}.\nassert {n} == {n}\nCode alone.", "output": f"{n} = {n}"} for n in range(3)]
    (tiny / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--model.decoding.max_new_tokens=3", "--trainer.precision=32-true", "--trainer.accelerator=cpu"]
    run = cli.run(["test", "--config", str(path), *tiny_options(path), *options])
    measures = run.trainer.callback_metrics
    assert measures.keys() == {"test_nll", "test_kl", "test_rouge_l", *(f"test_{name}" for name in names)}
    assert all(torch.isfinite(value) for value in measures.values())


def test_debug_recipe_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = cli.run(["fit", "--config", str(ROOT / "configs" / "debug.yaml")]).trainer
    assert trainer.global_step == 2 * (1 + 2 + 3)
    stages = json.loads((tmp_path / "runs" / "debug" / "runtime.json").read_text())["stages"]
    assert [(stage["rows"], stage["steps"]) for stage in stages] == [(2, 2), (4, 4), (6, 6)]


def _recipe_of_debug():
    return yaml.safe_load((ROOT / "configs" / "debug.yaml").read_text())


def base(*more):
    """Return the debug recipe with models that are loaded from folders."""
    recipe = _recipe_of_debug()
    recipe["model"] |= {
        "student": {"name": "student"},
        "teacher": {"name": "teacher"},
        "decoding": {"max_new_tokens": 3},
    }
    Path("base.yaml").write_text(yaml.safe_dump(recipe))
    return ["--config", "base.yaml", *more]


def test_short_names_and_layers(tiny):
    (tiny / "later.yaml").write_text("model: {loss: {class_path: JensenShannon, init_args: {beta: 0.1}}}\n")
    assert isinstance(cli.parse(base("--model.loss", "ReverseKL")).model.loss, ReverseKL)
    loss = cli.parse(base("--model.loss", "ReverseKL", "--config", "later.yaml")).model.loss
    assert isinstance(loss, JensenShannon)
    assert loss.beta == 0.1


@pytest.mark.parametrize("setting", ["config.hidden_size", "init_args.config.init_args.hidden_size"])
def test_setting_within_a_recipe_leaves_the_others_as_they_were(setting):
    recipe = str(ROOT / "configs" / "debug.yaml")
    student, teacher = cli.parse(["--config", recipe, f"--model.student.{setting}=64"]).model.models_by_name().values()
    assert student.config.to_dict() == {**teacher.config.to_dict(), "hidden_size": 64, "head_dim": 32}


def test_another_recipe_with_another_kind_of_student_takes_its_place(tiny):
    (tiny / "later.yaml").write_text(yaml.safe_dump({"model": {"student": _recipe_of_debug()["model"]["student"]}}))
    student = cli.parse(base("--config", "later.yaml")).model.student
    assert student.config.vocab_size == 384


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("torch.optim.AdamW", "fused", True),
        ("torch.optim.Adafactor", "eps", (None, 1e-4)),
        ("bitsandbytes.optim.AdamW8bit", "min_8bit_size", 8192),
        ("torchao.optim.AdamW8bit", "block_size", 128),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_an_optimizer_is_any_class_with_its_settings(name, setting, value, tiny):
    pytest.importorskip(name.split(".")[0])
    recipe = yaml.safe_load(Path(base()[1]).read_text())
    del recipe["model"]["optimizer"]
    Path("base.yaml").write_text(yaml.safe_dump(recipe))
    given = json.dumps(value)
    chosen = ["--model.optimizer", name, f"--model.optimizer.{setting}={given}", "--model.optimizer.lr=0.001"]
    optimizer = cli.parse(["--config", "base.yaml", *chosen]).model.optimizer([torch.nn.Parameter(torch.zeros(2, 2))])
    assert f"{type(optimizer).__module__}.{type(optimizer).__name__}".startswith(name.split(".")[0])
    assert type(optimizer).__name__ == name.rsplit(".", 1)[1]
    assert optimizer.param_groups[0]["lr"] == 0.001
    settings = {**vars(optimizer), **vars(getattr(optimizer, "args", optimizer)), **optimizer.param_groups[0]}
    assert settings[setting] == value


def test_curate_reflects_and_trains_nothing(tiny, monkeypatch):
    monkeypatch.setattr("srd_lightning.models.pretrained.Pretrained.model", lambda self: load(self.name))
    loaded = []

    def load(name):
        loaded.append(name)
        return AutoModelForCausalLM.from_pretrained(name)

    cli.run(["curate", *base("--data.scores=scores"), "--export=curated.jsonl"])
    assert sum(json.loads(line)["kept"] for line in (tiny / "curated.jsonl").open()) < 8
    scores = [row for part in (tiny / "scores").glob("part-*.parquet") for row in pq.read_table(part).to_pylist()]
    assert len(scores) == 8
    assert loaded == ["student"]
    monkeypatch.setattr("srd_lightning.criteria.base.generate_ids", None)
    assert cli.run(["fit", *base("--data.scores=scores")]).trainer.global_step == 12


@pytest.mark.parametrize("subcommand", ["validate", "test", "predict"])
def test_evaluation_subcommands(subcommand, tiny):
    run = cli.run([subcommand, *base()])
    expected = {"validate": {"val_nll", "val_kl"}, "test": {"test_nll", "test_kl", "test_rouge_l"}, "predict": set()}
    assert set(run.trainer.callback_metrics) == expected[subcommand]


def test_predict_writes_its_answers(tiny):
    writer = ["--trainer.callbacks+=AnswerWriter", "--trainer.callbacks.path=answers.jsonl"]
    run = cli.run(["predict", *base(*writer)])
    rows = [json.loads(line) for line in (tiny / "answers.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == list(run.datamodule.rows["test"]["prompt"])
    assert rows[0]["response"] == "Blue."
    assert set(rows[0]) == {"prompt", "response", "answer"}


@pytest.mark.parametrize(
    "command", [["cli.py"], ["-c", "from srd_lightning.cli import main; main()"]], ids=["cli.py", "srd"]
)
def test_help_names_the_subcommands(command):
    done = subprocess.run([sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    said = " ".join(done.stdout.split())
    for name, description in cli.ALL.items():
        assert f"{name} {description}" in said


def test_help_imports_nothing_that_takes_its_time():
    program = (
        "import sys; from srd_lightning.cli import main; sys.argv = ['srd', '--help']\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "print(sorted({'torch', 'lightning', 'transformers', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_subcommands_are_those_of_the_trainer():
    assert {*LightningCLI.subcommands(), "curate", "cache-teacher", "generate", "evaluate", "plan"} == set(
        cli.SUBCOMMANDS
    )
    assert all(callable(getattr(cli.SRDTrainer, name)) for name in cli.SUBCOMMANDS)


def help_of(capsys, *arguments):
    with pytest.raises(SystemExit, match="0"):
        cli.run(list(arguments))
    return capsys.readouterr().out.splitlines()


def test_help_of_a_subcommand_fits_a_screen(capsys):
    said = help_of(capsys, "fit", "--help")
    assert said[0] == "usage: srd fit [--config FILE ...] [--SETTING VALUE ...]"
    shown = [line.split()[0] for line in said if line.startswith("  --")]
    of_generate = settings_help.FIRST["what is written"]
    named = [name for names in settings_help.FIRST.values() for name in names if names is not of_generate]
    assert shown == [f"--{name}" for name in named]  # the parser has them all
    assert len(said) < 60
    assert all(len(line) <= settings_help.WIDTH for line in said)
    assert any(
        line.split() == ["--data.batch_size", "Rows", "per", "rank", "and", "training", "step", "[16]"] for line in said
    )


def test_help_of_all_settings(capsys):
    said = "\n".join(help_of(capsys, "curate", "--help.all"))
    for name in ("--data.decontaminate", "--trainer.sync_batchnorm", "--model.packing", "--data.decoding.top_p"):
        assert name in said


def test_help_of_a_class(capsys):
    assert any("--model.loss.beta" in line for line in help_of(capsys, "fit", "--model.loss.help", "JensenShannon"))


def test_one_source_of_several_on_the_command_line(tiny):
    (tiny / "more.jsonl").write_text((tiny / "rows.jsonl").read_text())
    recipe = base("--data.data={train: rows.jsonl, test: rows.jsonl}", "--data.data.train", "more.jsonl")
    assert cli.parse(recipe).datamodule.data == {"train": "more.jsonl", "test": "rows.jsonl"}


def test_sections_of_several_subcommands_in_one_file(tiny):
    recipe = yaml.safe_load((ROOT / "configs" / "debug.yaml").read_text())
    recipe["trainer"]["default_root_dir"] = "elsewhere"
    (tiny / "all.yaml").write_text(yaml.safe_dump({"validate": recipe, "test": {**recipe, "verbose": False}}))
    run = cli.run(["--config", "all.yaml", "validate"])
    assert run.trainer.default_root_dir.endswith("elsewhere")


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (LightningCLI, "_dump_config"),
        (LightningCLI, "_parse_ckpt_path"),
        (LightningCLI, "_set_seed"),
        (ArgumentParser, "_apply_actions"),
        (ArgumentParser, "_actions"),
        (ArgumentParser, "_option_string_actions"),
    ],
)
def test_private_names_that_are_used_are_there(owner, name, tiny):
    holder = owner() if owner is ArgumentParser else owner
    assert hasattr(holder, name)


def test_arguments_know_their_types(tiny):
    (action,) = (action for action in cli.parse(base()).parser._actions if action.dest == "data.batch_size")
    assert action._typehint is int


SAID = r"""
Seed set to 0
GPU available: (False|True \(.*\)), used: False
run: runs/debug
train: 8 rows; dropped: none; responses cut to max_length: 0
validation: 8 rows; dropped: none; responses cut to max_length: 0
test: 8 rows; dropped: none; responses cut to max_length: 0
train: none of 8 prompts repeat that of an earlier row
validation: 8 of its 8 prompts also in train, in 8 of 8 rows
test: 8 of its 8 prompts also in train, in 8 of 8 rows
reflection: +\d+%\|.*
from epoch 0: 2 of 8 rows
from epoch 2: 4 of 8 rows
from epoch 4: 6 of 8 rows
from epoch 0: loss.temperature 1, kd_weight 0.8
from epoch 2: loss.temperature 1.5, kd_weight 0.9
from epoch 4: loss.temperature 2, kd_weight 1
teacher cache: 14 rows with 139 response tokens take .* in runs/debug/teacher/[0-9a-f]+
teacher cache: +\d+%\|.*
student: 45,216 parameters, all of them trained
stage 0 begins at epoch 0 with 2 rows
stage 1 begins at epoch 2 with 4 rows
stage 2 begins at epoch 4 with 6 rows
`Trainer.fit` stopped: `max_epochs=6` reached.
student saved to runs/debug/student
where .* s went
┃ seconds +┃ epoch 0 on ┃ epoch 2 on ┃ epoch 4 on ┃ before ┃ +all ┃ share ┃
[┏┡├└].*[┓┩┤┘]
│ .* │
host memory .* GiB at most; products of float32: .*
finished: runs/debug
Epoch 5/5 .* train_loss: .*
val_nll: .*
""".strip().splitlines()
"""All that a good run says, the table of where its time went among it: each at least once, and no other."""


def test_all_that_a_good_run_says(tmp_path):
    code, out, error = run_cli(["fit", "--config", str(ROOT / "configs" / "debug.yaml")], tmp_path)
    assert code == 0, error
    said = [line.strip() for line in re.split(r"[\r\n]+", out + error) if line.strip()]
    assert [line for line in said if not any(re.fullmatch(expected, line) for expected in SAID)] == []
    assert [expected for expected in SAID if not any(re.fullmatch(expected, line) for line in said)] == []


def test_print_config_is_a_configuration(tiny):
    code, printed, error = run_cli(["fit", *base("--print_config")], tiny)
    assert code == 0, error
    (tiny / "printed.yaml").write_text(printed)
    run = cli.run(["fit", "--config", "printed.yaml"])
    assert run.datamodule.schedule == {0: 0.25, 2: 0.5, 4: 0.75}
    assert run.trainer.global_step == 12


def test_configurations_of_the_package_are_found():
    assert cli.find_config("debug.yaml").read_text() == (ROOT / "configs" / "debug.yaml").read_text()
    with pytest.raises(FileNotFoundError, match=r"no configuration nope\.yaml"):
        cli.find_config("nope.yaml")
