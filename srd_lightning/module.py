"""`KDLightningModule`: a student learns from the data and from a frozen teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning import Callback, LightningModule
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric
from transformers import PreTrainedTokenizerBase

from srd_lightning.answers import answers
from srd_lightning.caching import cache_teacher, teacher_digest
from srd_lightning.clipping import clip
from srd_lightning.failures import Failures, check_finite
from srd_lightning.fingerprint import digest
from srd_lightning.generation import Decoding
from srd_lightning.losses import DistillationLoss, ForwardKL, response_mask
from srd_lightning.models import Pretrained, check_same_tokenizer, dtype_named, shared_vocabulary, vocabulary_size
from srd_lightning.objective import CHUNK
from srd_lightning.placement import (
    TeacherPlacement,
    compute_dtype,
    data_parallel_mesh,
    place_student,
    place_teacher,
    shards_student,
    whole_weights,
)
from srd_lightning.planning import stage_steps, staged_schedule
from srd_lightning.resume import RunSeed, repair_progress
from srd_lightning.rouge import rouge_l
from srd_lightning.sharding import with_weights, without_weights
from srd_lightning.step import Step
from srd_lightning.teacher import CachedTeacher, HiddenStates, TopK
from srd_lightning.team import Team
from srd_lightning.token_mean import TokenMean

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
        activation_checkpointing: Keep one activation per block of the student and make the others again in the backward
            pass: less memory, about a third more time.
        teacher_placement: Where a teacher that is not cached is: whole on each device (``replicate``), spread over the
            devices (``shard``), or over the memories of their hosts (``offload``), from where each block comes when it
            is used. The last two need a strategy of processes.

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
        activation_checkpointing: bool = False,
        teacher_placement: TeacherPlacement = "replicate",
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
        self._skeleton: nn.Module | None
        self._speaker: nn.Module | None
        for name in ("teacher", "_skeleton", "_speaker"):
            self._keep(name, None)
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
        self.activation_checkpointing = activation_checkpointing
        self.teacher_placement = teacher_placement
        self._cached: CachedTeacher | None = None
        self._step: Step | None = None
        self._run_seed = RunSeed()
        self._token_mean = TokenMean()
        self.metrics = nn.ModuleDict(
            {f"{stage}_{name}": MeanMetric() for stage in ("val", "test") for name in ("nll", "kl", "rouge_l")}
        )

    def _keep(self, name: str, model: nn.Module | None) -> None:
        """Hold a model without registering it: no parameter of this module, in no state dict."""
        object.__setattr__(self, name, model)

    def _keep_teacher(self, teacher: nn.Module) -> None:
        self._keep("teacher", teacher.requires_grad_(False).eval())

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
            self._keep("teacher", None)
        return cached

    def _teacher_on_device(self) -> nn.Module:
        if self.teacher is None:
            self._keep_teacher(cast(Pretrained, self._teacher_source).model())
        return cast(nn.Module, self.teacher).to(self.trainer.strategy.root_device)

    def configure_model(self) -> None:
        """Load what is not there yet. Called by Lightning, possibly more than once."""
        if self._student_source is not None and self._teacher_source is not None and self.teacher is None:
            check_same_tokenizer(cast(Any, self.tokenizer), self._teacher_source.tokenizer())
        student = self.build_student().train()  # transformers load in eval mode, without dropout
        if self.activation_checkpointing:
            cast(Any, student).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if self._trainer and shards_student(self._trainer):
            self._prepare_to_shard(student)
            place_student(student, self)
        if self._teacher_source is not None and self.teacher is None and self._cached is None:
            self._keep_teacher(self._teacher_source.model())

    def _prepare_to_shard(self, student: nn.Module) -> None:
        if self.micro_batch_tokens is not None:
            raise ValueError(
                "micro_batch_tokens needs a student whose weights are whole, but this strategy shards them; take a "
                "smaller batch_size, and accumulate_grad_batches of the trainer"
            )
        if self._skeleton is None:
            self._keep("_skeleton", without_weights(student))

    def on_fit_start(self) -> None:
        """Place the teacher, which Lightning does not know, and learn who counts tokens together."""
        self._place_teacher()
        group = None if self.device_mesh is None else data_parallel_mesh(self).get_group()
        self._token_mean = TokenMean(group)

    def _place_teacher(self) -> None:
        if self._cached is not None:
            self._cached = self._cached.to(self.device)
            if (dtype := compute_dtype(self.trainer)) is not None:  # once, not at every step
                self._cached = self._cached.to(dtype)
        elif self.teacher is not None:
            place_teacher(self.teacher, self, self.teacher_placement)

    on_validation_start = _place_teacher

    def on_test_start(self) -> None:
        """Have a student that can answer by itself: processes would wait for each other at every token."""
        self._place_teacher()
        self._keep("_speaker", self.whole_student())

    on_predict_start = on_test_start

    def on_test_end(self) -> None:
        """Let go of it."""
        self._keep("_speaker", None)

    on_predict_end = on_test_end

    def whole_student(self, only_first: bool = False) -> nn.Module | None:
        """Return the student with all of its weights: itself, or a copy where the strategy has sharded it.

        Args:
            only_first: The copy is on the CPU of the first process, and nothing on others. All of them must ask.
        """
        if self._skeleton is None:
            return self.student
        weights = whole_weights(self, "student", only_first)
        if only_first and not self.trainer.is_global_zero:
            return None
        copy = with_weights(self._skeleton, weights, torch.device("cpu") if only_first else self.device)
        return copy.train(cast(nn.Module, self.student).training)

    def forward(self, batch: Batch) -> Tensor:
        """Return the student's logits, ``[B, T, V]``."""
        output = cast(Any, self.student)(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        return cast(Tensor, output.logits)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return (1 - w) CE + w KD of a batch; a part whose weight is 0 is not computed."""
        accumulated = self.trainer.accumulate_grad_batches if self._trainer else 1
        num_tokens = self._token_mean.divisor(response_mask(batch["labels"]).sum(), accumulated)
        objective = self._steps().objective(batch, self.loss, self.kd_weight, num_tokens)
        loss, ce, kd = self._token_mean.of_batch(torch.stack(objective).detach())
        check_finite(loss, "loss", self, batch_idx, own=objective.loss)
        if self.kd_weight < 1:
            self.log("train_ce", ce)
        if self.kd_weight > 0:
            self.log("train_kd", kd)
        self.log("train_loss", loss, prog_bar=True)
        return objective.loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Weigh all response tokens of the step alike."""
        self._token_mean.correct(self.parameters())

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
        student = cast(nn.Module, self.student if self._speaker is None else self._speaker)
        return answers(student, self._need_tokenizer(), batch, self.decoding)

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
        """Clip as Lightning does, also where it refuses to: by the norm under FSDP1, and fused optimizers in bf16.

        Raises:
            FloatingPointError: The norm is no number.
        """
        norm = clip(self, optimizer, gradient_clip_val, gradient_clip_algorithm)
        if norm is not None:
            check_finite(norm, "norm of the gradient", self, self.trainer.fit_loop.batch_idx)

    def configure_callbacks(self) -> list[Callback]:
        """Bring along what explains failures."""
        known = any(isinstance(callback, Failures) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
        return [] if known else [Failures()]

    def on_train_start(self) -> None:
        """Take the seed of the run: that of the run that is resumed, else of the first process."""
        self._run_seed.begin()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed what is random in a batch by its number, so that a resumed run draws the same."""
        self._run_seed.seed_batch(self.trainer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the seed of the run."""
        self._run_seed.save(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the seed of the run that is resumed, and repair what Lightning counted."""
        self._run_seed.load(checkpoint)
        if self._trainer is not None:
            repair_progress(checkpoint, self._trainer)

    def configure_optimizers(self) -> Any:
        """Return the optimizer, and the schedule over the planned steps of the whole curriculum."""
        optimizer = self.optimizer([parameter for parameter in self.parameters() if parameter.requires_grad])
        if self.lr_scheduler is None:
            return optimizer
        scheduler = staged_schedule(self.lr_scheduler, optimizer, stage_steps(self.trainer), self.restart_lr_each_stage)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
