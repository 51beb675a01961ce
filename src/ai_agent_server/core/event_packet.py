"""An event of a task as it goes out to others: by NATS, by a webhook. Pure."""

from collections.abc import Iterator
from typing import Literal

import msgspec

from ai_agent_server.core.chat import JSONObject
from ai_agent_server.core.task_packet import AnyTaskEvent, TaskPacket, TaskStatus
from ai_agent_server.core.transitions import fold, unfolded

BULKY_BYTES = 4 * 1024


class EventPacket(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An event as it goes out. `status` is the task's status after it.

    An event too large for a message comes without its bulky fields: `truncated` is then true and
    `href` is the path, on this server's REST API, of the task with all of it.
    """

    kind: Literal["event"]
    task_id: str
    status: TaskStatus
    event: AnyTaskEvent | JSONObject
    truncated: bool = False
    href: str | None = None


def cut(whole: EventPacket, event: AnyTaskEvent) -> EventPacket:
    """The same without the fields of `event` that are larger than 4 KiB."""
    fields: JSONObject = msgspec.to_builtins(event)
    small = {name: value for name, value in fields.items() if len(msgspec.json.encode(value)) <= BULKY_BYTES}
    return msgspec.structs.replace(whole, event=small, truncated=True, href=f"/api/v1/tasks/{whole.task_id}")


def is_copy(packet: TaskPacket, event: AnyTaskEvent) -> bool:
    """Whether a fork took `event` over: it happened to another task, and was told when it did."""
    return 1 < event.seq <= packet.copied_seq


def statuses(packet: TaskPacket, *, since: int) -> Iterator[tuple[AnyTaskEvent, TaskStatus]]:
    """Each event after `since` with the task's status after it."""
    if since == packet.revision - 1:
        yield packet.history[-1], packet.status
        return
    past = unfolded(packet)
    for event in packet.history:
        past = fold(past, [event])
        if event.seq > since:
            yield event, past.status
