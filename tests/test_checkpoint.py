"""What resuming is made of: loader, counters, seeds, rows that must be the same, whole files."""

import json
import shutil
import sys
import zipfile
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from lightning.fabric.plugins.io import torch_io
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from tiny import QUIET, make_rows, tiny_model
from transformers import ByT5Tokenizer

from srd_lightning import FSDP2, Curriculum, CurriculumCallback, ResumeCheckpoint, SRDDataModule, cli
from srd_lightning.checkpoints.consolidate import main as consolidate
from srd_lightning.checkpoints.files import is_complete
from srd_lightning.checkpoints.resume_state import ResumableLoader, ResumeState, batch_seed, repair_progress
from srd_lightning.curriculum.ranking import HardToEasy
from srd_lightning.data.samplers import LengthGrouped, Shuffled
from srd_lightning.storage import put_in_place

sys.path.insert(0, str(Path(__file__).parent / "projects"))
import resume as project


class Rows(torch.utils.data.Dataset):
    """Row numbers that remember who was asked for."""

    def __init__(self, number):
        self.number, self.asked = number, []

    def __len__(self):
        return self.number

    def __getitem__(self, row):
        self.asked.append(row)
        return {"id": f"row {row}", "number": row}


def loader(rows, epoch=3, workers=0, world_size=2, rank=1):
    sampler = LengthGrouped(rows, np.arange(len(rows)) % 4, 3, world_size, rank, seed=5)
    sampler.set_epoch(epoch)
    return ResumableLoader(rows, batch_size=3, sampler=sampler, num_workers=workers)


def numbers(batches):
    return [batch["number"].tolist() for batch in batches]


class TestResumableLoader:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_goes_on_with_what_was_not_delivered(self, workers):
        whole = numbers(loader(Rows(31)))
        first = loader(Rows(31))
        batches = iter(first)
        head = [next(batches)["number"].tolist() for _ in range(2)]
        state = first.state_dict()
        second = loader(Rows(31), workers=workers)
        second.load_state_dict(state)
        iter(second)  # as Lightning does it
        assert second.state_dict() == state
        assert head + numbers(second) == whole
        assert len(second) == len(whole) == 6
        assert second.state_dict() == {"epoch": 3, "delivered": 6}
        assert numbers(second) == whole

    def test_loads_nothing_of_what_was_delivered(self):
        rows = Rows(31)
        resumed = loader(rows)
        resumed.load_state_dict({"epoch": 3, "delivered": 5})
        (last,) = numbers(resumed)
        assert rows.asked == last

    def test_another_epoch_begins_with_its_first_batch(self):
        resumed = loader(Rows(31), epoch=4)
        resumed.load_state_dict({"epoch": 3, "delivered": 6})
        assert numbers(resumed) == numbers(loader(Rows(31), epoch=4))

    def test_names_the_rows_of_any_batch_at_any_time(self):
        rows = Rows(31)
        resumed = loader(rows)
        resumed.load_state_dict({"epoch": 3, "delivered": 4})
        expected = [[f"row {row}" for row in batch] for batch in numbers(loader(Rows(31)))]
        assert [resumed.ids(batch) for batch in range(6)] == expected
        assert resumed.ids(6) == []
        assert numbers(resumed) == numbers(loader(Rows(31)))[4:]


class Sums(BoringModel):
    """Sums the numbers of rows: another order or another row gives other weights."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return {"loss": self.layer(batch["number"].float()[:, None]).pow(2).mean() * 1e-3}

    def validation_step(self, batch, batch_idx):
        return None


class Growing(L.LightningDataModule):
    """Someone else's data: 2, 4, 4 and 6 batches."""

    curriculum = Curriculum(torch.arange(16), {0: 0.25, 1: 0.5, 3: 0.75})

    def train_dataloader(self):
        pool = self.curriculum.subset(Rows(16), self.trainer.current_epoch)
        sampler = Shuffled(pool, 1, 0)
        sampler.set_epoch(self.trainer.current_epoch)
        return ResumableLoader(pool, batch_size=2, sampler=sampler)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(2))


