import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from tiny import tiny_model
from torch.optim import SGD
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from srd_lightning import (
    AnswerWriter,
    Curriculum,
    CurriculumCallback,
    Decoding,
    HyperparameterScheduler,
    JensenShannon,
    KDLightningModule,
    SkewForwardKL,
    SkewReverseKL,
    SRDDataModule,
)
from srd_lightning.errors import SettingError, StorageError
from srd_lightning.preflight import run_preflight

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def module():
    return KDLightningModule(tiny_model(0), tiny_model(1), optimizer=lambda params: SGD(params, lr=0.1))


def data(tokenizer, rows, folder, schedule):
    return SRDDataModule(
        {"train": rows, "validation": rows[:4]},
        tokenizer,
        schedule=schedule,
        scores=str(folder / "scores"),
        decoding=Decoding(max_new_tokens=1),
        batch_size=4,
    )


def fit(callbacks, datamodule, folder, ckpt_path=None, **options):
    options = {"enable_checkpointing": False, **options}
    trainer = L.Trainer(callbacks=callbacks, default_root_dir=folder, **QUIET, **options)
    model = module()
    trainer.fit(model, datamodule=datamodule, ckpt_path=ckpt_path)
    return trainer, model


class Untouched(L.LightningDataModule):
    """Its rows must not be read: what is refused is refused before."""

    def setup(self, stage):
        run_preflight(self.trainer, self.trainer.lightning_module)
        pytest.fail("rows were read")


def refused(*callbacks, model=None, **options):
    options = {"enable_checkpointing": False, "max_epochs": 4, **options}
    L.Trainer(callbacks=list(callbacks), **QUIET, **options).fit(model or module(), datamodule=Untouched())


