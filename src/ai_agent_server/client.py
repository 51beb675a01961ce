"""A client of the REST API: what the command line speaks through, and small enough to copy."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias, TypeVar
from urllib.parse import quote

import httpx
import msgspec

from ai_agent_server.core.api_schemas import AcceleratorList, ExplainDraft, LLMCard, LLMList, ToggleDraft
from ai_agent_server.core.chat import Decision
from ai_agent_server.core.ports import HealthReport
from ai_agent_server.core.task_packet import (
    AnyTaskEvent,
    Canceled,
    Completed,
    Failed,
    FeedbackDraft,
    ForkDraft,
    Progress,
    Rejected,
    TaskDraft,
    TaskPacket,
)
from ai_agent_server.errors import ServerRefusedError, ServerUnreachableError
from ai_agent_server.load_balancer.base import AcceleratorView
from ai_agent_server.tasks_state.base import TaskPage

__all__ = ("Client", "Fetched", "Frame", "Told", "frames")

TASKS = "/api/v1/tasks"
TASK_FILE_HEADER = "X-Task-File"
CONNECT_S = 5.0
ANSWER_S = 30.0
SILENCE_S = 45.0
"""Three of the server's keep-alive comments: a stream that is silent for longer is dead."""
RECONNECT_S = 0.25
RECONNECT_MAX_S = 5.0
RECONNECT_FOR_S = 60.0
"""How long a server may be away, while it restarts say, before a watcher gives up."""
FINAL_EVENTS = (Completed, Failed, Canceled, Rejected)

Told: TypeAlias = TaskPacket | AnyTaskEvent | Progress
T = TypeVar("T")


class Fetched(msgspec.Struct, frozen=True, kw_only=True):
    """A task as the server has it; `file` is where it keeps it, "" where nowhere."""

    packet: TaskPacket
    file: str = ""


class Frame(msgspec.Struct, frozen=True, kw_only=True):
    """One server-sent event."""

    event: str
    data: str
    id: str = ""


class _Problem(msgspec.Struct, kw_only=True):
    """RFC 9457 problem details, with our own extensions."""

    title: str = ""
    detail: str = ""
    pointer: str = ""
    choices: tuple[str, ...] = ()


async def frames(lines: AsyncIterator[str]) -> AsyncGenerator[Frame, None]:
    """The server-sent events in `lines`; comments and unfinished events are dropped."""
    event, event_id, data = "message", "", list[str]()
    async for line in lines:
        if not line:
            if data:
                yield Frame(event=event, data="\n".join(data), id=event_id)
            event, event_id, data = "message", "", []
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match field:
            case "event":
                event = value
            case "data":
                data.append(value)
            case "id":
                event_id = value


