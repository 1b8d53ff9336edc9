"""What cannot be resumed is said before the work that would be lost; what is in a folder of checkpoints stays whole."""

import errno
import os
import shutil
import signal
import sys
import warnings
from pathlib import Path

import filelock
import lightning as L
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from lightning.pytorch.callbacks import BatchSizeFinder, GradientAccumulationScheduler
from tiny import QUIET, make_rows, tiny_model
from transformers import ByT5Tokenizer

from srd_lightning import KDLightningModule, LengthGrouped, ResumeCheckpoint, SRDDataModule
from srd_lightning.checkpoints.files import CHECKSUMS, checksums_of_rank, finish
from srd_lightning.checkpoints.refusals import check_intact, check_same_optimizer
from srd_lightning.checkpoints.run_folder import RunLock
from srd_lightning.curation.curator import Curator
from srd_lightning.data.templates import PromptTemplate
from srd_lightning.data.tokenization import digest_of_rows, digest_of_tokens
from srd_lightning.errors import ResumeError, StorageError
from srd_lightning.training.lr_plan import stage_steps

sys.path.insert(0, str(Path(__file__).parent / "projects"))
import resume as project


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two steps, with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    folder.mkdir()
    project.main(str(folder), max_steps=2, saves={"save_top_k": -1})
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it, to be gone on with."""
    shutil.copytree(finished, tmp_path / "run")
    shutil.copytree(finished.parent / "scores", tmp_path / "scores")
    return tmp_path / "run"


def newest(run):
    return max((run / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)


def flip(path):
    """Change one byte in the middle of the largest weight, and nothing else."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    times = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))


def forbidden(what):
    return lambda *_: pytest.fail(f"{what} though the run is refused")


class TestARefusal:
    @pytest.mark.parametrize(
        ("changed", "said"),
        [
            ({"seed": 1}, "seed was 0 and is 1"),
            ({"batch_size": 4}, "global_batch was 6 and is 4"),
            ({"sampler": LengthGrouped}, "sampler was None and is 'LengthGrouped'"),
        ],
    )
    def test_of_settings_comes_before_rows_are_read(self, run, changed, said, monkeypatch):
        monkeypatch.setattr(SRDDataModule, "read_rows", forbidden("rows were read"))
        with pytest.raises(ResumeError, match=said):
            project.main(str(run), data=changed)

    def test_of_tokens_comes_before_the_student_answers(self, run, monkeypatch):
        monkeypatch.setattr(Curator, "curate", forbidden("the student answered"))
        with pytest.raises(ResumeError, match=r"- other tokens \(of the same rows: use the same `template`"):
            project.main(str(run), data={"template": PromptTemplate("{instruction} {input}", "{instruction}")})

    def test_of_a_damaged_file_names_it(self, run, monkeypatch):
        monkeypatch.setattr(SRDDataModule, "read_rows", forbidden("rows were read"))
        flip(newest(run))
        with pytest.raises(ResumeError, match=rf"^ckpt_path: {newest(run)} is damaged: .*data/\d+ in it"):
            project.main(str(run))

    def test_of_a_file_whose_outline_is_damaged_is_no_crash(self, run):
        damaged = newest(run)
        content = bytearray(damaged.read_bytes())
        place = content.rindex(b"PK\x01\x02")  # the last entry of the list of contents
        content[place : place + 4] = b"XXXX"
        damaged.write_bytes(content)
        with pytest.raises(ResumeError, match=rf"{damaged} is damaged: the list of contents in it"):
            check_intact(damaged)
        assert project.main(str(run), max_steps=3).global_step == 3  # from the older one

    def test_of_the_only_file_that_was_cut_off_names_it(self, run):
        for path in (run / "checkpoints").glob("*.ckpt"):
            path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(ResumeError, match=rf"no checkpoint can be read: .*{newest(run)}.* was cut off"):
            project.main(str(run))

    def test_is_not_made_where_an_older_one_is_whole(self, run):
        cut = newest(run)
        cut.write_bytes(cut.read_bytes()[:1000])
        with pytest.warns(UserWarning, match=rf"{cut} was cut off .*; going on from .*step=1\.ckpt"):
            trainer = project.main(str(run), max_steps=3)
        assert trainer.global_step == 3

    def test_of_another_optimizer_comes_before_rows_are_read(self, run, monkeypatch):
        monkeypatch.setattr(SRDDataModule, "read_rows", forbidden("rows were read"))
        monkeypatch.setattr(project.torch.optim, "AdamW", lambda params, lr: torch.optim.SGD(params, lr, momentum=0.9))
        with pytest.raises(ResumeError, match=r"saved by another optimizer: settings .*betas.*momentum.* of one"):
            project.main(str(run))

    @pytest.mark.parametrize("content", [b"", b'{"instruction": "Hi", "output": "Ho"}\n'], ids=["empty", "jsonl"])
    def test_of_what_is_no_checkpoint(self, tmp_path, content):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(ResumeError, match=rf"{tmp_path}/file \({len(content)} bytes\) is no checkpoint"):
            check_intact(tmp_path / "file")
        with pytest.raises(ResumeError, match=f"there is no checkpoint {tmp_path}/none"):
            check_intact(tmp_path / "none")