class TestHyperparameterScheduler:
    @pytest.mark.parametrize(
        ("schedules", "said"),
        [
            ({"loss.temprature": {0: 1.0}}, r"KDLightningModule has no attribute 'loss\.temprature' to schedule"),
            ({"loss.beta": {0: 0.5}}, r"KDLightningModule has no attribute 'loss\.beta' to schedule"),
            ({"optimizer": {0: 0.5}}, "optimizer of KDLightningModule is a function, not a number"),
            ({"loss": {0: 0.5}}, "loss of KDLightningModule is a ForwardKL, not a number"),
            ({"loss.scale": {0: 0.5}}, r"the schedule of loss\.scale cannot begin 0\.5 at epoch 0: .*setter"),
            (
                {"kd_weight": {0: 0.5, 1: 1.5}},
                r"the schedule of kd_weight cannot begin 1\.5 at epoch 1: kd_weight must lie in \[0, 1\]",
            ),
            (
                {"loss.temperature": {0: 1.0, 3: 0.0}},
                r"the schedule of loss\.temperature cannot begin 0\.0 at epoch 3: temperature must be positive",
            ),
        ],
    )
    def test_what_cannot_be_is_refused_before_rows_are_read(self, schedules, said):
        model = module()
        with pytest.raises(SettingError, match=said):
            refused(HyperparameterScheduler(schedules), model=model)
        assert (model.kd_weight, model.loss.temperature) == (1.0, 1.0)

    @pytest.mark.parametrize(
        ("loss", "name"), [(JensenShannon, "beta"), (SkewForwardKL, "alpha"), (SkewReverseKL, "alpha")]
    )
    def test_shares_of_mixtures(self, loss, name):
        model = KDLightningModule(tiny_model(0), tiny_model(1), loss=loss())
        with pytest.raises(
            SettingError, match=rf"schedule of loss\.{name} cannot begin 1\.0 at epoch 2: {name} must lie"
        ):
            refused(HyperparameterScheduler({f"loss.{name}": {0: 0.5, 2: 1.0}}), model=model)

    def test_two_schedules_for_one_attribute(self):
        schedulers = [HyperparameterScheduler({"kd_weight": {0: value}}) for value in (0.5, 1.0)]
        with pytest.raises(SettingError, match="two HyperparameterSchedulers have a schedule for kd_weight"):
            refused(*schedulers)

    @pytest.mark.parametrize(
        ("schedule", "said"),
        [
            ({3: 1.0}, r"kd_weight must begin at epoch 0, but its epochs are \[3\]"),
            ({}, r"kd_weight must begin at epoch 0, but its epochs are \[\]"),
            ({0: 0.5, 1.5: 1.0}, r"the epochs of kd_weight must be whole numbers, but one is 1\.5"),
            ({0: "0.5"}, "the values of kd_weight must be numbers, but one is '0.5'"),
            ({0: None}, "the values of kd_weight must be numbers, but one is None"),
            ({0: float("nan")}, "the values of kd_weight must be numbers, but one is nan"),
        ],
    )
    def test_what_is_no_schedule(self, schedule, said):
        with pytest.raises(SettingError, match=said):
            HyperparameterScheduler({"kd_weight": schedule})

    def test_values_that_never_hold_are_named(self, tokenizer, rows, tmp_path):
        scheduler = HyperparameterScheduler({"kd_weight": {0: 0.5, 1: 0.7, 4: 1.0}})
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("default")  # as users have it: once
            fit([scheduler], data(tokenizer, rows, tmp_path, {0: 1.0}), tmp_path, max_epochs=1)
        (found,) = (str(one.message) for one in said if "never hold" in str(one.message))
        assert found.startswith("the values of kd_weight for epochs [1, 4] never hold: the run has 1 epochs")

    def test_values_are_set_when_a_run_is_resumed_within_an_epoch(self, tokenizer, rows, tmp_path):
        staged = {"loss.temperature": {0: 1.0, 1: 3.0}}
        all_rows = data(tokenizer, rows, tmp_path, {0: 1.0})
        checkpoint = ModelCheckpoint(tmp_path, "middle", every_n_train_steps=6)
        options = {"max_epochs": 2, "enable_checkpointing": True}
        fit([HyperparameterScheduler(staged), checkpoint], all_rows, tmp_path, **options)
        temperatures = []

        class Seen(L.Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                temperatures.append(pl_module.loss.temperature)

        callbacks = [HyperparameterScheduler(staged), Seen()]
        again = data(tokenizer, rows, tmp_path, {0: 1.0})
        fit(callbacks, again, tmp_path, ckpt_path=tmp_path / "middle.ckpt", max_epochs=2)
        assert temperatures == [3.0, 3.0]


class Plain(L.LightningModule):
    """A stranger's module, for any batches."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return sum(self.layer(part.float()[:, None]).sum() for part in tree_leaves(batch))

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=0.0)


def staged(size, epoch=0):
    """The loader of a curriculum of so many rows, half of which are in."""
    return DataLoader(Curriculum(torch.arange(size), {0: 0.5}).subset(range(size), epoch), batch_size=4)


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(range(8))


class TestCurriculumCallback:
    def fit(self, loaders, curriculum=None, **options):
        curriculum = curriculum or Curriculum(torch.arange(16), {0: 0.5})
        options = {"max_epochs": 1, "enable_checkpointing": False, **options}
        trainer = L.Trainer(callbacks=[CurriculumCallback(curriculum)], **QUIET, **options)
        trainer.fit(Plain(), loaders)
        return trainer

    def test_stage_and_rows_are_logged(self, tokenizer, rows, tmp_path):
        logged = []

        class Seen(L.Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                metrics = trainer.callback_metrics
                logged.append((float(metrics["curriculum/stage"]), float(metrics["curriculum/rows"])))

        fit([CurriculumCallback(), Seen()], data(tokenizer, rows, tmp_path, {0: 0.5, 2: 0.75}), tmp_path, max_epochs=3)
        assert logged == [(0.0, 8.0), (0.0, 8.0), (1.0, 12.0)]

    @pytest.mark.parametrize(
        "loaders",
        [
            {"staged": staged(16), "others": DataLoader(range(5))},
            [DataLoader(range(5)), staged(16)],
            CombinedLoader([staged(16), DataLoader(range(5))], "max_size_cycle"),
            [DataLoader(range(4)), DataLoader(range(4))],
            [DataLoader(Endless()), staged(16)],
        ],
        ids=["dict", "list", "CombinedLoader", "halves", "with endless ones"],
    )
    def test_several_loaders(self, loaders):
        trainer = self.fit(loaders)
        assert float(trainer.callback_metrics["curriculum/rows"]) == 8

    @pytest.mark.parametrize(
        ("loaders", "found"),
        [
            (DataLoader(range(16), batch_size=4), "16"),
            ({"a": DataLoader(range(16)), "b": DataLoader(range(5))}, "16 and 5"),
            (DataLoader(Endless()), "a number that is not known"),
            ([torch.zeros(2)], "a number that is not known"),
        ],
        ids=["one", "dict", "endless", "batches"],
    )
    def test_a_pool_that_does_not_grow_is_refused_before_a_step(self, loaders, found):
        """A data module that forgot the changed line."""
        steps = []

        class Counted(Plain):
            def training_step(self, batch, batch_idx):
                steps.append(batch)

        callback = CurriculumCallback(Curriculum(torch.arange(16), {0: 0.5}))
        trainer = L.Trainer(max_epochs=1, callbacks=[callback], enable_checkpointing=False, **QUIET)
        with pytest.raises(SettingError, match=f"epoch 0 should train on 8 rows, but its loader holds {found}; build"):
            trainer.fit(Counted(), loaders)
        assert steps == []

    def test_loaders_are_rebuilt_and_the_trainer_is_as_before_in_the_end(self):
        seen = []

        class Seen(Plain):
            def on_train_epoch_start(self):
                seen.append(self.trainer.reload_dataloaders_every_n_epochs)

        callback = CurriculumCallback(Curriculum(torch.arange(16), {0: 0.5}))
        options = {"max_epochs": 1, "enable_checkpointing": False, "reload_dataloaders_every_n_epochs": 3}
        trainer = L.Trainer(callbacks=[callback], **QUIET, **options)
        trainer.fit(Seen(), staged(16))
        assert (seen, trainer.reload_dataloaders_every_n_epochs) == ([1], 3)

    def test_it_needs_a_curriculum(self):
        trainer = L.Trainer(max_epochs=1, callbacks=[CurriculumCallback()], enable_checkpointing=False, **QUIET)
        with pytest.raises(SettingError, match="needs a curriculum: give it one, or use SRDDataModule"):
            trainer.fit(module(), train_dataloaders=[0])

    def test_two_curricula(self, tokenizer, rows, tmp_path):
        """That of the callback would be ignored."""
        other = CurriculumCallback(Curriculum(torch.arange(16), {0: 0.5}))
        with pytest.raises(SettingError, match="and SRDDataModule has another, by which its rows are chosen"):
            fit([other], data(tokenizer, rows, tmp_path, {0: 1.0}), tmp_path, max_epochs=1)

    def test_a_curriculum_without_the_callback(self):
        """The loader would be built once, and 6/6/6 rows trained on."""

        class Staged(L.LightningDataModule):
            curriculum = Curriculum(torch.arange(8), {0: 0.5, 1: 1.0})

            def train_dataloader(self):
                return DataLoader(self.curriculum.subset(range(8), self.trainer.current_epoch))

        trainer = L.Trainer(max_epochs=2, enable_checkpointing=False, **QUIET)
        with pytest.raises(SettingError, match=r"Staged has a curriculum, but .* only once.*: add Curriculum"):
            trainer.fit(module(), datamodule=Staged())


class Answers(Plain):
    """Answers each number of a batch."""

    def predict_step(self, batch, batch_idx):
        return [{"prompt": str(number), "answer": "x" * number} for number in batch.tolist()]


class TestAnswerWriter:
    def predict(self, path, module=None, **options):
        trainer = L.Trainer(callbacks=[AnswerWriter(str(path))], enable_checkpointing=False, **QUIET, **options)
        trainer.predict(module or Answers(), DataLoader(range(3), batch_size=2), return_predictions=False)

    def test_one_row_a_line_and_the_next_run_replaces_them(self, tmp_path):
        for _ in range(2):
            self.predict(tmp_path / "answers.jsonl")
            lines = (tmp_path / "answers.jsonl").read_text().splitlines()
            assert [json.loads(line)["answer"] for line in lines] == ["", "x", "xx"]

    def test_each_of_two_processes_has_one_file_however_often_it_predicts(self, tmp_path):
        """The path was renamed at every run: answers.0.jsonl, answers.0.0.jsonl."""
        writer = AnswerWriter(str(tmp_path / "answers.jsonl"))
        place = SimpleNamespace(world_size=2, global_rank=1, is_global_zero=False, state=SimpleNamespace(fn="predict"))
        for _ in range(2):
            writer.setup(place, Plain(), "predict")
            writer.on_predict_start(place, Plain())
            writer.write_on_batch_end(place, Plain(), [{"answer": "a"}])
        assert [path.name for path in tmp_path.iterdir()] == ["answers.1.jsonl"]
        assert (tmp_path / "answers.1.jsonl").read_text() == '{"answer": "a"}\n'

    @pytest.mark.parametrize(
        ("path", "content", "said"),
        [
            ("here", None, "must name a file, but .*here is a folder"),
            ("train.jsonl", '{"prompt": "a", "response": "b"}\n', "which does not hold the answers of an earlier run"),
            ("/proc/srd/a.jsonl", None, "but nothing can be written to /proc"),
        ],
    )
    def test_a_path_is_refused_before_rows_are_read(self, path, content, said, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "here").mkdir()
        if content is not None:
            (tmp_path / path).write_text(content)
        trainer = L.Trainer(callbacks=[AnswerWriter(path)], enable_checkpointing=False, **QUIET)
        with pytest.raises(StorageError, match=said):
            trainer.predict(Answers(), datamodule=Untouched())
        if content is not None:
            assert (tmp_path / path).read_text() == content

    def test_answers_of_a_run_on_more_processes_are_named(self, tmp_path):
        """Whoever reads answers.*.jsonl would take them for answers of this run."""
        for rank in range(3):
            (tmp_path / f"answers.{rank}.jsonl").write_text('{"answer": "a"}\n')
        (tmp_path / "answers.2024.jsonl").write_text("mine")
        place = SimpleNamespace(world_size=2, global_rank=0, is_global_zero=True)
        with pytest.warns(UserWarning, match=r"^answers\.2\.jsonl in .* hold answers of an earlier run"):
            AnswerWriter(str(tmp_path / "answers.jsonl")).on_predict_start(place, Plain())

    def test_a_run_that_predicts_nothing_leaves_the_answers(self, tmp_path):
        """As ``srd curate`` does."""
        self.predict(tmp_path / "answers.jsonl")
        trainer = L.Trainer(callbacks=[AnswerWriter(str(tmp_path / "answers.jsonl"))], **QUIET)
        trainer.predict(Answers(), DataLoader([]))
        assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 3

    @pytest.mark.parametrize("returned", [torch.zeros(2), {"answer": "a"}, [torch.zeros(2)], None])
    def test_what_json_cannot_hold(self, returned, tmp_path):
        class Other(Answers):
            def predict_step(self, batch, batch_idx):
                return returned

        with pytest.raises(SettingError, match=r"but predict_step of Other returned a .*; return a list of dicts"):
            self.predict(tmp_path / "answers.jsonl", Other())

    def test_a_full_disk_leaves_whole_lines(self, tmp_path, monkeypatch):
        """The second batch is written by half."""
        opened = Path.open

        class Half:
            def __init__(self, file):
                self.file = file

            def __getattr__(self, name):
                return getattr(self.file, name)

            def __enter__(self):
                return self

            def __exit__(self, *_):
                self.file.close()

            def write(self, lines):
                return self.file.write(lines[: len(lines) // 2 if b"xx" in lines else len(lines)])

        monkeypatch.setattr(Path, "open", lambda path, *mode, **how: Half(opened(path, *mode, **how)))
        with pytest.raises(StorageError, match=r"can no longer be written to .*answers\.jsonl \(the disk is full\)"):
            self.predict(tmp_path / "answers.jsonl")
        monkeypatch.undo()
        lines = (tmp_path / "answers.jsonl").read_text().splitlines()
        assert [json.loads(line)["answer"] for line in lines] == ["", "x"]
