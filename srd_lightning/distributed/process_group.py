"""Work of rank 0, results of all ranks, and waiting without a time limit; a failure on one rank ends all."""

from __future__ import annotations

import contextlib
import datetime
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import filelock
import torch.distributed as dist

from srd_lightning.errors import RankError
from srd_lightning.storage import write_atomically

T = TypeVar("T")
POLL = 0.05
"""Seconds between two looks at whether the others are done."""


class Ranks:
    """The processes of ``torch.distributed``; one alone where that is not in use."""

    def __init__(self) -> None:
        in_use = dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if in_use else (0, 1)

    def rank0_result(self, work: Callable[[], T]) -> T:
        """Let rank 0 work; return its result in all, or raise its error in all.

        Args:
            work: Runs in rank 0 only; its result must be picklable.
        """
        if self.size == 1:
            return work()
        outcome, error = _attempt(self.rank, work) if self.rank == 0 else (None, None)
        outcomes: list[Any] = [outcome]
        dist.broadcast_object_list(outcomes, src=0)
        (result,) = _results(outcomes, error)
        return cast(T, result)

    def all_results(self, work: Callable[[], T]) -> list[T]:
        """Let all ranks work; return all results in all, or raise an error in all: one's own, else the first."""
        if self.size == 1:
            return [work()]
        outcome, error = _attempt(self.rank, work)
        outcomes: list[Any] = [None] * self.size
        dist.all_gather_object(outcomes, outcome)
        return _results(outcomes, error)

    @contextmanager
    def work_then_wait(self, folder: Path) -> Iterator[Callable[[], None]]:
        """Work on one's share, then wait for the others, however long they take.

        A collective operation would time out, and would not say why. Signs are files in a folder that all see; each
        process holds a lock on its own, which ends with it.

        Args:
            folder: For the signs.

        Yields:
            A function to call now and then: it raises when another rank has failed or is gone.

        Raises:
            RankError: Another process has failed, with its reason, or is gone.
        """
        if self.size == 1:
            yield lambda: None
            return
        signs = Signs(self.rank0_result(lambda: _new_folder(folder)), self.rank, self.size)
        with signs.life(self.rank):
            dist.barrier()
            try:
                yield signs.check
            except Exception as error:
                signs.put("failed", _reason(self.rank, error))
                raise
            signs.put("done")
            while signs.missing():
                signs.check()
                time.sleep(POLL)
            dist.barrier()
        if self.rank == 0:
            shutil.rmtree(signs.folder, ignore_errors=True)  # on NFS others may still hold their files


PEER_IS_GONE = ("connection closed by peer", "connection reset by peer", "broken pipe", "remote process exited", "nccl")
"""How the back ends of ``torch.distributed`` say that they have lost another rank."""
ANSWERS_WITHIN = 5
"""Seconds after which a rank that has not failed as well counts as gone."""


def tell_failure(error: BaseException) -> str | None:
    """Let the other ranks know why this one fails; return which rank is to blame where it is another one.

    What is said stands in the store of the process group, which works when its collectives no longer do.

    Args:
        error: That ends this rank.

    Returns:
        Nothing where the error is this rank's own.
    """
    team, words = Ranks(), str(error).lower()
    lost = isinstance(error, RuntimeError) and any(sign in words for sign in PEER_IS_GONE)
    if team.size == 1:
        return None
    keys = [f"srd_lightning/failed/{rank}" for rank in range(team.size)]
    store = dist.distributed_c10d._get_default_store()
    try:
        store.set(keys[team.rank], "" if lost else _reason(team.rank, error))
        if not lost:
            return None
        with contextlib.suppress(RuntimeError):  # they have not all said something in time
            store.wait(keys, datetime.timedelta(seconds=ANSWERS_WITHIN))
        said = {rank: store.get(key).decode() for rank, key in enumerate(keys) if store.check([key])}
    except RuntimeError:  # the rank that has the store is gone
        return _gone([0]) if lost else None
    reasons = [reason for reason in said.values() if reason]
    silent = [rank for rank in range(team.size) if rank not in said]
    return reasons[0] if reasons else _gone(silent) if silent else None


def _gone(ranks: Sequence[int]) -> str:
    names = f"rank {ranks[0]} is" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} are"
    return (
        f"{names} gone: killed, perhaps for want of memory, or cut off from the others; its own output may say more, "
        "and the run goes on from its last checkpoint with ckpt_path=last"
    )


class Signs:
    """Signs of the ranks of a team, in a folder."""

    def __init__(self, folder: Path, rank: int, size: int) -> None:
        self.folder = folder
        self.rank = rank
        self.others = [other for other in range(size) if other != rank]

    def life(self, rank: int) -> filelock.BaseFileLock:
        """Return the lock that a process holds as long as it lives."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return filelock.FileLock(self.folder / f"alive-{rank}", timeout=0)

    def put(self, sign: str, text: str = "") -> None:
        """Leave a sign: ``done`` or ``failed``."""
        write_atomically(self.folder / f"{sign}-{self.rank}", text.encode())

    def missing(self) -> list[int]:
        """Return the other ranks that are not done."""
        return [other for other in self.others if not (self.folder / f"done-{other}").exists()]

    def check(self) -> None:
        """Raise if another rank has failed, or is gone without a sign."""
        for failure in sorted(self.folder.glob("failed-*")):
            raise RankError(failure.read_text())
        for other in self.missing():
            try:
                self.life(other).acquire().lock.release()
            except filelock.Timeout:  # it lives
                continue
            if other in self.missing() and not (self.folder / f"failed-{other}").exists():
                raise RankError(f"process {other} is gone: it was killed, perhaps for want of memory")


def _new_folder(folder: Path) -> Path:
    for old in folder.glob(".signs-*"):  # of a run that did not end well
        shutil.rmtree(old)
    return folder / f".signs-{uuid.uuid4().hex}"


def _attempt(rank: int, work: Callable[[], T]) -> tuple[tuple[T | None, str | None], Exception | None]:
    """Return what other ranks are told, a result or the reason why there is none, and the error itself."""
    try:
        return (work(), None), None
    except Exception as error:
        return (None, _reason(rank, error)), error


def _results(outcomes: list[Any], own_error: Exception | None) -> list[Any]:
    if own_error is not None:
        raise own_error
    for _, reason in outcomes:
        if reason is not None:
            raise RankError(reason)
    return [result for result, _ in outcomes]


def _reason(rank: int, error: BaseException) -> str:
    return f"process {rank} failed: {type(error).__name__}: {error}"