def test_each_file_of_a_sharded_checkpoint_is_checked(tmp_path):
    folder = tmp_path / "a.ckpt.partial"
    folder.mkdir()
    for name in ("__0_0.distcp", "__1_0.distcp", ".metadata"):
        (folder / name).write_bytes(name.encode() * 9)
    torch.save({}, folder / "meta.pt")
    finish(folder, tmp_path / "a.ckpt", [checksums_of_rank(folder, rank) for rank in (0, 1)])
    check_intact(tmp_path / "a.ckpt")
    names = ["__0_0.distcp", "__1_0.distcp", ".metadata", "meta.pt"]
    for name in names:
        copy = tmp_path / f"damaged {name}"
        shutil.copytree(tmp_path / "a.ckpt", copy)
        content = bytearray((copy / name).read_bytes())
        content[3] ^= 1
        (copy / name).write_bytes(content)
        if name != "meta.pt":  # of which a byte of the outline of a zip file was changed
            with pytest.raises(ResumeError, match=f"damaged: {name} in it is not what was written"):
                check_intact(copy)
    assert (tmp_path / "a.ckpt" / CHECKSUMS).is_file()


class TestTheOptimizer:
    def groups(self, make, steps=0):
        optimizer = make([torch.nn.Parameter(torch.ones(2))])
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 4)
        for _ in range(steps):
            optimizer.step()
            scheduler.step()
        return optimizer.state_dict()["param_groups"]

    def adamw(self, **options):
        return lambda parameters: torch.optim.AdamW(parameters, **{"lr": 1e-3, **options})

    def test_whose_schedule_has_moved_on_is_the_same(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_same_optimizer(self.groups(self.adamw(), steps=3), self.groups(self.adamw(fused=False)))

    def test_whose_schedule_keeps_notes_in_it_is_the_same(self):
        optimizer = self.adamw()([torch.nn.Parameter(torch.ones(2))])
        torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=9, cycle_momentum=False)
        saved = optimizer.state_dict()["param_groups"]
        saved[0]["initial_lr"] = 1e-3  # the schedule's first is another one
        check_same_optimizer(saved, self.groups(self.adamw()))

    @pytest.mark.parametrize(
        ("changed", "said"),
        [({"lr": 0.5}, "lr 0.001 and not 0.5"), ({"weight_decay": 0.2}, "weight_decay 0.01 and not 0.2")],
    )
    def test_whose_settings_are_changed_keeps_those_that_were_saved(self, changed, said):
        with pytest.warns(UserWarning, match=f"the optimizer goes on as it was saved, with {said}; to change that"):
            check_same_optimizer(self.groups(self.adamw(), steps=2), self.groups(self.adamw(**changed)))


def test_a_learning_rate_that_was_planned_for_other_epochs_is_told(run):
    project.main(str(run), max_steps=2)  # where it is the same, nothing is said: that would be an error here
    said = "the learning rate goes on as it was planned for max_epochs 4, which is 5 now"
    with pytest.warns(UserWarning, match=said):
        project.main(str(run), max_epochs=5, max_steps=3)


def test_digests_see_which_rows_there_are_and_their_tokens():
    assert len({digest_of_rows(pa.array(ids)) for ids in (["a", "b"], ["b", "a"], ["ab"], ["a", "b", "c"])}) == 4
    rows = [{"input_ids": [1, 2, 3], "prompt_length": 1}, {"input_ids": [4], "prompt_length": 0}]
    others = [
        [{**rows[0], "input_ids": [1, 2, 5]}, rows[1]],
        [{**rows[0], "prompt_length": 2}, rows[1]],
        [{**rows[0], "input_ids": [1, 2]}, {**rows[1], "input_ids": [3, 4]}],
    ]
    whole = Dataset.from_list(rows)
    assert len({digest_of_tokens(Dataset.from_list(some)) for some in (rows, *others)}) == 4
    turned = Dataset.from_list(rows[::-1]).select([1, 0])
    assert digest_of_tokens(turned) == digest_of_tokens(whole)


