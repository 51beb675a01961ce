"""The generic agent: a role that is only configuration and a prompt file."""

from collections.abc import Mapping

from ai_agent_server.agents._prompt import request
from ai_agent_server.agents.base import AgentCard, AgentContext, Outcome
from ai_agent_server.core.answer import read_object, read_text
from ai_agent_server.core.prompt import as_text
from ai_agent_server.core.task_packet import FeedbackReceived, StepFinished, TaskPacket

__all__ = ("PromptAgent",)


class PromptAgent:
    """Fills the role's prompt file and asks once.

    The prompt may name every field of the payload; `$payload`, the whole of it as JSON; the output
    of each role that ran before by its name (`$fast_coder` for fast-coder); `$work`, the latest
    output of any; `$code`, the latest artifact; `$feedback`, why the last role or outside agent ended
    as it did. With a `result_schema`
    the answer is an object that obeys it, without one it is {"text": ...}.
    """

    card = AgentCard(
        name="prompt",
        description="Asks an LLM with the role's prompt file and answers as its result schema says.",
        outcomes=("done",),
    )

    async def run(self, context: AgentContext) -> Outcome:
        """Ask, and read the answer. Raises `InvalidOutputError`."""
        schema = context.spec.result_schema
        reply = await context.chat(request(context, _fields(context.packet), schema=schema))
        output = {"text": read_text(reply)} if schema is None else read_object(reply, schema)
        return Outcome(verdict="done", output=output)


def _fields(packet: TaskPacket) -> Mapping[str, str]:
    fields = {"payload": as_text(dict(packet.payload))}
    for event in packet.history:
        if not isinstance(event, StepFinished | FeedbackReceived):
            continue
        if event.output is not None:
            text = event.output.get("text") if set(event.output) == {"text"} else event.output
            fields[event.role.replace("-", "_")] = fields["work"] = as_text(text)
        if event.artifact is not None:
            fields["code"] = event.artifact.content
        if event.why:
            fields["feedback"] = event.why
    return fields | {name: as_text(value) for name, value in packet.payload.items()}
