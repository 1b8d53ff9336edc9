"""Processes that share a task: one prepares, all work, all hear of a failure, nobody waits in vain."""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from srd_lightning.store import write_atomically

T = TypeVar("T")
POLL = 0.05
"""Seconds between two looks at whether the others are done."""


class Team:
    """The processes of ``torch.distributed``; one alone where that is not in use."""

    def __init__(self) -> None:
        in_use = dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if in_use else (0, 1)

    def from_first(self, work: Callable[[], T]) -> T:
        """Let the first process work; return its result in all, or raise its error in all.

        Args:
            work: Runs in the first process only; its result must be picklable.
        """
        if self.size == 1:
            return work()
        outcome: list[Any] = [None, None]
        failure: Exception | None = None
        if self.rank == 0:
            try:
                outcome[0] = work()
            except Exception as error:
                outcome[1], failure = _reason(0, error), error
        dist.broadcast_object_list(outcome, src=0)
        if failure is not None:
            raise failure
        if outcome[1] is not None:
            raise RuntimeError(outcome[1])
        return outcome[0]  # type: ignore[no-any-return]

    @contextmanager
    def sharing(self, folder: Path) -> Iterator[Callable[[], None]]:
        """Work on one's share, then wait for the others, however long they take.

        A collective operation would time out, and would not say why. Signs are files in a folder that all see.

        Args:
            folder: For the signs.

        Yields:
            A function to call now and then: it raises when another process has failed.

        Raises:
            RuntimeError: Another process has failed; with its reason.
        """
        if self.size == 1:
            yield lambda: None
            return
        signs = folder / self.from_first(lambda: f".signs-{uuid.uuid4().hex}")

        def check() -> None:
            for failure in sorted(signs.glob("failed-*")):
                raise RuntimeError(failure.read_text())

        try:
            yield check
        except Exception as error:
            write_atomically(signs / f"failed-{self.rank}", _reason(self.rank, error).encode())
            raise
        write_atomically(signs / f"done-{self.rank}", b"")
        while len(list(signs.glob("done-*"))) < self.size:
            check()
            time.sleep(POLL)
        dist.barrier()
        if self.rank == 0:
            shutil.rmtree(signs)


def _reason(rank: int, error: Exception) -> str:
    return f"process {rank} failed: {type(error).__name__}: {error}"
