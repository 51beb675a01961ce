"""Whether a task packet is what its own history says. Pure."""

from collections.abc import Iterator

from ai_agent_server.core.task_packet import (
    StepFinished,
    StepStarted,
    Submitted,
    TaskPacket,
    TaskStatus,
)
from ai_agent_server.core.transitions import DERIVED, fold, unfolded
from ai_agent_server.errors import InvalidTransitionError

SHOWN_CHARS = 120


def faults(packet: TaskPacket) -> tuple[str, ...]:
    """What is wrong with a packet that was decoded; nothing for one that is as the engine leaves it.

    Events are numbered 1, 2, 3, ..., each may follow the one before, steps begin and end in turn, an
    end has its reason, and status, usage, result and the other derived fields are what the events make
    them.
    """
    return (*_order(packet), *_steps(packet), *_fields(packet))


def _order(packet: TaskPacket) -> Iterator[str]:
    if packet.revision != len(packet.history):
        yield f"revision is {packet.revision}, but there are {len(packet.history)} events"
    for place, event in enumerate(packet.history, start=1):
        if event.seq != place:
            yield f"event {place} has the seq {event.seq}"
            break
    if not packet.history or not isinstance(packet.history[0], Submitted):
        yield "the history does not begin with task.submitted"


def _steps(packet: TaskPacket) -> Iterator[str]:
    begun, under_way = 0, None
    for event in packet.history:
        match event:
            case StepStarted(step=step):
                if under_way is not None:
                    yield f"step {step} began (event {event.seq}) before step {under_way.step} ended"
                if step != begun + 1:
                    yield f"step {step} began (event {event.seq}) after step {begun}"
                begun, under_way = step, event
            case StepFinished(step=step):
                if under_way is None or (under_way.step, under_way.role) != (step, event.role):
                    yield f"step {step} of {event.role} ended (event {event.seq}), which was not under way"
                under_way = None
            case _:
                pass


def _fields(packet: TaskPacket) -> Iterator[str]:
    try:
        replayed = fold(unfolded(packet), packet.history)
    except InvalidTransitionError as exc:
        yield exc.problem
        return
    for name in DERIVED:
        kept, made = getattr(packet, name), getattr(replayed, name)
        if name != "history" and kept != made:
            yield f"{name} is {_shown(kept)}, its history makes it {_shown(made)}"
    if packet.status.is_final and packet.status is not TaskStatus.COMPLETED and packet.reason is None:
        yield f"it ended ({packet.status}) without a reason"


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}..."
