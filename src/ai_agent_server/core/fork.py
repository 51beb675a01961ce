"""A fork: what a new task takes over of an ended one. Pure."""

import hashlib

import msgspec

from ai_agent_server.core.chat import JSONObject
from ai_agent_server.core.next_step import ENDING_OUTCOMES, REPEATED_OUTCOMES
from ai_agent_server.core.task_packet import (
    AnyTaskEvent,
    FeedbackReceived,
    ForkDraft,
    InputRequired,
    StepFinished,
    StepStarted,
    TaskPacket,
)
from ai_agent_server.errors import InvalidPacketError


def taken_over(origin: TaskPacket, step: int) -> tuple[AnyTaskEvent, ...]:
    """The work of `origin` up to the end of `step`, as events without a place yet.

    Who worked when, and pauses, are its own and stay behind. Raises `InvalidPacketError` for a step that
    it did not end.
    """
    if step == 0:
        return ()
    ends = {event.step: event.seq for event in origin.history if isinstance(event, StepFinished)}
    if step not in ends:
        raise InvalidPacketError(
            f"task {origin.task_id} has no step {step} that ended",
            pointer="/step",
            expected=f"0 to {max(ends, default=0)}",
        )
    return tuple(
        msgspec.structs.replace(event, seq=0)
        for event in origin.history[: ends[step]]
        if isinstance(event, StepStarted | StepFinished | FeedbackReceived | InputRequired)
    )


def last_good_step(packet: TaskPacket) -> int:
    """The last step that did its work, where a task that failed can be taken up again; 0: none did."""
    vain = ENDING_OUTCOMES.keys() | REPEATED_OUTCOMES.keys()
    done = [e.step for e in packet.history if isinstance(e, StepFinished) and e.outcome not in vain]
    return done[-1] if done else 0


def changed(payload: JSONObject, changes: JSONObject | None) -> JSONObject:
    """`payload` with other values for some of its keys, without those whose value is null."""
    said = changes or {}
    kept = {key: value for key, value in payload.items() if key not in said}
    return kept | {key: value for key, value in said.items() if value is not None}


def fork_hash(origin: TaskPacket, draft: ForkDraft) -> str:
    """The same for two requests for the same fork, whatever the new task's id."""
    same = msgspec.structs.replace(draft, task_id=None)
    text = msgspec.json.encode([origin.task_id, same], order="deterministic")
    return hashlib.sha256(text).hexdigest()
