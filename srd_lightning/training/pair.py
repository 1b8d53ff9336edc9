"""Student and teacher of a LightningModule: loaded when they are needed, and put where the strategy wants them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from transformers import PreTrainedTokenizerBase

from srd_lightning.digests import digest
from srd_lightning.distributed.fsdp2 import is_sharded, with_weights, without_weights
from srd_lightning.distributed.placement import (
    TeacherPlacement,
    compute_dtype,
    place_teacher,
    shard_student,
    shards_student,
    whole_weights,
)
from srd_lightning.distributed.process_group import Team
from srd_lightning.errors import ModelError, SettingError
from srd_lightning.models.pretrained import Pretrained, dtype_named
from srd_lightning.models.soundness import check_module
from srd_lightning.models.vocabulary import check_same_tokenizer, shared_vocabulary, vocabulary_size
from srd_lightning.protocols import HasCuratedRows
from srd_lightning.storage import check_folder
from srd_lightning.teacher.cache import MANIFEST, check_manifest
from srd_lightning.teacher.live import CachedTeacher, HiddenStates, TopK
from srd_lightning.teacher.precompute import cache_teacher, teacher_digest, width_of

TeacherCaching = Literal["none", "hidden", "topk"]


class StudentAndTeacher(LightningModule):
    """Holds a student, and a frozen teacher that is no part of it for Lightning.

    Arguments are those of `KDLightningModule`.
    """

    def __init__(
        self,
        student: Pretrained | nn.Module,
        teacher: Pretrained | nn.Module | None,
        tokenizer: PreTrainedTokenizerBase | None,
        teacher_cache: TeacherCaching,
        teacher_cache_dir: str | None,
        teacher_cache_dtype: str,
        top_k: int,
        activation_checkpointing: bool,
        teacher_placement: TeacherPlacement,
    ) -> None:
        super().__init__()
        self._student_source = student if isinstance(student, Pretrained) else None
        self._teacher_source = teacher if isinstance(teacher, Pretrained) else None
        self.student: nn.Module | None = student if isinstance(student, nn.Module) else None
        self.teacher: nn.Module | None
        self._skeleton: nn.Module | None
        for name in ("teacher", "_skeleton"):
            self.keep(name, None)
        if isinstance(teacher, nn.Module):
            self._keep_teacher(teacher)
        self._tokenizer = tokenizer
        self.teacher_cache = teacher_cache
        self.teacher_cache_dir = teacher_cache_dir
        self.teacher_cache_dtype = dtype_named(teacher_cache_dtype)
        self.top_k = top_k
        self.activation_checkpointing = activation_checkpointing
        self.teacher_placement = teacher_placement
        self._cached: CachedTeacher | None = None
        self._models_checked = False
        self._teacher_digest: str | None = None

    def keep(self, name: str, model: nn.Module | None) -> None:
        """Hold a model without registering it: no parameter of this module, in no state dict."""
        object.__setattr__(self, name, model)

    def _keep_teacher(self, teacher: nn.Module) -> None:
        self.keep("teacher", teacher.requires_grad_(False).eval())

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer given, else the student's, else the data module's, else nothing."""
        if self._tokenizer is None and self._student_source is not None:
            self._tokenizer = self._student_source.tokenizer()
        return self._tokenizer

    def student_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Return the tokenizer of the student, see `HasStudent`."""
        return self.tokenizer

    def models_by_name(self) -> dict[str, Pretrained | nn.Module | None]:
        """Return student and teacher, as they were given or as they are loaded."""
        return {"student": self._student_source or self.student, "teacher": self._teacher_source or self.teacher}

    def build_student(self) -> nn.Module:
        """Load the student if it is not there yet, and return it."""
        if self.student is None:
            assert self._student_source is not None
            self.student = self._student_source.model()
        return self.student

    def check_models(self, trainer: Trainer) -> None:
        """See whether student and teacher can be used, as far as that is known before they are loaded; once.

        Args:
            trainer: Of the run.

        Raises:
            SRDError: They cannot, with the reason.
        """
        if self._models_checked:
            return
        tokenizer = self._tokenizer_of_rows(trainer)
        for model, name in ((self._student_source or self.student, "student"), (self._teacher_of(), "teacher")):
            if isinstance(model, Pretrained):
                model.check(tokenizer)
            elif model is not None:
                check_module(model, f"the {name}", tokenizer)
        self._check_same_family()
        self._models_checked = True

    def check_cache(self, trainer: Trainer) -> None:
        """See whether the teacher can be cached where it is to be, and that nothing else is cached there.

        Args:
            trainer: Of the run.

        Raises:
            StorageError: Nothing can be written there, or the cache there is another one's, or damaged.
        """
        folder = self._cache_folder(trainer, {})
        check_folder(folder, "teacher_cache_dir" if self.teacher_cache_dir else "default_root_dir")
        if self.teacher_cache_dir is not None:  # else it is named after what it is made of

            def look() -> None:
                if (folder / MANIFEST).exists():
                    check_manifest(folder, self._cache_made_of())

            Team().from_first(look)

    def _cache_made_of(self) -> dict[str, str]:
        if self._teacher_digest is None or self._teacher_source is None:  # files stay, weights may change
            self._teacher_digest = teacher_digest(cast(Any, self._teacher_of()))
        return {"teacher": self._teacher_digest, "kind": repr(self._cache_kind())}

    def _cache_kind(self) -> HiddenStates | TopK:
        return HiddenStates(self.teacher_cache_dtype) if self.teacher_cache == "hidden" else TopK(self.top_k)

    def _teacher_of(self) -> Pretrained | nn.Module | None:
        return self._teacher_source or self.teacher

    def _check_same_family(self) -> None:
        if self._student_source is None or self._teacher_source is None or self._models_checked:
            return
        check_same_tokenizer(cast(Any, self.tokenizer), self._teacher_source.tokenizer())
        if self._student_source == self._teacher_source:
            rank_zero_warn(
                f"student and teacher are the same model {self._student_source.name}: the distillation loss begins at "
                "0, and only holds the student where it is"
            )

    def _tokenizer_of_rows(self, trainer: Trainer) -> PreTrainedTokenizerBase | None:
        """Return the tokenizer of an `SRDDataModule`, or the one that it will take; else what was given, if any."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, HasCuratedRows):
            return self._tokenizer
        return data.rows_tokenizer() or self.tokenizer

    def setup(self, stage: str) -> None:
        """Before training: let the teacher be cached, where that is asked for. Data modules are set up by now."""
        self._cached = None
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, HasCuratedRows):
            data.use_batch_columns(None)
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
            raise SettingError("nothing is to be cached: set teacher_cache to hidden or topk")
        if not isinstance(data, HasCuratedRows):
            raise SettingError("teacher_cache needs an SRDDataModule: its batches bring along what is cached")
        if is_sharded(self.teacher):
            raise ModelError("an earlier run has sharded the teacher, which cannot be cached then; make a new module")
        made_of = Team().from_first(self._cache_made_of)
        cache, cached = cache_teacher(
            data.rows_to_cache(),
            self._cache_folder(self.trainer, made_of),
            self._cache_kind(),
            made_of,
            self._teacher_on_device,
            self.shared_vocabulary,
            width_of(cast(Any, self._teacher_of())),
        )
        data.use_batch_columns(cache.batch)
        if self._teacher_source is not None:  # it can be loaded again
            self.keep("teacher", None)
        return cached

    def _cache_folder(self, trainer: Trainer, made_of: Mapping[str, str]) -> Path:
        return Path(self.teacher_cache_dir or Path(trainer.default_root_dir) / "teacher" / digest(made_of))

    def _teacher_on_device(self) -> nn.Module:
        if self.teacher is None:
            self._keep_teacher(cast(Pretrained, self._teacher_source).model())
        return cast(nn.Module, self.teacher).to(self.trainer.strategy.root_device)

    def configure_model(self) -> None:
        """Load what is not there yet. Called by Lightning, possibly more than once."""
        if self.teacher is None:
            self._check_same_family()
        student = self.build_student().train()  # transformers load in eval mode, without dropout
        if self.activation_checkpointing:
            cast(Any, student).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if self._trainer and shards_student(self._trainer):
            if self._skeleton is None:
                self.keep("_skeleton", without_weights(student))
            shard_student(student, self)
        if self._teacher_source is not None and self.teacher is None and self._cached is None:
            self._keep_teacher(self._teacher_source.model())

    def place_teacher(self) -> None:
        """Put the teacher, which Lightning does not know, where it is to be."""
        if self._cached is not None:
            self._cached = self._cached.to(self.device)
            if (dtype := compute_dtype(self.trainer)) is not None:  # once, not at every step
                self._cached = self._cached.to(dtype)
        elif self.teacher is not None:
            place_teacher(self.teacher, self, self.teacher_placement)

    def whole_student(self, only_first: bool = False) -> nn.Module | None:
        """Return the student with all of its weights: itself, or while a run shards it a copy.

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

    def shared_vocabulary(self, teacher: nn.Module | CachedTeacher) -> int | None:
        """Return how many tokens the student shares with a teacher, or nothing where all are."""
        if isinstance(teacher, CachedTeacher):
            return len(teacher.head.weight)
        both_known = self._student_source is not None and self._teacher_source is not None
        sizes = vocabulary_size(self.build_student()), vocabulary_size(teacher)
        return shared_vocabulary(*sizes, self.tokenizer if both_known else None)
