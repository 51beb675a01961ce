"""The time-outs of one answer, by phase: first token, then idle."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ai_agent_server.errors import EngineTimeoutError, TimeoutPhase
from ai_agent_server.llm_engines.base import EngineTimeouts


class Pace:
    """Bounds each wait of one answer.

    Until `progress` is first called all waits together may last `first_token_s`; afterwards
    those between two calls may last `idle_s`. Only waiting counts: a slow reader is not a silent engine.
    """

    def __init__(self, timeouts: EngineTimeouts, engine: str) -> None:
        self._timeouts, self._engine = timeouts, engine
        self._phase: TimeoutPhase = "first_token"
        self.left_s = timeouts.first_token_s
        """How long the next wait may last."""

    @asynccontextmanager
    async def waiting(self) -> AsyncIterator[None]:
        """Raise `EngineTimeoutError` when the body takes longer than the phase has left."""
        now_s = asyncio.get_running_loop().time
        began_s = now_s()
        try:
            async with asyncio.timeout(self.left_s) as limit:
                yield
        except TimeoutError as exc:
            if not limit.expired():
                raise
            raise self.expired() from exc
        self.waited(now_s() - began_s)

    def waited(self, seconds: float) -> None:
        """A wait is over, in time."""
        self.left_s -= seconds

    def expired(self) -> EngineTimeoutError:
        """What a wait that lasts longer than `left_s` ends with."""
        allowed_s = self._timeouts.idle_s if self._phase == "idle" else self._timeouts.first_token_s
        return EngineTimeoutError(self._phase, allowed_s, engine=self._engine)

    def progress(self) -> None:
        """The model wrote something."""
        self._phase, self.left_s = "idle", self._timeouts.idle_s