class Client:
    """Asks one server. Raises `ServerUnreachableError` and `ServerRefusedError`, nothing else."""

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        self.url = url.rstrip("/")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers=headers,
            timeout=httpx.Timeout(ANSWER_S, connect=CONNECT_S),
            # A proxy from the environment is for the internet; the server is asked as it is named.
            trust_env=False,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def submit(self, profile: str, role: str, draft: TaskDraft, *, idempotency_key: str) -> Fetched:
        """Send a task. The same key again answers the same task."""
        answer = await self._ask(
            "POST",
            f"/api/v1/{_segment(profile)}/{_segment(role)}",
            body=_said(draft),
            headers={"Idempotency-Key": idempotency_key},
        )
        return self._fetched(answer)

    async def task(self, task_id: str) -> Fetched:
        """The task as it is."""
        return self._fetched(await self._ask("GET", f"{TASKS}/{_segment(task_id)}"))

    async def tasks(
        self,
        *,
        profile: str | None = None,
        role: str | None = None,
        status: str | None = None,
        limit: int = 50,
        cursor: str | None = None,
    ) -> TaskPage:
        """A page of summaries, newest first."""
        asked = {"profile": profile, "role": role, "status": status, "limit": str(limit), "cursor": cursor}
        query = {key: value for key, value in asked.items() if value is not None}
        return self._decode(await self._ask("GET", TASKS, query=query), TaskPage)

    async def cancel(self, task_id: str) -> Fetched:
        """End it now."""
        return self._fetched(await self._ask("POST", f"{TASKS}/{_segment(task_id)}/cancel"))

    async def pause(self, task_id: str) -> Fetched:
        """Hold it after the step that is under way."""
        return self._fetched(await self._ask("POST", f"{TASKS}/{_segment(task_id)}/pause"))

    async def resume(self, task_id: str) -> Fetched:
        """Let it go on."""
        return self._fetched(await self._ask("POST", f"{TASKS}/{_segment(task_id)}/resume"))

    async def fork(self, task_id: str, draft: ForkDraft, *, idempotency_key: str) -> Fetched:
        """Send a task that goes on after a step of an ended one. The same key again answers the same task."""
        answer = await self._ask(
            "POST",
            f"{TASKS}/{_segment(task_id)}/fork",
            body=_said(draft),
            headers={"Idempotency-Key": idempotency_key},
        )
        return self._fetched(answer)

    async def delete(self, task_id: str) -> None:
        """Remove an ended task and its file."""
        await self._ask("DELETE", f"{TASKS}/{_segment(task_id)}")

    async def feedback(self, task_id: str, draft: FeedbackDraft) -> Fetched:
        """Report for a role, as an outside agent does."""
        body = msgspec.json.encode(draft)
        return self._fetched(await self._ask("POST", f"{TASKS}/{_segment(task_id)}/feedback", body=body))

    async def llms(self) -> tuple[LLMCard, ...]:
        """The configured LLMs as they stand now."""
        return self._decode(await self._ask("GET", "/api/v1/llms"), LLMList).items

    async def set_toggle(self, name: str, on: bool) -> LLMCard:
        """Switch an LLM on or off; answers it as it became."""
        body = msgspec.json.encode(ToggleDraft(toggle=on))
        return self._decode(await self._ask("PATCH", f"/api/v1/llms/{_segment(name)}", body=body), LLMCard)

    async def explain(self, wanted: ExplainDraft) -> Decision:
        """Which LLM would serve, and why; no LLM is called."""
        body = msgspec.json.encode(wanted)
        return self._decode(await self._ask("POST", "/api/v1/load-balancer/explain", body=body), Decision)

    async def accelerators(self) -> tuple[AcceleratorView, ...]:
        """Every accelerator: its memory, its queue, its last decisions."""
        return self._decode(await self._ask("GET", "/api/v1/accelerators"), AcceleratorList).items

    async def health(self) -> HealthReport:
        """The server as a whole."""
        answer = await self._send("GET", "/health")
        return self._decode(answer, HealthReport)

    async def follow(self, task_id: str, *, since: int = 0) -> AsyncGenerator[Told, None]:
        """The packet, then each event after `since` once and in order, until the task ended.

        Progress comes between the events. The stream is taken up again after the last event seen
        when it breaks, for as long as `RECONNECT_FOR_S` while the server is away.
        """
        last, first, away_s, pause_s = since, True, 0.0, RECONNECT_S
        while True:
            try:
                # The snapshot is told once: a reader that comes back knows the task already.
                async with contextlib.aclosing(self._events(task_id, last)) as told:
                    async for seq, item in told:
                        away_s, pause_s = 0.0, RECONNECT_S
                        if isinstance(item, TaskPacket):
                            if first:
                                first = False
                                yield item
                            if item.status.is_final and item.revision <= last:
                                return
                            continue
                        last = max(last, seq)
                        yield item
                        if isinstance(item, FINAL_EVENTS):
                            return
            except ServerUnreachableError:
                if first or away_s >= RECONNECT_FOR_S:
                    raise
            await asyncio.sleep(pause_s)
            away_s, pause_s = away_s + pause_s, min(pause_s * 2, RECONNECT_MAX_S)

    async def _events(self, task_id: str, since: int) -> AsyncGenerator[tuple[int, Told], None]:
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": str(since)} if since else {})
        timeout = httpx.Timeout(SILENCE_S, connect=CONNECT_S)
        with self._reaching():
            async with self._http.stream(
                "GET", f"{TASKS}/{_segment(task_id)}/events", headers=headers, timeout=timeout
            ) as answer:
                if answer.status_code == 503:
                    raise ServerUnreachableError(self.url, "the server is stopping or not ready")
                if answer.status_code >= 400:
                    await answer.aread()
                    raise _refusal(answer)
                async with contextlib.aclosing(frames(answer.aiter_lines())) as arriving:
                    async for frame in arriving:
                        item = self._told(frame)
                        if item is not None:
                            yield int(frame.id) if frame.id.isdecimal() else 0, item

    def _told(self, frame: Frame) -> Told | None:
        kind: Any
        match frame.event:
            case "snapshot":
                kind = TaskPacket
            case "progress":
                kind = Progress
            case name if name.startswith(("task.", "step.", "feedback.", "input.")):
                kind = AnyTaskEvent
            case _:
                return None
        try:
            item: Told = msgspec.json.decode(frame.data, type=kind)
        except msgspec.DecodeError as exc:
            raise self._foreign(exc) from exc
        return item

    async def _ask(
        self,
        method: Literal["GET", "POST", "PATCH", "DELETE"],
        path: str,
        *,
        body: bytes | None = None,
        query: dict[str, str] | None = None,
        headers: dict[str, str] | None = None,
    ) -> httpx.Response:
        answer = await self._send(method, path, body=body, query=query, headers=headers)
        if answer.status_code >= 300:
            raise _refusal(answer)
        return answer

    async def _send(
        self,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        query: dict[str, str] | None = None,
        headers: dict[str, str] | None = None,
    ) -> httpx.Response:
        sent = dict(headers or {})
        if body is not None:
            sent["Content-Type"] = "application/json"
        with self._reaching():
            return await self._http.request(method, path, content=body, params=query, headers=sent)

    @contextlib.contextmanager
    def _reaching(self) -> Any:
        try:
            yield
        except (httpx.TransportError, httpx.InvalidURL, httpx.DecodingError) as exc:
            raise ServerUnreachableError(self.url, str(exc) or type(exc).__name__) from exc

    def _fetched(self, answer: httpx.Response) -> Fetched:
        return Fetched(packet=self._decode(answer, TaskPacket), file=answer.headers.get(TASK_FILE_HEADER, ""))

    def _decode(self, answer: httpx.Response, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(answer.content, type=kind)
        except msgspec.DecodeError as exc:
            raise self._foreign(exc) from exc

    def _foreign(self, exc: msgspec.DecodeError) -> ServerUnreachableError:
        return ServerUnreachableError(self.url, f"what answers is not this version's server ({exc})")


def _refusal(answer: httpx.Response) -> ServerRefusedError:
    try:
        problem = msgspec.json.decode(answer.content, type=_Problem)
    except msgspec.DecodeError:
        problem = _Problem()
    return ServerRefusedError(
        answer.status_code,
        problem.title or answer.reason_phrase or "refused",
        detail=problem.detail,
        pointer=problem.pointer,
        choices=problem.choices,
    )


def _segment(name: str) -> str:
    # What a person typed stays one segment of the path, whatever it holds.
    return quote(name, safe="", errors="replace")


def _said(draft: TaskDraft | ForkDraft) -> bytes:
    # Only what was said: the server has its own defaults, by role.
    said = {key: value for key, value in msgspec.to_builtins(draft).items() if value not in (None, [])}
    return msgspec.json.encode(said)
