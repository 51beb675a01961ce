"""The client of the REST API, against a real API where it can be and a server that fails where it must."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import UTC, datetime

import msgspec
import pytest

from ai_agent_server.client import Client, Frame, Told, frames
from ai_agent_server.core.api_schemas import ExplainDraft
from ai_agent_server.core.task_packet import (
    AnyTaskEvent,
    Completed,
    Hop,
    Progress,
    Started,
    StepStarted,
    Submitted,
    TaskDraft,
    TaskPacket,
)
from ai_agent_server.core.transitions import fold
from ai_agent_server.errors import ServerRefusedError, ServerUnreachableError
from tests.servers.api import Parts, serving
from tests.servers.http_double import HTTPDouble, Out, Request

AT = datetime(2026, 11, 21, tzinfo=UTC)
TASK_ID = "01939a1e-7c3b-7000-8000-000000000001"
SUBMITTED = TaskPacket(
    task_id=TASK_ID, context_id=TASK_ID, profile="developer", role="planner", payload={}, created_at=AT
)
HISTORY: tuple[AnyTaskEvent, ...] = fold(
    SUBMITTED,
    [
        Submitted(at=AT, via="rest"),
        Started(at=AT, generation=1),
        StepStarted(at=AT, step=1, role="planner", attempt=1, hop=Hop(on="entry", why="sent here")),
        Completed(at=AT, result={"outcome": "done"}),
    ],
).history


class Events(HTTPDouble):
    """An event stream that breaks `breaks` times, each time after one more event."""

    def __init__(self, breaks: int) -> None:
        super().__init__()
        self.breaks = breaks

    async def answer(self, request: Request, out: Out) -> None:
        since = int(request.headers.get("last-event-id", "0"))
        out.begin("text/event-stream")
        await out.piece(_frame("snapshot", SUBMITTED, None))
        for event in HISTORY[since:]:
            await out.piece(b": keep-alive\n\n" + _frame(_tag(event), event, event.seq))
            if self.breaks:
                self.breaks -= 1
                out.cut()
                return
        await out.end()


def _tag(event: AnyTaskEvent) -> str:
    return str(type(event).__struct_config__.tag)


def _frame(event: str, item: object, seq: int | None) -> bytes:
    head = f"id: {seq}\n" if seq is not None else ""
    return f"{head}event: {event}\ndata: ".encode() + msgspec.json.encode(item) + b"\n\n"


async def told(client: Client, *, since: int = 0) -> list[Told]:
    async with aclosing(client.follow(TASK_ID, since=since)) as items:
        return [item async for item in items]


@pytest.mark.parametrize("breaks", [0, 1, 3])
async def test_every_event_comes_once_and_in_order_however_often_the_stream_breaks(breaks: int) -> None:
    async with Events(breaks) as server, Client(server.url) as client:
        first, *events = await told(client)
        assert len(server.requests) == breaks + 1
    assert isinstance(first, TaskPacket)
    assert events == list(HISTORY)


async def test_a_reader_that_comes_late_hears_only_what_it_missed() -> None:
    async with Events(0) as server, Client(server.url) as client:
        assert (await told(client, since=3))[1:] == [HISTORY[3]]


async def test_a_server_that_was_never_there_is_unreachable() -> None:
    async with Client("http://127.0.0.1:9") as client:
        with pytest.raises(ServerUnreachableError, match=r"127\.0\.0\.1:9"):
            await told(client)
        with pytest.raises(ServerUnreachableError):
            await client.tasks()


async def test_another_program_on_the_port_is_not_taken_for_the_server() -> None:
    class Other(HTTPDouble):
        async def answer(self, request: Request, out: Out) -> None:
            await out.whole(200, ["hello"])

    async with Other() as server, Client(server.url) as client:
        with pytest.raises(ServerUnreachableError, match="not this version's server"):
            await client.task(TASK_ID)


async def test_a_task_is_submitted_listed_read_and_canceled() -> None:
    async with serving(Parts().app) as url, Client(url) as client:
        draft = TaskDraft(payload={"task": "add two numbers"})
        sent = await client.submit("developer", "planner", draft, idempotency_key="k1")
        again = await client.submit("developer", "planner", draft, idempotency_key="k1")
        assert again.packet.task_id == sent.packet.task_id
        page = await client.tasks(profile="developer", status="submitted")
        assert [item.task_id for item in page.items] == [sent.packet.task_id]
        assert (await client.task(sent.packet.task_id)).file.endswith(f"{sent.packet.task_id}.json")
        assert (await client.cancel(sent.packet.task_id)).packet.status == "canceled"
        await client.delete(sent.packet.task_id)
        assert (await client.tasks()).items == ()


async def test_a_refusal_says_what_was_wrong_and_what_would_be_right() -> None:
    async with serving(Parts().app) as url, Client(url) as client:
        with pytest.raises(ServerRefusedError, match="embedded") as refused:
            await client.set_toggle("embeded", True)
    assert refused.value.status == 404
    assert refused.value.choices == ("embedded",)


async def test_what_a_person_types_stays_one_segment_of_the_path() -> None:
    async with serving(Parts().app) as url, Client(url) as client:
        for odd in ("../llms", "a b?c#d", "%2e%2e", "é\udce9"):
            with pytest.raises(ServerRefusedError) as refused:
                await client.task(odd)
            assert refused.value.status in {404, 422}


async def test_the_key_is_sent() -> None:
    async with serving(Parts(api_key="secret").app) as url:
        async with Client(url) as client:
            with pytest.raises(ServerRefusedError) as refused:
                await client.llms()
            assert refused.value.status == 401
        async with Client(url, api_key="secret") as client:
            assert [card.name for card in await client.llms()] == ["embedded"]


async def test_a_choice_is_explained() -> None:
    async with serving(Parts().app) as url, Client(url) as client:
        found = await client.explain(ExplainDraft(tier="small"))
    assert (found.chosen, found.reason) == ("embedded", "tier small")


async def test_frames_join_lines_and_drop_comments_and_what_is_unfinished() -> None:
    async def lines() -> AsyncIterator[str]:
        for line in (": hello", "", "id: 7", "event: a", "data: one", "data: two", "", "data:cut"):
            yield line

    assert [frame async for frame in frames(lines())] == [Frame(event="a", data="one\ntwo", id="7")]


async def test_progress_is_told_between_the_events() -> None:
    progress = Progress(
        task_id=TASK_ID, step=1, role="planner", llm="embedded", why="only one", output_tokens=3, elapsed_ms=9
    )

    class WithProgress(HTTPDouble):
        async def answer(self, request: Request, out: Out) -> None:
            out.begin("text/event-stream")
            await out.piece(_frame("snapshot", SUBMITTED, None) + _frame("progress", progress, None))
            await out.piece(_frame("task.completed", HISTORY[-1], HISTORY[-1].seq))
            await out.end()

    async with WithProgress() as server, Client(server.url) as client:
        assert (await told(client))[1:] == [progress, HISTORY[-1]]
