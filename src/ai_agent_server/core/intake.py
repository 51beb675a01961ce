"""What may come in: packets and feedback checked against what is configured. Pure."""

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError, best_match

from ai_agent_server.core.chat import JSONObject
from ai_agent_server.core.next_step import drafts
from ai_agent_server.core.packet_json import json_pointer
from ai_agent_server.core.task_packet import (
    Artifact,
    FeedbackDraft,
    FeedbackReceived,
    InputRequired,
    TaskDraft,
    TaskPacket,
    TaskStatus,
    TestReport,
    is_task_id,
)
from ai_agent_server.core.workflow import Workflow
from ai_agent_server.errors import InvalidPacketError, InvalidTransitionError

SHOWN_CHARS = 80


class PayloadCheck:
    """A role's payload schema, ready to check payloads; `at` is where they stand in what was sent."""

    def __init__(self, schema: JSONObject | None, *, at: str = "payload") -> None:
        self._validator = None if schema is None else Draft202012Validator(schema)
        self._at = (at,) if at else ()

    def __call__(self, payload: JSONObject) -> None:
        """Raises `InvalidPacketError` with the pointer of the first mistake and what would be right."""
        if self._validator is None:
            return
        mistake = best_match(self._validator.iter_errors(payload))
        if mistake is not None:
            raise _explained(mistake, self._at)


def _explained(mistake: ValidationError, at: tuple[str, ...]) -> InvalidPacketError:
    path = (*at, *(str(part) for part in mistake.absolute_path))
    schema: Any = mistake.schema
    found: Any = mistake.instance
    wanted: Any = mistake.validator_value
    properties: JSONObject = schema.get("properties", {}) if isinstance(schema, Mapping) else {}
    if mistake.validator == "required":
        missing = next(key for key in wanted if key not in found)
        return InvalidPacketError(
            f"{missing!r} is missing",
            pointer=json_pointer((*path, missing)),
            expected=_described(properties.get(missing, {})),
        )
    if mistake.validator == "additionalProperties":
        unknown = next(key for key in found if key not in properties)[:SHOWN_CHARS]
        return InvalidPacketError(
            f"unknown key {unknown!r}",
            pointer=json_pointer((*path, unknown)),
            expected=f"one of: {', '.join(properties)}",
        )
    return InvalidPacketError(
        mistake.message[:300], pointer=json_pointer(path), expected=f"{mistake.validator}: {wanted}"
    )


def _described(prop: JSONObject) -> str:
    kind = str(prop.get("type", "a value"))
    return f"{kind}: {prop['description']}" if "description" in prop else kind


def checked_id(given: str | None, pointer: str) -> str | None:
    """`given`, which must be a canonical UUID where there is one."""
    if given is not None and not is_task_id(given):
        raise InvalidPacketError(
            f"{given[:SHOWN_CHARS]!r} is not a UUID",
            pointer=pointer,
            expected="a UUID in lower case, with hyphens",
        )
    return given


def request_hash(draft: TaskDraft) -> str:
    """The same for two drafts that ask for the same, whatever their ids."""
    same = msgspec.structs.replace(draft, task_id=None, status=None)
    return hashlib.sha256(msgspec.json.encode(same, order="deterministic")).hexdigest()


def check_feedback(
    packet: TaskPacket, draft: FeedbackDraft, *, roles: tuple[str, ...], workflow: Workflow
) -> None:
    """Whether an outside agent may report this now.

    Raises `InvalidTransitionError` for an ended task and for what nobody asked, and
    `InvalidPacketError` for a role or an outcome that the profile does not know.
    """
    if packet.status.is_final:
        raise InvalidTransitionError(
            packet.task_id, f"it has ended ({packet.status}); feedback came too late"
        )
    if draft.answers is not None:
        asking = next(
            (e.seq for e in reversed(packet.history) if isinstance(e, InputRequired | FeedbackReceived)), None
        )
        if packet.status is not TaskStatus.INPUT_REQUIRED or asking != draft.answers:
            raise InvalidTransitionError(packet.task_id, f"question {draft.answers} is not open (any more)")
    if draft.role == "user":
        _one_of(draft.outcome, ("answer",), "user")
        asked = [event.role for event in packet.history if isinstance(event, InputRequired)]
        if packet.status is not TaskStatus.INPUT_REQUIRED or asked[-1] != "user":
            raise InvalidTransitionError(packet.task_id, "it has asked nobody anything")
        return
    if draft.role not in roles:
        raise InvalidPacketError(
            f"the profile {packet.profile!r} has no role {draft.role!r}",
            pointer="/role",
            expected=f"one of: {', '.join((*roles, 'user'))}",
            choices=(*roles, "user"),
        )
    routed = (on.partition(".") for on in workflow.routes)
    own = tuple(outcome for role, _, outcome in routed if role == draft.role)
    _one_of(draft.outcome, own or ("done", "pass", "fail"), draft.role)
    if draft.outcome == "pass" and workflow.makers and not drafts(packet, workflow):
        raise InvalidTransitionError(packet.task_id, "there is no work yet that could pass")


def _one_of(outcome: str, choices: tuple[str, ...], role: str) -> None:
    if outcome not in choices:
        raise InvalidPacketError(
            f"{role} cannot report {outcome!r}",
            pointer="/outcome",
            expected=f"one of: {', '.join(choices)}",
            choices=choices,
        )


def code_artifact(content: str) -> Artifact:
    """Code as an artifact."""
    digest = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()
    return Artifact(artifact_id=digest, kind="code", content=content)


def outside_report(draft: FeedbackDraft) -> TestReport | None:
    """An outside agent's verdict in the form of a test report."""
    if draft.outcome not in {"pass", "fail"}:
        return None
    return TestReport(
        verdict="pass" if draft.outcome == "pass" else "fail",
        tier="outside",
        failing=draft.failing,
        detail=draft.why,
    )
