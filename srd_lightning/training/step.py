"""What is computed of a batch: the objective, in the cheapest way that the models and the loss allow."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from srd_lightning.data.batches import check_batch, problem_of
from srd_lightning.data.layout import Inspected, LaidOut, Layout, lay_out, layout_of, predicting
from srd_lightning.distributed.fsdp2 import inside, is_sharded, release
from srd_lightning.distributed.process_group import Ranks
from srd_lightning.errors import ModelError, SettingError
from srd_lightning.losses.auxiliary import LAST, AuxiliaryLoss
from srd_lightning.losses.base import IGNORE_INDEX, DistillationLoss, needs_all_logits, upcast
from srd_lightning.losses.checks import check_scalar
from srd_lightning.losses.chunked import Objective, chunked_objective
from srd_lightning.losses.head import Head
from srd_lightning.losses.pieces import Logits
from srd_lightning.losses.top_k import TopKTeacher
from srd_lightning.models.calling import logits_of
from srd_lightning.models.family import is_encoder_decoder
from srd_lightning.models.split import BodyAndHead, CannotSplit, split
from srd_lightning.models.vocabulary import vocabulary_size
from srd_lightning.protocols import Around, unwatched
from srd_lightning.teacher.live import CachedTeacher, LiveTeacher, Teacher
from srd_lightning.training.diagnosis import cause_of
from srd_lightning.training.micro_batches import in_parts

Batch = Mapping[str, Tensor]


class DistillationStep:
    """The objective of a student and a teacher, which are attached for each run.

    Args:
        chunk: Response tokens whose logits exist at a time, by default as `chunk_size` says; ``None`` makes all logits.
        packing: See `SplitModel`.
        compile: Compile bodies, and what turns logits into gradients.
        micro_batch_tokens: Most rows times longest row of a part, see `lay_out`; by default batches are taken whole.
    """

    def __init__(
        self,
        chunk: int | Literal["auto"] | None = "auto",
        packing: bool = False,
        compile: bool = False,
        micro_batch_tokens: int | None = None,
    ) -> None:
        self.chunk = chunk
        self.packing = packing
        self.compile = compile
        self.micro_batch_tokens = micro_batch_tokens
        self.student: nn.Module | None = None
        self.around: Around = unwatched

    def attach(
        self, student: nn.Module, teacher: nn.Module | CachedTeacher | None, vocabulary: int | None = None
    ) -> DistillationStep:
        """Take the models of a run; they are looked at when its first batch comes.

        Args:
            student: The model that is trained.
            teacher: A model or a cache, or nothing where the distillation loss has no weight.
            vocabulary: Tokens that the two share, where their heads are of different size.

        Returns:
            Itself.
        """
        self.student, self.source, self.vocabulary = student, teacher, vocabulary
        self.parts: BodyAndHead | None = None
        self.teacher: Teacher | None = None
        self._looked = self._warned = False
        self._inspected: Inspected | None = None
        return self

    def inspect(self, batch: Any) -> Layout | None:
        """Return the layout of a batch, if it is sound, while it is on the host; if not, the step will say so."""
        sound = self.student is not None and problem_of(batch, self._tokens, self._encoder_decoder) is None
        return self._lay_out(batch) if sound else None

    def expect(self, batch: Any, layout: Layout | None) -> None:
        """Keep the layout of the batch, now on its device, that the next step will be given."""
        self._inspected = None if layout is None else Inspected.of(batch, layout)

    def laid_out(self, batch: Any, name: str) -> LaidOut:
        """Return a batch with its layout, which makes the host wait where it was not inspected, or was changed since.

        Args:
            batch: Any.
            name: Of the batch, for the message.

        Raises:
            DataError: It is not what it must be; see `check_batch`.
        """
        if self._inspected is not None and self._inspected.is_of(batch):
            return LaidOut(batch, self._inspected.layout)
        return LaidOut(batch, self._lay_out(check_batch(batch, self._tokens, name, self._encoder_decoder)))

    def _lay_out(self, batch: Batch) -> Layout:
        return lay_out(batch, self.packing, self.micro_batch_tokens)

    @property
    def _tokens(self) -> int | None:
        return self.vocabulary or vocabulary_size(self.student)

    @property
    def _encoder_decoder(self) -> bool:
        return is_encoder_decoder(self.student)

    def objective(
        self,
        batch: Batch,
        loss: DistillationLoss,
        kd_weight: float,
        num_tokens: Tensor | None = None,
        auxiliary: Sequence[AuxiliaryLoss] = (),
    ) -> Objective:
        """Return the objective of a batch, taken in parts where it is large.

        Args:
            batch: See `check_batch`; and what is cached of the teacher; see `laid_out`.
            loss: The distillation loss.
            kd_weight: Its share.
            num_tokens: What sums over tokens are divided by, a scalar; by default their number.
            auxiliary: Losses of hidden states, whose weighted means are added to the loss.

        Raises:
            SettingError: It has a share, and there is no teacher.
            ModelError: Auxiliary losses need hidden states, and a model cannot be used as body and head.
        """
        if kd_weight > 0 and self.source is None:
            raise SettingError(
                f"kd_weight is {kd_weight}, but there is no teacher to learn from; give one, or keep it at 0"
            )
        if not self._looked:
            self._probe_models(batch)
        if not self._warned and self.parts is not None and kd_weight > 0 and needs_all_logits(loss):
            self._warned = True
            rank_zero_info(_all_logits(loss.why_all_logits))
        if not isinstance(batch, LaidOut):
            batch = LaidOut(batch, self._lay_out(batch))
        if num_tokens is None:
            num_tokens = torch.full((), max(len(batch.layout.targets), 1), device=batch["labels"].device)
        whole = self.parts is None or (kd_weight > 0 and needs_all_logits(loss))
        if auxiliary:
            self._check_hidden_states(None if whole else self.parts)
        parts = list(batch.parts())
        way = self._from_all_logits
        if not whole:
            cast_head = self._cast_head(batch["labels"].device.type) if len(parts) > 1 else None
            way = functools.partial(self._from_chunks, auxiliary=auxiliary, cast_head=cast_head)
        shares = [functools.partial(way, part, loss, kd_weight, num_tokens) for part in parts]
        if len(shares) == 1:
            objective = shares[0]()
        else:
            modules = (cast(nn.Module, self.student), loss, *auxiliary)
            objective = in_parts(shares, itertools.chain(*(module.parameters() for module in modules)))
        if isinstance(self.source, nn.Module):
            release(self.source)
        return objective

    def why_not_finite(self, batch: Batch, trained: bool) -> str | None:
        """Return which model makes the loss of a batch NaN or infinite, if one does; see `cause_of`."""
        try:
            student = LiveTeacher(cast(nn.Module, self.student), self.parts).logits(batch, self.vocabulary)
            live = self.teacher if isinstance(self.teacher, LiveTeacher) else None  # what is kept was looked at
            teacher = None if live is None else live.logits(batch, self.vocabulary)
            return cause_of(student, teacher, layout_of(batch).targets, trained)
        except Exception:  # what it is to explain must not be hidden by it
            return None

    def _check_hidden_states(self, parts: BodyAndHead | None) -> None:
        found = {"student": parts}
        if isinstance(self.teacher, LiveTeacher):
            found["teacher"] = self.teacher.parts
        if lacking := [name for name, parts in found.items() if parts is None]:
            raise ModelError(
                f"auxiliary losses need the hidden states of both models, but the {lacking[0]} is not used as body and "
                "head, for the reason that was told; leave them out, or choose another model or loss"
            )

    @torch.no_grad()
    def _cast_head(self, device: str) -> Head | None:
        """Return the student's head as autocast casts it, once for all parts of a batch."""
        if self.parts is None or not torch.is_autocast_enabled(device):
            return None
        return self.parts.head().narrow(self.vocabulary).to(torch.get_autocast_dtype(device))

    def _from_chunks(
        self,
        batch: LaidOut,
        loss: DistillationLoss,
        kd_weight: float,
        num_tokens: Tensor,
        auxiliary: Sequence[AuxiliaryLoss],
        cast_head: Head | None,
    ) -> Objective:
        parts, chunk = self.parts, self.chunk
        assert parts is not None, "without parts all logits are made"
        assert chunk is not None
        targets, rows = batch.layout.targets, batch.layout.rows
        logits, theirs = None, dict[int, Tensor]()
        if self.teacher is not None and (kd_weight > 0 or auxiliary):
            numbers = {layer for other in auxiliary for layer in other.teacher_layers}
            logits, theirs = self._ask_teacher(batch, numbers)

        def work() -> tuple[Objective, dict[int, Tensor]]:
            head, own = parts.head().narrow(self.vocabulary), parts.layers(batch, layers)
            return chunked_objective(
                own[LAST], head, targets, loss, logits, kd_weight, num_tokens, chunk, self.compile, rows, cast_head
            ), own if auxiliary else {}

        layers = (LAST, *(layer for other in auxiliary for layer in other.student_layers))
        objective, own = inside(parts.model, work) if is_sharded(parts.model) else work()
        for other in auxiliary:
            objective = objective._replace(loss=objective.loss + other(own, theirs) / num_tokens)
        return objective

    def _probe_models(self, batch: Batch) -> None:
        """See on the first batch which models can be taken apart, and say which cannot."""
        self._looked = True
        if self.chunk is not None:
            self.parts = self._split(cast(nn.Module, self.student), batch)
        if isinstance(self.source, nn.Module):
            self.teacher = LiveTeacher(self.source, None if self.chunk is None else self._split(self.source, batch))
        else:
            self.teacher = self.source

    def _split(self, model: nn.Module, batch: Batch) -> BodyAndHead | None:
        """Take a model apart, or on no rank: sharded weights are gathered by all at once."""
        found: list[BodyAndHead] = []

        def reason() -> str | None:
            try:
                found.append(split(model, batch, self.packing))
            except CannotSplit as error:
                return str(error)
            return None

        if reasons := [why for why in Ranks().all_results(reason) if why is not None]:
            quietly = "set chunk to null to have it so without being told"
            rank_zero_warn(_all_logits(f"{type(model).__name__}: {reasons[0]}; {quietly}"))
            return None
        (parts,) = found
        if self.compile:
            parts.body.compile()
        return parts

    def _from_all_logits(
        self, batch: LaidOut, loss: DistillationLoss, kd_weight: float, num_tokens: Tensor
    ) -> Objective:
        positions, targets = batch.layout.positions, batch.layout.targets
        logits = logits_of(cast(nn.Module, self.student), batch)
        own = functools.partial(_rows_of, logits, positions, self.vocabulary)
        count = torch.full((), max(len(targets), 1), device=logits.device)
        total = logits.new_zeros((), dtype=torch.float32)
        ce = kd = total
        if kd_weight < 1:
            ce = nn.functional.cross_entropy(upcast(own()), targets, reduction="sum") / count
            total = total + (1 - kd_weight) * ce
        if kd_weight > 0:
            teacher = self._all_teacher_logits(batch)
            if needs_all_logits(loss):
                logits = logits[..., : self.vocabulary]
                full = teacher.new_zeros(logits.shape[:2].numel(), teacher.shape[-1])
                full = full.index_copy_(0, positions, teacher).view(*logits.shape[:2], -1)
                kd = check_scalar(loss, loss(*_as_of_decoder(logits, full, batch)))
            else:
                kd = loss.of_tokens(own(), teacher, count, batch.layout.rows)
            total = total + kd_weight * kd
        share = torch.full_like(count, len(targets)) / num_tokens
        return Objective(total * share, (ce * share).detach(), (kd * share).detach())

    def _ask_teacher(self, batch: Batch, layers: Collection[int] = ()) -> tuple[Logits, dict[int, Tensor]]:
        """Return what the teacher says, and the hidden states of some layers; tell when it is at work."""
        assert self.teacher is not None
        around = self.around
        with around("teacher"):
            logits, found = self.teacher.logits_and_layers(batch, self.vocabulary, layers)

        def of_tokens(tokens: slice | Tensor) -> Tensor | TopKTeacher:
            with around("teacher"):
                return logits(tokens)

        return of_tokens, found

    def _all_teacher_logits(self, batch: Batch) -> Tensor:
        """Return ``[N, V]``."""
        logits = self._ask_teacher(batch)[0](slice(None))
        if isinstance(logits, TopKTeacher):
            raise SettingError(
                "teacher_cache topk knows no logits, which this student or loss needs all of: use hidden"
            )
        return logits


def _rows_of(logits: Tensor, positions: Tensor, vocabulary: int | None) -> Tensor:
    """Take ``[N, V]`` out of ``[B, T, V]``."""
    return logits.flatten(0, 1).index_select(0, positions)[:, :vocabulary]


def _as_of_decoder(student: Tensor, teacher: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits of student and teacher and the labels, where each position predicts the label of the next."""
    _, ahead = predicting(batch)
    if ahead == 1:
        return student, teacher, batch["labels"]
    pad = nn.functional.pad
    return pad(student, (0, 0, 0, 1)), pad(teacher, (0, 0, 0, 1)), pad(batch["labels"], (1, 0), value=IGNORE_INDEX)


def _all_logits(why: str) -> str:
    return f"all logits are made at every step, which takes more memory and time, because of {why}"
