"""What a task becomes when something happens to it, and what happens next. Pure: no I/O, no clock."""

from collections.abc import Sequence
from typing import assert_never

import msgspec

from ai_agent_server.core.task_packet import (
    AnyTaskEvent,
    Canceled,
    Completed,
    Failed,
    FeedbackReceived,
    Hop,
    InputRequired,
    Paused,
    Recovered,
    Rejected,
    Resumed,
    Started,
    StepFinished,
    StepStarted,
    Submitted,
    TaskEvent,
    TaskPacket,
    TaskStatus,
    Usage,
)
from ai_agent_server.errors import InvalidTransitionError

_FIELDS = msgspec.structs.fields(TaskPacket)
DERIVED = tuple(field.name for field in _FIELDS[[field.name for field in _FIELDS].index("status") :])
"""The packet's fields that `fold` makes: everything from `status` down."""
_BEGINNING = {field.name: field.default for field in _FIELDS if field.name in DERIVED}


def fold(packet: TaskPacket, events: Sequence[TaskEvent]) -> TaskPacket:
    """The packet after `events`, each given the next `seq`.

    Raises `InvalidTransitionError` for an event that cannot follow. A file, a restart and another
    store agree on a task because they all replay this function.
    """
    for event in events:
        packet = _apply(packet, event)
    return packet


def unfolded(packet: TaskPacket) -> TaskPacket:
    """The packet as it was before anything happened to it."""
    return msgspec.structs.replace(packet, **_BEGINNING)


def _apply(packet: TaskPacket, event: TaskEvent) -> TaskPacket:
    if packet.status.is_final:
        raise InvalidTransitionError(packet.task_id, f"it has ended ({packet.status}); nothing follows")
    seq = packet.revision + 1
    if event.seq not in (0, seq):
        raise InvalidTransitionError(
            packet.task_id, f"event {event.seq} cannot follow event {packet.revision}"
        )
    placed: AnyTaskEvent = msgspec.structs.replace(event, seq=seq)  # type: ignore[assignment]
    if seq <= packet.copied_seq:
        return msgspec.structs.replace(packet, history=(*packet.history, placed), revision=seq)
    changed = _changes(packet, placed)
    return msgspec.structs.replace(
        packet,
        history=(*packet.history, placed),
        revision=seq,
        updated_at=event.at,
        **changed,
    )


def _changes(packet: TaskPacket, event: AnyTaskEvent) -> dict[str, object]:
    match event:
        case Submitted():
            if packet.revision:
                raise InvalidTransitionError(packet.task_id, "it was submitted before")
            return {"status": TaskStatus.SUBMITTED, "forked_from": event.forked_from}
        case Started() | Recovered():
            if event.generation <= packet.generation:
                raise InvalidTransitionError(
                    packet.task_id, f"generation {event.generation} is not above {packet.generation}"
                )
            status = packet.status if packet.status is TaskStatus.INPUT_REQUIRED else TaskStatus.WORKING
            return {
                "status": status,
                "generation": event.generation,
                "holder": event.holder,
                "started_at": packet.started_at or event.at,
            }
        case Paused() | Resumed():
            return _held(packet, event)
        case StepStarted():
            if packet.paused_at is not None:
                raise InvalidTransitionError(packet.task_id, "it is paused; no step begins")
            return {"status": TaskStatus.WORKING, "usage": _hopped(packet.usage, event.hop)}
        case StepFinished():
            return {"usage": _used(packet.usage, event)}
        case FeedbackReceived():
            return {"status": TaskStatus.WORKING if packet.generation else packet.status}
        case InputRequired():
            return {"status": TaskStatus.INPUT_REQUIRED, "usage": _hopped(packet.usage, event.hop)}
        case Completed() | Failed() | Canceled() | Rejected():
            return _ended(event)
        case _:
            assert_never(event)


def _held(packet: TaskPacket, event: Paused | Resumed) -> dict[str, object]:
    is_pause = isinstance(event, Paused)
    if is_pause is (packet.paused_at is not None):
        raise InvalidTransitionError(
            packet.task_id, f"it is {'paused already' if is_pause else 'not paused'}"
        )
    return {"paused_at": event.at if is_pause else None}


_ENDS = {
    Completed: TaskStatus.COMPLETED,
    Failed: TaskStatus.FAILED,
    Canceled: TaskStatus.CANCELED,
    Rejected: TaskStatus.REJECTED,
}


def _ended(event: Completed | Failed | Canceled | Rejected) -> dict[str, object]:
    told = {name: getattr(event, name) for name in ("reason", "error", "result") if hasattr(event, name)}
    return {"status": _ENDS[type(event)], "paused_at": None, **told}


def _hopped(usage: Usage, hop: Hop | None) -> Usage:
    if hop is None or not hop.feedback:
        return usage
    return msgspec.structs.replace(usage, feedback_hops=usage.feedback_hops + 1)


def _used(usage: Usage, step: StepFinished) -> Usage:
    if step.call is None:
        return usage
    return msgspec.structs.replace(
        usage,
        calls=usage.calls + 1,
        input_tokens=usage.input_tokens + step.call.input_tokens,
        output_tokens=usage.output_tokens + step.call.output_tokens,
        cost_usd=usage.cost_usd + step.call.cost_usd,
    )