class Moments(L.Callback):
    """Saves after every batch, after validations and at the end of epochs, and writes down what happens."""

    def __init__(self, folder=None):
        self.folder, self.seen, self.saved = folder, [], {}

    def _save(self, trainer, moment):
        if self.folder is not None:
            self.saved[moment] = f"{self.folder}/{moment}.ckpt"
            trainer.save_checkpoint(self.saved[moment])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append((trainer.global_step, batch_idx, *batch["number"].tolist()))

    def on_train_batch_end(self, trainer, *_):
        self._save(trainer, f"batch-{trainer.global_step}")

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.seen.append(f"validated {trainer.current_epoch}")
            self._save(trainer, f"validation-{trainer.global_step}")

    def on_train_epoch_start(self, trainer, pl_module):
        self.seen.append(f"begins {trainer.current_epoch}")

    def on_train_epoch_end(self, trainer, pl_module):
        self._save(trainer, f"epoch-{trainer.global_step}")

    def on_train_end(self, trainer, pl_module):
        self.seen.append(f"logged {trainer.fit_loop.epoch_loop._batches_that_stepped}")


def grow(folder=None, checkpoint=None, **options):
    torch.manual_seed(0)
    moments, module = Moments(folder), Sums()
    trainer = L.Trainer(**{**QUIET, "max_epochs": 4, "callbacks": [moments, CurriculumCallback()], **options})
    trainer.fit(module, datamodule=Growing(), ckpt_path=checkpoint)
    return moments, module.layer.weight.item(), trainer


@pytest.mark.parametrize("options", [{}, {"max_steps": 100}, {"check_val_every_n_epoch": 2}, {"limit_val_batches": 0}])
def test_a_run_of_someone_else_goes_on_from_any_moment(options, tmp_path):
    whole, weight, _ = grow(tmp_path, **options)
    assert len(whole.saved) >= 16 + 4
    for moment, checkpoint in whole.saved.items():
        again, same, trainer = grow(None, checkpoint, **options)
        step = int(moment.rpartition("-")[2])
        first = next((seen for seen in again.seen if isinstance(seen, tuple)), None)
        assert first is None or first[0] == step
        expected = whole.seen if first is None else whole.seen[whole.seen.index(first) :]
        found = again.seen if first is None else again.seen[again.seen.index(first) :]
        assert expected[-len(found) :] == found, moment
        assert (same, trainer.global_step) == (weight, 16), moment


@pytest.mark.parametrize(
    ("moment", "options", "steps"), [("batch-2", {}, 14), ("batch-10", {}, 12), ("epoch-2", {"max_steps": 100}, 10)]
)
def test_lightning_alone_still_leaves_out_batches(moment, options, steps, tmp_path, monkeypatch):
    """When this fails, Lightning has changed, and `repair_progress` may no longer be needed, or no longer be right."""
    whole, _, _ = grow(tmp_path, **options)
    monkeypatch.setattr("srd_lightning.checkpoints.resume_state.repair_progress", lambda *_: None)
    assert grow(None, whole.saved[moment], **options)[2].global_step == steps


class Ones(BoringModel):
    def training_step(self, batch, batch_idx):
        return self.layer(torch.ones(1, 32)).mean()


@pytest.mark.parametrize("ours", ["data", "curriculum", "checkpoint", "all"])
def test_whatever_is_ours_brings_along_what_resumes_a_run_once(ours, tmp_path):
    data = {"train_dataloaders": torch.utils.data.DataLoader(torch.zeros(2))}
    if ours in ("data", "all"):
        data = {"datamodule": SRDDataModule(make_rows(4), ByT5Tokenizer(), schedule={0: 1.0}, batch_size=2)}
    callbacks = [CurriculumCallback(None if ours == "all" else Curriculum(torch.arange(2), {0: 1.0}))]
    callbacks = callbacks if ours in ("curriculum", "all") else []
    callbacks += [ResumeCheckpoint(tmp_path)] if ours in ("checkpoint", "all") else []
    options = {**QUIET, "enable_checkpointing": True, "max_epochs": 1, "default_root_dir": tmp_path}
    trainer = L.Trainer(callbacks=callbacks, limit_val_batches=0, **options)
    for _ in range(2):
        trainer.fit(Ones(), **data)
    assert [type(callback) for callback in trainer.callbacks].count(ResumeState) == 1


@pytest.mark.parametrize("options", [{}, {"max_steps": 100}])
def test_to_repair_twice_changes_nothing(options, tmp_path):
    whole, _, trainer = grow(tmp_path, **options)
    for path in whole.saved.values():
        once, twice = torch.load(path), torch.load(path)
        repair_progress(once, trainer)
        for _ in range(2):
            repair_progress(twice, trainer)
        assert once["loops"] == twice["loops"], path


