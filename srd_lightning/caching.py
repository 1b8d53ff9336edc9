"""The teacher is run once over all rows, by all processes, before training; after that it need not be there."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoConfig

from srd_lightning.fingerprint import weights_digest
from srd_lightning.models import Pretrained
from srd_lightning.objective import Head
from srd_lightning.rows import collate, lengths_of
from srd_lightning.sampling import of_like_length
from srd_lightning.split import NotSplit, SplitModel, split
from srd_lightning.teacher import CachedTeacher, HiddenStates, TopK
from srd_lightning.teacher_cache import TeacherCache
from srd_lightning.team import Team

TOKENS_AT_ONCE = 4096
"""With padding, that go through the teacher at one time."""


def cache_teacher(
    rows: Dataset,
    folder: Path,
    kind: HiddenStates | TopK,
    made_of: Mapping[str, str],
    load: Callable[[], nn.Module],
    vocabulary: Callable[[nn.Module], int | None],
) -> tuple[TeacherCache, CachedTeacher]:
    """Let the teacher see each row that it has not seen yet, and keep what it says.

    Args:
        rows: Tokenised rows.
        folder: Which all processes see.
        kind: What to keep.
        made_of: What it depends on, by name of the part.
        load: Gives the teacher, on the device where it is to run; called only where a row or the head is missing.
        vocabulary: Says how many tokens student and teacher share.

    Returns:
        The cache, and the teacher that lives on it.

    Raises:
        ValueError: The folder was made of something else, or the teacher has no head that can be taken off.
        OSError: The disk is too small.
    """
    team = Team()
    cache, missing = team.from_first(lambda: _open(folder, kind, made_of, rows))
    head = cache.head()
    if len(missing) or head is None:
        chosen = rows.select(missing if len(missing) else [0])
        model = load()
        parts = _take_apart(model, chosen)
        head = parts.head().narrow(vocabulary(model))
        width = head.weight.shape[1]
        team.from_first(lambda: cache.check_room(rows.select(missing), width))
        batches = list(of_like_length(lengths_of(chosen), TOKENS_AT_ONCE)) if len(missing) else []
        with team.sharing(folder) as check:
            _fill(cache, chosen, parts, head, batches[team.rank :: team.size], check, show=team.rank == 0)
        team.from_first(functools.partial(cache.save_head, head))
        cache.reread()
        head = cast(Head, cache.head())  # the model's own would keep the file of all its weights in memory
    return cache, CachedTeacher(kind, head)


def _open(
    folder: Path, kind: HiddenStates | TopK, made_of: Mapping[str, str], rows: Dataset
) -> tuple[TeacherCache, NDArray[np.int64]]:
    cache = TeacherCache(folder, kind, made_of)
    missing = cache.missing(rows)
    cache.reread()  # nothing is mapped when it is sent to the other processes
    return cache, missing


def _take_apart(model: nn.Module, rows: Dataset) -> SplitModel:
    try:
        return split(model, _batch([rows[0]], model))
    except NotSplit as error:
        raise ValueError(f"this teacher cannot be cached, set teacher_cache to none: {error}") from error


def _fill(
    cache: TeacherCache,
    rows: Dataset,
    parts: SplitModel,
    head: Head,
    batches: Sequence[NDArray[np.int64]],
    check: Callable[[], None],
    show: bool,
) -> None:
    progress = tqdm(total=sum(map(len, batches)), desc="teacher cache", unit="row", disable=not show or not batches)
    try:
        for batch in batches:
            check()
            some = rows.select(batch).to_list()
            with torch.no_grad():
                cache.append(some, cache.kind.observe(parts.hidden(_batch(some, parts.model)), head))
            progress.update(len(batch))
    finally:
        progress.close()
        cache.flush()


def _batch(rows: Sequence[Mapping[str, Any]], model: nn.Module) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {name: values.to(device) for name, values in collate(rows, pad_token_id=0).items()}


def teacher_digest(source: Pretrained | nn.Module) -> str:
    """Return a digest of a teacher: of files, a commit on the hub or weights, without loading it if that can be."""
    if isinstance(source, nn.Module):
        return weights_digest(source)
    digest = hashlib.sha256(repr(replace(source, name="", attn_implementation=None)).encode())
    folder = Path(source.name)
    if folder.is_dir():
        files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".gguf"))
        for path in [folder / "config.json", *files]:
            if path.exists():
                with path.open("rb") as file:
                    while block := file.read(2**24):
                        digest.update(block)
    else:
        config: Any = AutoConfig.from_pretrained(
            source.name, revision=source.revision, trust_remote_code=source.trust_remote_code
        )
        digest.update(f"{source.name} {getattr(config, '_commit_hash', source.revision)}".encode())
    return digest.hexdigest()[:16]
