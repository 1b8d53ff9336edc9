import copy
import math

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder
from lightning.pytorch.tuner import Tuner
from tiny import QUIET, make_rows, tiny_model
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR

from srd_lightning import (
    Decoding,
    HyperparameterScheduler,
    JensenShannon,
    KDLightningModule,
    Pretrained,
    SRDDataModule,
)
from srd_lightning.errors import SettingError
from srd_lightning.evaluation.text_metrics import rouge_l
from srd_lightning.models.generation import generate
from srd_lightning.training.step import DistillationStep


def sgd(params):
    return SGD(params, lr=0.1)


def everything(tokenizer, rows, **options):
    return SRDDataModule(
        {"train": rows, "validation": rows[:5], "test": rows[:5]}, tokenizer, schedule={0: 1.0}, batch_size=4, **options
    )


class Batches(L.Callback):
    """Keeps every batch, for a plain loop to train on."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(batch)


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_weight_zero_is_plain_fine_tuning_bit_for_bit(student, teacher, tokenizer, rows):
    plain, batches = copy.deepcopy(student), Batches()
    module = KDLightningModule(student, teacher, kd_weight=0.0, optimizer=sgd, chunk=None)
    L.Trainer(max_epochs=2, callbacks=[batches], **QUIET).fit(module, datamodule=everything(tokenizer, rows))

    optimizer = SGD(plain.train().parameters(), lr=0.1)
    for batch in batches.seen:
        optimizer.zero_grad()
        plain(**batch).loss.backward()
        optimizer.step()
    assert len(batches.seen) == 8
    assert same(student, plain)


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_all_rows_from_the_start_is_ordinary_distillation(weight, student, teacher, tokenizer, rows, monkeypatch):
    monkeypatch.setattr("srd_lightning.curation.reflection.Reflector.scores", None)
    plain, batches = copy.deepcopy(student), Batches()
    module = KDLightningModule(student, teacher, kd_weight=weight, optimizer=sgd)
    data = everything(tokenizer, rows)
    L.Trainer(max_epochs=2, callbacks=[batches], **QUIET).fit(module, datamodule=data)

    optimizer = SGD(plain.train().parameters(), lr=0.1)
    for batch in batches.seen:
        optimizer.zero_grad()
        output = plain(**batch)
        with torch.no_grad():
            target = teacher(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        mask = batch["labels"][:, 1:] != -100
        p, q = (logits[:, :-1][mask].log_softmax(-1) for logits in (target, output.logits))
        kl = F.kl_div(q, p, log_target=True, reduction="sum") / mask.sum()
        ((1 - weight) * output.loss + weight * kl).backward()
        optimizer.step()
    seen = sorted(tuple(row[row != 0].tolist()) for batch in batches.seen[:4] for row in batch["input_ids"])
    assert seen == sorted(tuple(ids) for ids in data.rows["train"]["input_ids"])
    for ours, theirs in zip(student.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_teacher_is_frozen_in_eval_and_in_no_checkpoint(student, teacher, tokenizer, rows, tmp_path):
    before = copy.deepcopy(teacher)
    module = KDLightningModule(student, teacher, optimizer=sgd)
    trainer = L.Trainer(max_epochs=1, **QUIET)
    trainer.fit(module, datamodule=everything(tokenizer, rows))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    assert same(teacher, before)
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    checkpoint = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert {name.split(".")[0] for name in checkpoint["state_dict"]} == {"student"}

    resumed = KDLightningModule(tiny_model(seed=5), teacher, optimizer=sgd)
    trainer = L.Trainer(max_epochs=1, **QUIET)
    trainer.fit(resumed, datamodule=everything(tokenizer, rows), ckpt_path=tmp_path / "run.ckpt")
    assert same(resumed.student, student)


def test_pretrained_models_are_loaded_when_needed_and_the_student_trains(tokenizer, rows, tmp_path):
    for name, seed in (("student", 0), ("teacher", 1)):
        tiny_model(seed, attention_dropout=0.1).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    module = KDLightningModule(Pretrained(str(tmp_path / "student")), Pretrained(str(tmp_path / "teacher")))
    assert module.student is None
    module.configure_model()
    student, teacher = module.student, module.teacher
    module.configure_model()
    assert (module.student, module.teacher) == (student, teacher)
    assert all(part.training for part in student.modules())
    assert not any(part.training for part in teacher.modules())
    assert module.tokenizer.get_vocab() == tokenizer.get_vocab()


def test_the_student_trains_after_it_has_answered(student, teacher, tokenizer, rows, tmp_path):
    """Reflection and evaluation put it in eval mode, and must put it back."""
    modes = []

    class Modes(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            modes.append(all(part.training for part in pl_module.student.modules()))

    data = SRDDataModule(
        rows, tokenizer, schedule={0: 0.5}, scores=str(tmp_path), decoding=Decoding(max_new_tokens=2), batch_size=4
    )
    student.eval()
    trainer = L.Trainer(max_epochs=1, callbacks=[Modes()], **QUIET)
    trainer.fit(KDLightningModule(student, teacher, optimizer=sgd), datamodule=data)
    assert modes == [True, True]


def test_distillation_brings_the_student_to_the_teacher(student, teacher, tokenizer):
    options = {"optimizer": lambda params: torch.optim.AdamW(params, lr=3e-3), "decoding": Decoding(max_new_tokens=1)}
    module = KDLightningModule(student, teacher, **options)
    trainer = L.Trainer(max_epochs=60, **QUIET)
    data = everything(tokenizer, make_rows(8))
    before = trainer.test(module, datamodule=data, verbose=False)[0]["test_kl"]
    trainer.fit(module, datamodule=data)
    after = trainer.test(module, datamodule=data, verbose=False)[0]["test_kl"]
    assert after < before / 10


def test_evaluation_weighs_every_token_and_every_answer_alike(student, teacher, tokenizer, rows):
    decoding = Decoding(max_new_tokens=6)
    module = KDLightningModule(student, teacher, tokenizer=tokenizer, decoding=decoding)
    data = everything(tokenizer, rows, eval_batch_size=3)
    (metrics,) = L.Trainer(**QUIET).test(module, datamodule=data, verbose=False)

    nll, kl, tokens, scores = 0.0, 0.0, 0, []
    for row in data.rows["test"]:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            q, p = (model(ids).logits[0].double().log_softmax(-1) for model in (student.eval(), teacher))
        for position in range(row["prompt_length"] - 1, len(row["input_ids"]) - 1):
            nll -= q[position, row["input_ids"][position + 1]].item()
            kl += (p[position].exp() * (p[position] - q[position])).sum().item()
            tokens += 1
        (answer,) = generate(student, tokenizer, [row["input_ids"][: row["prompt_length"]]], decoding)
        scores.append(rouge_l(row["response"], answer))
    expected = {"test_nll": nll / tokens, "test_kl": kl / tokens, "test_rouge_l": sum(scores) / len(scores)}
    assert metrics == pytest.approx(expected, rel=1e-4)


def test_predict_returns_prompt_truth_and_answer(student, tokenizer, rows):
    module = KDLightningModule(student, kd_weight=0.0, decoding=Decoding(max_new_tokens=3))
    data = everything(tokenizer, rows)
    answers = [row for batch in L.Trainer(**QUIET).predict(module, datamodule=data) for row in batch]
    assert [row["prompt"] for row in answers] == list(data.rows["test"]["prompt"])
    assert [row["response"] for row in answers] == [row["output"] for row in rows[:5]]
    assert all(isinstance(row["answer"], str) for row in answers)


def learning_rates(module, data, tmp_path, **trainer_options):
    rates = []

    class Rates(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    L.Trainer(callbacks=[Rates()], **QUIET, **trainer_options).fit(module, datamodule=data)
    return rates


def cosine(steps):
    return [0.1 * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps)]


@pytest.mark.parametrize(
    ("restart", "options", "expected"),
    [
        (False, {"max_epochs": 4}, cosine(2 + 2 + 3 + 3)),
        (True, {"max_epochs": 4}, cosine(2 + 2) + cosine(3 + 3)),
        (False, {"max_epochs": 4, "max_steps": 7}, cosine(7)),
        (True, {"max_epochs": 4, "max_steps": 7}, cosine(4) + cosine(3)),
        (False, {"max_epochs": -1, "max_steps": 9}, cosine(9)),
        (False, {"max_epochs": 4, "limit_train_batches": 1}, cosine(4)),
        (False, {"max_epochs": 4, "accumulate_grad_batches": 2}, cosine(1 + 1 + 2 + 2)),
        (True, {"max_epochs": 2}, cosine(4)),
    ],
    ids=["whole", "restart", "max_steps", "max_steps_restart", "only_steps", "limited", "accumulated", "one_stage"],
)
def test_learning_rate_is_planned_over_the_growing_curriculum(
    restart, options, expected, student, teacher, tokenizer, rows, tmp_path
):
    module = KDLightningModule(
        student, teacher, optimizer=sgd, lr_scheduler=CosineAnnealingLR, restart_lr_each_stage=restart
    )
    data = SRDDataModule(
        rows,
        tokenizer,
        schedule={0: 0.5, 2: 0.75},
        scores=str(tmp_path),
        decoding=Decoding(max_new_tokens=1),
        batch_size=4,
    )
    assert learning_rates(module, data, tmp_path, **options) == pytest.approx(expected, abs=1e-9)


def test_temperature_and_weight_of_the_epoch_are_used(student, teacher, tokenizer, rows):
    used = []

    class Used(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            used.append((pl_module.loss.temperature, pl_module.kd_weight))

    staged = HyperparameterScheduler({"loss.temperature": {0: 1.0, 1: 1.5}, "kd_weight": {0: 0.0, 2: 1.0}})
    module = KDLightningModule(student, teacher, loss=JensenShannon(), optimizer=sgd)
    trainer = L.Trainer(max_epochs=3, limit_train_batches=1, callbacks=[Used(), staged], **QUIET)
    trainer.fit(module, datamodule=everything(tokenizer, rows))
    assert used == [(1.0, 0.0), (1.5, 0.0), (1.5, 1.0)]


def test_a_run_without_end_cannot_plan(student, teacher, tokenizer, rows):
    module = KDLightningModule(student, teacher, lr_scheduler=CosineAnnealingLR)
    with pytest.raises(ValueError, match="set the trainer's max_epochs or max_steps"):
        L.Trainer(max_epochs=-1, **QUIET).fit(module, datamodule=everything(tokenizer, rows))


def test_a_module_trains_after_it_was_measured(student, teacher, tokenizer, rows):
    module, data = KDLightningModule(student, teacher, optimizer=sgd), everything(tokenizer, rows)
    trainer = L.Trainer(max_epochs=1, **QUIET)
    before = trainer.validate(module, datamodule=data, verbose=False)[0]["val_kl"]
    trainer.fit(module, datamodule=data)
    assert trainer.validate(module, datamodule=data, verbose=False)[0]["val_kl"] < before


def test_what_a_module_brings_along_cannot_get_lost(student, teacher, tokenizer, rows):
    class Own(KDLightningModule):
        def configure_callbacks(self):
            return []

    with pytest.raises(RuntimeError, match=r"Own\.configure_callbacks leaves out .*super\(\)\.configure_callbacks"):
        L.Trainer(max_epochs=1, **QUIET).fit(Own(student, teacher), datamodule=everything(tokenizer, rows))


def test_another_teacher_is_another_module(student, teacher):
    module = KDLightningModule(student, teacher)
    with pytest.raises(SettingError, match="the teacher of a KDLightningModule cannot be set later"):
        module.teacher = tiny_model()
    assert module.teacher is teacher
    assert set(dict(module.named_children())) == {"student", "loss", "auxiliary", "metrics"}


def test_models_are_looked_at_once_in_a_run(student, teacher, tokenizer, rows, tmp_path, monkeypatch):
    made = []

    class Counted(DistillationStep):
        def attach(self, *arguments):
            made.append(self)
            return super().attach(*arguments)

    monkeypatch.setattr("srd_lightning.module.DistillationStep", Counted)
    module = KDLightningModule(student, teacher, teacher_cache="hidden", optimizer=sgd)
    data = everything(tokenizer, rows)
    L.Trainer(max_epochs=3, default_root_dir=tmp_path, **QUIET).fit(module, datamodule=data)
    assert len(made) == 1


@pytest.mark.parametrize("options", [{"overfit_batches": 2}, {"callbacks": [BatchSizeFinder("power", max_trials=2)]}])
def test_what_lightning_does_to_loaders(options, student, teacher, tokenizer, rows, tmp_path):
    module, data = KDLightningModule(student, teacher, optimizer=sgd), everything(tokenizer, rows)
    options = {**QUIET, "enable_checkpointing": True, **options}
    trainer = L.Trainer(max_epochs=2, default_root_dir=tmp_path, **options)
    trainer.fit(module, datamodule=data)
    assert trainer.global_step > 0
    assert torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)["epoch"] == 1


@pytest.mark.parametrize("way", ["callback", "tuner"])
def test_another_batch_size_that_lightning_finds(way, student, teacher, tokenizer, rows, tmp_path):
    """What it goes back to was saved with the batch size before: no run that is resumed."""
    data = everything(tokenizer, rows)
    data.batch_size = 2
    finder = [BatchSizeFinder("power", init_val=2, max_trials=2, steps_per_trial=1)] if way == "callback" else []
    trainer = L.Trainer(max_epochs=1, default_root_dir=tmp_path, callbacks=finder, **QUIET)
    module = KDLightningModule(student, teacher, optimizer=sgd)
    if way == "tuner":
        Tuner(trainer).scale_batch_size(module, datamodule=data, init_val=2, max_trials=2, steps_per_trial=1)
    trainer.fit(module, datamodule=data)
    assert (data.batch_size, trainer.global_step) == (4, 4)


def test_the_trainer_builds_its_loaders_afterwards_as_before(student, teacher, tokenizer, rows, tmp_path):
    trainer = L.Trainer(max_epochs=1, default_root_dir=tmp_path, reload_dataloaders_every_n_epochs=4, **QUIET)
    trainer.fit(KDLightningModule(student, teacher, optimizer=sgd), datamodule=everything(tokenizer, rows))
    assert trainer.reload_dataloaders_every_n_epochs == 4
