import json
from itertools import count

import lightning as L
import pytest
import references
import torch
from conftest import tiny_model
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.optim import SGD
from transformers import AutoModelForCausalLM, AutoTokenizer

from srd_lightning import (
    Curriculum,
    CurriculumCallback,
    Decoding,
    HuggingFaceExport,
    HyperparameterScheduler,
    KDLightningModule,
    RuntimeBenchmark,
    SRDDataModule,
)

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


def test_scheduler_refuses_an_attribute_that_is_not_there(tokenizer, rows, tmp_path):
    scheduler = HyperparameterScheduler({"loss.temprature": {0: 1.0}})
    with pytest.raises(ValueError, match=r"KDLightningModule has no attribute 'loss\.temprature' to schedule"):
        fit([scheduler], data(tokenizer, rows, tmp_path, {0: 1.0}), tmp_path, max_epochs=1)


def test_schedules_begin_at_epoch_0():
    with pytest.raises(ValueError, match=r"kd_weight must begin at epoch 0, but its epochs are \[3\]"):
        HyperparameterScheduler({"kd_weight": {3: 1.0}})


def test_scheduled_values_are_set_when_a_run_is_resumed_within_an_epoch(tokenizer, rows, tmp_path):
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


def test_curriculum_callback_logs_stage_and_rows(tokenizer, rows, tmp_path):
    logged = []

    class Seen(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            metrics = trainer.callback_metrics
            logged.append((float(metrics["curriculum/stage"]), float(metrics["curriculum/rows"])))

    fit([CurriculumCallback(), Seen()], data(tokenizer, rows, tmp_path, {0: 0.5, 2: 0.75}), tmp_path, max_epochs=3)
    assert logged == [(0.0, 8.0), (0.0, 8.0), (1.0, 12.0)]


def test_curriculum_callback_refuses_a_pool_that_does_not_grow(tokenizer, rows, tmp_path):
    """A data module that forgot the changed line."""
    curriculum = Curriculum(torch.arange(16), {0: 0.5})
    all_rows = data(tokenizer, rows, tmp_path, {0: 1.0})
    all_rows.curriculum = None

    class Forgetful(L.LightningDataModule):
        def train_dataloader(self):
            return torch.utils.data.DataLoader(range(16), batch_size=4)

    class Plain(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def training_step(self, batch, batch_idx):
            return self.layer(batch.float()[:, None]).sum()

        def configure_optimizers(self):
            return SGD(self.parameters(), lr=0.0)

    trainer = L.Trainer(max_epochs=1, callbacks=[CurriculumCallback(curriculum)], enable_checkpointing=False, **QUIET)
    with pytest.raises(ValueError, match="epoch 0 should train on 8 rows, but its loader holds 16; build the loader"):
        trainer.fit(Plain(), datamodule=Forgetful())
    assert trainer.reload_dataloaders_every_n_epochs == 1


def test_curriculum_callback_needs_a_curriculum(tmp_path):
    trainer = L.Trainer(max_epochs=1, callbacks=[CurriculumCallback()], enable_checkpointing=False, **QUIET)
    with pytest.raises(ValueError, match="needs a curriculum: give it one, or use SRDDataModule"):
        trainer.fit(module(), train_dataloaders=[0])


@pytest.fixture
def ticks(monkeypatch):
    """A clock that goes on by a second whenever it is looked at."""
    ticks = count()
    monkeypatch.setattr("srd_lightning.runtime.time.perf_counter", lambda: float(next(ticks)))
    return ticks


def test_runtime_benchmark_counts_rows_steps_tokens_and_time(tokenizer, rows, tmp_path, ticks):
    batches = {}

    class Seen(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            lengths = batch["attention_mask"].sum(dim=1).tolist()
            batches.setdefault(trainer.current_epoch // 2, []).append(lengths)

    benchmark = RuntimeBenchmark(str(tmp_path / "runtime.json"))
    datamodule = data(tokenizer, rows, tmp_path, {0: 0.5, 2: 0.75})
    fit([benchmark, Seen()], datamodule, tmp_path, max_epochs=3, num_sanity_val_steps=0)

    report = json.loads((tmp_path / "runtime.json").read_text())
    assert report == benchmark.report
    lengths = [len(ids) for ids in datamodule.rows["train"]["input_ids"]]
    tokens = [sum(lengths[row] for row in datamodule.curriculum.order[:size].tolist()) for size in (8, 12)]
    positions = [sum(len(batch) * max(batch) for batch in batches[stage]) for stage in (0, 1)]
    padding = [pytest.approx(references.share_of_padding(batches[stage])) for stage in (0, 1)]
    # Within an epoch the clock is read at its start, at both ends of each batch and of the validation, at its end.
    seconds = [2 * number + 4 - 1 - 1.0 for number in (2, 3)]
    assert report["stages"] == [
        {"first_epoch": 0, "rows": 8, "steps": 4, "tokens": 2 * tokens[0], "positions": positions[0]}
        | {"padding": padding[0], "seconds": 2 * seconds[0], "waiting_seconds": 2 * 2.0},
        {"first_epoch": 2, "rows": 12, "steps": 3, "tokens": tokens[1], "positions": positions[1]}
        | {"padding": padding[1], "seconds": seconds[1], "waiting_seconds": 3.0},
    ]
    assert report["validation_seconds"] == 3.0
    assert (report["curation"]["rows"], report["curation"]["kept"]) == (16, 12)
    assert report["peak_memory_bytes"] > 10 * 2**20


def test_runtime_benchmark_does_not_take_validation_for_waiting(tokenizer, rows, tmp_path, ticks):
    class Slow(L.Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            for _ in range(1000):
                next(ticks)

    benchmark = RuntimeBenchmark()
    options = {"max_epochs": 1, "num_sanity_val_steps": 0, "val_check_interval": 1}
    fit([benchmark, Slow()], data(tokenizer, rows, tmp_path, {0: 1.0}), tmp_path, **options)
    assert benchmark.report["validation_seconds"] == 4 * 1001.0
    (stage,) = benchmark.report["stages"]
    assert stage["waiting_seconds"] == 1.0 + 3 * 2.0  # both ends of a validation cost a look each
    assert stage["seconds"] < 30.0


def test_runtime_benchmark_of_a_resumed_run_reports_every_stage(tokenizer, rows, tmp_path):
    schedule = {0: 0.5, 1: 0.75}
    trainer, _ = fit([RuntimeBenchmark()], data(tokenizer, rows, tmp_path, schedule), tmp_path, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    benchmark = RuntimeBenchmark()
    again = data(tokenizer, rows, tmp_path, schedule)
    fit([benchmark], again, tmp_path, ckpt_path=tmp_path / "first.ckpt", max_epochs=2)
    assert [stage["steps"] for stage in benchmark.report["stages"]] == [2, 3]


def test_export_is_a_hugging_face_folder(tokenizer, rows, tmp_path):
    export = HuggingFaceExport(str(tmp_path / "student"))
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "stale.txt").write_text("from the last run")
    _, trained = fit([export], data(tokenizer, rows, tmp_path, {0: 1.0}), tmp_path, max_epochs=1)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    for ours, theirs in zip(trained.student.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert ours[0] == theirs[0]
        assert torch.equal(ours[1], theirs[1])
    assert AutoTokenizer.from_pretrained(tmp_path / "student").get_vocab() == tokenizer.get_vocab()
    files = {path.name for path in (tmp_path / "student").iterdir()}
    assert "model.safetensors" in files
    assert "stale.txt" not in files
    assert not list(tmp_path.glob(".*partial*"))


def test_export_merges_lora(tokenizer, rows, tmp_path):
    pytest.importorskip("peft")
    from srd_lightning import Pretrained

    tiny_model(0).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    student = Pretrained(str(tmp_path / "base"), lora={"r": 2, "target_modules": ["q_proj"]})
    model = KDLightningModule(student, tiny_model(1), optimizer=lambda params: SGD(params, lr=1.0))
    trainer = L.Trainer(
        max_epochs=1, callbacks=[HuggingFaceExport(str(tmp_path / "out"))], enable_checkpointing=False, **QUIET
    )
    trainer.fit(model, datamodule=data(tokenizer, rows, tmp_path, {0: 0.5}))  # it has also answered
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.generation_config.eos_token_id == tiny_model(0).generation_config.eos_token_id == 1
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(loaded(ids).logits, model.student.eval()(ids).logits)
    assert not torch.equal(
        loaded.model.layers[0].self_attn.q_proj.weight, tiny_model(0).model.layers[0].self_attn.q_proj.weight
    )


def test_export_needs_a_student():
    trainer = L.Trainer(max_epochs=1, callbacks=[HuggingFaceExport("out")], enable_checkpointing=False, **QUIET)
    with pytest.raises(ValueError, match="saves `student`, which BoringModel does not have"):
        trainer.fit(BoringModel())
