"""The table of operations told as OpenAPI 3.1, as JSON Schema, and as a page for people."""

import inspect
import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import msgspec

from ai_agent_server.config.settings import NAME_PATTERN, SCHEMA_ID
from ai_agent_server.core.api_operations import (
    ADDRESS,
    EVENT_STREAM,
    TAGS,
    TASK_ID,
    Answer,
    Operation,
    operations,
    problem_examples,
    problem_kinds,
)
from ai_agent_server.core.api_schemas import (
    JSON,
    PROBLEM_JSON,
    Problem,
    ProblemKind,
)
from ai_agent_server.core.chat import JSONObject
from ai_agent_server.core.task_packet import (
    FeedbackDraft,
    Progress,
    TaskDraft,
    TaskPacket,
)

_REF = "#/components/schemas/{name}"


def document(version: str, more: Sequence[Operation] = ()) -> JSONObject:
    """The OpenAPI 3.1 document; `more` are other surfaces' operations."""
    told = (*operations(), *more)
    paths: dict[str, JSONObject] = {}
    for operation in told:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "AI-Agent-Server",
            "version": version,
            "summary": "Takes task packets, runs agents on local and remote LLMs, and tells what happened.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": name, "description": about} for name, about in TAGS.items()],
        # A key is asked for only where the server was started with one.
        "security": [{}, {"bearer": []}, {"apiKey": []}],
        "paths": paths,
        "components": {
            "schemas": _components(told),
            "examples": {
                slug: {"summary": example.title, "value": _plain(example)}
                for slug, example in problem_examples().items()
            },
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "apiKey": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def task_packet_schema() -> JSONObject:
    """The JSON Schema (2020-12) of a task packet; `$defs` holds what a caller may send too."""
    (_, *_), definitions = msgspec.json.schema_components(
        [TaskPacket, TaskDraft, FeedbackDraft, Progress], ref_template="#/$defs/{name}"
    )
    return {
        "$schema": SCHEMA_ID,
        "title": "Task packet of AI-Agent-Server",
        "$ref": "#/$defs/TaskPacket",
        "$defs": _tidied(definitions),
    }


def curl(path: str, method: str, body_example: Any) -> str:
    """A command that makes the call."""
    address = ADDRESS + (
        path.replace("{profile}", "developer")
        .replace("{role}", "planner")
        .replace("{task_id}", TASK_ID)
        .replace("{name}", "embedded")
        .replace("{model}", "embedded")
        .replace("{tool}", "classify")
    )
    words = ["curl", *(["-N"] if path.endswith("/events") else []), address]
    if method != "get":
        words[1:1] = ["-X", method.upper()]
    command = " ".join(words)
    if body_example is None:
        return command
    body = json.dumps(body_example, indent=2).replace("'", "'\\''")
    return f"{command} \\\n  -H 'Content-Type: {JSON}' \\\n  -d '{body}'"


def _operation(operation: Operation) -> JSONObject:
    described: JSONObject = {
        "operationId": operation.id,
        "tags": [operation.tag],
        "summary": operation.summary,
        "parameters": [
            *_path_parameters(operation.path),
            *(_query_parameters(operation.query) if operation.query is not None else ()),
            *(
                {
                    "name": header.name,
                    "in": "header",
                    "required": False,
                    "description": header.about,
                    "schema": header.schema,
                    "example": header.example,
                }
                for header in operation.headers
            ),
        ],
        "responses": {
            str(answer.status): _answer(answer) for answer in (*operation.answers, *operation.refusals)
        },
    }
    if operation.about:
        described["description"] = operation.about
    if operation.is_public:
        described["security"] = []
    if operation.body is not None:
        described["requestBody"] = {
            "required": True,
            "content": {JSON: {"schema": _ref(operation.body), "example": operation.body_example}},
        }
    examples = problem_examples()
    for status, kinds in problem_kinds(operation).items():
        described["responses"].setdefault(
            str(status),
            {
                "description": "; ".join(kind.title for kind in kinds) + ".",
                "content": {
                    PROBLEM_JSON: {
                        "schema": _ref(Problem),
                        "examples": {
                            kind.slug: {"$ref": f"#/components/examples/{kind.slug}"} for kind in kinds
                        },
                    }
                },
                **(_retry_after(kinds, examples)),
            },
        )
    _add_problem_beside(described, operation)
    return described


def _add_problem_beside(described: JSONObject, operation: Operation) -> None:
    """A status that is both an answer and a problem (health's 503) tells both bodies."""
    for answer in operation.answers:
        for kind in problem_kinds(operation).get(answer.status, ()):
            described["responses"][str(answer.status)]["content"].setdefault(
                PROBLEM_JSON,
                {"schema": _ref(Problem), "example": _plain(problem_examples()[kind.slug])},
            )


def _retry_after(kinds: list[ProblemKind], examples: Mapping[str, Problem]) -> JSONObject:
    if not any(examples[kind.slug].retry_after_s is not None for kind in kinds):
        return {}
    return {
        "headers": {
            "Retry-After": {
                "description": "Seconds after which a repeat may be taken.",
                "schema": {"type": "integer", "minimum": 1},
            }
        }
    }


def _answer(answer: Answer) -> JSONObject:
    described: JSONObject = {"description": answer.about}
    if answer.headers:
        described["headers"] = {
            header.name: {
                "description": header.about,
                "required": header.required,
                "schema": header.schema,
                "example": header.example,
            }
            for header in answer.headers
        }
    if answer.links_task:
        described["links"] = {
            operation_id: {"operationId": operation_id, "parameters": {"task_id": "$response.body#/task_id"}}
            for operation_id in ("readTask", "followTask", "giveFeedback", "cancelTask", "deleteTask")
        }
    if answer.kind is None and answer.media_type == JSON:
        return described
    content: JSONObject = {}
    if answer.kind is not None:
        content["schema"] = _ref(answer.kind)
    elif answer.media_type != EVENT_STREAM:
        # What an event stream holds, OpenAPI 3.1 cannot say.
        content["schema"] = {"type": "string"}
    if answer.example is not None:
        content["example"] = _plain(answer.example)
    described["content"] = {answer.media_type: content}
    if answer.is_also_streamed:
        described["content"][EVENT_STREAM] = {}
    return described


def _plain(value: object) -> Any:
    """`value` as JSON has it: a tuple is an array there."""
    return msgspec.json.decode(msgspec.json.encode(value))


def _ref(kind: type[Any]) -> JSONObject:
    return {"type": "object"} if kind is dict else {"$ref": _REF.format(name=kind.__name__)}


def json_components(kinds: tuple[type[Any], ...]) -> JSONObject:
    """The schemas of `kinds` and of all they are made of, by name."""
    _, components = msgspec.json.schema_components(kinds, ref_template=_REF)
    return _tidied(components)


def _components(told: Sequence[Operation]) -> JSONObject:
    kinds: dict[type[Any], None] = {Problem: None, Progress: None}
    for operation in told:
        for kind in (
            operation.body,
            *(answer.kind for answer in (*operation.answers, *operation.refusals)),
        ):
            if kind is not None and kind is not dict:
                kinds[kind] = None
    return json_components(tuple(kinds))


def _tidied(components: Mapping[str, Any]) -> JSONObject:
    """msgspec's schemas with what it cannot know: whole docstrings, and that times are times."""
    tidied: JSONObject = {}
    for name, schema in sorted(components.items()):
        if "description" in schema:
            schema["description"] = inspect.cleandoc(schema["description"])
        for field, prop in schema.get("properties", {}).items():
            if field in {"at", "since"} or field.endswith("_at"):
                for branch in (prop, *prop.get("anyOf", ())):
                    if branch.get("type") == "string":
                        branch["format"] = "date-time"
        tidied[name] = schema
    return tidied


def _path_parameters(path: str) -> list[JSONObject]:
    name_schema = {"type": "string", "pattern": NAME_PATTERN}
    known: dict[str, tuple[str, JSONObject, str]] = {
        "profile": ("A profile's name.", name_schema, "developer"),
        "role": ("A role's name in the profile.", name_schema, "planner"),
        "name": ("An LLM's name.", name_schema, "embedded"),
        "model": ("A name from the list; a role's has a slash in it.", {"type": "string"}, "embedded"),
        "tool": ("A tool's name.", name_schema, "classify"),
        "task_id": ("The task's id.", {"type": "string", "format": "uuid"}, TASK_ID),
    }
    return [
        {
            "name": name,
            "in": "path",
            "required": True,
            "description": about,
            "schema": schema,
            "example": example,
        }
        for name, (about, schema, example) in known.items()
        if f"{{{name}}}" in path
    ]


def _query_parameters(kind: type[Any]) -> list[JSONObject]:
    (_,), components = msgspec.json.schema_components([kind], ref_template=_REF)
    parameters = []
    for name, schema in components[kind.__name__].get("properties", {}).items():
        about = schema.pop("description", "")
        parameters.append(
            {"name": name, "in": "query", "required": False, "description": about, "schema": schema}
        )
    return parameters


def page(described: JSONObject) -> str:
    """`described` for people: one page that loads nothing from anywhere."""
    sections = "".join(
        f"<h2>{escape(tag['name'].capitalize())}</h2><p>{escape(tag['description'])}</p>"
        + "".join(
            _page_operation(path, method, operation)
            for path, methods in described["paths"].items()
            for method, operation in methods.items()
            if tag["name"] in operation["tags"]
        )
        for tag in described["tags"]
    )
    problems = "".join(
        f"<h3 id='{escape(slug)}'>{example.status} {escape(example.title)}</h3>{_page_json(example)}"
        for slug, example in problem_examples().items()
    )
    schemas = "".join(
        f"<details id='schema-{escape(name)}'><summary><code>{escape(name)}</code></summary>"
        f"{_page_json(schema)}</details>"
        for name, schema in described["components"]["schemas"].items()
    )
    info = described["info"]
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(info['title'])}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(info['title'])} <small>{escape(info['version'])}</small></h1>"
        f"<p>{escape(info['summary'])} <a href='/api/v1/openapi.json'>OpenAPI 3.1</a></p>"
        f"{sections}<h2>Problems</h2><p>Every error is a problem detail (RFC 9457).</p>{problems}"
        f"<h2>Schemas</h2>{schemas}</body></html>"
    )


