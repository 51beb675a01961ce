"""A deadline that moves on with every piece of a stream: a timer that is set once and looks again."""

import asyncio
import math
from collections.abc import Callable

__all__ = ("Deadline",)


class Deadline:
    """Calls `passed` once the time that was last given to `start` is over, unless `stop` came before.

    To move it on is an assignment: a timer that fires early is set anew for the rest. Belongs to one loop.
    """

    __slots__ = ("_at_s", "_loop", "_passed", "_timer")

    def __init__(self, loop: asyncio.AbstractEventLoop, passed: Callable[[], None]) -> None:
        self._loop, self._passed = loop, passed
        self._at_s = math.inf
        self._timer: asyncio.TimerHandle | None = None

    def start(self, within_s: float) -> None:
        """From now on it is so many seconds away."""
        self._at_s = self._loop.time() + within_s
        if self._timer is not None and self._timer.when() > self._at_s:
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            self._timer = self._loop.call_at(self._at_s, self._look)

    def stop(self) -> None:
        """There is none, until the next `start`."""
        self._at_s = math.inf

    def close(self) -> None:
        """The timer goes too."""
        self.stop()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        if math.isinf(self._at_s):
            return
        if self._loop.time() < self._at_s:
            self._timer = self._loop.call_at(self._at_s, self._look)
            return
        self.stop()
        self._passed()
