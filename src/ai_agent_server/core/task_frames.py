"""What a reader of a task is sent: a snapshot, each event once and in order, and something in every silence.

Server-sent events and WebSockets send the same frames, each in its own form.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress
from typing import Final

import msgspec

from ai_agent_server.core.task_packet import FINAL_EVENTS, AnyTaskEvent, Progress, TaskPacket

KEEP_ALIVE: Final = "keep-alive"
CUT: Final = "cut"


class Frame(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One frame. `event` is `snapshot`, an event's type, `progress`, `keep-alive` or `cut`.

    `id` is the event's `seq`: where a reader goes on that comes back. After `cut` nothing follows though
    the task goes on; its data say where to go on (`since`).
    """

    event: str
    id: int | None = None
    data: msgspec.Raw = msgspec.Raw(b"null")


async def frames(
    packet: TaskPacket,
    followed: AsyncIterator[AnyTaskEvent | Progress],
    *,
    since: int,
    keep_alive_s: float,
) -> AsyncGenerator[Frame]:
    """The frames of a task that was read as `packet` and is followed after `since`."""
    is_final = packet.status.is_final
    snapshot = _frame("snapshot", msgspec.structs.replace(packet, history=()))
    # A reader may take its time, and the packet may be large.
    del packet
    yield snapshot
    del snapshot
    last: AnyTaskEvent | Progress | None = None
    coming: asyncio.Future[AnyTaskEvent | Progress] | None = None
    try:
        while True:
            coming = asyncio.ensure_future(anext(followed))
            while not (await asyncio.wait({coming}, timeout=keep_alive_s))[0]:
                yield Frame(event=KEEP_ALIVE)
            try:
                last = coming.result()
            except StopAsyncIteration:
                break
            if isinstance(last, Progress):
                yield _frame("progress", last)
            else:
                since = last.seq
                yield _frame(str(last.__struct_config__.tag), last, seq=since)
    finally:
        if coming is not None and not coming.done():
            coming.cancel()
            with suppress(asyncio.CancelledError, StopAsyncIteration):
                await coming
        if isinstance(followed, AsyncGenerator):
            await followed.aclose()
    if not is_final and not isinstance(last, FINAL_EVENTS):
        yield _frame(CUT, {"since": since})


def _frame(name: str, data: object, *, seq: int | None = None) -> Frame:
    return Frame(event=name, id=seq, data=msgspec.Raw(msgspec.json.encode(data)))
