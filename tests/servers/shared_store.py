"""The store of a cluster as one server has it, without the server around it."""

from contextlib import suppress
from pathlib import Path

import nats
from nats.js.errors import NotFoundError

from ai_agent_server.cluster.nats_store import DELETED_S, STREAM, NatsTaskStore, stream
from ai_agent_server.nats_link import Link
from ai_agent_server.tasks_state.base import TaskStore
from ai_agent_server.tasks_state.json_file_store import JsonFileStore
from tests.servers.nats import NatsServer

SIZE_BYTES = 16 * 1024 * 1024


def a_link(server: NatsServer, *, url: str = "", replicas: int = 1) -> Link:
    """A link of its own, as the server's parts share one."""
    link = Link(
        url or server.url,
        credentials=server.credentials,
        name="test",
        streams=(stream(SIZE_BYTES),),
        replicas=replicas,
    )
    link.open()
    return link


class SharedStore(NatsTaskStore):
    """One server's part of a shared store: its copies in `folder`, its link closed with it."""

    def __init__(
        self,
        folder: Path,
        server: NatsServer,
        *,
        url: str = "",
        replicas: int = 1,
        deleted_s: int = DELETED_S,
        copies: TaskStore | None = None,
    ) -> None:
        self.link = a_link(server, url=url, replicas=replicas)
        super().__init__(self.link, copies or JsonFileStore(folder), deleted_s=deleted_s)

    async def aclose(self) -> None:
        await super().aclose()
        await self.link.aclose()


async def forget_tasks(server: NatsServer) -> None:
    """Remove the stream of tasks, for the next test to begin with none."""
    user, _, password = server.credentials.partition(":")
    client = await nats.connect(server.url, user=user, password=password)
    with suppress(NotFoundError):
        await client.jetstream().delete_stream(STREAM)
    await client.close()