class TestAFolderOfCheckpoints:
    def test_belongs_to_one_run(self, run, monkeypatch):
        monkeypatch.setattr("srd_lightning.checkpoints.run_folder.PATIENCE", 0.01)
        monkeypatch.setattr(SRDDataModule, "read_rows", forbidden("rows were read"))
        before = {path.name: path.read_bytes() for path in (run / "checkpoints").iterdir()}
        lock = filelock.FileLock(run / ".checkpoints.lock")  # as another rank has it
        lock.acquire()
        with pytest.raises(StorageError, match=f"another run saves to {run}/checkpoints; wait until it has ended"):
            project.main(str(run))
        assert {path.name: path.read_bytes() for path in (run / "checkpoints").iterdir()} == before

    def test_is_free_again_when_a_run_has_ended(self, run):
        for steps in (3, 4):
            assert project.main(str(run), max_steps=steps).global_step == steps
        RunLock(run / "checkpoints").check()

    def test_keeps_an_earlier_run_apart_from_one_that_begins_anew(self, run):
        earlier = {path.name: path.read_bytes() for path in (run / "checkpoints").glob("*.ckpt")}
        project.main(str(run), max_steps=1, ckpt_path=None)
        (aside,) = (run / "checkpoints").glob("earlier-*")
        assert {path.name: path.read_bytes() for path in aside.iterdir()} == earlier
        assert [path.name for path in (run / "checkpoints").glob("*.ckpt")] == ["epoch=0-step=1.ckpt"]

    def test_is_left_alone_by_a_run_that_only_tries(self, run):
        before = sorted(path.name for path in (run / "checkpoints").iterdir())
        with pytest.warns(UserWarning, match="loss.temperature"):  # of whose epochs it reaches the first only
            project.main(str(run), ckpt_path=None, fast_dev_run=True)
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == before

    def test_is_named_where_its_disk_is_full(self, run, monkeypatch):
        def full(*_, **__):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(L.Trainer, "save_checkpoint", full)
        with pytest.raises(StorageError, match=r"step=3\.ckpt could not be written \(No space left.*; make room"):
            project.main(str(run), max_steps=3)


class Terminate(L.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        os.kill(os.getpid(), signal.SIGTERM)


def small(callbacks, **options):
    module = KDLightningModule(tiny_model(0), tiny_model(1))
    data = SRDDataModule(make_rows(16), ByT5Tokenizer(), schedule={0: 1.0}, batch_size=2)
    checkpoints = any(isinstance(callback, ResumeCheckpoint) for callback in callbacks)
    settings = {**QUIET, "enable_checkpointing": checkpoints, **options}
    return module, data, L.Trainer(callbacks=callbacks, **settings)


def test_sigterm_ends_with_143_also_where_nothing_is_saved(tmp_path):
    module, data, trainer = small([Terminate()], max_epochs=1, default_root_dir=tmp_path)
    with pytest.raises(SystemExit) as end:
        trainer.fit(module, datamodule=data)
    assert end.value.code == 143


def test_a_batch_size_can_be_searched_for(tmp_path):
    finder = BatchSizeFinder(mode="power", steps_per_trial=1, init_val=2, max_trials=2)
    module, data, trainer = small([finder], max_steps=1, default_root_dir=tmp_path)
    trainer.fit(module, datamodule=data)
    assert finder.optimal_batch_size == data.batch_size > 2
    assert trainer.global_step == 1


def test_steps_are_planned_with_scheduled_accumulation(tmp_path):
    """8 batches an epoch: 8 steps, then 4, then 2."""
    module, data, trainer = small(
        [GradientAccumulationScheduler({0: 1, 1: 2, 2: 4})], max_epochs=3, default_root_dir=tmp_path
    )
    module.lr_scheduler = lambda optimizer, steps: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    trainer.fit(module, datamodule=data)
    assert sum(stage_steps(trainer)) == trainer.global_step == 8 + 4 + 2


def test_a_resume_with_other_accumulation_is_refused(tmp_path):
    for batches in (1, 2):
        module, data, trainer = small(
            [ResumeCheckpoint()], max_epochs=batches, accumulate_grad_batches=batches, default_root_dir=tmp_path
        )
        if batches == 1:
            trainer.fit(module, datamodule=data, ckpt_path="last")
        else:
            with pytest.raises(ResumeError, match=r"accumulate_grad_batches was \{0: 1\} and is \{0: 2\} \(set"):
                trainer.fit(module, datamodule=data, ckpt_path="last")
