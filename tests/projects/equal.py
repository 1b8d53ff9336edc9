"""The same training under any strategy: ``equal.py FOLDER DEVICES STRATEGY [JSON]``.

Each rank writes its losses and last measures (``rank0.json``, …), the first one exports the student (``student``).
"""

import functools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import distil
import drive
import lightning as L
import torch
from fsdp1_on_cpu import FSDP1OnCPU
from lightning.pytorch.loops import utilities
from lightning.pytorch.strategies import FSDPStrategy
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor
from transformers import ByT5Tokenizer, T5Config, T5ForConditionalGeneration

from srd_lightning import (
    GKD,
    TAID,
    AnswerScores,
    CacheSettings,
    Decoding,
    DistiLLM,
    ForwardKL,
    HiddenStateMSE,
    HuggingFaceExport,
    HyperparameterScheduler,
    KDLightningModule,
    MiniLLM,
    ReflectionReplay,
    ReverseKL,
    SRDDataModule,
    TAIDSchedule,
    TokenTemperature,
)
from srd_lightning.distributed.fsdp2 import FSDP2, is_sharded
from srd_lightning.evaluation.answer_scores import CorpusChrF

utilities.dist = SimpleNamespace(get_backend=lambda: "nccl")
"""Lightning evaluates over gloo in another mode than over NCCL: let it take the harder one, as on GPUs."""
GLOBAL_BATCH = 4
STAGED = {"kd_weight": {0: 0.5, 2: 0.9}, "loss.temperature": {0: 1.0, 1: 2.0}}


GREEDY = Decoding(max_new_tokens=4)
"""What is sampled depends on the rank; what is likeliest does not."""


class GreedyMiniLLM(MiniLLM):
    """Takes the likeliest token of the mixture."""

    def __init__(self):
        super().__init__(0.5)
        self.decoding = GREEDY


class DrawingDistiLLM(DistiLLM):
    """Has a full buffer soon, and keeps what was in it when texts were asked for, and what came."""

    def __init__(self):
        super().__init__(0.9, rise=0.0, capacity=4, decoding=GREEDY)
        self.asked = []

    def texts(self, rows, models):
        before = list(self.kept)
        self.asked.append((before, super().texts(rows, models), list(self.kept) == before))
        return self.asked[-1][1]


ROLLOUTS = {
    "gkd": lambda: GKD(0.5, GREEDY),
    "minillm": GreedyMiniLLM,
    "distillm": lambda: DistiLLM(0.2, rise=0.3, tolerance=-100.0, decoding=GREEDY),  # its buffer is never full
    "distillm that draws": DrawingDistiLLM,
    "replay": lambda: ReflectionReplay(0.5),
}


class OwnText(L.Callback):
    """Keeps which batches are the student's own, and the share of these at the end of each epoch."""

    def __init__(self):
        self.own = []
        self.shares = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.own.append(pl_module.rollouts_handle.objective(ForwardKL(), 0.25)[1] == 1.0)

    def on_train_epoch_end(self, trainer, pl_module):
        self.shares.append(pl_module.rollouts_handle.rollouts.measures().get("rollouts/share"))


