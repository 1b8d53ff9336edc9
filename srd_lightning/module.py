"""`KDLightningModule`: a student learns from the data and from a frozen teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning import LightningModule
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities.enums import GradClipAlgorithmType
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric
from transformers import PreTrainedTokenizerBase

from srd_lightning.caching import cache_teacher, teacher_digest
from srd_lightning.fingerprint import digest
from srd_lightning.generation import Decoding, generate
from srd_lightning.losses import IGNORE_INDEX, DistillationLoss, ForwardKL, response_mask
from srd_lightning.models import Pretrained, check_same_tokenizer, dtype_named, shared_vocabulary, vocabulary_size
from srd_lightning.objective import CHUNK
from srd_lightning.planning import stage_steps, staged_schedule
from srd_lightning.rouge import rouge_l
from srd_lightning.step import Step
from srd_lightning.teacher import CachedTeacher, HiddenStates, TopK
from srd_lightning.team import Team

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
        teacher_cache: ``hidden`` runs the teacher once over all rows, before training, and keeps its final hidden
            states on disk; with a complete cache it is not even loaded. ``topk`` keeps its likeliest tokens instead:
            smaller, and not exact. Needs an `SRDDataModule`.
        teacher_cache_dir: Folder that all processes see; by default one in the trainer's ``default_root_dir``, named
            after what the cache depends on.
        teacher_cache_dtype: In which hidden states are kept.
        top_k: Tokens that ``topk`` keeps of each distribution.
        micro_batch_tokens: Most rows times longest row that go through the models at a time: a batch with more is taken
            in parts, with the same result and less memory. By default batches are taken whole.
        packing: Put the rows of a batch behind each other instead of padding them, for attention that keeps them apart
            (flash attention on a GPU; others do so too, and lose by it).
        chunk: Response tokens whose logits exist at a time; ``None`` makes all logits, as losses that define `forward`
            for themselves need.
        compile: Compile the bodies of student and teacher, and what turns logits into gradients.

    Raises:
        ValueError: ``kd_weight`` is outside [0, 1], there is no teacher for it, a size is below 1, or the two models
            have different tokenizers (checked where both are `Pretrained`).

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
        optimizer: Callable[[Any], Optimizer] = lambda params: AdamW(params, lr=1e-4, weight_decay=0.01, fused=True),
        lr_scheduler: Callable[[Optimizer, int], LRScheduler] | None = None,
        restart_lr_each_stage: bool = False,
        tokenizer: PreTrainedTokenizerBase | None = None,
        decoding: Decoding = Decoding(),  # noqa: B008 (frozen)
        teacher_cache: Literal["none", "hidden", "topk"] = "none",
        teacher_cache_dir: str | None = None,
        teacher_cache_dtype: str = "bfloat16",
        top_k: int = 64,
        micro_batch_tokens: int | None = None,
        packing: bool = False,
        chunk: int | None = CHUNK,
        compile: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= kd_weight <= 1:
            raise ValueError(f"kd_weight must lie in [0, 1], but is {kd_weight}")
        if teacher is None and kd_weight > 0:
            raise ValueError(f"kd_weight {kd_weight} needs a teacher; give one, or set kd_weight to 0 for fine-tuning")
        if teacher is None and teacher_cache != "none":
            raise ValueError(f"teacher_cache {teacher_cache} needs a teacher, but none is given")
        sizes = {"top_k": top_k, "micro_batch_tokens": micro_batch_tokens, "chunk": chunk}
        if wrong := [f"{name}={size}" for name, size in sizes.items() if size is not None and size < 1]:
            raise ValueError(f"sizes must be at least 1, but {', '.join(wrong)}")
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
        self.teacher_cache = teacher_cache
        self.teacher_cache_dir = teacher_cache_dir
        self.teacher_cache_dtype = dtype_named(teacher_cache_dtype)
        self.top_k = top_k
        self.micro_batch_tokens = micro_batch_tokens
        self.packing = packing
        self.chunk = chunk
        self.compile_step = compile
        self._cached: CachedTeacher | None = None
        self._step: Step | None = None
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

    def setup(self, stage: str) -> None:
        """Before training: let the teacher be cached, where that is asked for. Data modules are set up by now."""
        self._cached = self._step = None
        data: Any = getattr(self.trainer, "datamodule", None)
        if hasattr(data, "teacher_cache"):
            data.teacher_cache = None
        if stage == "fit" and self.teacher_cache != "none":
            self._cached = self.cache(data)

    def cache(self, data: Any) -> CachedTeacher:
        """Let the teacher see all rows of an `SRDDataModule` that its cache lacks; batches then bring along the rest.

        Args:
            data: Set up for ``fit``.

        Returns:
            The teacher as it lives on in the cache.
        """
        if self.teacher_cache == "none":
            raise ValueError("nothing is to be cached: set teacher_cache to hidden or topk")
        if not hasattr(data, "rows_of_teacher"):
            raise ValueError("teacher_cache needs an SRDDataModule: its batches bring along what is cached")
        kind = HiddenStates(self.teacher_cache_dtype) if self.teacher_cache == "hidden" else TopK(self.top_k)
        source = self._teacher_source or cast(nn.Module, self.teacher)
        made_of = Team().from_first(lambda: {"teacher": teacher_digest(source), "kind": repr(kind)})
        folder = self.teacher_cache_dir or Path(self.trainer.default_root_dir) / "teacher" / digest(made_of)
        loaded_here = self.teacher is None
        data.teacher_cache, cached = cache_teacher(
            data.rows_of_teacher(), Path(folder), kind, made_of, self._teacher_on_device, self._shared_vocabulary
        )
        if loaded_here:
            self._keep_teacher(None)
        return cached

    def _teacher_on_device(self) -> nn.Module:
        if self.teacher is None:
            self._keep_teacher(cast(Pretrained, self._teacher_source).model())
        return cast(nn.Module, self.teacher).to(self.trainer.strategy.root_device)

    def configure_model(self) -> None:
        """Load what is not there yet. Called by Lightning, possibly more than once."""
        if self._student_source is not None and self._teacher_source is not None and self.teacher is None:
            check_same_tokenizer(cast(Any, self.tokenizer), self._teacher_source.tokenizer())
        self.build_student().train()  # transformers load in eval mode, without dropout
        if self._teacher_source is not None and self.teacher is None and self._cached is None:
            self._keep_teacher(self._teacher_source.model())

    def on_fit_start(self) -> None:
        """Move the teacher, which Lightning does not know, to the device."""
        if self._cached is not None:
            self._cached = self._cached.to(self.device)
            with self.trainer.precision_plugin.forward_context():
                if torch.is_autocast_enabled(self.device.type):  # once, not at every step
                    self._cached = self._cached.to(torch.get_autocast_dtype(self.device.type))
        elif self.teacher is not None:
            self.teacher.to(self.device)

    on_validation_start = on_test_start = on_predict_start = on_fit_start

    def forward(self, batch: Batch) -> Tensor:
        """Return the student's logits, ``[B, T, V]``."""
        output = cast(Any, self.student)(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        return cast(Tensor, output.logits)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return (1 - w) CE + w KD of a batch; a part whose weight is 0 is not computed."""
        objective = self._steps().objective(batch, self.loss, self.kd_weight)
        if self.kd_weight < 1:
            self.log("train_ce", objective.ce)
        if self.kd_weight > 0:
            self.log("train_kd", objective.kd)
        self.log("train_loss", objective.loss, prog_bar=True)
        return objective.loss

    def _steps(self) -> Step:
        student = cast(nn.Module, self.student)
        teacher = self._cached if self._cached is not None else self.teacher
        if self._step is None or self._step.student is not student or self._step.source is not teacher:
            vocabulary = None if teacher is None else self._shared_vocabulary(teacher)
            self._step = Step(
                student, teacher, vocabulary, self.chunk, self.packing, self.compile_step, self.micro_batch_tokens
            )
        return self._step

    def _shared_vocabulary(self, teacher: nn.Module | CachedTeacher) -> int | None:
        if isinstance(teacher, CachedTeacher):
            return len(teacher.head.weight)
        both_known = self._student_source is not None and self._teacher_source is not None
        sizes = vocabulary_size(self.build_student()), vocabulary_size(teacher)
        return shared_vocabulary(*sizes, self.tokenizer if both_known else None)

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
        tokens = response_mask(batch["labels"]).sum()
        with_teacher = self.teacher is not None or self._cached is not None
        found = self._steps().objective(batch, ForwardKL(), 0.5 if with_teacher else 0.0)
        self._log_mean(f"{stage}_nll", found.ce, tokens)
        if with_teacher:
            self._log_mean(f"{stage}_kl", found.kd, tokens)

    def _log_mean(self, name: str, value: Tensor | float, weight: Tensor | int) -> None:
        metric = cast(MeanMetric, self.metrics[name])
        metric.update(value, weight)
        self.log(name, metric, on_step=False, on_epoch=True, prog_bar=name == "val_nll")

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as Lightning does, and in bf16 also for fused optimizers: no scaler has touched the gradients there."""
        plugin = self.trainer.precision_plugin
        if isinstance(plugin, MixedPrecision) and plugin.scaler is None:
            algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val or 0.0, algorithm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def configure_optimizers(self) -> Any:
        """Return the optimizer, and the schedule over the planned steps of the whole curriculum."""
        optimizer = self.optimizer([parameter for parameter in self.parameters() if parameter.requires_grad])
        if self.lr_scheduler is None:
            return optimizer
        scheduler = staged_schedule(self.lr_scheduler, optimizer, stage_steps(self.trainer), self.restart_lr_each_stage)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


BATCH_FIELDS = ("input_ids", "attention_mask", "labels")


def _split_row(input_ids: list[int], attention_mask: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
    """Return prompt and response: what stands before the first label, and the labels."""
    first = next((position for position, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))
    prompt = [token for token, real in zip(input_ids[:first], attention_mask[:first], strict=True) if real]
    return prompt, [label for label in labels if label != IGNORE_INDEX]
