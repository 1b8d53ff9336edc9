"""The teacher of a module: where it comes from, whether it is cached, and where its weights are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from datasets import Dataset
from lightning import Trainer
from numpy.typing import NDArray
from torch import nn

from srd_lightning.digests import digest
from srd_lightning.distributed.fsdp2 import gathered_digest, is_sharded
from srd_lightning.distributed.placement import TeacherPlacement, compute_dtype, place_teacher
from srd_lightning.distributed.process_group import Ranks
from srd_lightning.errors import SettingError
from srd_lightning.models.pretrained import Pretrained, dtype_named
from srd_lightning.protocols import Around, HasCuratedRows, unwatched
from srd_lightning.storage import check_folder
from srd_lightning.teacher.cache import TeacherCache, check_same
from srd_lightning.teacher.live import CachedTeacher, HiddenStates, TopK
from srd_lightning.teacher.precompute import cache_teacher, width_of
from srd_lightning.teacher.products import cast_products

CacheKind = Literal["none", "hidden", "topk"]


@dataclass(frozen=True)
class CacheSettings:
    """What is kept on disk of a teacher, and where.

    Args:
        kind: ``hidden``: its final hidden states. ``topk``: its likeliest tokens; smaller, and not exact.
        k: Tokens that ``topk`` keeps of each distribution; 64 by default.
        dtype: Type in which ``hidden`` keeps them; bfloat16 by default.
        dir: Folder that all ranks see; by default one in the trainer's ``default_root_dir``, named after what the
            cache depends on.

    Example:
        >>> CacheSettings("topk", k=16).format
        TopK(k=16)
    """

    kind: Literal["hidden", "topk"]
    k: int | None = None
    dtype: str | None = None
    dir: str | None = None

    @property
    def format(self) -> HiddenStates | TopK:
        """What is kept of each response token."""
        return TopK(self.k or 64) if self.kind == "topk" else HiddenStates(dtype_named(self.dtype or "bfloat16"))


class TeacherHandle:
    """A frozen teacher, which is no part of the module for Lightning: in no state dict, and moved by nobody else.

    Args:
        source: The model, or what it is loaded from; nothing where the distillation loss has no weight.
        cache: What is kept of it on disk; by default it is run at every step.
        placement: Where the weights of one that is run are.
    """

    def __init__(
        self, source: Pretrained | nn.Module | None, cache: CacheSettings | None, placement: TeacherPlacement
    ) -> None:
        self.source = source if isinstance(source, Pretrained) else None
        self.model: nn.Module | None = None
        if isinstance(source, nn.Module):
            self._hold(source)
        self.cache = cache
        self.placement = placement
        self.cached: CachedTeacher | None = None
        """The teacher as it lives on in its cache, in a run that has one."""
        self.around: Around = unwatched
        self._digest: str | None = None
        self._products: torch.dtype | None = None

    def begin(self) -> None:
        """Forget the cache of an earlier run."""
        self.cached = None

    def _hold(self, model: nn.Module) -> nn.Module:
        self.model = model.requires_grad_(False).eval()
        return self.model

    @property
    def given(self) -> Pretrained | nn.Module | None:
        """The teacher as it was given."""
        return self.source or self.model

    @property
    def used(self) -> CachedTeacher | nn.Module | None:
        """What a run asks, once it is set up."""
        return self.cached or self.model

    def check_cache(self, trainer: Trainer) -> None:
        """See whether the teacher can be cached where it is to be, and that nothing else is cached there.

        Args:
            trainer: Of the run.

        Raises:
            StorageError: Nothing can be written there, or the cache there is another one's, or damaged.
        """
        folder, own = self._folder(trainer, {}), self.cache is not None and self.cache.dir is not None
        check_folder(folder, "teacher_cache.dir" if own else "default_root_dir")
        if own:  # else it is named after what it is made of
            made_of = self._made_of_for_first()
            Ranks().rank0_result(lambda: check_same(folder, made_of))

    def fill_cache(self, data: object, trainer: Trainer, vocabulary: Callable[[nn.Module], int | None]) -> None:
        """Let the teacher see all rows that its cache lacks; batches carry the rest from now on.

        Args:
            data: A `HasCuratedRows`, set up for ``fit``.
            trainer: Of the run.
            vocabulary: Says how many tokens student and teacher share.

        Raises:
            SettingError: Nothing is to be cached, or batches cannot carry it.
            ModelError: The teacher has no head that can be taken off, or says NaN or inf.
        """
        if self.cache is None:
            raise SettingError("nothing is to be cached: set teacher_cache to hidden or topk")
        if not isinstance(data, HasCuratedRows):
            raise SettingError("teacher_cache needs an SRDDataModule: its batches bring along what is cached")
        with self.around("teacher_cache"):
            made_of = Ranks().rank0_result(self._made_of_for_first())
            given = cast("Pretrained | nn.Module", self.given)
            cache, self.cached = cache_teacher(
                data.rows_to_cache(),
                self._folder(trainer, made_of),
                self.cache.format,
                made_of,
                lambda: self._ready_to_speak(trainer),
                vocabulary,
                width_of(given),
                trainer.strategy.root_device,
            )
        on_gpu = trainer.strategy.root_device.type == "cuda"
        data.use_batch_columns(functools.partial(cache.batch, pin_memory=on_gpu))
        if self.source is not None:  # it can be loaded again
            self.model = None

    def missing(self, rows: Dataset, trainer: Trainer) -> NDArray[np.int64]:
        """Return the places of rows that the cache lacks, all where there is none; nothing is written.

        Args:
            rows: Tokenised.
            trainer: Of the run.

        Raises:
            StorageError: The cache is another teacher's.
        """
        assert self.cache is not None, "nothing is to be cached"
        made_of = self._made_of()
        folder = self._folder(trainer, made_of)
        if not check_same(folder, lambda: made_of):
            return np.arange(len(rows))
        return TeacherCache(folder, self.cache.format, made_of).missing(rows)

    def load(self) -> nn.Module:
        """Load the teacher if it is not there yet, and return it."""
        if self.model is None:
            self._products = None
            self._hold(cast(Pretrained, self.source).model())
        return cast(nn.Module, self.model)

    def _ready_to_speak(self, trainer: Trainer) -> nn.Module:
        """Put it where it is to be, in the types of its weights: what is cached is the same in each place."""
        self.load()
        self._cast_products(None)
        model = cast(nn.Module, self.model)
        place_teacher(model, trainer, self.placement, None)
        return model

    def place(self, trainer: Trainer) -> None:
        """Put it where it is to be.

        Args:
            trainer: Of the run.
        """
        dtype = compute_dtype(trainer)
        if self.cached is not None:
            self.cached = self.cached.to(trainer.strategy.root_device)
            if dtype is not None:  # once, not at every step
                self.cached = self.cached.to(dtype)
        elif self.model is not None:
            self._cast_products(dtype)
            place_teacher(self.model, trainer, self.placement, dtype)

    def _made_of_for_first(self) -> Callable[[], dict[str, str]]:
        """Return what the first rank asks for what the cache is made of; of a sharded teacher all ranks say it now."""
        if self.source is None and is_sharded(self.model):
            made_of = self._made_of()
            return lambda: made_of
        return self._made_of

    def _cast_products(self, dtype: torch.dtype | None) -> None:
        """Cast the weights of products once, where autocast would do so at every step, of a model that is ours."""
        if self.source is None or self.placement != "replicate" or dtype == self._products:
            return
        if self._products is not None:  # by an earlier run, in another precision
            self._hold(self.source.model())
        if dtype is not None:
            cast_products(cast(nn.Module, self.model), dtype)
        self._products = dtype

    def _made_of(self) -> dict[str, str]:
        assert self.cache is not None
        if self.source is None:
            teacher = gathered_digest(cast(nn.Module, self.model))
        else:
            teacher = self._digest = self._digest or self.source.digest()  # files stay, weights may change
        return {"teacher": teacher, "kind": repr(self.cache.format)}

    def _folder(self, trainer: Trainer, made_of: Mapping[str, str]) -> Path:
        own = self.cache and self.cache.dir
        return Path(own or Path(trainer.default_root_dir) / "teacher" / digest(made_of))
