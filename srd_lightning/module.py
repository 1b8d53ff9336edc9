"""`KDLightningModule`: a student learns from the data and from a frozen teacher."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedTokenizerBase

from srd_lightning.callbacks.hyperparameters import HyperparameterScheduler
from srd_lightning.callbacks.monitors import check_monitors
from srd_lightning.checkpoints.refusals import check_optimizer
from srd_lightning.checkpoints.resume_state import ResumeState, RunSeed
from srd_lightning.data.layout import LaidOut
from srd_lightning.distributed.clipping import clip
from srd_lightning.distributed.placement import TeacherPlacement, asked_sharded, data_parallel_mesh, shard_along
from srd_lightning.errors import SettingError
from srd_lightning.evaluation.answers import answers
from srd_lightning.evaluation.text_metrics import rouge_l
from srd_lightning.evaluation.weighted_mean import WeightedMean
from srd_lightning.losses.auxiliary import AuxiliaryLoss
from srd_lightning.losses.base import DistillationLoss
from srd_lightning.losses.standard import ForwardKL
from srd_lightning.models.calling import logits_of
from srd_lightning.models.generation import Decoding
from srd_lightning.models.pretrained import ModelName, Pretrained, named
from srd_lightning.models.vocabulary import shared_vocabulary, vocabulary_size
from srd_lightning.preflight import callbacks_of, check_no_twin, warn_of_twin
from srd_lightning.protocols import Around, HasCuratedRows
from srd_lightning.rollouts.base import Rollouts
from srd_lightning.rollouts.handle import RolloutsHandle
from srd_lightning.rollouts.hooks import RolloutHooks
from srd_lightning.teacher.handle import CacheKind, CacheSettings, TeacherHandle
from srd_lightning.teacher.live import CachedTeacher
from srd_lightning.training import arguments, compatibility
from srd_lightning.training.failures import Failures, Measured, read_finite
from srd_lightning.training.hardware import Hardware
from srd_lightning.training.hooks import TrainingHooks
from srd_lightning.training.lr_plan import stage_steps, staged_schedule
from srd_lightning.training.step import DistillationStep
from srd_lightning.training.student import StudentHandle
from srd_lightning.training.token_normalizer import TokenNormalizer

Batch = Mapping[str, Tensor]


class KDLightningModule(LightningModule):
    r"""Trains a student by :math:`(1 - w) \, \mathrm{CE} + w \, \text{distillation loss}`.

    Batches are Hugging Face's: ``input_ids``, ``attention_mask`` and unshifted ``labels`` with -100 where nothing is
    learnt; of encoder-decoders also ``decoder_input_ids``. Models take all but the labels and return an object with
    ``logits``. The teacher is frozen, in eval mode, and no
    part of the checkpoint.

    Args:
        student: The model to train; a plain text is the name of a `Pretrained` one.
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
            smaller, and not exact. `CacheSettings` also say how many, in which type and where. Needs an
            `SRDDataModule`.
        micro_batch_tokens: Most rows times longest row that go through the models at a time: a batch with more is taken
            in parts, with the same result and less memory. By default batches are taken whole.
        packing: Put the rows of a batch behind each other instead of padding them, for attention that keeps them apart
            (flash attention on a GPU; others do so too, and lose by it).
        chunk: Response tokens whose logits exist at a time, by default as many as suit the device: 256 on a CPU, and on
            a GPU so many that they take the memory of the head's gradient; ``None`` makes all logits, as losses that
            define `forward` for themselves need.
        compile: Compile the bodies of student and teacher, and what turns logits into gradients.
        activation_checkpointing: Keep one activation per block of the student and make the others again in the backward
            pass: less memory, about a third more time.
        rollouts: Trains with the student's own text too: `GKD`, `DistiLLM`, `MiniLLM` or `ReflectionReplay`.
        auxiliary: Losses of hidden states, whose weighted means over response tokens are added to the objective in
            training, with parameters of their own that are trained along; see `AuxiliaryLoss`.
        teacher_placement: Where a teacher that is not cached is: whole on each device (``replicate``), spread over the
            devices (``shard``), or over the memories of their hosts (``offload``), from where each block comes when it
            is used. The last two need a strategy of ranks.

    Raises:
        SettingError: ``kd_weight`` is outside [0, 1], there is no teacher for it, a size is below 1, or an argument is
            not of its kind.
        ModelError: Student and teacher share weights, or have different tokenizers (checked where both are
            `Pretrained`).

    Example:
        >>> module = KDLightningModule(Pretrained("gpt2"), Pretrained("gpt2-xl", dtype="bfloat16"), kd_weight=0.8)
        >>> module.loss, module.kd_weight
        (ForwardKL(), 0.8)
    """

    def __init__(
        self,
        student: Pretrained | nn.Module | ModelName,
        teacher: Pretrained | nn.Module | ModelName | None = None,
        loss: DistillationLoss | None = None,
        kd_weight: float = 1.0,
        optimizer: Callable[[Any], Optimizer] = lambda params: AdamW(params, lr=1e-4, weight_decay=0.01, fused=True),
        lr_scheduler: Callable[[Optimizer, int], LRScheduler] | None = None,
        restart_lr_each_stage: bool = False,
        tokenizer: PreTrainedTokenizerBase | None = None,
        decoding: Decoding = Decoding(),  # noqa: B008 (frozen)
        teacher_cache: CacheKind | CacheSettings = "none",
        micro_batch_tokens: int | None = None,
        packing: bool = False,
        chunk: int | Literal["auto"] | None = "auto",
        compile: bool = False,
        activation_checkpointing: bool = False,
        teacher_placement: TeacherPlacement = "replicate",
        auxiliary: Sequence[AuxiliaryLoss] = (),
        rollouts: Rollouts | None = None,
    ) -> None:
        student, teacher = named(student), None if teacher is None else named(teacher)
        loss = loss if loss is not None else ForwardKL()
        arguments.check_loss_type(loss)
        arguments.check_auxiliary_types(auxiliary)
        arguments.check_rollouts_type(rollouts)
        arguments.check_models(student, teacher)
        arguments.check_tokenizer(tokenizer)
        arguments.check_makers(optimizer=optimizer, lr_scheduler=lr_scheduler)
        cache = arguments.cache_settings(teacher_cache)
        arguments.check_choice("teacher_placement", teacher_placement, TeacherPlacement)
        arguments.check_sizes(micro_batch_tokens=micro_batch_tokens, chunk=None if chunk == "auto" else chunk)
        arguments.check_kd_weight(kd_weight, has_teacher=teacher is not None)
        if teacher is None and cache is not None:
            raise SettingError(f"teacher_cache {cache.kind} needs a teacher, but none is given")
        if auxiliary and teacher is None:
            raise SettingError("auxiliary losses need a teacher, but none is given")
        if rollouts is not None and teacher is None:
            raise SettingError("rollouts learn from what a teacher says to the student's text, but none is given")
        super().__init__()
        warn_of_twin(self)
        self.student: nn.Module | None = student if isinstance(student, nn.Module) else None
        self.student_handle = StudentHandle(
            student if isinstance(student, Pretrained) else None, activation_checkpointing
        )
        self.teacher_handle = TeacherHandle(teacher, cache, teacher_placement)
        self.rollouts_handle = RolloutsHandle(rollouts, stage_steps)
        self.step = DistillationStep(chunk, packing, compile, micro_batch_tokens)
        self._tokenizer = tokenizer
        self._models_checked = False
        self.loss = loss
        self.auxiliary = nn.ModuleList(auxiliary)
        self._has_teacher = teacher is not None
        self._kd_weight = kd_weight
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.restart_lr_each_stage = restart_lr_each_stage
        self.decoding = decoding
        self.token_normalizer = TokenNormalizer()
        self._measured: list[Measured] = []
        self._step_kd: float | None = None
        self.is_set_up = False
        """Whether `setup` was called for the run that begins."""
        self.metrics = nn.ModuleDict(
            {f"{stage}_{name}": WeightedMean() for stage in ("val", "test") for name in ("nll", "kl", "rouge_l")}
        )

    @property
    def kd_weight(self) -> float:
        """Share of the distillation loss; checked also where it is set later."""
        return self._kd_weight

    @kd_weight.setter
    def kd_weight(self, kd_weight: float) -> None:
        arguments.check_kd_weight(kd_weight, self._has_teacher)
        self._kd_weight = kd_weight

    @property
    def teacher(self) -> nn.Module | None:
        """The teacher, where it is loaded."""
        return self.teacher_handle.model

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse another teacher: torch would register it beside the one that is used."""
        if name == "teacher":
            raise SettingError(
                f"the teacher of a {type(self).__name__} cannot be set later, for it is no part of the module; make a "
                "new module with it, KDLightningModule(student, teacher)"
            )
        super().__setattr__(name, value)

    @property
    def generation_seconds(self) -> float:
        """Time that texts of `rollouts` have taken to be written, in this run and process."""
        return self.rollouts_handle.seconds

    @property
    def teacher_cache_dir(self) -> str | None:
        """The folder of the teacher's cache, where one was given."""
        return None if self.teacher_handle.cache is None else self.teacher_handle.cache.dir

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer given, else the student's, else nothing."""
        if self._tokenizer is None and self.student_handle.source is not None:
            self._tokenizer = self.student_handle.source.tokenizer()
        return self._tokenizer

    def student_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Return the tokenizer of the student, see `HasStudent`."""
        return self.tokenizer

    def models_by_name(self) -> dict[str, Pretrained | nn.Module | None]:
        """Return student and teacher, as they were given or as they are loaded."""
        return {"student": self.student_handle.source or self.student, "teacher": self.teacher_handle.given}

    def build_student(self, trainer: Trainer | None = None) -> nn.Module:
        """Load the student if it is not there yet, and return it.

        Args:
            trainer: Under FSDP2 it is sharded as well, unless a subclass has a `configure_model` of its own, which may
                do to it what can only be done before.
        """
        if self.student is None:
            self.student = cast(Pretrained, self.student_handle.source).model()
        own = type(self).configure_model is not KDLightningModule.configure_model
        if trainer is not None and asked_sharded(trainer) and not own:
            self.student_handle.spread(self.student, trainer)
        return self.student

    def whole_student(self, only_first: bool = False) -> nn.Module | None:
        """Return the student with all of its weights, a copy while a run shards it; see `StudentHandle.gather`."""
        return self.student_handle.gather(cast(nn.Module, self.student), self, only_first)

    def student_to_ask(self) -> nn.Module:
        """Return the student as `generate` takes it, sharded or whole, on all ranks; see `StudentHandle.to_ask`."""
        return self.student_handle.to_ask(cast(nn.Module, self.student), self)

    def shared_vocabulary(self, teacher: nn.Module | CachedTeacher) -> int | None:
        """Return how many tokens the student shares with a teacher, or nothing where all are."""
        if isinstance(teacher, CachedTeacher):
            return len(teacher.head.weight)
        both_known = self.student_handle.source is not None and self.teacher_handle.source is not None
        sizes = vocabulary_size(self.build_student()), vocabulary_size(teacher)
        return shared_vocabulary(*sizes, self.tokenizer if both_known else None)

    def run_teacher(self) -> nn.Module | None:
        """Return the teacher, where it is not cached; see `RunsTeacher`."""
        return None if self.teacher_handle.cached is not None else self.teacher

    def watch(self, around: Around) -> None:
        """Tell when the teacher is asked or cached, and texts are written; see `TellsParts`."""
        self.step.around = self.teacher_handle.around = self.rollouts_handle.around = around

    def _check_same_family(self) -> None:
        student, teacher = self.student_handle.source, self.teacher_handle.source
        if student is not None and teacher is not None:
            compatibility.check_same_family(student, teacher, cast(PreTrainedTokenizerBase, self.tokenizer))

    def _tokenizer_of_rows(self, trainer: Trainer) -> PreTrainedTokenizerBase | None:
        """Return the tokenizer of an `SRDDataModule`, or the one that it will take; else what was given, if any."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        return (data.rows_tokenizer() or self.tokenizer) if isinstance(data, HasCuratedRows) else self._tokenizer

    def cache(self, data: object, trainer: Trainer) -> None:
        """Let the teacher see all rows that its cache lacks, and answers; see `TeacherHandle.fill_cache`."""
        self.rollouts_handle.begin(data)
        self.teacher_handle.fill_cache(data, trainer, self.shared_vocabulary)

    def preflight(self, trainer: Trainer) -> None:
        """Refuse what cannot be trained, or not together, see `training.compatibility`; look at the two models."""
        compatibility.check_run(self, trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            self.rollouts_handle.check(self, trainer, trainer.datamodule)  # type: ignore[attr-defined]
        if type(self) is KDLightningModule and trainer.state.fn == TrainerFn.FITTING:  # a subclass may log more
            check_monitors(trainer, self._has_teacher, len(self.auxiliary) > 0, self._kd_weights(trainer))
        if trainer.state.fn == TrainerFn.FITTING and (
            type(self).configure_optimizers is KDLightningModule.configure_optimizers
        ):
            check_optimizer(trainer, self.optimizer)
        if not self._models_checked:
            compatibility.check_models(self.models_by_name(), self._tokenizer_of_rows(trainer))
            compatibility.check_families(self.models_by_name(), self.step, self.rollouts_handle.rollouts)
            self._check_same_family()
            self._models_checked = True
        if trainer.state.fn == TrainerFn.FITTING:
            self.check_cache(trainer)

    def _kd_weights(self, trainer: Trainer) -> set[float]:
        """Return the shares of the distillation loss that the steps of a run may have."""
        schedulers = [other for other in callbacks_of(trainer) if isinstance(other, HyperparameterScheduler)]
        staged = {weight for other in schedulers for weight in other.schedules.get("kd_weight", {}).values()}
        return self.rollouts_handle.kd_weights(staged or {self.kd_weight})

    def check_cache(self, trainer: Trainer) -> None:
        """See whether the teacher can be cached, where that is asked for; see `TeacherHandle.check_cache`."""
        if self.teacher_handle.cache is not None:
            self.teacher_handle.check_cache(trainer)

    def setup(self, stage: str) -> None:
        """Begin anew; before training, let the teacher be cached, where that is asked for."""
        # for then the module's is used, which is what is wanted: only it can look at batches before they move
        warnings.filterwarnings("ignore", "You have overridden `transfer_batch_to_device` in `LightningModule` but")
        self.preflight(self.trainer)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        self.teacher_handle.begin()
        if isinstance(data, HasCuratedRows):
            data.use_batch_columns(None)
        if stage == "fit" and self.teacher_handle.cache is not None:
            self.cache(data, self.trainer)
        elif stage == "fit":
            self.rollouts_handle.begin(data)
        self.is_set_up = True
        if stage in ("test", "predict") and type(self).predict_step is KDLightningModule.predict_step:
            self._need_tokenizer()

    def configure_callbacks(self) -> list[Callback]:
        """Bring along what is done around the steps, what resumes a run, and what explains failures."""
        check_no_twin(self.trainer.datamodule, self)  # type: ignore[attr-defined]
        known = {type(callback) for callback in callbacks_of(self.trainer)}
        kinds = (TrainingHooks, RunSeed, ResumeState, RolloutHooks, Failures, Hardware)
        return [kind() for kind in kinds if kind not in known]

    def configure_model(self) -> None:
        """Load what is not there yet, and shard it where the strategy leaves that to the module."""
        if self._trainer and not any(isinstance(callback, TrainingHooks) for callback in callbacks_of(self._trainer)):
            raise RuntimeError(
                f"{type(self).__name__}.configure_callbacks leaves out what this class brings along, without which it "
                "trains wrongly: return [*super().configure_callbacks(), ...]"
            )
        if self.teacher is None and not self._models_checked:
            self._check_same_family()
        student = self.build_student()
        if self._trainer and self._trainer.state.fn == "fit":
            compatibility.check_student(student, self.student_handle.activation_checkpointing, self._trainer)
        self.student_handle.prepare(student, self)
        for loss in (self.loss, *self.auxiliary) if self._trainer else ():
            shard_along(loss, self.trainer)
        if self.teacher_handle.given is not None and self.teacher_handle.cached is None:
            self.teacher_handle.load()
        self.prepare()

    def prepare(self) -> None:
        """Settle what is known as soon as both models are there: where the teacher is, and what a step computes."""
        group = None
        if self._trainer:
            if self._trainer.state.fn != TrainerFn.PREDICTING:
                self.teacher_handle.place(self._trainer)
            group = None if self.device_mesh is None else data_parallel_mesh(self._trainer).get_group()
        self.token_normalizer, self._measured = TokenNormalizer(group), []
        teacher = self.teacher_handle.used
        self.step.attach(self.build_student(), teacher, None if teacher is None else self.shared_vocabulary(teacher))

    def forward(self, batch: Batch) -> Tensor:
        """Return the student's logits, ``[B, T, V]``."""
        return logits_of(cast(nn.Module, self.student), batch)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch, and look at it before: to ask the device what is in it, the step would have to wait."""
        batch = self.rollouts_handle.on_host(batch, self)
        layout = self.step.inspect(batch)  # some batches move in place
        moved = super().transfer_batch_to_device(batch, device, dataloader_idx)
        self.step.expect(moved, layout)
        return moved

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return (1 - w) CE + w KD of a batch; a part whose weight is 0 is not computed."""
        step, accumulated = self.step, self.trainer.accumulate_grad_batches if self._trainer else 1
        laid_out = self._laid_out(batch, f"training batch {batch_idx}")
        num_tokens = self.token_normalizer.divisor(_number_of_tokens(laid_out), accumulated)
        auxiliary = cast("list[AuxiliaryLoss]", list(self.auxiliary))
        loss, kd_weight = self.rollouts_handle.objective(self.loss, self.kd_weight)
        objective = step.objective(laid_out, loss, kd_weight, num_tokens, auxiliary)
        others = objective.loss - (1 - kd_weight) * objective.ce - kd_weight * objective.kd
        means = self.token_normalizer.of_batch(torch.stack([*objective, others]).detach())
        if self._trainer is not None and not self.trainer.training:  # asked for by an evaluation: no step comes of it
            return objective.loss
        trained = self._trainer is not None and self.trainer.global_step > 0
        why = functools.partial(step.why_not_finite, laid_out.without_columns(), trained)
        tokens = self.token_normalizer.tokens_of_batch
        self._measured.append(Measured(batch_idx, means, tokens, objective.loss.detach(), why, kd_weight))
        if self._trainer is None or not self.automatic_optimization:  # nobody will say when the step is made
            self.read_measures()
        return objective.loss

    def read_measures(self, norm: Tensor | None = None) -> None:
        """Log what was measured for a step, and refuse to make it with what is NaN or infinite; see `read_finite`.

        Args:
            norm: Of the gradient, where it is known.

        Raises:
            NonFiniteError: A loss or the norm is NaN or infinite.
        """
        batches, self._measured = self._measured, []
        means = read_finite(batches, norm, self)
        if means is None:
            return
        loss, ce, kd, auxiliary = means  # on the host, so nothing that is logged makes it wait
        if all(batch.kd_weight < 1 for batch in batches):
            self.log("train_ce", ce)
        self._step_kd = float(kd) if all(batch.kd_weight > 0 for batch in batches) else None
        if self._step_kd is not None:
            self.log("train_kd", kd)
        if self.auxiliary:
            self.log("train_auxiliary", auxiliary)
        self.log("train_loss", loss, prog_bar=True)

    def step_kd(self) -> float | None:
        """Return the distillation loss of the last step, see `KnowsStepLoss`."""
        return self._step_kd

    @property
    def reads_when_clipping(self) -> bool:
        """Whether a step is read when its gradient is clipped, with the norm; else it is read just before."""
        return type(self).configure_gradient_clipping is KDLightningModule.configure_gradient_clipping

    def _laid_out(self, batch: Batch, name: str) -> LaidOut:
        if self.step.student is None or self.step.student is not self.student:
            raise RuntimeError(
                f"the student of {type(self).__name__} is not the one that configure_model() has prepared; call that "
                "before the first step, or super().configure_model() in your own, with the student in its place"
            )
        return self.step.laid_out(batch, name)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log ``val_nll`` and ``val_kl``, means over response tokens."""
        self._log_likelihoods("val", batch, batch_idx)

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Log ``test_nll`` and ``test_kl`` over tokens, and ``test_rouge_l`` of the generated answers over rows.

        Returns:
            ``answers``, as of `predict_step`, for `AnswerScores`.
        """
        self._log_likelihoods("test", batch, batch_idx)
        rows = self.predict_step(batch, batch_idx)
        scores = [rouge_l(row["response"], row["answer"]) for row in rows]
        self._log_mean("test_rouge_l", sum(scores) / max(len(scores), 1), len(scores))
        return {"answers": rows}

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, str]]:
        """Return prompt, reference response and generated answer of every row that has a response.

        Rows that repeat a prompt are sampled anew: every batch of every rank has a seed of its own.
        """
        gathered = self.student_handle.for_generation
        ranks = self._trainer.world_size if self._trainer else 1
        return answers(
            cast(nn.Module, self.student) if gathered is None else gathered,
            self._need_tokenizer(),
            batch,
            self.decoding,
            self.decoding.seed + batch_idx * ranks + self.global_rank,
        )

    def _need_tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = self.tokenizer or getattr(getattr(self.trainer, "datamodule", None), "tokenizer", None)
        if tokenizer is None:
            raise SettingError("answers need a tokenizer: give KDLightningModule(tokenizer=...)")
        return tokenizer

    def _log_likelihoods(self, stage: str, batch: Batch, batch_idx: int) -> None:
        laid_out = self._laid_out(batch, f"{stage} batch {batch_idx}")
        tokens = _number_of_tokens(laid_out)
        with_teacher = self.teacher_handle.used is not None
        found = self.step.objective(laid_out, ForwardKL(), 0.5 if with_teacher else 0.0)
        self._log_mean(f"{stage}_nll", found.ce, tokens)
        if with_teacher:
            self._log_mean(f"{stage}_kl", found.kd, tokens)

    def _log_mean(self, name: str, value: Tensor | float, weight: Tensor | int) -> None:
        metric = cast(WeightedMean, self.metrics[name])
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
            FloatingPointError: The norm is NaN or infinite.
        """
        self.read_measures(clip(self, optimizer, gradient_clip_val, gradient_clip_algorithm))

    def configure_optimizers(self) -> Any:
        """Return the optimizer, and the schedule over the planned steps of the whole curriculum."""
        optimizer = self.optimizer([parameter for parameter in self.parameters() if parameter.requires_grad])
        if self.lr_scheduler is None:
            return optimizer
        scheduler = staged_schedule(self.lr_scheduler, optimizer, stage_steps(self.trainer), self.restart_lr_each_stage)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _number_of_tokens(batch: LaidOut) -> Tensor:
    """Return the number of response tokens, a scalar, made on the device of the batch: to copy it there would wait."""
    return torch.full((), len(batch.layout.targets), dtype=torch.float32, device=batch["labels"].device)
