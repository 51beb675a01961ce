"""The configuration: each kind of mistake is told with its place and what would be right."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from ai_agent_server.assembly import members_for, profiles_for, strategy_for
from ai_agent_server.config.settings import (
    MAX_BYTES,
    Settings,
    json_schema,
    load,
    packaged_configuration,
    parse,
)
from ai_agent_server.core.task_packet import Limits
from ai_agent_server.errors import ConfigurationError

LLM = {"engine": "local.scripted", "model": "m", "source": "local"}
WHOLE: dict[str, Any] = {
    "accelerators": {"gpu": {"memory_mb": 8000}},
    "llms": {"one": {**LLM, "accelerator": "gpu", "api_key": {"env": "KEY"}}},
    "profiles": {
        "developer": {
            "roles": {"qa": {"llm": "one"}, "debug": {"prefer": ["one"], "limits": {"calls": 3}}},
            "workflow": {"routes": {"qa.fail": [{"to": "debug", "since": ["qa"]}]}, "makers": ["debug"]},
        }
    },
    "limits": {"tokens": 5},
    "messaging": {"credentials": {"env": "CREDENTIALS"}},
    "gateway": {"keys": {"laptop": {"api_key": {"env": "LAPTOP"}, "limits": [{"per_s": 60, "tokens": 9}]}}},
    "callbacks": {"targets": {"ci": {"url": "http://ci.test/hook", "secret": {"env": "CI"}}}},
    "projects": {"shop": {"paths": ["/home/me/shop"]}},
}

SECTIONS = (
    "",
    "/accelerators/gpu",
    "/balancer",
    "/balancer/circuit",
    "/balancer/retry",
    "/callbacks",
    "/callbacks/targets/ci",
    "/cluster",
    "/gateway",
    "/gateway/cache",
    "/gateway/keys/laptop",
    "/gateway/keys/laptop/limits/0",
    "/gateway/limits",
    "/gateway/limits/tiers",
    "/gateway/tiers",
    "/gateway/tiers/main",
    "/gateway/tiers/small",
    "/limits",
    "/llms/one",
    "/llms/one/api_key",
    "/llms/one/timeouts",
    "/messaging",
    "/messaging/credentials",
    "/metrics",
    "/profiles/developer",
    "/profiles/developer/roles/qa",
    "/profiles/developer/roles/qa/limits",
    "/profiles/developer/workflow",
    "/profiles/developer/workflow/routes/qa.fail/0",
    "/projects/shop",
    "/sandbox",
    "/sandbox/limits",
    "/server",
    "/store",
    "/store/retention",
    "/tracing",
)
"""Every object of the file whose keys are a closed set."""

OUT_OF_BOUNDS = (
    ("/accelerators/gpu/memory_mb", -1),
    ("/accelerators/gpu/headroom_mb", -1),
    ("/balancer/circuit/failures", -3),
    ("/balancer/circuit/failures", 0),
    ("/balancer/circuit/cooldown_s", -0.1),
    ("/balancer/max_wait_s", -1),
    ("/balancer/retry/attempts", 0),
    ("/balancer/retry/backoff_s", -1),
    ("/balancer/retry/backoff_max_s", -1),
    ("/gateway/cache/max_mb", -1),
    ("/gateway/cache/ttl_s", 0),
    ("/gateway/keep_alive_s", 0),
    ("/gateway/keys/laptop/limits/0/gpu_s", 0),
    ("/gateway/keys/laptop/limits/0/per_s", 0.5),
    ("/gateway/keys/laptop/limits/0/requests", 0),
    ("/gateway/keys/laptop/limits/0/tokens", 0),
    ("/gateway/keys/laptop/limits/0/usd", 0),
    ("/gateway/tiers/main/max_output_tokens", 0),
    ("/gateway/tiers/small/max_input_tokens", 0),
    ("/limits/calls", -1),
    ("/limits/cost_usd", -0.01),
    ("/limits/feedback_hops", -1),
    ("/limits/tokens", -1),
    ("/limits/wall_s", -1),
    ("/llms/one/context", 0),
    ("/llms/one/cost_per_million_input_usd", -1),
    ("/llms/one/cost_per_million_output_usd", -1),
    ("/llms/one/memory_mb", -1),
    ("/llms/one/slots", 0),
    ("/llms/one/slots", 10**400),
    ("/llms/one/timeouts/connect_s", 0),
    ("/llms/one/timeouts/first_token_s", -1),
    ("/llms/one/timeouts/idle_s", 0),
    ("/messaging/metrics_interval_s", 0),
    ("/messaging/metrics_interval_s", 0.01),
    ("/profiles/developer/roles/qa/limits/calls", -1),
    ("/profiles/developer/roles/qa/max_tokens", 0),
    ("/profiles/developer/roles/qa/temperature", -0.1),
    ("/profiles/developer/workflow/input_expires_s", 0),
    ("/profiles/developer/workflow/max_invalid_output", 0),
    ("/profiles/developer/workflow/max_rounds_without_progress", 0),
    ("/profiles/developer/workflow/max_same_step", 0),
    ("/profiles/developer/workflow/routes/qa.fail/0/at_most", 0),
    ("/sandbox/limits/cpu_s", 0),
    ("/sandbox/limits/file_mb", -1),
    ("/sandbox/limits/memory_mb", 0),
    ("/sandbox/limits/output_kb", -1),
    ("/sandbox/limits/processes", 0),
    ("/sandbox/limits/wall_s", 0),
    ("/server/max_body_mb", 0),
    ("/server/max_live", 0),
    ("/server/max_running", 0),
    ("/server/shutdown_s", -1),
)

MEANINGLESS: tuple[tuple[str, Any, str, str, tuple[str, ...]], ...] = (
    # where it is put, what is put there, where it is told, words of the problem, choices
    ("", [], "", "must be object", ()),
    ("/llms", {}, "/llms", "at least one LLM", ()),
    ("/llms/Big", LLM, "/llms/Big", "must be lower-case", ()),
    ("/llms/one/engine", 7, "/llms/one/engine", "must be string", ()),
    ("/llms/one/slots", "2", "/llms/one/slots", "must be integer", ()),
    ("/llms/one/slots", 1.5, "/llms/one/slots", "must be integer", ()),
    ("/llms/one/slots", True, "/llms/one/slots", "must be integer", ()),
    ("/llms/one/context", None, "/llms/one/context", "must be integer", ()),
    ("/llms/one/api_key", 7, "/llms/one/api_key", "must be object or null", ()),
    ("/profiles/developer/roles/qa/llm", 7, "/profiles/developer/roles/qa/llm", "must be string or null", ()),
    ("/llms/one/toggle", "on", "/llms/one/toggle", "must be boolean", ()),
    ("/llms/one/source", "cloud", "/llms/one/source", "'cloud' is not one", ("api", "local")),
    ("/llms/one/tier", "huge", "/llms/one/tier", "'huge' is not one", ("small", "main")),
    ("/llms/one", {"engine": "local.scripted", "source": "local"}, "/llms/one", "'model' is a required", ()),
    ("/llms/one/accelerator", "tpu", "/llms/one/accelerator", "unknown accelerator 'tpu'", ("gpu",)),
    ("/llms/one/options/base_url", "http://gpu.example.org", "/llms/one/source", "loopback", ()),
    ("/llms/one/options/base_url", "http://127.0.0.1.example.org", "/llms/one/source", "loopback", ()),
    ("/llms/one/options/base_url", "http://[::1", "/llms/one/options/base_url", "URL", ()),
    ("/llms/one/options/base_url", "http://localhost:99999", "/llms/one/options/base_url", "URL", ()),
    ("/llms/one/options/base_url", "ftp://localhost", "/llms/one/options/base_url", "URL", ()),
    ("/llms/one/options/base_url", 7, "/llms/one/options/base_url", "URL", ()),
    ("/llms/one/engine", "api.openai", "/llms/one/source", "loopback", ()),
    ("/accelerators/gpu/headroom_mb", 8000, "/accelerators/gpu/headroom_mb", "no memory", ()),
    ("/llms/one/source", "api", "/llms/one/accelerator", "needs no accelerator", ()),
    ("/llms/one/memory_mb", 8000, "/llms/one/memory_mb", "never fit: models have 7488 MB of gpu", ()),
    ("/profiles/tasks", {"roles": {"qa": {}}}, "/profiles/tasks", "shadow the route", ()),
    ("/profiles/My Team", {"roles": {"qa": {}}}, "/profiles/My Team", "must be lower-case", ()),
    ("/profiles/developer/roles", {}, "/profiles/developer/roles", "at least one role", ()),
    ("/profiles/developer/roles/a~b", {}, "/profiles/developer/roles/a~0b", "must be lower-case", ()),
    ("/profiles/developer/roles/end", {}, "/profiles/developer/roles/end", "engine's own", ()),
    ("/profiles/developer/roles/user", {}, "/profiles/developer/roles/user", "engine's own", ()),
    ("/profiles/developer/roles/qa/llm", "two", "/profiles/developer/roles/qa/llm", "'two'", ("one",)),
    (
        "/profiles/developer/roles/qa/prefer", ["one", "two"],
        "/profiles/developer/roles/qa/prefer/1", "unknown LLM 'two'", ("one",),
    ),
    (
        "/profiles/developer/roles/qa/payload_schema", {"type": "thing"},
        "/profiles/developer/roles/qa/payload_schema/type", "not a JSON Schema", (),
    ),
    (
        "/profiles/developer/roles/qa/result_schema", {"properties": {"a": 1}},
        "/profiles/developer/roles/qa/result_schema/properties/a", "not a JSON Schema", (),
    ),
    (
        "/profiles/developer/payload_schema", {"required": "a"},
        "/profiles/developer/payload_schema/required", "not a JSON Schema", (),
    ),
    (
        "/profiles/developer/workflow/routes", {"coder.done": []},
        "/profiles/developer/workflow/routes/coder.done", "unknown role 'coder'", ("qa", "debug"),
    ),
    (
        "/profiles/developer/workflow/routes/qa.fail/0/to", "coder",
        "/profiles/developer/workflow/routes/qa.fail/0/to", "unknown role 'coder'", ("qa", "debug", "end"),
    ),
    (
        "/profiles/developer/workflow/routes/qa.fail/0/since", ["coder"],
        "/profiles/developer/workflow/routes/qa.fail/0/since", "unknown role 'coder'", ("qa", "debug"),
    ),
    (
        "/profiles/developer/workflow/makers", ["debug", "coder"],
        "/profiles/developer/workflow/makers/1", "unknown role 'coder'", ("qa", "debug"),
    ),
    ("/gateway/cors", ["*"], "/gateway/cors/0", "not an origin", ()),
    ("/gateway/cors", ["https://a.example/"], "/gateway/cors/0", "not an origin", ()),
    ("/gateway/cors", ["https://a.example:443"], "/gateway/cors/0", "not an origin", ()),
    ("/gateway/cors", ["https://me@a.example"], "/gateway/cors/0", "not an origin", ()),
    ("/gateway/cors", ["http://a.example", "null"], "/gateway/cors/1", "not an origin", ()),
    ("/gateway/keys/admin", {"api_key": {"env": "A"}}, "/gateway/keys/admin", "AI_AGENT_SERVER_API_KEY", ()),
    ("/gateway/keys/Mine", {"api_key": {"env": "A"}}, "/gateway/keys/Mine", "must be lower-case", ()),
    (
        "/gateway/keys/laptop/allowed_llms", ["one", "two"],
        "/gateway/keys/laptop/allowed_llms/1", "unknown LLM 'two'", ("one",),
    ),
    (
        "/gateway/keys/laptop/scopes", ["root"], "/gateway/keys/laptop/scopes/0", "'root' is not one",
        ("admin", "chat", "metrics", "tasks", "tools"),
    ),
    ("/projects/shop/paths", ["shop"], "/projects/shop/paths/0", "not an absolute path", ()),
    ("/projects/shop/paths", ["/"], "/projects/shop/paths/0", "not an absolute path", ()),
    ("/projects/shop/prefer", ["two"], "/projects/shop/prefer/0", "unknown LLM 'two'", ("one",)),
    ("/projects/other", {"paths": ["/home/me/shop/"]}, "/projects/other/paths/0", "'shop' has this", ()),
    ("/sandbox/tier", "jail", "/sandbox/tier", "'jail'", ("auto", "bubblewrap", "landlock", "unsafe")),
)  # fmt: skip

UNBUILDABLE: tuple[tuple[str, Any, str, str], ...] = (
    # where it is put, what, where it is told, one of the choices
    ("/llms/one/engine", "local.ollamma", "/llms/one/engine", "local.ollama"),
    ("/llms/one/options/repliez", [], "/llms/one/options", "replies"),
    ("/llms/one/options/delay_s", "soon", "/llms/one/options", "delay_s"),
    ("/balancer/strategy", "fastest", "/balancer/strategy", "lowest_latency"),
    (
        "/profiles/developer/roles/qa/options/limits",
        {},
        "/profiles/developer/roles/qa/options",
        "sandbox_limits",
    ),
    ("/profiles/developer/roles/qa/agent", "developer.qaa", "/profiles/developer/roles/qa/agent", "prompt"),
)


def within(document: Any, pointer: str, value: Any) -> Any:
    """`document` with `value` at `pointer`; objects on the way are made."""
    if not pointer:
        return value
    changed = copy.deepcopy(document)
    place, steps = changed, pointer.split("/")[1:]
    for step in steps[:-1]:
        place = place[int(step)] if isinstance(place, list) else place.setdefault(step, {})
    place[steps[-1]] = value
    return changed


def read(document: Any) -> Settings:
    return parse(json.dumps(document).encode(), source="my.json")


def mistake_in(document: Any) -> ConfigurationError:
    with pytest.raises(ConfigurationError) as caught:
        read(document)
    assert str(caught.value).startswith("my.json")
    return caught.value


def test_what_is_packaged_has_no_mistake_and_its_schema_is_one() -> None:
    Draft202012Validator.check_schema(json_schema())

    assert load(None) == parse(packaged_configuration(), source="packaged")


def test_the_tables_start_from_a_file_without_a_mistake() -> None:
    assert read(WHOLE).llms["one"].accelerator == "gpu"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"", "not JSON: Expecting value at line 1, column 1"),
        (b'{"llms": {},}', "not JSON: .+ at line 1, column"),
        (b"{'llms': {}}", "not JSON"),
        (b'{"llms": {}} {}', "not JSON: Extra data"),
        (b'{"llms": "\xff"}', "not UTF-8 at byte 10"),
        (b'{"limits": {"calls": ' + b"1" * 5000 + b"}}", "too many digits"),
        (b"[" * 100_000, "nested too deep"),
    ],
)
def test_what_is_no_json_is_told_with_the_place(text: bytes, problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem) as caught:
        parse(text, source="my.json")
    assert caught.value.pointer == ""
    assert str(caught.value).startswith("my.json: ")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
@pytest.mark.parametrize("pointer", ["/balancer/max_wait_s", "/llms/one/options/replies", "/limits/calls"])
def test_a_number_that_is_none_is_told_wherever_it_stands(pointer: str, number: str) -> None:
    text = json.dumps(within(WHOLE, pointer, "@")).replace('"@"', number)
    with pytest.raises(ConfigurationError, match="NaN, infinite or too large") as caught:
        parse(text.encode(), source="my.json")
    assert caught.value.pointer == pointer


@pytest.mark.parametrize(
    ("text", "pointer"),
    [
        ('{"llms": {}, "llms": {}}', "/llms"),
        ('{"llms": {"one": {"model": "a", "model": "b"}}}', "/llms/one/model"),
        (
            '{"profiles": {"p": {"workflow": {"makers": [{"x": 1, "x": 1}]}}}}',
            "/profiles/p/workflow/makers/0/x",
        ),
    ],
)
def test_a_key_that_stands_twice_is_told(text: str, pointer: str) -> None:
    with pytest.raises(ConfigurationError, match="stands twice") as caught:
        parse(text.encode(), source="my.json")
    assert caught.value.pointer == pointer


@pytest.mark.parametrize("section", SECTIONS)
def test_an_unknown_key_is_told_with_those_there_are(section: str) -> None:
    mistake = mistake_in(within(WHOLE, f"{section}/colour", "red"))

    assert mistake.pointer == f"{section}/colour"
    assert mistake.problem == "unknown key 'colour'"
    assert mistake.choices
    assert "colour" not in mistake.choices


def test_every_closed_object_is_in_the_table() -> None:
    closed = {
        name for name, shape in json_schema()["$defs"].items() if shape.get("additionalProperties") is False
    }

    # EnvSecret stands in two places of the table; LimitsDraft is a role's limits.
    assert len(closed) == len(SECTIONS) - 1


@pytest.mark.parametrize(("pointer", "value"), OUT_OF_BOUNDS)
def test_a_number_out_of_bounds_is_told(pointer: str, value: float) -> None:
    mistake = mistake_in(within(WHOLE, pointer, value))

    assert mistake.pointer == pointer
    assert re.search("less than|greater than", mistake.problem)


def test_an_alias_leads_to_a_model_that_there_is() -> None:
    aliases = {"claude-haiku-*": "small", "claude-*": "developer/qa", "gpt-*": "one", "*": "auto"}
    assert read(within(WHOLE, "/gateway/aliases", aliases)).gateway.aliases == aliases

    mistake = mistake_in(within(WHOLE, "/gateway/aliases/gpt-*", "two"))
    assert mistake.pointer == "/gateway/aliases/gpt-*"
    assert {"auto", "small", "main", "one", "developer/qa"} <= set(mistake.choices)


def test_every_number_has_both_bounds() -> None:
    def unbounded(shape: Any, name: str) -> list[str]:
        if shape.get("type") in {"integer", "number"}:
            low, high = {"minimum", "exclusiveMinimum"} & shape.keys(), {"maximum"} & shape.keys()
            return [] if low and high else [name]
        return [found for branch in shape.get("anyOf", ()) for found in unbounded(branch, name)]

    assert not [
        found
        for kind, definition in json_schema()["$defs"].items()
        for key, shape in definition.get("properties", {}).items()
        for found in unbounded(shape, f"{kind}.{key}")
    ]


@pytest.mark.parametrize(("at", "value", "pointer", "problem", "choices"), MEANINGLESS)
def test_what_cannot_be_meant_is_told(
    at: str, value: Any, pointer: str, problem: str, choices: tuple[str, ...]
) -> None:
    mistake = mistake_in(within(WHOLE, at, value))

    assert mistake.pointer == pointer
    assert problem in mistake.problem
    assert set(mistake.choices) == set(choices)


@pytest.mark.parametrize("pointer", ["/llms/one/api_key", "/messaging/credentials", "/llms/one/memory_mb"])
def test_a_secret_written_where_its_variable_is_named_is_not_repeated(pointer: str) -> None:
    mistake = mistake_in(within(WHOLE, pointer, "sk-live-123456"))

    assert mistake.pointer == pointer
    assert "sk-live" not in str(mistake)


@pytest.mark.parametrize(("at", "value", "pointer", "choice"), UNBUILDABLE)
def test_what_names_nothing_there_is_is_told_with_what_there_is(
    at: str, value: Any, pointer: str, choice: str
) -> None:
    settings = read(within(WHOLE, at, value))
    with pytest.raises(ConfigurationError) as caught:
        _ = strategy_for(settings), profiles_for(settings, None), members_for(settings, {}, {})

    assert caught.value.pointer == pointer
    assert choice in caught.value.choices


def test_a_whole_number_may_be_written_with_a_point() -> None:
    assert read(within(WHOLE, "/llms/one/slots", 2.0)).llms["one"].slots == 2


def test_a_roles_limits_leave_the_others_as_the_file_has_them() -> None:
    roles = profiles_for(read(WHOLE), None)["developer"].roles

    assert roles["qa"].limits == Limits(tokens=5)
    assert roles["debug"].limits == Limits(tokens=5, calls=3)


@pytest.mark.parametrize(
    "base_url", ["http://127.0.0.1:8080/v1", "http://localhost:1", "http://[::1]:2", "https://LOCALHOST"]
)
def test_a_local_llm_may_be_behind_a_loopback_address(base_url: str) -> None:
    assert read(within(WHOLE, "/llms/one/options/base_url", base_url)).llms["one"].source == "local"


def test_a_file_that_is_missing_a_folder_or_too_large_is_told(tmp_path: Path) -> None:
    large = tmp_path / "large.json"
    large.write_bytes(bytes(MAX_BYTES + 1))

    for path, problem in (
        (tmp_path / "none.json", "No such file"),
        (tmp_path, "Is a directory"),
        (large, "larger than 4 MiB"),
    ):
        with pytest.raises(ConfigurationError, match=problem) as caught:
            load(path)
        assert caught.value.source == str(path)


@pytest.mark.parametrize(
    ("content", "problem"), [(b"Test it. \xff", "not UTF-8 at byte 9"), (None, "cannot be read")]
)
def test_a_prompt_file_that_cannot_be_read_is_told(
    tmp_path: Path, content: bytes | None, problem: str
) -> None:
    prompt = tmp_path / ("prompt.md" if content is not None else f"{'long' * 64}.md")
    if content is not None:
        prompt.write_bytes(content)
    settings = read(within(WHOLE, "/profiles/developer/roles/qa/prompt", prompt.name))
    with pytest.raises(ConfigurationError, match=problem) as caught:
        profiles_for(settings, tmp_path)

    assert caught.value.pointer == "/profiles/developer/roles/qa/prompt"


@pytest.mark.parametrize("name", ["/etc/passwd", "../prompt.md"])
def test_a_prompt_file_stays_below_the_configurations_folder(tmp_path: Path, name: str) -> None:
    settings = read(within(WHOLE, "/profiles/developer/roles/qa/prompt", name))
    with pytest.raises(ConfigurationError, match="relative to the configuration"):
        profiles_for(settings, tmp_path)
