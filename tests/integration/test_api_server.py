"""The REST API's view of the server itself, and its keys, over a real socket."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import httpx
import msgspec
import pytest
from jsonschema import Draft202012Validator

from ai_agent_server.config.settings import EnvSecret
from ai_agent_server.core.ports import Component, HealthReport
from ai_agent_server.core.task_packet import Completed, Hop, LLMCall, Started, StepFinished, StepStarted
from ai_agent_server.errors import ConfigurationError
from tests.servers.api import Parts, serving

EXPLAIN = "/api/v1/load-balancer/explain"


@pytest.fixture
def parts() -> Parts:
    return Parts()


@pytest.fixture
async def http(parts: Parts) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(parts.app) as address, httpx.AsyncClient(base_url=address, timeout=30) as client:
        yield client


async def test_profiles_tell_each_role_with_its_endpoint_and_schema(http: httpx.AsyncClient) -> None:
    profiles = (await http.get("/api/v1/profiles")).json()["items"]

    developer = next(profile for profile in profiles if profile["name"] == "developer")
    planner = next(role for role in developer["roles"] if role["name"] == "planner")
    assert planner["endpoint"] == "/api/v1/developer/planner"
    assert planner["payload_schema"]["required"] == ["task"]
    assert developer["routes"]["qa.fail"][0]["to"] == "fast-coder"


async def test_an_llm_is_switched_off_and_on(http: httpx.AsyncClient) -> None:
    off = await http.patch("/api/v1/llms/embedded", json={"toggle": False})
    listed = (await http.get("/api/v1/llms")).json()["items"]
    explained = await http.post("/api/v1/load-balancer/explain", json={})
    on = await http.patch("/api/v1/llms/embedded", json={"toggle": True})

    assert (off.status_code, off.json()["toggle"], on.json()["toggle"]) == (200, False, True)
    assert [(llm["name"], llm["toggle"], llm["engine"]) for llm in listed] == [
        ("embedded", False, "local.llama_cpp")
    ]
    assert explained.json()["chosen"] is None


async def test_an_llm_that_is_not_configured_is_told_with_those_that_are(http: httpx.AsyncClient) -> None:
    answer = await http.patch("/api/v1/llms/embeded", json={"toggle": False})

    assert (answer.status_code, answer.json()["choices"]) == (404, ["embedded"])


@pytest.mark.parametrize("body", [{}, {"toggle": 1}, {"toggle": True, "locked": True}, []])
async def test_a_switch_is_on_or_off_and_nothing_else(http: httpx.AsyncClient, body: object) -> None:
    assert (await http.patch("/api/v1/llms/embedded", json=body)).status_code == 422


async def test_the_balancer_explains_a_choice(http: httpx.AsyncClient) -> None:
    answer = await http.post("/api/v1/load-balancer/explain", json={"tier": "main", "needs": ["vision"]})
    wrong = await http.post("/api/v1/load-balancer/explain", json={"needs": ["telepathy"]})

    assert (answer.json()["chosen"], answer.json()["reason"]) == ("embedded", "tier main")
    assert answer.json()["candidates"] == [{"llm": "embedded", "score": 1.0}]
    assert (wrong.status_code, wrong.json()["pointer"]) == (422, "/needs/0")
    assert "vision" in wrong.json()["choices"]


async def test_a_reload_tells_what_changed_or_what_is_wrong(parts: Parts, http: httpx.AsyncClient) -> None:
    good = await http.post("/api/v1/config/reload")
    parts.mistake = ConfigurationError("unknown LLM 'x'", pointer="/profiles/a", choices=("embedded",))
    bad = await http.post("/api/v1/config/reload")

    assert (good.status_code, good.json()["changed"]) == (200, ["/llms/embedded/toggle"])
    assert (bad.status_code, bad.json()["pointer"]) == (422, "/profiles/a")
    assert bad.json()["choices"] == ["embedded"]


@pytest.mark.parametrize("path", ["/health", "/api/v1/health"])
async def test_health_is_200_until_the_server_is_down(
    parts: Parts, http: httpx.AsyncClient, path: str
) -> None:
    parts.health = HealthReport(status="degraded", version="0")
    degraded = await http.get(path)
    parts.health = HealthReport(
        status="down", version="0", components={"store": Component(status="down", advice="free some space")}
    )
    down = await http.get(path)

    assert (degraded.status_code, down.status_code) == (200, 503)
    assert down.json()["components"]["store"]["advice"] == "free some space"


async def test_the_same_numbers_come_as_json_and_for_prometheus(
    parts: Parts, http: httpx.AsyncClient
) -> None:
    task_id = (await http.post("/api/v1/developer/planner", json={"payload": {}})).json()["task_id"]
    now = datetime.now(UTC) + timedelta(seconds=2)
    call = LLMCall(
        llm="embedded",
        model="m",
        source="local",
        input_tokens=30,
        output_tokens=11,
        finish_reason="stop",
        time_to_first_token_ms=50,
        duration_ms=1050,
        prompt_sha256="",
    )
    parts.engine.happen(
        task_id,
        Started(at=now, generation=1),
        StepStarted(at=now, step=1, role="planner", attempt=1, hop=Hop(on="entry", why="")),
        StepFinished(at=now, step=1, role="planner", outcome="done", call=call, duration_ms=1100),
        Completed(at=now, result={}),
    )
    told = (await http.get("/api/v1/metrics")).json()
    text = (await http.get("/metrics")).text

    assert told["state"]["tasks"]["completed"] == 1
    assert told["use"]["llms"]["embedded"] == {
        "calls": 1,
        "input_tokens": 30,
        "output_tokens": 11,
        "cost_usd": 0.0,
    }
    assert told["performance"]["llms"]["embedded"]["output_tokens_per_s"]["p50"] == 10
    for line in (
        'ai_agent_server_tasks{status="completed"} 1.0',
        'ai_agent_server_llm_calls_total{llm="embedded"} 1.0',
        'ai_agent_server_role_output_tokens_total{role="developer/planner"} 11.0',
        'ai_agent_server_llm_output_tokens_per_second{llm="embedded",quantile="0.5"} 10.0',
        'ai_agent_server_step_duration_seconds{quantile="0.95",role="developer/planner"} 1.1',
    ):
        assert line in text.splitlines()


async def test_the_schemas_are_published_and_hold_for_what_the_api_answers(http: httpx.AsyncClient) -> None:
    schema = (await http.get("/api/v1/schema/task-packet")).json()
    packet = (await http.post("/api/v1/developer/planner", json={"payload": {}})).json()
    configuration = (await http.get("/api/v1/schema/configuration")).json()

    Draft202012Validator(schema).validate(packet)
    assert not Draft202012Validator(schema).is_valid({**packet, "status": "done"})
    assert "llms" in configuration["$defs"]["Settings"]["properties"]


async def test_the_docs_page_needs_nothing_from_elsewhere_and_has_a_place_for_each_problem(
    http: httpx.AsyncClient,
) -> None:
    page = (await http.get("/api/v1/docs")).text
    problem = (await http.get("/api/v1/tasks/1")).json()

    assert "://" not in page.replace("http://127.0.0.1:3160", "").replace("https://json-schema.org", "")
    assert f"id='{problem['type'].partition('#')[2]}'" in page


async def test_with_a_key_everything_but_health_asks_for_it() -> None:
    async with serving(Parts(api_key="s3cret").app) as address, httpx.AsyncClient(base_url=address) as http:
        paths = (await http.get("/api/v1/openapi.json", headers={"x-api-key": "s3cret"})).json()["paths"]
        for path, methods in paths.items():
            for method in methods:
                answer = await http.request(method, path)
                assert answer.status_code == (200 if path.endswith("/health") else 401), path
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": "Bearer s3cret"}, 200),
        ({"authorization": "bearer s3cret"}, 200),
        ({"x-api-key": "s3cret"}, 200),
        ({"Authorization": "Bearer s3cre"}, 401),
        ({"Authorization": "Bearer s3crets"}, 401),
        ({"Authorization": "Basic s3cret"}, 401),
        ({"Authorization": "s3cret"}, 401),
        ({"x-api-key": ""}, 401),
        ({"x-api-key": "ключ".encode().decode("latin-1")}, 401),
    ],
)
async def test_a_key_is_taken_in_both_forms_and_only_when_it_is_right(
    headers: dict[str, str], status: int
) -> None:
    encoded = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    async with serving(Parts(api_key="s3cret").app) as address, httpx.AsyncClient(base_url=address) as http:
        answer = await http.get("/api/v1/tasks", headers=httpx.Headers(encoded))

    assert answer.status_code == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("https://evil.example", 403),
        ("http://localhost.evil.example:3160", 403),
        ("null", 403),
        ("http://[", 403),
        ("http://localhost:5173", 202),
        ("http://127.0.0.1:3160", 202),
        ("http://[::1]:8080", 202),
    ],
)
async def test_without_a_key_a_page_from_elsewhere_gives_no_work(
    parts: Parts, http: httpx.AsyncClient, origin: str, status: int
) -> None:
    answer = await http.post("/api/v1/developer/planner", json={"payload": {}}, headers={"Origin": origin})

    assert (answer.status_code, len(parts.engine.tasks)) == (status, status == 202)


async def test_a_name_that_was_made_to_point_here_reads_nothing(http: httpx.AsyncClient) -> None:
    answer = await http.get("/api/v1/tasks", headers={"Host": "attacker.example"})
    assert answer.status_code == 403
    assert (await http.get("/api/v1/tasks", headers={"Host": "localhost:3160"})).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/api/v1/health"])
async def test_health_answers_head_as_get_without_a_body(http: httpx.AsyncClient, path: str) -> None:
    got, head = await http.get(path), await http.head(path)

    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == got.headers["content-length"]


async def test_the_root_leads_to_the_docs(http: httpx.AsyncClient) -> None:
    answer = await http.get("/")

    assert (answer.status_code, answer.headers["location"]) == (303, "/api/v1/docs")


async def test_the_prometheus_text_names_its_charset_once(http: httpx.AsyncClient) -> None:
    content_type = (await http.get("/metrics")).headers["content-type"]

    assert content_type == "text/plain; version=0.0.4; charset=utf-8"


async def test_a_choice_is_explained_as_a_role_would_ask(parts: Parts, http: httpx.AsyncClient) -> None:
    role = parts.settings.profiles["developer"].roles["planner"]
    role = msgspec.structs.replace(role, tier="main", privacy="local", max_tokens=77, result_schema={})
    profile = msgspec.structs.replace(parts.settings.profiles["developer"], roles={"planner": role})
    parts.settings = msgspec.structs.replace(parts.settings, profiles={"developer": profile})
    of_role = {"profile": "developer", "role": "planner"}

    await http.post(EXPLAIN, json=of_role)
    await http.post(EXPLAIN, json={**of_role, "tier": "small", "privacy": "any", "needs": ["tools"]})

    plain, with_more = parts.balancer.asked
    assert (plain.tier, plain.privacy, plain.output_tokens) == ("main", "local", 77)
    assert plain.needs == {"chat", "json_schema"}
    assert (with_more.tier, with_more.privacy) == ("small", "local")
    assert with_more.needs == {"tools"}


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"profile": "nope", "role": "planner"}, 404, "developer"),
        ({"profile": "developer", "role": "nope"}, 404, "planner"),
        ({"profile": "developer"}, 422, "/role"),
    ],
)
async def test_an_unknown_role_is_not_explained(
    http: httpx.AsyncClient, body: object, status: int, says: str
) -> None:
    answer = await http.post(EXPLAIN, json=body)

    assert answer.status_code == status
    assert says in answer.text


async def test_an_llm_tells_whether_its_key_is_set_and_never_the_key() -> None:
    for environ, has_key in (({}, False), ({"SOME_KEY": "s3cret"}, True)):
        parts = Parts(environ=environ)
        llm = msgspec.structs.replace(parts.settings.llms["embedded"], api_key=EnvSecret(env="SOME_KEY"))
        parts.settings = msgspec.structs.replace(parts.settings, llms={"embedded": llm})
        async with serving(parts.app) as address, httpx.AsyncClient(base_url=address) as client:
            answer = await client.get("/api/v1/llms")
        assert answer.json()["items"][0]["has_key"] is has_key
        assert "s3cret" not in answer.text
