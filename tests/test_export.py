"""`HuggingFaceExport`: what is saved, and that nothing of the user's is lost for it."""

import json
from collections import namedtuple

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file
from tiny import QUIET, tiny_model
from torch.optim import SGD
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer

from srd_lightning import Decoding, HuggingFaceExport, KDLightningModule, Pretrained, RuntimeBenchmark, SRDDataModule
from srd_lightning.callbacks import export, export_folder
from srd_lightning.errors import ModelError, SettingError, StorageError


def module(student=None):
    return KDLightningModule(student or tiny_model(0), tiny_model(1), optimizer=lambda params: SGD(params, lr=0.1))


def data(tokenizer, rows):
    return SRDDataModule({"train": rows}, tokenizer, schedule={0: 1.0}, decoding=Decoding(max_new_tokens=1))


def fit(datamodule, folder, *callbacks, model=None, **options):
    options = {"max_epochs": 1, "limit_train_batches": 1, **QUIET, **options}
    trainer = L.Trainer(callbacks=list(callbacks), default_root_dir=folder / "run", **options)
    model = model or module()
    trainer.fit(model, datamodule=datamodule)
    return model


def refused(tmp_path, *callbacks, model=None, **options):
    """Begin a run whose rows cannot even be counted."""
    datamodule = SRDDataModule([], tokenizer=ByT5Tokenizer(), schedule={0: 1.0})
    datamodule.read_rows = lambda: pytest.fail("rows were read")
    fit(datamodule, tmp_path, *callbacks, model=model, **options)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def saved_norm(folder):
    return load_file(folder / "model.safetensors")["model.norm.weight"]


