"""The teacher is run once over all rows, by all ranks, before training; after that it need not be there."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray
from torch import Tensor, nn

from srd_lightning.data.samplers import batches_by_token_budget
from srd_lightning.data.tokenization import lengths_of, response_lengths
from srd_lightning.distributed.fsdp2 import inside, release
from srd_lightning.distributed.process_group import Ranks
from srd_lightning.errors import ModelError, StorageError
from srd_lightning.losses.head import Head
from srd_lightning.models.family import family_of
from srd_lightning.models.lockstep import share
from srd_lightning.models.pretrained import Pretrained
from srd_lightning.models.split import BodyAndHead, CannotSplit, split
from srd_lightning.progress import progress_bar
from srd_lightning.teacher.cache import TeacherCache
from srd_lightning.teacher.live import CachedTeacher, HiddenStates, TopK

TOKENS_AT_ONCE = 4096
"""With padding, that go through the teacher at one time."""


def cache_teacher(
    rows: Dataset,
    folder: Path,
    kind: HiddenStates | TopK,
    made_of: Mapping[str, str],
    load: Callable[[], nn.Module],
    vocabulary: Callable[[nn.Module], int | None],
    width: int | None = None,
    device: torch.device | None = None,
) -> tuple[TeacherCache, CachedTeacher]:
    """Let the teacher see each row that it has not seen yet, and keep what it says; one that is sharded in lockstep.

    Args:
        rows: Tokenised rows.
        folder: Which all ranks see.
        kind: What to keep.
        made_of: What it depends on, by name of the part.
        load: Gives the teacher, where it is to run, whole or sharded; called only where a row or the head is missing.
        vocabulary: Says how many tokens student and teacher share.
        width: Of the teacher's hidden states, if it is known: then the disk is looked at before the teacher is loaded.
        device: Where it runs; by default where its weights are.

    Returns:
        The cache, and the teacher that lives on it.

    Raises:
        StorageError: The folder was made of something else, another run writes to it, or the disk is too small.
        ModelError: The teacher has no head that can be taken off, or says NaN or inf.
    """
    team = Ranks()
    with ExitStack() as stack:

        def begin() -> tuple[TeacherCache, NDArray[np.int64]]:
            cache = stack.enter_context(TeacherCache.locked(folder, kind, made_of))
            missing = cache.missing(rows)
            cache.reread()  # nothing is mapped when it is sent to the other ranks
            if len(missing) and width is not None:
                check_room(cache, rows.select(missing), width)
            return cache, missing

        cache, missing = team.rank0_result(begin)
        head = cache.head()
        if len(missing) or head is None:
            chosen = rows.select(missing if len(missing) else [0])
            model = load()
            device = device or next(model.parameters()).device
            parts, common = _take_apart(model, chosen, device), vocabulary(model)
            if len(missing) and width is None:
                found = inside(model, parts.head).weight.shape[1]
                team.rank0_result(lambda: check_room(cache, chosen, found))
            batches = list(batches_by_token_budget(lengths_of(chosen), TOKENS_AT_ONCE)) if len(missing) else []
            with share(model) as check:
                mine = batches[team.rank :: team.size]
                _fill(cache, chosen, parts, common, mine, device, check, show=team.rank == 0)

            def save() -> None:
                head = parts.head().narrow(common)
                team.rank0_result(functools.partial(cache.save_head, head))

            inside(model, save)
            release(model)
            cache.reread()
            head = cast(Head, cache.head())  # the model's own would keep the file of all its weights in memory
    return cache, CachedTeacher(kind, head)


def check_room(cache: TeacherCache, rows: Dataset, width: int) -> None:
    """Say what rows will take on disk, and refuse to begin what it cannot hold.

    Args:
        cache: Where they are to be.
        rows: Those that are not there yet.
        width: Of the teacher's hidden states.

    Raises:
        StorageError: The disk is too small.
    """
    tokens = int(np.sum(rows["length"]) - np.sum(rows["prompt_length"]))
    needed, free = tokens * cache.kind.bytes_per_token(width), shutil.disk_usage(cache.folder).free
    rank_zero_info(
        f"teacher cache: {len(rows)} rows with {tokens} response tokens take {_readable(needed)} in {cache.folder}"
    )
    if needed > free:
        raise StorageError(
            f"the teacher cache needs {_readable(needed)} in {cache.folder}, where {_readable(free)} are free; "
            "point `teacher_cache.dir` to a larger disk, or keep less with teacher_cache: topk"
        )


def _readable(size: float) -> str:
    """Return a number of bytes as one reads it."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"


