"""A prompt file made into a request: `$name` filled in, what nothing is known of left out. Pure."""

import json
import re
from collections.abc import Mapping
from string import Template

import msgspec

from ai_agent_server.core.chat import ChatRequest, ImagePart, JSONObject, Message, TextPart, message
from ai_agent_server.errors import ConfigurationError

SYSTEM_ENDS = "---"
"""A line of its own: what stands above it is the system message."""
RETRY_TEMPERATURE = 0.7
"""The least temperature of a repeat: an answer that was unusable at 0 would come again unchanged."""


def render(template: str, fields: Mapping[str, str]) -> tuple[Message, ...]:
    """The messages that a prompt file asks for.

    A paragraph that names fields, all of them empty or unknown, is left out; `$$` is a dollar. What
    a field holds is never read as a template.
    """
    system, line, user = template.partition(f"\n{SYSTEM_ENDS}\n")
    if not line:
        system, user = "", template
    filled = [("system", _fill(system, fields)), ("user", _fill(user, fields))]
    return tuple(message("system" if role == "system" else "user", text) for role, text in filled if text)


def _fill(text: str, fields: Mapping[str, str]) -> str:
    kept: list[str] = []
    for paragraph in text.strip().split("\n\n"):
        template = Template(paragraph)
        names = template.get_identifiers()
        if names and not any(fields.get(name) for name in names):
            continue
        kept.append(template.safe_substitute({name: fields.get(name, "") for name in names}))
    return "\n\n".join(kept).strip()


def has_section(prompt: str, name: str) -> bool:
    """Whether a prompt file has the line `## name`."""
    return re.search(rf"^## {re.escape(name)}\s*$", prompt, flags=re.MULTILINE) is not None


def section_of(prompt: str, name: str) -> str:
    """The part of a prompt file below the line `## name`, for a role that asks more than one thing."""
    for part in re.split(r"^## ", prompt, flags=re.MULTILINE)[1:]:
        title, _, text = part.partition("\n")
        if title.strip() == name:
            return text.strip()
    raise ConfigurationError(f"the prompt file has no section '## {name}'")


def ask(
    messages: tuple[Message, ...],
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
    attempt: int = 1,
    complaint: str = "",
    schema: JSONObject | None = None,
    images: tuple[ImagePart, ...] = (),
    stop: tuple[str, ...] = (),
) -> ChatRequest:
    """The request of these messages.

    A repeat (`attempt` above 1) is warmer and says in `complaint` what was wrong with the answer before.
    """
    additions: list[TextPart | ImagePart] = list(images)
    if complaint:
        additions.append(TextPart(text=f"\n\nThe answer before could not be used: {complaint}"))
    if additions:
        last = messages[-1]
        messages = (*messages[:-1], msgspec.structs.replace(last, parts=(*last.parts, *additions)))
    return ChatRequest(
        messages=messages,
        max_tokens=max_tokens,
        temperature=max(temperature, RETRY_TEMPERATURE) if attempt > 1 else temperature,
        seed=seed,
        stop=stop,
        response_schema=schema,
    )


def as_text(value: object) -> str:
    """A payload field or an output as a prompt shows it: text as it is, a list line by line, else JSON."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return "\n".join(value)
    return json.dumps(value, ensure_ascii=False)