def test_it_is_a_hugging_face_folder_in_place_of_an_older_one(tokenizer, rows, tmp_path):
    out = tmp_path / "student"
    fit(data(tokenizer, rows), tmp_path, HuggingFaceExport(str(out)))
    first = saved_norm(out)
    trained = fit(data(tokenizer, rows), tmp_path, HuggingFaceExport(str(out)), model=module(tiny_model(5)))
    loaded = AutoModelForCausalLM.from_pretrained(out)
    for ours, theirs in zip(trained.student.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert ours[0] == theirs[0]
        assert torch.equal(ours[1], theirs[1])
    assert not torch.equal(first, saved_norm(out))
    assert AutoTokenizer.from_pretrained(out).get_vocab() == tokenizer.get_vocab()
    assert names(tmp_path) == ["student"]


class TestNothingOfTheUsersIsLost:
    def test_a_folder_with_other_files(self, tmp_path):
        (tmp_path / "runs").mkdir()
        (tmp_path / "runs" / "thesis.tex").write_text("mine")
        with pytest.raises(StorageError, match=r"runs holds thesis\.tex, which no export has written"):
            refused(tmp_path, HuggingFaceExport(str(tmp_path / "runs")))
        assert (tmp_path / "runs" / "thesis.tex").read_text() == "mine"

    def test_a_model_that_is_no_export(self, tmp_path):
        tiny_model().save_pretrained(tmp_path / "base")
        before = names(tmp_path / "base")
        with pytest.raises(
            StorageError, match=r"base holds .*which no export has written; give it a folder of its own"
        ):
            refused(tmp_path, HuggingFaceExport(str(tmp_path / "base")))
        assert names(tmp_path / "base") == before

    def test_a_file_added_to_an_export(self, tmp_path):
        export_folder.replace(tmp_path / "student", tiny_model(), None)
        (tmp_path / "student" / "notes.md").write_text("mine")
        with pytest.raises(StorageError, match=r"student holds notes\.md"):
            refused(tmp_path, HuggingFaceExport(str(tmp_path / "student")))

    def test_a_folder_named_as_the_older_export(self, tmp_path):
        (tmp_path / "student-older").mkdir()
        (tmp_path / "student-older" / "weights.pt").write_text("mine")
        with pytest.raises(StorageError, match=r"student-older holds weights\.pt"):
            refused(tmp_path, HuggingFaceExport(str(tmp_path / "student")))

    def test_a_file(self, tmp_path):
        (tmp_path / "student").write_text("mine")
        with pytest.raises(StorageError, match=r"needs a folder, but .*student is a file; name another dirpath"):
            refused(tmp_path, HuggingFaceExport(str(tmp_path / "student")))
        assert (tmp_path / "student").read_text() == "mine"

    @pytest.mark.parametrize("dirpath", [".", "/", "~", "..", ""])
    def test_what_the_user_lives_in(self, dirpath, tmp_path, monkeypatch):
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        with pytest.raises(SettingError, match=r"is or holds (the current folder|your home); give it a folder"):
            refused(tmp_path, HuggingFaceExport(dirpath))

    def test_the_folder_of_the_run(self, tmp_path):
        with pytest.raises(SettingError, match=r"run is or holds default_root_dir of the trainer"):
            refused(tmp_path, HuggingFaceExport(str(tmp_path / "run")))

    @pytest.mark.parametrize(
        ("writes", "said"),
        [
            (lambda folder: {"callbacks": [RuntimeBenchmark(str(folder / "report.json"))]}, "RuntimeBenchmark"),
            (lambda folder: {"callbacks": [HuggingFaceExport(str(folder))]}, "HuggingFaceExport"),
            (lambda folder: {"logger": CSVLogger(folder / "logs")}, "CSVLogger"),
        ],
    )
    def test_what_the_run_writes_besides(self, writes, said, tmp_path):
        others = {"callbacks": [], **writes(tmp_path / "out")}
        with pytest.raises(SettingError, match=f"out is or holds what {said} writes"):
            refused(tmp_path, HuggingFaceExport(str(tmp_path / "out")), *others.pop("callbacks"), **others)

    def test_the_root_of_a_disk(self, tmp_path, monkeypatch):
        monkeypatch.setattr(export_folder.os.path, "ismount", lambda path: path == tmp_path / "disk")
        with pytest.raises(StorageError, match="the root of a disk, does not allow; give it a folder in there"):
            refused(tmp_path, HuggingFaceExport(str(tmp_path / "disk")))

    def test_what_came_while_it_trained(self, tokenizer, rows, tmp_path):
        class Adds(L.Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                (tmp_path / "student").mkdir()
                (tmp_path / "student" / "mine.txt").write_text("mine")

        model = module()
        with pytest.raises(
            StorageError, match=r"could not be saved to .*student \(.*mine\.txt.*\); it is in "
        ) as caught:
            fit(data(tokenizer, rows), tmp_path, HuggingFaceExport(str(tmp_path / "student")), Adds(), model=model)
        assert names(tmp_path / "student") == ["mine.txt"]
        (rescued,) = tmp_path.glob("student-rescued-*")
        assert str(rescued) in str(caught.value)
        assert torch.equal(
            load_file(rescued / "model.safetensors")["model.norm.weight"], model.student.model.norm.weight
        )


class TestWhatCannotBeSaved:
    def test_a_place_that_cannot_be_written(self, tmp_path):
        with pytest.raises(StorageError, match=r"HuggingFaceExport\(dirpath=.*nothing can be written to /proc"):
            refused(tmp_path, HuggingFaceExport("/proc/srd/student"))

    def test_a_place_below_a_file(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(StorageError, match=r"but .*file is a file; name another place"):
            refused(tmp_path, HuggingFaceExport(str(tmp_path / "file" / "student")))

    def test_a_disk_that_is_too_full(self, tmp_path, monkeypatch):
        size = sum(weight.numel() * 4 for weight in tiny_model().parameters())
        room = namedtuple("room", "free")
        monkeypatch.setattr("shutil.disk_usage", lambda path: room(size - 1))
        with pytest.raises(StorageError, match=r"will write 0\.000\d+ GB to .*, but only 0\.000\d+ GB are free there"):
            refused(tmp_path, HuggingFaceExport(str(tmp_path / "student")))
        monkeypatch.setattr("shutil.disk_usage", lambda path: room(size))
        export._check_student(tiny_model(), tmp_path)

    def test_a_generation_config_that_transformers_does_not_save(self, tmp_path):
        student = tiny_model()
        student.generation_config.temperature = 0.5  # without do_sample
        with pytest.raises(ModelError, match="the generation_config of the student cannot be saved"):
            refused(tmp_path, HuggingFaceExport(str(tmp_path / "student")), model=module(student))

    def test_a_module_without_a_student(self, tmp_path):
        trainer = L.Trainer(max_epochs=1, callbacks=[HuggingFaceExport(str(tmp_path / "out"))], **QUIET)
        with pytest.raises(SettingError, match="saves `student`, which BoringModel does not have"):
            trainer.fit(BoringModel())

    def test_a_student_that_is_no_transformer(self, tmp_path):
        class Own(BoringModel):
            student = torch.nn.Linear(2, 2)

        trainer = L.Trainer(max_epochs=1, callbacks=[HuggingFaceExport(str(tmp_path / "out"))], **QUIET)
        with pytest.raises(ModelError, match=r"needs a student with save_pretrained, .* but it is a Linear"):
            trainer.fit(Own())

    def test_only_training_is_refused(self, tokenizer, rows, tmp_path):
        (tmp_path / "student").write_text("mine")
        trainer = L.Trainer(callbacks=[HuggingFaceExport(str(tmp_path / "student"))], **QUIET)
        trainer.validate(module(), datamodule=SRDDataModule({"validation": rows[:1]}, tokenizer), verbose=False)


class Fails(L.Callback):
    def on_train_end(self, trainer, pl_module):
        raise RuntimeError("a stranger's callback")


class TestTrainedStudents:
    def test_another_callback_that_fails_at_the_end(self, tokenizer, rows, tmp_path):
        model = module()
        warning = pytest.warns(UserWarning, match="training had ended when the error came, .*: it is in ")
        with warning, pytest.raises(RuntimeError, match="a stranger's callback"):
            fit(data(tokenizer, rows), tmp_path, Fails(), HuggingFaceExport(str(tmp_path / "student")), model=model)
        (rescued,) = tmp_path.glob("student-rescued-*")
        assert torch.equal(
            load_file(rescued / "model.safetensors")["model.norm.weight"], model.student.model.norm.weight
        )

    def test_an_error_before_the_end_saves_nothing(self, tokenizer, rows, tmp_path):
        class FailsSoon(L.Callback):
            def on_train_batch_end(self, *_):
                raise RuntimeError("soon")

        with pytest.raises(RuntimeError, match="soon"):
            fit(data(tokenizer, rows), tmp_path, FailsSoon(), HuggingFaceExport(str(tmp_path / "s")), max_epochs=2)
        assert names(tmp_path) == []

    def test_a_report_that_can_no_longer_be_written_does_not_stop_it(self, tokenizer, rows, tmp_path):
        class Blocks(L.Callback):
            def on_train_start(self, *_):
                (tmp_path / "report.json").mkdir()

        callbacks = [RuntimeBenchmark(str(tmp_path / "report.json")), HuggingFaceExport(str(tmp_path / "student"))]
        with pytest.warns(UserWarning, match=r"could not write .*report\.json .*; the report is:\n\{"):
            fit(data(tokenizer, rows), tmp_path, *callbacks, Blocks())
        assert (tmp_path / "student" / "model.safetensors").is_file()

    def test_no_place_at_all(self, tokenizer, rows, tmp_path, monkeypatch):
        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(export_folder, "_write", full)
        with pytest.raises(StorageError, match=r"\[Errno 28\] No space left on device\); its weights are lost"):
            fit(data(tokenizer, rows), tmp_path, HuggingFaceExport(str(tmp_path / "student")))
        checkpoint = L.pytorch.callbacks.ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
        with pytest.raises(StorageError, match=r"its weights are in the checkpoint .*last\.ckpt"):
            fit(
                data(tokenizer, rows),
                tmp_path,
                HuggingFaceExport(str(tmp_path / "student")),
                checkpoint,
                enable_checkpointing=True,
            )
        assert names(tmp_path) == ["checkpoints", "run"]

    def test_a_dry_run_leaves_the_export_of_a_real_one(self, tokenizer, rows, tmp_path):
        export_folder.replace(tmp_path / "student", tiny_model(3), None)
        before = (tmp_path / "student" / "model.safetensors").read_bytes()
        fit(data(tokenizer, rows), tmp_path, HuggingFaceExport(str(tmp_path / "student")), fast_dev_run=True)
        assert (tmp_path / "student" / "model.safetensors").read_bytes() == before

    def test_a_link_stays_one(self, tokenizer, rows, tmp_path):
        (tmp_path / "disk").mkdir()
        (tmp_path / "student").symlink_to(tmp_path / "disk" / "student")
        for _ in range(2):
            fit(data(tokenizer, rows), tmp_path, HuggingFaceExport(str(tmp_path / "student")))
        assert (tmp_path / "student").is_symlink()
        assert names(tmp_path / "disk") == ["student"]

    @pytest.mark.parametrize("killed", ["before", "between"])
    def test_a_kill_between_the_renames_is_put_right_at_the_next_start(self, killed, tmp_path):
        """Killed when the new export has its name, and when the older one has lost it."""
        for name in ("student", "student-older"):
            export_folder.replace(tmp_path / name, tiny_model(), None)
            (tmp_path / name / "config.json").write_text(json.dumps(name))
        (tmp_path / ".student.partial").mkdir()
        if killed == "between":
            (tmp_path / "student").rename(tmp_path / "gone")
        export_folder.clear_away(tmp_path / "student")
        kept = "student" if killed == "before" else "student-older"
        assert json.loads((tmp_path / "student" / "config.json").read_text()) == kept
        assert names(tmp_path) == (["student"] if killed == "before" else ["gone", "student"])


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("averaging", ["swa", "ema"])
def test_averaged_weights_are_what_is_saved(averaging, first, tokenizer, rows, tmp_path):
    average = {
        "swa": lambda: StochasticWeightAveraging(swa_lrs=0.5, swa_epoch_start=1, annealing_epochs=1),
        "ema": lambda: EMAWeightAveraging(decay=0.5),
    }[averaging]()
    last_step = {}

    class Seen(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            last_step["weight"] = pl_module.student.model.norm.weight.detach().clone()

    saves = HuggingFaceExport(str(tmp_path / "student"))
    callbacks = [saves, average] if first else [average, saves]
    model = fit(data(tokenizer, rows), tmp_path, *callbacks, Seen(), max_epochs=4, limit_train_batches=2)
    saved = saved_norm(tmp_path / "student")
    assert torch.equal(saved, model.student.model.norm.weight)
    averaged = average._average_model.module if averaging == "ema" else average._average_model
    assert torch.equal(saved, averaged.student.model.norm.weight)
    assert not torch.equal(saved, last_step["weight"])


def test_averaging_that_a_module_brings_along(tokenizer, rows, tmp_path):
    """Callbacks of a module come after those of the trainer."""
    average = EMAWeightAveraging(decay=0.5)

    class Averages(KDLightningModule):
        def configure_callbacks(self):
            return [*super().configure_callbacks(), average]

    model = Averages(tiny_model(0), tiny_model(1), optimizer=lambda params: SGD(params, lr=0.1))
    saves = HuggingFaceExport(str(tmp_path / "student"))
    fit(data(tokenizer, rows), tmp_path, saves, model=model, max_epochs=2)
    assert torch.equal(saved_norm(tmp_path / "student"), average._average_model.module.student.model.norm.weight)


class TestLora:
    @pytest.fixture
    def student(self, tokenizer, tmp_path):
        pytest.importorskip("peft")
        tiny_model(0).save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        return Pretrained(str(tmp_path / "base"), lora={"r": 2, "target_modules": ["q_proj"]})

    def test_adapters_are_merged(self, student, tokenizer, rows, tmp_path):
        model = KDLightningModule(student, tiny_model(1), optimizer=lambda params: SGD(params, lr=1.0))
        trainer = L.Trainer(max_epochs=1, callbacks=[HuggingFaceExport(str(tmp_path / "out"))], **QUIET)
        options = {"scores": str(tmp_path / "scores"), "batch_size": 4, "decoding": Decoding(max_new_tokens=1)}
        half = SRDDataModule({"train": rows}, tokenizer, schedule={0: 0.5}, **options)
        trainer.fit(model, datamodule=half)  # it has also answered
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert loaded.generation_config.eos_token_id == tiny_model(0).generation_config.eos_token_id == 1
        ids = torch.tensor([[5, 6, 7, 8]])
        torch.testing.assert_close(loaded(ids).logits, model.student.eval()(ids).logits)
        assert not torch.equal(
            loaded.model.layers[0].self_attn.q_proj.weight, tiny_model(0).model.layers[0].self_attn.q_proj.weight
        )

    def test_they_are_merged_in_a_copy_on_the_cpu(self, student, monkeypatch):
        """No weight is copied where it is, which may be a GPU that training has filled."""
        model = student.model()
        before = {name: weight.clone() for name, weight in model.state_dict().items()}

        def refuse(*_):
            raise AssertionError("copied on its device")

        monkeypatch.setattr(torch.nn.Parameter, "__deepcopy__", refuse)
        monkeypatch.setattr(torch.Tensor, "__deepcopy__", refuse)
        merged = export._merged(model)
        assert {weight.device.type for weight in merged.parameters()} == {"cpu"}
        assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_a_loader_of_ones_own(tmp_path):
    """A stranger's module with a student, and no data module."""

    class Own(BoringModel):
        def __init__(self):
            super().__init__()
            self.student = tiny_model()

    trainer = L.Trainer(max_epochs=1, callbacks=[HuggingFaceExport(str(tmp_path / "out"))], **QUIET)
    trainer.fit(Own(), DataLoader(torch.randn(2, 32)))
    assert (tmp_path / "out" / "model.safetensors").is_file()
