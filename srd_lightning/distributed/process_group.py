"""Work of rank 0, results of all ranks, and waiting without a time limit; a failure on one rank ends all."""

from __future__ import annotations

import contextlib
import datetime
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch.distributed as dist

from srd_lightning.errors import RankError

T = TypeVar("T")
POLL = 0.05
"""Seconds between two looks at whether the others are done."""
BEAT = 1.0
"""Seconds between two heartbeats of a rank."""
PATIENCE = 60.0
"""Seconds without a heartbeat after which a rank counts as gone."""


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
    def work_then_wait(self) -> Iterator[Callable[[], None]]:
        """Work on one's share, then wait for the others, however long they take.

        A collective operation would time out, and would not say why. Signs stand in the store of the process group,
        with a heartbeat of each rank: nothing depends on a file system.

        Yields:
            A function to call now and then: it raises when another rank has failed or is gone.

        Raises:
            RankError: Another process has failed, with its reason, or is gone.
        """
        if self.size == 1:
            yield lambda: None
            return
        signs = Signs(_default_store(), self.rank0_result(lambda: uuid.uuid4().hex), self.rank, self.size)
        with signs.heartbeat():
            dist.barrier()
            try:
                yield signs.check
            except Exception as error:
                signs.fail(reason_of(self.rank, error))
                raise
            signs.done()
            while not signs.all_done():
                signs.check()
                time.sleep(POLL)
            dist.barrier()


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
    store = _default_store()
    try:
        store.set(keys[team.rank], "" if lost else reason_of(team.rank, error))
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
    """What ranks tell each other while each does its share: that they live, are done, or have failed.

    Args:
        store: Of the process group, which works when its collectives no longer do.
        name: Of this piece of work, the same in all ranks.
        rank: Of this process.
        size: Number of ranks.

    Example:
        >>> store = dist.HashStore()
        >>> first, second = (Signs(store, "work", rank, 2) for rank in (0, 1))
        >>> first.done(), first.all_done(), second.done(), first.all_done()
        (None, False, None, True)
    """

    def __init__(self, store: Any, name: str, rank: int, size: int) -> None:
        self._store = store
        self._name = f"srd_lightning/{name}"
        self._rank = rank
        self._size = size
        self._heard: dict[int, tuple[int, float]] = {}
        self._listened = time.monotonic()
        self._reason: str | None = None

    @contextmanager
    def heartbeat(self) -> Iterator[None]:
        """Let the others hear that this process lives, and hear why they fail, for as long as it is in here."""
        ended = threading.Event()

        def beat() -> None:
            with contextlib.suppress(RuntimeError):  # the rank that has the store is gone, as `check` will say
                while not ended.wait(BEAT):
                    self._listen()
                    self._store.add(self._beat(self._rank), 1)

        self._store.add(self._beat(self._rank), 1)
        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def done(self) -> None:
        """Say that this rank has done its share."""
        with contextlib.suppress(RuntimeError):  # the store is gone, as `all_done` will say
            self._store.add(f"{self._name}/done", 1)

    def fail(self, reason: str) -> None:
        """Say why this rank fails, and stay until the others have heard it: the store may end with this process."""
        self._reason = reason
        others = [f"{self._name}/heard/{rank}" for rank in range(self._size) if rank != self._rank]
        until = time.monotonic() + ANSWERS_WITHIN
        with contextlib.suppress(RuntimeError):  # perhaps because the store is gone
            self._store.set(f"{self._name}/heard/{self._rank}", "")
            self._store.set(f"{self._name}/failed/{self._rank}", reason)
            self._store.add(f"{self._name}/failures", 1)
            while not self._store.check(others) and time.monotonic() < until:
                time.sleep(POLL)

    def all_done(self) -> bool:
        """Return whether all ranks have done their share."""
        return self._counted(f"{self._name}/done") == self._size

    def check(self) -> None:
        """Raise if another rank has failed, or is gone without a word.

        Raises:
            RankError: With its reason.
        """
        self._listen()
        if self._reason is not None:
            raise RankError(self._reason)
        now = time.monotonic()
        if now - self._listened < BEAT:
            return
        self._listened = now
        for rank in range(self._size):
            beats = self._counted(self._beat(rank))
            last, since = self._heard.get(rank, (-1, now))
            self._heard[rank] = (beats, since if beats == last else now)
            if rank != self._rank and now - self._heard[rank][1] > PATIENCE:
                raise RankError(_killed(rank))

    def _listen(self) -> None:
        if self._reason is None and self._counted(f"{self._name}/failures"):
            keys = [f"{self._name}/failed/{rank}" for rank in range(self._size)]
            self._reason = next(self._store.get(key).decode() for key in keys if self._store.check([key]))
            self._store.set(f"{self._name}/heard/{self._rank}", "")

    def _beat(self, rank: int) -> str:
        return f"{self._name}/beat/{rank}"

    def _counted(self, key: str) -> int:
        try:
            return int(self._store.add(key, 0))  # to get waits for what is not there
        except RuntimeError as error:
            raise RankError(_killed(0)) from error  # which has the store


def _killed(rank: int) -> str:
    return f"process {rank} is gone: it was killed, perhaps for want of memory, or is cut off from the others"


def _default_store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _attempt(rank: int, work: Callable[[], T]) -> tuple[tuple[T | None, str | None], Exception | None]:
    """Return what other ranks are told, a result or the reason why there is none, and the error itself."""
    try:
        return (work(), None), None
    except Exception as error:
        return (None, reason_of(rank, error)), error


def _results(outcomes: list[Any], own_error: Exception | None) -> list[Any]:
    if own_error is not None:
        raise own_error
    for _, reason in outcomes:
        if reason is not None:
            raise RankError(reason)
    return [result for result, _ in outcomes]


def reason_of(rank: int, error: BaseException) -> str:
    """Return what other ranks are told of an error."""
    return f"process {rank} failed: {type(error).__name__}: {error}"