_STYLE = (
    ":root{color-scheme:light dark}"
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "pre{overflow:auto;padding:.75rem;background:#8882;border-radius:.4rem;font-size:.85rem}"
    "table{border-collapse:collapse}td,th{text-align:left;padding:.2rem 1rem .2rem 0;vertical-align:top}"
    "h3{margin-top:2rem}small{opacity:.6}summary{cursor:pointer}"
)


def _page_operation(path: str, method: str, operation: JSONObject) -> str:
    body = operation.get("requestBody", {}).get("content", {}).get(JSON, {})
    parameters = "".join(
        f"<tr><td><code>{escape(parameter['name'])}</code></td><td>{escape(parameter['in'])}</td>"
        f"<td>{escape(parameter['description'])}</td></tr>"
        for parameter in operation["parameters"]
    )
    responses = "".join(
        f"<details><summary>{escape(status)} {escape(response['description'])}</summary>"
        f"{_page_example(response)}</details>"
        for status, response in sorted(operation["responses"].items())
    )
    return (
        f"<h3 id='{escape(operation['operationId'])}'><code>{method.upper()} {escape(path)}</code> "
        f"<small>{escape(operation['summary'])}</small></h3>"
        f"<p>{escape(operation.get('description', ''))}</p>"
        + (f"<table>{parameters}</table>" if parameters else "")
        + f"<pre>{escape(curl(path, method, body.get('example')))}</pre>{responses}"
    )


def _page_example(response: JSONObject) -> str:
    shown = []
    for content in response.get("content", {}).values():
        if "$ref" in content.get("schema", {}):
            name = content["schema"]["$ref"].rpartition("/")[2]
            shown.append(f"<p>Schema: <a href='#schema-{escape(name)}'>{escape(name)}</a></p>")
        if "example" in content:
            shown.append(_page_json(content["example"]))
        shown.extend(
            f"<p><a href='#{escape(slug)}'>{escape(slug)}</a></p>" for slug in content.get("examples", ())
        )
    return "".join(shown)


def _page_json(value: object) -> str:
    if isinstance(value, str):
        return f"<pre>{escape(value)}</pre>"
    return f"<pre>{escape(json.dumps(_plain(value), indent=2, ensure_ascii=False))}</pre>"