def test_seeds_of_batches_differ_by_everything_that_matters():
    seeds = [batch_seed(run, batch, rank) for run in (0, 1) for batch in (0, 1, 11) for rank in (0, 1, 10)]
    assert len(set(seeds)) == len(seeds)
    for seed in seeds:
        torch.manual_seed(seed)


class TestRowsStillToCome:
    @pytest.fixture(scope="class")
    def checkpoint(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("rows") / "run"
        project.main(folder_of(folder), max_steps=3)
        (path,) = (folder / "checkpoints").iterdir()
        return path

    @pytest.mark.parametrize(
        ("changed", "said"),
        [
            ({"seed": 1}, "seed was 0 and is 1"),
            ({"group_by_length": False}, "group_by_length was True and is False"),
            ({"batch_size": 4}, "global_batch was 6 and is 4"),
            ({"schedule": {0: 0.5, 3: 0.75}}, "schedule was {0: 0.25, 1: 0.5, 3: 0.75} and is {0: 0.5, 3: 0.75}"),
            ({"ties": "order"}, r"- other ranking \(of the same rows: use the same `scores`.*`ties`"),
            ({"arrangement": HardToEasy()}, r"arrangement was 'EasyToHard\(\)' and is 'HardToEasy\(\)'"),
        ],
    )
    def test_that_would_be_others_are_refused(self, checkpoint, changed, said, tmp_path):
        shutil.copytree(checkpoint.parents[2] / "scores", tmp_path / "scores")
        with pytest.raises(ValueError, match=said) as refused:
            project.main(folder_of(tmp_path / "run"), ckpt_path=str(checkpoint), data=changed)
        assert str(refused.value).count("\n- ") == 1
        assert "without ckpt_path" in str(refused.value)

    def test_all_that_differs_is_named(self, checkpoint, tmp_path):
        with pytest.raises(ValueError, match="seed was 0 and is 3") as refused:
            project.main(folder_of(tmp_path / "run"), ckpt_path=str(checkpoint), data={"seed": 3, "batch_size": 1})
        assert "global_batch was 6 and is 1 (" in str(refused.value)

    def test_older_checkpoints_say_nothing_of_them(self, checkpoint, tmp_path):
        older = torch.load(checkpoint)
        del older["SRDDataModule"]["rows"], older["run_seed"]
        torch.save(older, tmp_path / "older.ckpt")
        run = project.main(folder_of(tmp_path / "run"), ckpt_path=str(tmp_path / "older.ckpt"), data={"seed": 3})
        assert run.global_step == 8


def folder_of(path):
    path.mkdir(parents=True, exist_ok=True)
    return str(path)


class OwnFiles(TorchCheckpointIO):
    def save_checkpoint(self, checkpoint, path, storage_options=None):
        Path(path).parent.mkdir(exist_ok=True)
        torch.save({**checkpoint, "own": True}, path)


class TestResumeCheckpoint:
    def test_holds_no_teacher_and_plain_values_only(self, tmp_path):
        trainer = project.main(folder_of(tmp_path / "run"), max_steps=1)
        checkpoint = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)
        student = {f"student.{name}" for name in trainer.lightning_module.student.state_dict()}
        assert set(checkpoint["state_dict"]) == student
        assert trainer.lightning_module.teacher is not None
        assert checkpoint["run_seed"] == 0

    def test_last_is_the_newest_that_is_complete(self, tmp_path):
        run = project.main(folder_of(tmp_path / "run"), max_steps=3, saves={"save_top_k": -1})
        folder = tmp_path / "run" / "checkpoints"
        assert {path.name for path in folder.iterdir()} == {
            "epoch=0-step=1.ckpt",
            "epoch=1-step=2.ckpt",
            "epoch=1-step=3.ckpt",
        }
        whole = (folder / "epoch=1-step=3.ckpt").read_bytes()
        (folder / "newer.ckpt").write_bytes(whole[: len(whole) // 2])
        run.save_checkpoint(folder / "weights.ckpt", weights_only=True)
        (folder / "shards.ckpt").mkdir()
        with pytest.warns(UserWarning, match=f"{folder}/newer.ckpt.* was cut off .*; going on from .*step=3.ckpt"):
            assert ResumeCheckpoint(folder)._find_last_checkpoints(run) == {str(folder / "epoch=1-step=3.ckpt")}
        shutil.copy(folder / "epoch=0-step=1.ckpt", folder / "whatever its name.ckpt")
        assert ResumeCheckpoint(folder)._find_last_checkpoints(run) == {str(folder / "whatever its name.ckpt")}
        assert ResumeCheckpoint(tmp_path / "nowhere")._find_last_checkpoints(run) == set()

    def test_keeps_one_and_clears_away_what_a_killed_run_left(self, tmp_path):
        folder = tmp_path / "run" / "checkpoints"
        project.main(folder_of(tmp_path / "run"), max_steps=3)
        (folder / ".epoch=1-step=4.ckpt.partial").write_bytes(b"half")
        (folder / ".epoch=1-step=5.ckpt.partial").mkdir()
        project.main(folder_of(tmp_path / "run"), max_steps=5)
        assert [path.name for path in folder.iterdir()] == ["epoch=2-step=5.ckpt"]

    def test_saves_nothing_while_gradients_are_accumulated(self, tmp_path):
        saves = {"every_n_train_steps": None, "train_time_interval": timedelta(0), "save_top_k": -1}
        for steps in (3, 5):  # Lightning alone saves after the first batch of a resumed run
            project.main(folder_of(tmp_path / "run"), max_steps=steps, saves=saves)
        done = [torch.load(path) for path in (tmp_path / "run" / "checkpoints").iterdir()]
        counted = [state["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"] for state in done]
        assert sorted(counted) == [2, 4, 6, 8, 10]

    def test_what_one_device_cannot_read(self, tmp_path):
        sharded = tmp_path / "checkpoints" / "epoch=0-step=1.ckpt"
        sharded.mkdir(parents=True)
        (sharded / ".metadata").touch()
        torch.save({}, sharded / "meta.pt")
        with pytest.raises(ValueError, match=r"is sharded, which SingleDeviceStrategy .* srd_lightning\.consolidate"):
            project.main(str(tmp_path))

    @pytest.mark.parametrize(("other", "said"), [(7, "after steps 0, 7"), ("b.ckpt", "from None, b.ckpt")])
    def test_processes_that_would_not_go_on_together(self, other, said, tmp_path, monkeypatch):
        together = SimpleNamespace(
            all_results=lambda work: [work(), other if isinstance(work(), type(other)) else work()],
            rank0_result=lambda work: work(),
        )
        monkeypatch.setattr("srd_lightning.checkpoints.refusals.Ranks", lambda: together)
        with pytest.raises(ValueError, match=f"would go on {said}: they do not all see the same checkpoints"):
            project.main(folder_of(tmp_path / "run"))

    @pytest.mark.parametrize("own", [None, OwnFiles], ids=["Lightning's plug-in", "one's own"])
    def test_goes_straight_to_disk_unless_the_user_has_chosen_otherwise(self, own, tmp_path, monkeypatch):
        monkeypatch.setattr(torch_io, "_atomic_save", lambda *_: pytest.fail("made in memory"))
        plugins = [own()] if own else []
        trainer = project.main(folder_of(tmp_path / "run"), max_steps=1, plugins=plugins)
        (kept,) = (tmp_path / "run" / "checkpoints").iterdir()
        assert torch.load(kept, weights_only=True).get("own", False) == bool(own)
        assert type(trainer.strategy.checkpoint_io) is (own or TorchCheckpointIO)

    @pytest.mark.parametrize("wrong", ["save_weights_only", "save_on_exception"])
    def test_what_no_run_can_be_resumed_from(self, wrong):
        with pytest.raises(ValueError, match=f"{wrong} saves; leave that to another"):
            ResumeCheckpoint(**{wrong: True})

    def test_where_nothing_can_be_renamed(self):
        with pytest.raises(ValueError, match="s3://bucket/run cannot do"):
            ResumeCheckpoint("s3://bucket/run")

    def test_what_does_not_tell_when_it_is_done(self):
        trainer = L.Trainer(**{**QUIET, "enable_checkpointing": True}, plugins=[AsyncCheckpointIO()])
        trainer.state.fn = TrainerFn.FITTING
        with pytest.raises(ValueError, match="AsyncCheckpointIO does not tell"):
            ResumeCheckpoint().setup(trainer, BoringModel(), "fit")

    def test_through_the_command_line(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for name, seed in (("student", 0), ("teacher", 1)):
            tiny_model(seed).save_pretrained(name)
            ByT5Tokenizer().save_pretrained(name)
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(16)))
        recipe = {
            "model": {"student": {"name": "student"}, "teacher": {"name": "teacher"}},
            "data": {"data": "rows.jsonl", "batch_size": 2, "decoding": {"max_new_tokens": 2}, "scores": "scores"},
            "trainer": {
                "default_root_dir": ".",
                "max_epochs": 2,
                "accelerator": "cpu",
                "logger": False,
                "callbacks": [
                    {"class_path": "HyperparameterScheduler", "init_args": {"schedules": {"kd_weight": {0: 0.5}}}},
                    {"class_path": "CurriculumCallback"},
                    {"class_path": "RuntimeBenchmark"},
                    {"class_path": "AnswerWriter", "init_args": {"path": "answers.jsonl"}},
                    {"class_path": "HuggingFaceExport", "init_args": {"dirpath": "export"}},
                    {"class_path": "ResumeCheckpoint", "init_args": {"every_n_train_steps": 1}},
                ],
            },
        }
        Path("run.yaml").write_text(yaml.safe_dump(recipe))
        for steps in (1, 3):  # begins anew, then goes on
            run = cli.run(["fit", "--config", "run.yaml", f"--trainer.max_steps={steps}", "--ckpt_path=last"])
            (path,) = Path("checkpoints").iterdir()
            checkpoint = torch.load(path, weights_only=True)
            assert checkpoint["global_step"] == run.trainer.global_step == steps
            assert all(name.startswith("student.") for name in checkpoint["state_dict"])
        assert run.trainer.ckpt_path.endswith("step=1.ckpt")


class TestWholeFiles:
    def test_a_name_is_for_what_is_complete(self, tmp_path):
        checkpoint = tmp_path / "one.ckpt"
        torch.save({"optimizer_states": [], "state_dict": {"a": torch.zeros(999)}}, checkpoint)
        assert is_complete(checkpoint)
        content = checkpoint.read_bytes()
        for length in (0, 10, len(content) // 2, len(content) - 1):
            checkpoint.write_bytes(content[:length])
            assert not is_complete(checkpoint), length
        assert not is_complete(tmp_path / "none.ckpt")
        with zipfile.ZipFile(checkpoint, "w") as other:
            other.writestr("other", "optimizer_states")
        assert not is_complete(checkpoint)

    @pytest.mark.parametrize("before", [None, "file", "folder"])
    @pytest.mark.parametrize("now", ["file", "folder"])
    def test_replaces_what_is_there(self, before, now, tmp_path):
        def make(path, kind, content):
            if kind == "folder":
                (path / "inner").mkdir(parents=True)
                path = path / "inner" / "file"
            path.write_text(content)

        if before:
            make(tmp_path / "a.ckpt", before, "before")
        make(tmp_path / ".a.ckpt.partial", now, "now")
        put_in_place(tmp_path / ".a.ckpt.partial", tmp_path / "a.ckpt")
        assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]
        found = tmp_path / "a.ckpt" / "inner" / "file" if now == "folder" else tmp_path / "a.ckpt"
        assert found.read_text() == "now"

    def test_a_folder_that_is_killed_while_it_is_replaced_is_found(self, tmp_path, monkeypatch):
        for name in ("a.ckpt", ".a.ckpt.partial"):
            (tmp_path / name).mkdir()
            (tmp_path / name / ".metadata").write_bytes(b"")
            torch.save({}, tmp_path / name / "meta.pt")
        rename = Path.rename

        def killed(path, target):
            if path.name.endswith(".partial"):
                raise KeyboardInterrupt
            rename(path, target)

        monkeypatch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            put_in_place(tmp_path / ".a.ckpt.partial", tmp_path / "a.ckpt")
        found = ResumeCheckpoint(tmp_path)._find_last_checkpoints(L.Trainer(strategy=FSDP2(), **QUIET))
        assert found == {str(tmp_path / "a-older.ckpt")}

    @pytest.mark.parametrize(
        ("arguments", "said"), [(["no", "new"], "no is no sharded checkpoint: it has no .metadata and no meta.pt"),
                                (["shards", "old"], "old is there already; delete it")]
    )  # fmt: skip
    def test_what_cannot_become_one_file(self, arguments, said, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        Path("shards").mkdir()
        for name in ("old", "shards/.metadata", "shards/meta.pt"):
            Path(name).touch()
        with pytest.raises(SystemExit):
            consolidate(arguments)
        assert said in capsys.readouterr().err
