"""What can be known is said before rows are read and models loaded; an order is that of the student that is trained."""

import shutil
from collections import namedtuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lightning import Trainer
from tiny import PLAIN, QUIET, make_rows, tiny_model
from transformers import ByT5Tokenizer

from srd_lightning import Decoding, KDLightningModule, Pretrained, SRDDataModule
from srd_lightning.criteria import Column, NegativeLogLikelihood
from srd_lightning.curation.student_source import ReflectingStudent
from srd_lightning.errors import DataError, MissingDataError, ModelError, SettingError, StorageError

ROWS = [{"id": str(number), **row} for number, row in enumerate(make_rows(8))]


@pytest.fixture(autouse=True)
def _apart(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_rows_are_read(monkeypatch):
    monkeypatch.setattr("srd_lightning.data.row_reader.load_splits", None)


@pytest.fixture
def make(tokenizer):
    def make(data=ROWS, **options):
        options = {"schedule": {0: 0.5}, "decoding": Decoding(max_new_tokens=2), "student": tiny_model(), **options}
        return SRDDataModule(data, tokenizer, template=PLAIN, **options)

    return make


JUDGE = Column("judge", higher_is_easier=True)


@pytest.mark.usefixtures("no_rows_are_read")
class TestBeforeRowsAreRead:
    @pytest.mark.parametrize(
        ("positions", "message"),
        [
            (100, "^max_length lets a row have 128 tokens, but the student has 100 positions; set it to at most 100$"),
            (
                128,
                "^max_prompt_length with decoding.max_new_tokens lets a row have 130 tokens, but the student has 128",
            ),
        ],
        ids=["rows", "answers"],
    )
    def test_positions_of_the_student(self, make, positions, message):
        student = tiny_model(max_position_embeddings=positions)
        data = make(student=student, max_length=128, max_prompt_length=100, decoding=Decoding(max_new_tokens=30))
        with pytest.raises(SettingError, match=message):
            data.setup("fit")

    def test_positions_of_a_teacher_that_is_not_loaded(self, make, tmp_path):
        tiny_model(max_position_embeddings=500).save_pretrained(tmp_path / "teacher")
        (tmp_path / "teacher/model.safetensors").unlink()
        data = make(student=None)
        module = KDLightningModule(tiny_model(), Pretrained(str(tmp_path / "teacher")))
        with pytest.raises(
            SettingError, match=r"^max_length lets a row have 512 tokens, but the teacher has 500 positions"
        ):
            data.set_up_for(module, None, "test")

    def test_splits(self, make):
        with pytest.raises(DataError, match=r"^training needs the split 'train', but `data` has test$"):
            make({"test": ROWS}).setup("fit")

    @pytest.mark.parametrize(
        ("scores", "criteria", "error", "message"),
        [
            ("gone.parquet", [JUDGE], MissingDataError, "^`scores` names the file gone.parquet, which is not there"),
            ("notes", [JUDGE], DataError, "^`scores` names the file notes, but files of scores are .jsonl, "),
            ("some.parquet", [JUDGE], DataError, "has no column 'judge' for Column, only id, nll; add it"),
            (None, [JUDGE], SettingError, "^the column 'judge' is read from a file, but `scores` names none$"),
            ("notes/scores", None, StorageError, "scores needs the folder notes/scores, but .*notes is a file"),
        ],
        ids=["missing", "text", "column", "none", "below_a_file"],
    )
    def test_scores(self, make, tmp_path, scores, criteria, error, message):
        (tmp_path / "notes").write_text("")
        pq.write_table(pa.table({"id": ["0"], "nll": [0.5]}), tmp_path / "some.parquet")
        with pytest.raises(error, match=message):
            make(scores=scores, criteria=criteria).setup("fit")

    def test_a_folder_of_scores_that_cannot_be_written(self, make, monkeypatch):
        def refuse(**_):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("tempfile.TemporaryFile", refuse)
        with pytest.raises(StorageError, match=r"^scores needs the folder scores, .* \(Permission denied\)"):
            make(scores="scores").setup("fit")

    def test_a_folder_is_not_made_by_looking(self, make, tmp_path):
        with pytest.raises(TypeError):  # where rows are read
            make(scores="scores").setup("fit")
        assert not (tmp_path / "scores").exists()


def test_a_full_disk_is_said_before_the_student_is_loaded(make, monkeypatch):
    usage = namedtuple("Usage", "total used free")(10**9, 10**9, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(ReflectingStudent, "untrained", None)
    with pytest.raises(StorageError, match=r"^scores will write .* GB to scores, but only 1e-06 GB are free there"):
        make(scores="scores").setup("fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ties": "random"}, "^ties must be 'average' or 'order', but is 'random'$"),
        ({"schedule": {0: 0.5, 1.5: 1.0}}, "whole numbers, but one is 1.5$"),
        ({"num_workers": -1}, "^num_workers must be 0 or more, but is -1$"),
        ({"eval_batch_size": -1}, "^sizes must be at least 1, but eval_batch_size=-1$"),
    ],
)
def test_settings_are_checked_when_they_are_given(make, options, message):
    with pytest.raises(SettingError, match=message):
        make(**options)


