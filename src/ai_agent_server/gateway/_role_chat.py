"""A role as a chat partner: a conversation becomes a task, its steps thoughts, its result the answer."""

from collections.abc import AsyncGenerator, Callable
from contextlib import suppress

import msgspec

from ai_agent_server.core.chat import (
    ChatDelta,
    ChatRequest,
    ChatUsage,
    ImagePart,
    JSONObject,
    Message,
    Privacy,
)
from ai_agent_server.core.ports import Orchestration
from ai_agent_server.core.task_packet import (
    AnyTaskEvent,
    FeedbackReceived,
    InputRequired,
    Progress,
    Recovered,
    Sender,
    StepFinished,
    StepStarted,
    TaskDraft,
    TaskPacket,
    TaskStatus,
)
from ai_agent_server.errors import AgentError, InvalidPacketError, ShuttingDownError, TaskStateError

__all__ = ("RoleTask", "answer", "payload", "progress", "stream")


class RoleTask(msgspec.Struct, frozen=True, kw_only=True):
    """The task that a conversation asks for."""

    profile: str
    role: str
    schema: JSONObject | None
    """What the role's payload must be."""
    privacy: Privacy
    sender: Sender | None = None
    idempotency_key: str | None = None


async def stream(
    orchestration: Orchestration,
    request: ChatRequest,
    task: RoleTask,
    saw: Callable[[TaskPacket], None],
) -> AsyncGenerator[ChatDelta, None]:
    """Submit the task, tell its steps as reasoning and its result as text; closed early, it is cancelled.

    One with an idempotency key goes on: whoever comes again with the key wants its result.
    `saw` is given the packet at its start and its end. A task that asks something back answers with
    the question, and ends: the next message of the conversation begins another. Raises what
    `Orchestration.submit` raises, `ShuttingDownError` when the server stops meanwhile, and `AgentError`
    for a task that failed.
    """
    draft = TaskDraft(
        payload=payload(request.messages, task.schema),
        profile=task.profile,
        role=task.role,
        privacy=task.privacy,
    )
    packet, _ = await orchestration.submit(
        draft, via="rest", idempotency_key=task.idempotency_key, sender=task.sender
    )
    saw(packet)
    seq, question = 0, None
    try:
        # A reader that fell behind is ended early, and comes back.
        while not packet.status.is_final and question is None:
            followed = orchestration.follow(packet.task_id, since=seq)
            try:
                async for event in followed:
                    if isinstance(event, Progress):
                        continue
                    seq = event.seq
                    line = progress(event)
                    if line:
                        yield ChatDelta(reasoning=line)
                    if isinstance(event, InputRequired):
                        question = event.question
                        break
            finally:
                if isinstance(followed, AsyncGenerator):
                    await followed.aclose()
            packet = await orchestration.read(packet.task_id)
            if not packet.status.is_final and question is None and not orchestration.status().accepting:
                # Followers are ended at once from here on; the task goes on after the restart.
                raise ShuttingDownError
    finally:
        is_awaited = task.idempotency_key is not None and question is None
        if not packet.status.is_final and not is_awaited and orchestration.status().accepting:
            # Ended meanwhile, perhaps: then there is nothing to cancel.
            with suppress(TaskStateError):
                packet = await orchestration.cancel(packet.task_id)
        saw(packet)
    usage = ChatUsage(input_tokens=packet.usage.input_tokens, output_tokens=packet.usage.output_tokens)
    text = answer(packet) if question is None else question
    yield ChatDelta(text=text)
    yield ChatDelta(finish_reason="stop", usage=usage)


def payload(messages: tuple[Message, ...], schema: JSONObject | None) -> JSONObject:
    """The role's payload: the last user message, as it is where it is a JSON object.

    Otherwise it is the `task`, or the `text` where the schema knows no task; an image in it is the
    `image`, and what was said before is the `context`, each where the schema has it.
    """
    last = next((at for at in reversed(range(len(messages))) if messages[at].role == "user"), None)
    if last is None:
        raise InvalidPacketError("there is no user message", pointer="/messages")
    text = messages[last].text
    with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        given = msgspec.json.decode(text)
        if isinstance(given, dict):
            return given
    known = (schema or {}).get("properties", {})
    made: JSONObject = {"text" if "text" in known and "task" not in known else "task": text}
    image = next((part for part in messages[last].parts if isinstance(part, ImagePart)), None)
    if image is not None and "image" in known:
        made["image"] = f"data:{image.media_type};base64,{image.content}"
    before = "\n\n".join(f"{said.role}: {said.text}" for said in messages[:last] if said.text)
    if before and "context" in known:
        longest = known["context"].get("maxLength", len(before))
        made["context"] = before[-longest:]
    return made


def progress(event: AnyTaskEvent) -> str:
    """One line for what happened; empty where it is no news to who waits."""
    match event:
        case StepStarted():
            return f"{event.role}: begins ({event.hop.why})\n"
        case StepFinished():
            by = f", {event.call.llm}" if event.call is not None else ""
            why = f": {event.why}" if event.why else ""
            return f"{event.role}: {event.outcome}{why} ({event.duration_ms / 1000:.1f} s{by})\n"
        case FeedbackReceived():
            return f"{event.role}: {event.outcome} (reported by {event.sender or 'an outside agent'})\n"
        case Recovered():
            return f"taken up again: {event.why}\n"
        case _:
            return ""


def answer(packet: TaskPacket) -> str:
    """The ended task's result as a chat message. Raises `AgentError` where it did not end well."""
    if packet.status is not TaskStatus.COMPLETED:
        why = packet.error.message if packet.error is not None else packet.reason or packet.status.value
        raise AgentError(
            f"the task ended as {packet.status.value} ({packet.reason}): {why}; "
            f"what there is: GET /api/v1/tasks/{packet.task_id}"
        )
    result = packet.result or {}
    artifact, output = result.get("artifact"), result.get("output")
    if isinstance(artifact, dict):
        tests = result.get("tests") or {}
        passed, total = tests.get("tests_passed", 0), tests.get("tests_total", 0)
        anchors = f"{tests.get('anchors_passed', 0)} of {tests.get('anchors_total', 0)} examples"
        checked = f"Tests: {result.get('verdict')} ({anchors}, {passed} of {total} tests)."
        fence = "```" if "```" not in artifact["content"] else "````"
        return f"{fence}{artifact.get('language', '')}\n{artifact['content'].rstrip()}\n{fence}\n\n{checked}"
    shown = output if output is not None else result
    if isinstance(shown, dict) and len(shown) == 1:
        (only,) = shown.values()
        if isinstance(only, str):
            return only
    return msgspec.json.format(msgspec.json.encode(shown), indent=2).decode()