def width_of(source: Pretrained | nn.Module) -> int | None:
    """Return how wide the hidden states of a model are, if its configuration says so."""
    text = _text_config(source)
    width = getattr(text, "word_embed_proj_dim", None) or getattr(text, "hidden_size", None)  # OPT's head is narrower
    return width if isinstance(width, int) else None


def depth_of(source: Pretrained | nn.Module) -> int | None:
    """Return how many blocks a model has, if its configuration says so."""
    depth = getattr(_text_config(source), "num_hidden_layers", None)
    return depth if isinstance(depth, int) else None


def _text_config(source: Pretrained | nn.Module) -> Any:
    config: Any = source.config() if isinstance(source, Pretrained) else getattr(source, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else None


def _take_apart(model: nn.Module, rows: Dataset, device: torch.device) -> BodyAndHead:
    try:
        return split(model, _batch([rows[0]], model, device))
    except CannotSplit as error:
        raise ModelError(f"this teacher cannot be cached, set teacher_cache to none: {error}") from error


def _fill(
    cache: TeacherCache,
    rows: Dataset,
    parts: BodyAndHead,
    vocabulary: int | None,
    batches: Sequence[NDArray[np.int64]],
    device: torch.device,
    check: Callable[[], None],
    show: bool,
) -> None:
    def look(batch: Mapping[str, Tensor]) -> tuple[Tensor, Mapping[str, Tensor]]:
        hidden = parts.hidden(batch)
        return hidden, cache.kind.observe(hidden, parts.head().narrow(vocabulary))

    progress = progress_bar(sum(map(len, batches)), "teacher cache", show and len(batches) > 0)
    try:
        for batch in batches:
            check()
            some = rows.select(batch).to_list()
            with torch.no_grad():
                hidden, kept = inside(parts.model, functools.partial(look, _batch(some, parts.model, device)))
            _check_finite(some, hidden, kept, parts.model)
            cache.append(some, kept)
            progress.update(len(batch))
    finally:
        progress.close()
        cache.flush()


def _check_finite(
    rows: Sequence[Mapping[str, Any]], hidden: Tensor, kept: Mapping[str, Tensor], model: nn.Module
) -> None:
    """Check that a teacher says numbers; only the log-probability of a token may be -inf."""
    known = kept["teacher_hidden"] if "teacher_hidden" in kept else kept["teacher_logp"][:, :1]
    finite = torch.isfinite(hidden).all(1)
    places = torch.nonzero(~(finite & torch.isfinite(known).all(1))).flatten().tolist()
    if not places:
        return
    ends = np.cumsum(response_lengths(rows))
    row = rows[int(np.searchsorted(ends, places[0], side="right"))]["id"]
    name = getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__
    if finite[places[0]] and "teacher_hidden" in kept:
        dtype = str(known.dtype).removeprefix("torch.")
        raise ModelError(
            f"the hidden states of the teacher {name} for row {row} are too large for teacher_cache.dtype {dtype}; "
            "take bfloat16 or float32"
        )
    raise ModelError(
        f"the teacher {name} gives NaN or inf for row {row}; load it in another dtype (float16 overflows where "
        "bfloat16 and float32 do not), or choose another teacher"
    )


def _batch(rows: Sequence[Mapping[str, Any]], model: nn.Module, device: torch.device) -> dict[str, Tensor]:
    family = family_of(getattr(model, "config", None))
    return {name: values.to(device) for name, values in family.collate(rows, pad_token_id=0).items()}
