"""A stranger's project with `transformers.Trainer`: a student distilled in stages, also after an interruption.

``hf_trainer.py FOLDER [STEPS]``: ends after some steps, or goes on from where it ended and writes what was seen.
"""

import json
import os
import sys
from pathlib import Path

import torch
from distil import tiny
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from srd_lightning import (
    Curriculum,
    CurriculumSampler,
    CurriculumTrainerCallback,
    ForwardKL,
    WholeRunSampler,
    reciprocal_rank_fusion,
)

SCHEDULE, EPOCHS = {0: 0.25, 1: 0.5, 3: 0.75}, 4
STAGED = {"temperature": {0: 1.0, 1: 1.5, 3: 2.0}}


class Rows(torch.utils.data.Dataset):
    """Row n is hard as n is large."""

    def __len__(self):
        return 16

    def __getitem__(self, row):
        ids = torch.tensor([70, 71, 72, row + 3, 1])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


class Distiller(Trainer):
    """What is needed in the stranger's own subclass: the sampler, and the loss."""

    def __init__(self, *arguments, teacher, loss, rows, **options):
        super().__init__(*arguments, **options)
        self.teacher, self.loss, self.rows, self.model_accepts_loss_kwargs = teacher, loss, rows, False

    def _get_train_sampler(self, train_dataset=None):
        return self.rows

    def compute_loss(self, model, inputs, return_outputs=False, **others):
        outputs = model(**inputs)
        with torch.no_grad():
            logits = self.teacher(**inputs).logits
        loss = self.loss(outputs.logits, logits, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


class Seen(TrainerCallback):
    """Keeps the rows of each step, with the temperature and the learning rate that they are trained with."""

    def __init__(self, loss, run):
        self.loss, self.run, self.steps = loss, run, []

    def keep(self, module, arguments, options):
        if module.training:
            self.batches.append((options["input_ids"][:, 3] - 3).tolist())

    def on_train_begin(self, args, state, control, model=None, **_):
        self.batches = []
        model.register_forward_pre_hook(self.keep, with_kwargs=True)

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **_):
        rows = [row for batch in self.batches for row in batch]
        epoch = self.run.epoch_of(state.global_step)
        self.steps.append([epoch, rows, self.loss.temperature, optimizer.param_groups[0]["lr"]])
        self.batches = []


def main(folder, stop=None, **options):
    set_seed(0)
    curriculum = Curriculum(reciprocal_rank_fusion(-torch.arange(16.0)), SCHEDULE)
    run = WholeRunSampler(CurriculumSampler(curriculum), EPOCHS, 4 * int(os.environ.get("WORLD_SIZE", 1)))
    loss = ForwardKL()
    seen = Seen(loss, run)
    settings = {
        "output_dir": folder,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.1,
        "lr_scheduler_type": "linear",
        "optim": "sgd",
        "save_steps": 3,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        **options,
    }
    trainer = Distiller(
        tiny(0),
        TrainingArguments(**settings),
        train_dataset=Rows(),
        teacher=tiny(1).eval(),
        loss=loss,
        rows=run,
        callbacks=[CurriculumTrainerCallback(run, loss, STAGED), seen],
    )
    if stop is not None:
        trainer.add_callback(Stop(stop))
    trainer.train(resume_from_checkpoint=any(Path(folder).glob("checkpoint-*")))
    return trainer, seen


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == self.step


if __name__ == "__main__":
    folder, *stop = sys.argv[1:]
    trainer, seen = main(folder, *map(int, stop))
    record = {
        "seen": seen.steps,
        "steps": trainer.state.global_step,
        "logged": [line["curriculum_epoch"] for line in trainer.state.log_history if "loss" in line],
        "weights": sum(float(weight.double().abs().sum()) for weight in trainer.model.parameters()),
    }
    Path(folder, f"rank{trainer.args.process_index}.json").write_text(json.dumps(record))
