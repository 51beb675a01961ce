"""What webhooks know of their deliveries, kept while they end."""

import asyncio
import random
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from ai_agent_server.cluster.alone import FileShelf
from ai_agent_server.config.settings import CallbackSettings
from ai_agent_server.core.ports import Orchestration
from ai_agent_server.core.webhooks import Targets, Webhooks
from ai_agent_server.tasks_state.base import TaskPage


class NoTasks:
    """An orchestration that has none."""

    def observe(self, listener: Any) -> None: ...

    async def list(self, *_: Any, **__: Any) -> TaskPage:
        return TaskPage(items=())


class SlowShelf(FileShelf):
    """Keeps nothing before it may."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.is_asked, self.may_keep = asyncio.Event(), asyncio.Event()

    async def put(self, content: bytes) -> None:
        self.is_asked.set()
        await self.may_keep.wait()
        await super().put(content)


async def test_what_is_being_kept_as_the_server_stops_is_kept(tmp_path: Path) -> None:
    shelf = SlowShelf(tmp_path / "callbacks.json")
    webhooks = Webhooks(
        cast(Orchestration, NoTasks()),
        targets=Targets(CallbackSettings, {}),
        clock=lambda: datetime.now(UTC),
        rng=random.Random(1),
        shelf=shelf,
    )
    async with asyncio.timeout(60):
        async with webhooks:
            await shelf.is_asked.wait()
            asyncio.get_running_loop().call_later(0.05, shelf.may_keep.set)
    assert await shelf.read() is not None
