"""`KDLightningModule`: a student learns from the data and from a frozen teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any, cast

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, SequentialLR
from torchmetrics import MeanMetric
from transformers import PreTrainedTokenizerBase

from srd_lightning.evaluation import TokenSums, divergence_from_teacher, negative_log_likelihood
from srd_lightning.generation import Decoding, generate
from srd_lightning.losses import IGNORE_INDEX, DistillationLoss, ForwardKL, cross_entropy
from srd_lightning.models import Pretrained, check_same_tokenizer
from srd_lightning.planning import stage_steps
from srd_lightning.rouge import rouge_l

Batch = Mapping[str, Tensor]


class KDLightningModule(LightningModule):
    r"""Trains a student by :math:`(1 - w) \, \mathrm{CE} + w \, \text{distillation loss}`.

    Batches are Hugging Face's: ``input_ids``, ``attention_mask`` and unshifted ``labels`` with -100 where nothing is
    learnt. Models take the first two and return an object with ``logits``. The teacher is frozen, in eval mode, and no
    part of the checkpoint.

    Args:
        student: The model to train.
        teacher: The model to learn from; may be left out where ``kd_weight`` stays 0.
        loss: The distillation loss; `ForwardKL` by default.
        kd_weight: Share w of the distillation loss, in [0, 1]; 0 is plain fine-tuning. Staged by
            ``HyperparameterScheduler({"kd_weight": …})``.
        optimizer: Makes the optimizer from the parameters that train.
        lr_scheduler: Makes the schedule from the optimizer and the number of planned steps, as ``CosineAnnealingLR``
            and ``PolynomialLR`` do; by default the learning rate is constant.
        restart_lr_each_stage: Run the schedule once per stage, as the paper does, instead of once over all stages.
        tokenizer: For answers in ``test`` and ``predict``; by default the student's, or the data module's.
        decoding: How answers are generated in ``test`` and ``predict``.

    Raises:
        ValueError: ``kd_weight`` is outside [0, 1], there is no teacher for it, or the two models have different
            tokenizers (checked where both are `Pretrained`).

    Example:
        >>> module = KDLightningModule(Pretrained("gpt2"), Pretrained("gpt2-xl", dtype="bfloat16"), kd_weight=0.8)
        >>> module.loss, module.kd_weight
        (ForwardKL(), 0.8)
    """

    def __init__(
        self,
        student: Pretrained | nn.Module,
        teacher: Pretrained | nn.Module | None = None,
        loss: DistillationLoss | None = None,
        kd_weight: float = 1.0,
        optimizer: Callable[[Any], Optimizer] = lambda params: AdamW(params, lr=1e-4, weight_decay=0.01),
        lr_scheduler: Callable[[Optimizer, int], LRScheduler] | None = None,
        restart_lr_each_stage: bool = False,
        tokenizer: PreTrainedTokenizerBase | None = None,
        decoding: Decoding = Decoding(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__()
        if not 0 <= kd_weight <= 1:
            raise ValueError(f"kd_weight must lie in [0, 1], but is {kd_weight}")
        if teacher is None and kd_weight > 0:
            raise ValueError(f"kd_weight {kd_weight} needs a teacher; give one, or set kd_weight to 0 for fine-tuning")
        self._student_source = student if isinstance(student, Pretrained) else None
        self._teacher_source = teacher if isinstance(teacher, Pretrained) else None
        self.student: nn.Module | None = None
        self.teacher: nn.Module | None
        self._keep_teacher(None)
        if isinstance(student, nn.Module):
            self.student = student
        if isinstance(teacher, nn.Module):
            self._keep_teacher(teacher)
        self.loss = loss if loss is not None else ForwardKL()
        self.kd_weight = kd_weight
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.restart_lr_each_stage = restart_lr_each_stage
        self._tokenizer = tokenizer
        self.decoding = decoding
        self.metrics = nn.ModuleDict(
            {f"{stage}_{name}": MeanMetric() for stage in ("val", "test") for name in ("nll", "kl", "rouge_l")}
        )

    def _keep_teacher(self, teacher: nn.Module | None) -> None:
        """Hold the teacher without registering it: no parameter of this module, in no state dict."""
        object.__setattr__(self, "teacher", teacher and teacher.requires_grad_(False).eval())

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer given, else the student's, else the data module's, else nothing."""
        if self._tokenizer is None and self._student_source is not None:
            self._tokenizer = self._student_source.tokenizer()
        return self._tokenizer

    def build_student(self) -> nn.Module:
        """Load the student if it is not there yet, and return it."""
        if self.student is None:
            assert self._student_source is not None
            self.student = self._student_source.model()
        return self.student

    def configure_model(self) -> None:
        """Load what is not there yet. Called by Lightning, possibly more than once."""
        if self._student_source is not None and self._teacher_source is not None and self.teacher is None:
            check_same_tokenizer(cast(Any, self.tokenizer), self._teacher_source.tokenizer())
        self.build_student().train()  # transformers load in eval mode, without dropout
        if self._teacher_source is not None and self.teacher is None:
            self._keep_teacher(self._teacher_source.model())

    def on_fit_start(self) -> None:
        """Move the teacher, which Lightning does not know, to the device."""
        self._place_teacher()

    on_validation_start = on_test_start = on_predict_start = on_fit_start

    def _place_teacher(self) -> None:
        if self.teacher is not None:
            self.teacher.to(self.device)

    def forward(self, batch: Batch) -> Tensor:
        """Return the student's logits, ``[B, T, V]``."""
        return _logits(cast(nn.Module, self.student), batch)

    @torch.no_grad()
    def teacher_logits(self, batch: Batch) -> Tensor:
        """Return the teacher's logits, ``[B, T, V]``."""
        return _logits(cast(nn.Module, self.teacher), batch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return (1 - w) CE + w KD of a batch; a part whose weight is 0 is not computed."""
        labels = batch["labels"]
        student_logits: Tensor = self(batch)
        loss = student_logits.new_zeros((), dtype=torch.float32)
        if self.kd_weight < 1:
            ce = cross_entropy(student_logits, labels)
            self.log("train_ce", ce)
            loss = loss + (1 - self.kd_weight) * ce
        if self.kd_weight > 0:
            kd: Tensor = self.loss(student_logits, self.teacher_logits(batch), labels)
            self.log("train_kd", kd)
            loss = loss + self.kd_weight * kd
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log ``val_nll`` and ``val_kl``, means over response tokens."""
        self._log_likelihoods("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log ``test_nll`` and ``test_kl`` over tokens, and ``test_rouge_l`` of the generated answers over rows."""
        self._log_likelihoods("test", batch)
        scores = [rouge_l(row["response"], row["answer"]) for row in self.predict_step(batch, batch_idx)]
        self._log_mean("test_rouge_l", sum(scores) / max(len(scores), 1), len(scores))

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, str]]:
        """Return prompt, true response and generated answer of every row that has a response."""
        tokenizer = self._need_tokenizer()
        rows = [_split_row(*row) for row in zip(*(batch[name].tolist() for name in BATCH_FIELDS), strict=True)]
        rows = [(prompt, response) for prompt, response in rows if response]
        if not rows:
            return []
        prompts, limits = [prompt for prompt, _ in rows], self.decoding.limits([len(truth) for _, truth in rows])
        answers = generate(cast(nn.Module, self.student), tokenizer, prompts, self.decoding, limits=limits)
        return [
            {
                "prompt": tokenizer.decode(prompt),
                "response": tokenizer.decode(response, skip_special_tokens=True).strip(),
                "answer": answer,
            }
            for (prompt, response), answer in zip(rows, answers, strict=True)
        ]

    def _need_tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = self.tokenizer or getattr(getattr(self.trainer, "datamodule", None), "tokenizer", None)
        if tokenizer is None:
            raise ValueError("answers need a tokenizer: give KDLightningModule(tokenizer=...)")
        return tokenizer

    def _log_likelihoods(self, stage: str, batch: Batch) -> None:
        labels, student_logits = batch["labels"], self(batch)
        self._log_token_mean(f"{stage}_nll", negative_log_likelihood(student_logits, labels))
        if self.teacher is not None:
            kl = divergence_from_teacher(student_logits, self.teacher_logits(batch), labels)
            self._log_token_mean(f"{stage}_kl", kl)

    def _log_token_mean(self, name: str, values: TokenSums) -> None:
        tokens = values.tokens.sum()
        self._log_mean(name, values.sums.sum() / tokens.clamp(min=1), tokens)

    def _log_mean(self, name: str, value: Tensor | float, weight: Tensor | int) -> None:
        metric = cast(MeanMetric, self.metrics[name])
        metric.update(value, weight)
        self.log(name, metric, on_step=False, on_epoch=True, prog_bar=name == "val_nll")

    def configure_optimizers(self) -> Any:
        """Return the optimizer, and the schedule over the planned steps of the whole curriculum."""
        optimizer = self.optimizer([parameter for parameter in self.parameters() if parameter.requires_grad])
        if self.lr_scheduler is None:
            return optimizer
        scheduler = _schedule(self.lr_scheduler, optimizer, stage_steps(self.trainer), self.restart_lr_each_stage)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


BATCH_FIELDS = ("input_ids", "attention_mask", "labels")


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    return cast(Tensor, model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits)


def _split_row(input_ids: list[int], attention_mask: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
    """Return prompt and response: what stands before the first label, and the labels."""
    first = next((position for position, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))
    prompt = [token for token, real in zip(input_ids[:first], attention_mask[:first], strict=True) if real]
    return prompt, [label for label in labels if label != IGNORE_INDEX]


def _schedule(
    make: Callable[[Optimizer, int], LRScheduler], optimizer: Optimizer, steps: list[int], restart: bool
) -> LRScheduler:
    """Return one schedule over all steps, or one per stage, one after the other."""
    if not restart or len(steps) == 1:
        return make(optimizer, sum(steps))
    return SequentialLR(optimizer, [make(optimizer, count) for count in steps], milestones=list(accumulate(steps))[:-1])
