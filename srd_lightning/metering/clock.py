"""A clock that divides time into parts, each from one mark to the next: nothing is counted twice, and nothing is lost.

On a GPU the marks are events in its stream, so the parts are those of the device, and no step waits for them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

WHOLE = frozenset({"curation", "teacher_cache", "refresh", "generation", "validation"})
"""Parts of which none is told apart: what a teacher says in a validation belongs to the validation."""


class Timeline(Protocol):
    """Where marks are made: on the host, or on a device that works later than it is told to."""

    def mark(self) -> Any:
        """Make a mark at what is done next."""

    def seconds(self, start: Any, end: Any) -> float:
        """Return the time between two marks that are past."""

    def is_past(self, mark: Any) -> bool:
        """Return whether a mark was reached; never wait."""

    def wait(self, mark: Any) -> None:
        """Wait until it is."""


class HostTimeline:
    """The clock of the host."""

    def mark(self) -> float:
        """See `Timeline.mark`."""
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        """See `Timeline.seconds`."""
        return end - start

    def is_past(self, mark: float) -> bool:
        """See `Timeline.is_past`."""
        return True

    def wait(self, mark: float) -> None:
        """See `Timeline.wait`."""


class CudaTimeline:
    """Events in the stream of a GPU.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> torch.cuda.Event:
        """See `Timeline.mark`."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """See `Timeline.seconds`."""
        return float(start.elapsed_time(end)) / 1000

    def is_past(self, mark: torch.cuda.Event) -> bool:
        """See `Timeline.is_past`."""
        return bool(mark.query())  # type: ignore[no-untyped-call]

    def wait(self, mark: torch.cuda.Event) -> None:
        """See `Timeline.wait`."""
        mark.synchronize()


def timeline_of(device: torch.device) -> Timeline:
    """Return the timeline of a GPU, or that of the host for any other device."""
    return CudaTimeline(device) if device.type == "cuda" else HostTimeline()


class PartClock:
    """Knows which part of a run is under way, and how long each has taken since it was last asked.

    Args:
        timeline: Where marks are made.

    Attributes:
        part: The one under way; nothing while the clock stands still.
        seen: Parts that something was around, since this was last cleared.

    Example:
        >>> clock = PartClock(HostTimeline())
        >>> clock.start("data")
        >>> clock.enter("forward")
        >>> with clock.around("teacher"):
        ...     pass
        >>> clock.part, list(clock.take())
        ('forward', ['data', 'forward', 'teacher'])
    """

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self.part: str | None = None
        self.seen: set[str] = set()
        self._since: Any = None
        self._unread: deque[tuple[str, Any]] = deque()
        self._seconds: dict[str, float] = {}

    def __deepcopy__(self, memo: object) -> PartClock:
        """Return itself: where a module that is watched is copied, it is the same time that goes by."""
        return self

    def start(self, part: str) -> None:
        """Begin with a part."""
        self.part, self._since = part, self._timeline.mark()
        self._unread.clear()
        self._seconds = {}

    def stop(self) -> None:
        """Stand still from now on."""
        self.part = None

    def enter(self, part: str) -> None:
        """End the part that is under way and begin another."""
        if self.part is None:
            return
        self._unread.append((self.part, self._timeline.mark()))
        self.part = part
        while self._unread and self._timeline.is_past(self._unread[0][1]):
            self._read()

    @contextmanager
    def around(self, part: str) -> Iterator[None]:
        """Have a part in the midst of another, unless that is one of those that are left whole, see `WHOLE`."""
        self.seen.add(part)
        before = self.part
        if before is None or before in WHOLE:
            yield
            return
        self.enter(part)
        try:
            yield
        finally:
            self.enter(before)

    def take(self) -> dict[str, float]:
        """Return the seconds of each part since this was last asked; a device is waited for."""
        if self.part is not None:
            self.enter(self.part)
        if self._unread:
            self._timeline.wait(self._unread[-1][1])
        while self._unread:
            self._read()
        taken, self._seconds = self._seconds, {}
        return taken

    def _read(self) -> None:
        part, end = self._unread.popleft()
        self._seconds[part] = self._seconds.get(part, 0.0) + self._timeline.seconds(self._since, end)
        self._since = end