class Losses(L.Callback):
    """Keeps the loss of every step, which is the same on all ranks."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step > len(self.losses):
            self.losses.append(float(trainer.callback_metrics["train_loss"]))


class Mute(L.Callback):
    """Leaves most rows without a response token, so that some batches of a process have none at all."""

    def __init__(self, wanted):
        self.wanted = wanted
        self.silent_batches = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        for row, prompt in enumerate(pl_module.tokenizer.batch_decode(batch["input_ids"])):
            if self.wanted and int(prompt.split("Say ")[1].split(".")[0]) % 4:
                batch["labels"][row] = -100
        self.silent_batches += int((batch["labels"] == -100).all())


class Distillation(KDLightningModule):
    """Begins with other weights on each rank but the first, whose weights all are to take."""

    def configure_model(self):
        if self.global_rank and not is_sharded(self.student):
            for weight in self.student.parameters():
                weight.data += 1
        super().configure_model()


class Learnt(ForwardKL):
    """A loss with a weight of its own, which is trained."""

    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(2))

    def divergence(self, teacher_logp, student_logp):
        return super().divergence(teacher_logp, student_logp) * self.gain.square().mean()


def rows():
    return [
        {"id": n, "instruction": f"Say {n}.", "output": "ab" * (1 + 7 * (n % 3 == 0) + n % 5) + str(n)}
        for n in range(40)
    ]


def encoder_decoder(seed):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 384, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, dropout_rate=0.0))


def numbers(trainer):
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def main(folder, devices=1, strategy="auto", settings="{}", accelerator="cpu"):
    settings, callbacks = json.loads(settings), []
    trainer_options, data_options = settings.pop("trainer", {}), settings.pop("data", {})
    mute, fits_only = Mute(settings.pop("muted", False)), settings.pop("fits_only", False)
    tied, lora, two = (settings.pop(name, False) for name in ("tied", "lora", "encoder_decoder"))
    tiny = encoder_decoder if two else functools.partial(distil.tiny, tie_word_embeddings=tied)
    if isinstance(cache := settings.get("teacher_cache"), dict):
        settings["teacher_cache"] = CacheSettings(**cache)
    if method := settings.pop("own_text", None):
        settings["rollouts"] = ROLLOUTS[method]()
        callbacks = [own_text := OwnText()]
    L.seed_everything(0)
    losses = Losses()
    student = tiny(0)
    width = student.config.hidden_size
    if settings.pop("learnt_loss", False):
        settings["loss"] = Learnt()
    auxiliary = [HiddenStateMSE(width, width, weight=0.1)] if settings.pop("auxiliary", False) else []
    if settings.pop("warmed", False):  # what a row decides for itself, and what all ranks decide together
        settings["loss"] = TokenTemperature(TAID(ReverseKL()), strength=0.5)
        callbacks = [TAIDSchedule(alpha=0.1, attribute="loss.loss.t")]
    kind = KDLightningModule if settings.pop("reflects_sharded", False) else Distillation
    module = kind(
        get_peft_model(student, LoraConfig(r=4, target_modules=["q_proj", "lm_head"])) if lora else student,
        tiny(1),
        auxiliary=auxiliary,
        tokenizer=ByT5Tokenizer(),
        decoding=Decoding(max_new_tokens=4),
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3),
        lr_scheduler=lambda optimizer, steps: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps),
        **settings,
    )
    data = SRDDataModule(
        {"train": rows(), "validation": rows()[:6], "test": rows()[30:35]},
        schedule={0: 0.25, 1: 0.5, 2: 0.75},
        scores=str(Path(folder).parent / f"scores-{tied}-{lora}-{two}"),
        decoding=Decoding(max_new_tokens=2),
        **{"batch_size": GLOBAL_BATCH // int(devices), **data_options},
    )
    strategies = {
        "fsdp1": FSDP1OnCPU if accelerator == "cpu" else FSDPStrategy,
        "fsdp2": FSDP2,
    }
    trainer = L.Trainer(
        max_epochs=3,
        accelerator=accelerator,
        devices=int(devices),
        strategy=strategies[strategy]() if strategy in strategies else strategy,
        callbacks=[
            *(*callbacks, mute, losses, HyperparameterScheduler(STAGED), HuggingFaceExport(f"{folder}/student")),
            AnswerScores([CorpusChrF()]),
        ],
        default_root_dir=folder,
        enable_checkpointing=False,
        **drive.QUIET,
        **trainer_options,
    )
    trainer.fit(module, datamodule=data)
    record = {"losses": losses.losses, "metrics": numbers(trainer), "in_parts": module.step.parts is not None}
    own = (*module.loss.parameters(), *module.auxiliary.parameters())
    weights = [weight.detach() for weight in own]
    weights = [weight.full_tensor() if isinstance(weight, DTensor) else weight for weight in weights]
    record["auxiliary"] = [value for weight in weights for value in weight.flatten().tolist()]
    record["silent_batches"] = mute.silent_batches
    if method:
        record |= {"own": own_text.own, "shares": own_text.shares}
        record["asked"] = getattr(module.rollouts_handle.rollouts, "asked", [])
    if strategy != "fsdp1" and not fits_only:  # Lightning cannot use a module again that FSDP1 has wrapped
        trainer.test(module, datamodule=data, verbose=False)
        record["metrics"] |= numbers(trainer)
        record["answers"] = [row for batch in trainer.predict(module, datamodule=data) for row in batch]
    Path(folder, f"rank{trainer.global_rank}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main(*sys.argv[1:])
    drive.end_together()