def test_a_stage_that_never_begins_is_said(make, tmp_path):
    data = make(schedule={0: 0.5, 1: 0.75, 3: 1.0})
    with pytest.warns(
        UserWarning, match="schedule has a stage from epoch 3 on, but the run ends with trainer.max_epochs 3"
    ):
        data.set_up_for(None, Trainer(max_epochs=3, default_root_dir=tmp_path, **QUIET))


def test_decontamination_that_leaves_nothing_is_said(make):
    with pytest.raises(
        DataError, match=r"^decontaminate leaves no row: each of the 8 prompts of train stands in another"
    ):
        make({"train": ROWS, "test": ROWS}, decontaminate=True, schedule={0: 1.0}).setup("fit")


def test_a_student_that_gives_nan_is_to_blame(make):
    student = tiny_model()
    torch.nn.init.constant_(student.lm_head.weight, float("nan"))
    with pytest.raises(
        ModelError, match=r"^nll is NaN for all 8 rows, so it is not the rows but the student that gives NaN"
    ):
        make(student=student, criteria=[NegativeLogLikelihood()]).setup("fit")


def test_another_module_is_another_student(make, tmp_path):
    data = make(student=None, criteria=[NegativeLogLikelihood()])
    orders = []
    for seed in (0, 1, 1):
        module = KDLightningModule(tiny_model(seed, initializer_range=0.3), kd_weight=0.0)
        Trainer(default_root_dir=tmp_path, max_epochs=1, **QUIET).fit(module, data)
        orders.append(data.curation.columns["nll"])
    alone = make(student=tiny_model(1, initializer_range=0.3), criteria=[NegativeLogLikelihood()])
    alone.setup("fit")
    assert not np.array_equal(orders[0], orders[1])
    np.testing.assert_array_equal(orders[1], alone.curation.columns["nll"])
    np.testing.assert_array_equal(orders[1], orders[2])


def test_another_root_is_another_run(make, tmp_path):
    data, module = make(student=None, criteria=[NegativeLogLikelihood()]), KDLightningModule(tiny_model(), kd_weight=0)
    for name in ("first", "second"):
        Trainer(default_root_dir=tmp_path / name, max_epochs=1, **QUIET).fit(module, data)
        assert data.curation.scores.folder.parent == tmp_path / name / "scores"
        assert data.curation.scored == 8


def test_another_module_has_its_own_tokenizer(make, tmp_path):
    data = SRDDataModule(ROWS, template=PLAIN, schedule={0: 1.0})
    for tokenizer in (ByT5Tokenizer(), ByT5Tokenizer(extra_ids=10)):
        module = KDLightningModule(tiny_model(), kd_weight=0, tokenizer=tokenizer)
        Trainer(default_root_dir=tmp_path, max_epochs=1, **QUIET).fit(module, data)
        assert data.tokenizer is tokenizer


def test_a_cache_of_the_teacher_is_that_of_its_run(make, tmp_path):
    """A module of the user's own takes batches as they are."""
    data = make(schedule={0: 1.0})
    module = KDLightningModule(tiny_model(), tiny_model(1), teacher_cache="hidden")
    Trainer(default_root_dir=tmp_path, max_epochs=1, **QUIET).fit(module, data)
    assert set(next(iter(data.train_dataloader()))) == {"input_ids", "attention_mask", "labels"}


def test_the_same_module_keeps_its_order(make, tmp_path):
    data = make(student=None)
    module = KDLightningModule(tiny_model(), kd_weight=0.0)
    Trainer(default_root_dir=tmp_path, max_epochs=1, **QUIET).fit(module, data)
    first = data.curation
    Trainer(default_root_dir=tmp_path, max_epochs=1, **QUIET).fit(module, data)
    assert data.curation is first


def test_after_training_a_run_may_bring_its_own_loader_but_not_none(make, tmp_path):
    data, module = make(student=None, schedule={0: 1.0}), KDLightningModule(tiny_model(), kd_weight=0.0)
    trainer = Trainer(default_root_dir=tmp_path, max_epochs=1, **QUIET)
    trainer.fit(module, datamodule=data)
    assert trainer.validate(module, data.train_dataloader(), verbose=False)[0]["val_nll"] > 0
    with pytest.raises(DataError, match=r"^testing needs the split 'test', but `data` has train$"):
        trainer.test(module, datamodule=data)
