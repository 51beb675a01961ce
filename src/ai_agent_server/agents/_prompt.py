"""A step's request: the role's prompt file filled in, and on a repeat what was wrong before."""

from collections.abc import Mapping

from ai_agent_server.agents.base import AgentContext
from ai_agent_server.core.chat import ChatRequest, ImagePart, JSONObject, message
from ai_agent_server.core.prompt import as_text, ask, render, section_of
from ai_agent_server.core.task_packet import StepFinished, TaskPacket


def request(
    context: AgentContext,
    fields: Mapping[str, str],
    *,
    section: str | None = None,
    schema: JSONObject | None = None,
    images: tuple[ImagePart, ...] = (),
) -> ChatRequest:
    """The role's prompt with `fields` filled in, sampled as the role is configured.

    A repeat is warmer, has another seed, and says what was wrong with the answer before. A later
    answer of a role that answered before is as warm as the role says for that.
    """
    spec = context.spec
    temperature = spec.temperature
    if spec.temperature_again is not None and answers_of(context.packet, spec.role):
        temperature = spec.temperature_again
    prompt = spec.prompt if section is None else section_of(spec.prompt, section)
    return ask(
        render(prompt, fields) or (message("user", _payload_text(context.packet)),),
        max_tokens=spec.max_tokens,
        temperature=temperature,
        seed=seed(context.packet),
        attempt=context.attempt,
        complaint=last_complaint(context.packet, spec.role) if context.attempt > 1 else "",
        schema=schema,
        images=images,
        stop=spec.stop,
    )


def answers_of(packet: TaskPacket, role: str) -> int:
    """How often `role` has answered."""
    return sum(isinstance(event, StepFinished) and event.role == role for event in packet.history)


def seed(packet: TaskPacket) -> int:
    """Another for each step of a task, the same when the step is run again after a restart."""
    return 1 + sum(isinstance(event, StepFinished) for event in packet.history)


def last_complaint(packet: TaskPacket, role: str) -> str:
    """Why the role's last answer was unusable, "" if it was not."""
    for event in reversed(packet.history):
        if isinstance(event, StepFinished) and event.role == role:
            return event.error.message[:300] if event.outcome == "invalid" and event.error else ""
    return ""


def _payload_text(packet: TaskPacket) -> str:
    if set(packet.payload) == {"task"}:
        return as_text(packet.payload["task"])
    return as_text(packet.payload)
