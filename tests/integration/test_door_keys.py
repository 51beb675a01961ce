"""The door on a real server: keys, scopes, privacy, web pages, and what is never told."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from ai_agent_server.gateway.keys import KeptKey, changing, hashed, new_secret, read_kept
from tests.servers.process import SCRIPT, ServerProcess, scripted, write_config

LAPTOP, PHONE, ADMIN = "sk-the-laptop", "sk-the-phone", "sk-the-admin"
PAGE = "https://app.example.org"
CHAT: dict[str, Any] = {"model": "scripted", "messages": [{"role": "user", "content": "Hello"}]}
TASK: dict[str, Any] = {"payload": {"text": "Hello", "instructions": "shorter"}}
REWRITE = "/api/v1/productivity/rewrite"
SOON_S = 60.0


def two_llms() -> dict[str, Any]:
    """One LLM on this machine and one that counts as an API."""
    far = {**SCRIPT, "engine": "local.scripted", "source": "api", "options": {"replies": ["far"]}}
    return {**scripted("near"), "far": far}


@asynccontextmanager
async def server(
    folder: Path, *, environ: dict[str, str] | None = None, **changes: Any
) -> AsyncIterator[ServerProcess]:
    config = write_config(folder, **{"llms": scripted("hi"), "messaging": {"enabled": False}, **changes})
    given: dict[str, Any] = {"AI_AGENT_SERVER_API_KEY": "", **(environ or {})}
    async with ServerProcess(folder / "state", config, **given) as running:
        yield running


async def refusal_to_start(
    folder: Path, *arguments: str, environ: dict[str, str] | None = None, **changes: Any
) -> str:
    """What `serve` says when it does not start."""
    config = write_config(folder, messaging={"enabled": False}, **changes)
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "ai_agent_server", "serve", "--port", "0", "--config", str(config),
        "--state-dir", str(folder / "state"), *arguments,
        env={**os.environ, "AI_AGENT_SERVER_API_KEY": "", **(environ or {})},
        stdin=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(60):
            _, errors = await child.communicate()
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    assert child.returncode == 2
    assert b"Traceback" not in errors
    return errors.decode()


def shows(key: str, **headers: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}", **headers}


async def until(http: httpx.AsyncClient, path: str, key: str, status: int) -> None:
    """Wait until `key` is answered with `status` at `path`."""
    async with asyncio.timeout(SOON_S):
        while (await http.get(path, headers=shows(key))).status_code != status:
            await asyncio.sleep(0.1)


async def test_each_key_opens_what_it_is_for(tmp_path: Path) -> None:
    keys = {
        "laptop": {"api_key": {"env": "LAPTOP"}, "scopes": ["chat"]},
        "phone": {"api_key": {"env": "PHONE"}, "scopes": ["tasks", "metrics"]},
    }
    environ = {"LAPTOP": LAPTOP, "PHONE": PHONE, "AI_AGENT_SERVER_API_KEY": ADMIN}
    asked = (
        ("GET", "/v1/models"), ("GET", "/api/v1/tasks"), ("GET", "/api/v1/metrics"), ("GET", "/metrics"),
        ("POST", "/api/v1/config/reload"), ("PATCH", "/api/v1/llms/scripted"), ("GET", "/mcp/tools"),
    )  # fmt: skip
    opened: dict[str, list[bool]] = {}
    async with server(tmp_path, environ=environ, gateway={"keys": keys}) as running, running.http() as http:
        for key in (LAPTOP, PHONE, ADMIN):
            answers = [await http.request(method, path, headers=shows(key)) for method, path in asked]
            assert {answer.status_code for answer in answers} <= {200, 403, 415}
            opened[key] = [answer.status_code != 403 for answer in answers]
        unknown = [
            (await http.request(method, path, headers=shows("sk-x"))).status_code for method, path in asked
        ]
        health = await http.get("/health")
        refused = await http.get("/api/v1/tasks", headers=shows(LAPTOP))
    assert opened == {
        LAPTOP: [True, False, False, False, False, False, False],
        PHONE: [False, True, True, True, False, False, False],
        ADMIN: [True] * 7,
    }
    assert unknown == [401] * 7
    assert health.status_code == 200
    assert refused.json()["type"].endswith("#wrong-scope")
    assert "'tasks'" in refused.json()["detail"]


async def test_a_key_that_is_made_opens_and_one_that_is_revoked_does_not(tmp_path: Path) -> None:
    secret = new_secret(lambda size: bytes(range(size)))
    made = {"scopes": ["tasks"], "sha256": hashed(secret.encode()), "created_at": "2026-11-21T09:30:00Z"}
    path = tmp_path / "state" / "keys.json"
    async with server(tmp_path) as running, running.http() as http:
        assert (await http.get("/api/v1/tasks")).status_code == 200
        path.write_text(json.dumps({"laptop": made}))
        await until(http, "/api/v1/tasks", secret, 200)
        await until(http, "/api/v1/tasks", "none", 401)

        path.write_text("{not json")
        await asyncio.sleep(2.5)
        assert (await http.get("/api/v1/tasks", headers=shows(secret))).status_code == 200

        with_none: dict[str, Any] = {}
        path.write_text(json.dumps(with_none))
        await until(http, "/api/v1/tasks", secret, 401)
        # It asked for keys once: revoking the last one must not open the door to everybody.
        assert (await http.get("/api/v1/tasks")).status_code == 401
    assert secret not in running.log.read_text()


async def keys(folder: Path, *arguments: str) -> tuple[int, str, str]:
    """`ai-agent-server keys ARGUMENTS` for the server in `folder`: exit code, output, errors."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "ai_agent_server", "keys", *arguments,
        "--state-dir", str(folder / "state"), "--config", str(folder / "configuration.json"),
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(60):
            out, errors = await child.communicate()
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    assert child.returncode is not None
    return child.returncode, out.decode(), errors.decode()


async def test_a_key_of_the_command_line_opens_a_running_server_until_it_is_revoked(tmp_path: Path) -> None:
    async with server(tmp_path) as running, running.http() as http:
        code, out, told = await keys(
            tmp_path, "new", "laptop", "--scope", "chat", "--limit", "per_s=3600,requests=1", "--cache"
        )
        assert code == 0
        assert "not shown again" in told
        secret = out.strip()
        await until(http, "/v1/models", "none", 401)
        assert (await http.get("/v1/models", headers=shows(secret))).status_code == 200
        chats = [await http.post("/v1/chat/completions", json=CHAT, headers=shows(secret)) for _ in range(2)]
        task = await http.get("/api/v1/tasks", headers=shows(secret))
        listed = await keys(tmp_path, "--json")
        again = await keys(tmp_path, "new", "laptop")
        assert (await keys(tmp_path, "revoke", "laptop"))[0] == 0
        await until(http, "/v1/models", secret, 401)
        gone = await keys(tmp_path, "revoke", "laptop")
    assert [answer.status_code for answer in chats] == [200, 429]
    assert task.status_code == 403
    (item,) = json.loads(listed[1])["items"]
    assert (item["name"], item["scopes"], item["cache"]) == ("laptop", ["chat"], True)
    assert chats[0].headers["x-cache"] == "miss"
    assert "sha256" not in item
    assert (again[0], gone[0]) == (2, 2)
    assert "there is a key 'laptop'" in again[2]
    assert secret not in listed[1] + again[2] + running.log.read_text()


async def test_a_key_that_cannot_be_meant_is_not_made(tmp_path: Path) -> None:
    write_config(tmp_path, gateway={"keys": {"phone": {"api_key": {"env": "PHONE"}}}})
    for arguments, said in (
        (("Big",), "no name"), (("admin",), "taken by a key"), (("phone",), "taken by a key"),
        (("a", "--llm", "nope"), "unknown LLM 'nope'"), (("a", "--limit", "per_s=3"), "bounds nothing"),
        (("a", "--limit", "tokens=many"), "tokens"), (("a", "--scope", "root"), "root"),
    ):  # fmt: skip
        code, out, errors = await keys(tmp_path, "new", *arguments)
        assert (code, out) == (2, "")
        assert said in errors
    assert not (tmp_path / "state").exists()


async def test_no_secret_is_told_in_a_log_an_answer_or_a_file(tmp_path: Path) -> None:
    keys = {"laptop": {"api_key": {"env": "LAPTOP"}, "limits": [{"per_s": 60, "requests": 1}]}}
    seen = ""
    async with (
        server(tmp_path, environ={"LAPTOP": LAPTOP}, gateway={"keys": keys}) as running,
        running.http() as http,
    ):
        for key in (LAPTOP, LAPTOP, LAPTOP + "x"):
            for path, body in ((REWRITE, TASK), ("/v1/chat/completions", CHAT)):
                answer = await http.post(path, json=body, headers=shows(key))
                seen += str(answer.headers) + answer.text
        for path in ("/api/v1/metrics", "/metrics", "/health", "/api/v1/llms", "/api/v1/openapi.json"):
            seen += (await http.get(path, headers=shows(LAPTOP))).text
    kept = "".join(path.read_text() for path in (tmp_path / "state").rglob("*.json"))
    assert "limits.json" in {path.name for path in (tmp_path / "state").iterdir()}
    assert LAPTOP not in seen + running.log.read_text() + kept


@pytest.mark.parametrize(
    ("changes", "environ", "said"),
    [
        ({"keys": {"laptop": {"api_key": {"env": "LAPTOP"}}}}, {}, "LAPTOP is not set"),
        (
            {"keys": {"a": {"api_key": {"env": "A"}}, "b": {"api_key": {"env": "B"}}}},
            {"A": "same", "B": "same"},
            "the same key as 'a'",
        ),
        (
            {"keys": {"a": {"api_key": {"env": "A"}}}},
            {"A": ADMIN, "AI_AGENT_SERVER_API_KEY": ADMIN},
            "'admin'",
        ),
    ],
)
async def test_keys_that_cannot_be_meant_refuse_the_start(
    tmp_path: Path, changes: dict[str, Any], environ: dict[str, str], said: str
) -> None:
    assert said in await refusal_to_start(tmp_path, environ=environ, gateway=changes)


async def test_a_broken_keys_file_refuses_the_start(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "keys.json").write_text('{"laptop": {"sha256": "short"}}')
    assert "not a file of keys" in await refusal_to_start(tmp_path)


async def test_beyond_this_machine_any_key_will_do_and_without_one_nothing_listens(tmp_path: Path) -> None:
    refusal = await refusal_to_start(tmp_path, "--host", "0.0.0.0")
    assert "a key is needed" in refusal
    with changing(tmp_path / "state" / "keys.json") as kept:
        kept["laptop"] = KeptKey(sha256=hashed(LAPTOP.encode()), created_at=datetime.now(UTC))
    # A loopback address that is none: the check has passed, and the binding fails.
    assert "cannot listen on 192.0.2.1" in await refusal_to_start(tmp_path, "--host", "192.0.2.1")


async def test_a_header_makes_privacy_stricter_and_never_weaker(tmp_path: Path) -> None:
    keys = {
        "laptop": {"api_key": {"env": "LAPTOP"}, "privacy": "local"},
        "phone": {"api_key": {"env": "PHONE"}},
    }
    projects = {"secret": {"privacy": "local"}, "public": {}}
    asked: tuple[tuple[str, dict[str, str]], ...] = (
        (LAPTOP, {"X-Privacy": "any"}), (LAPTOP, {"X-Project": "public"}), (PHONE, {"X-Privacy": "local"}),
        (PHONE, {"X-Privacy": "any", "X-Project": "secret"}), (PHONE, {"X-Project": "public"}), (PHONE, {}),
    )  # fmt: skip
    async with (
        server(
            tmp_path, environ={"LAPTOP": LAPTOP, "PHONE": PHONE}, llms=two_llms(), gateway={"keys": keys},
            projects=projects,
        ) as running,
        running.http() as http,
    ):  # fmt: skip
        far = {**CHAT, "model": "far"}
        chats = [await http.post("/v1/chat/completions", json=far, headers=shows(k, **h)) for k, h in asked]
        tasks = [
            await http.post(REWRITE, params={"wait": 60}, json=TASK, headers=shows(key, **headers))
            for key, headers in asked
        ]
    assert [answer.headers["x-llm"] for answer in chats] == [*["scripted"] * 4, "far", "far"]
    assert [task.json()["privacy"] for task in tasks] == ["local", "local", "local", "local", "any", "any"]


async def test_another_projects_name_takes_no_privacy_away(tmp_path: Path) -> None:
    projects = {"secret": {"privacy": "local", "paths": ["/home/me/secret"]}, "public": {}}
    there = {"role": "system", "content": "Working directory: /home/me/secret/src"}
    body = {"model": "far", "messages": [there, *CHAT["messages"]]}
    async with server(tmp_path, llms=two_llms(), projects=projects) as running, running.http() as http:
        answers = [
            await http.post("/v1/chat/completions", json=body, headers=headers)
            for headers in ({}, {"X-Project": "public"}, {"X-Project": "secret"}, {"X-Project": "nobody"})
        ]
    assert [answer.headers["x-llm"] for answer in answers] == ["scripted"] * 4


async def test_a_key_for_some_llms_gets_no_other(tmp_path: Path) -> None:
    keys = {"laptop": {"api_key": {"env": "LAPTOP"}, "allowed_llms": ["scripted"]}}
    async with (
        server(tmp_path, environ={"LAPTOP": LAPTOP}, llms=two_llms(), gateway={"keys": keys}) as running,
        running.http() as http,
    ):
        models = (await http.get("/v1/models", headers=shows(LAPTOP))).json()["data"]
        chats = [
            await http.post("/v1/chat/completions", json={**CHAT, "model": model}, headers=shows(LAPTOP))
            for model in ("scripted", "auto", "far")
        ]
        task = await http.post(REWRITE, params={"wait": 60}, json=TASK, headers=shows(LAPTOP))
    assert "far" not in {model["id"] for model in models}
    assert [answer.status_code for answer in chats] == [200, 200, 403]
    assert [answer.headers["x-llm"] for answer in chats[:2]] == ["scripted", "scripted"]
    called = [event["call"]["llm"] for event in task.json()["history"] if event.get("call")]
    assert called == ["scripted"]


async def test_a_page_of_a_configured_origin_may_use_the_server_and_no_other(tmp_path: Path) -> None:
    keys = {"laptop": {"api_key": {"env": "LAPTOP"}}}
    async with (
        server(tmp_path, environ={"LAPTOP": LAPTOP}, gateway={"keys": keys, "cors": [PAGE]}) as running,
        running.http() as http,
    ):
        for path in ("/v1/chat/completions", REWRITE, "/mcp/tools/classify"):
            asks = {
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "authorization,content-type",
            }
            preflight = await http.options(path, headers={"Origin": PAGE, **asks})
            assert preflight.status_code == 204
            assert preflight.headers["access-control-allow-origin"] == PAGE
            assert preflight.headers["access-control-allow-headers"] == "authorization,content-type"
            assert "POST" in preflight.headers["access-control-allow-methods"]
            foreign = await http.options(path, headers={"Origin": "https://evil.example", **asks})
            assert "access-control-allow-origin" not in foreign.headers
        good = await http.get("/v1/models", headers=shows(LAPTOP, Origin=PAGE))
        bad = await http.get("/v1/models", headers={"Origin": PAGE})
        other = await http.get("/v1/models", headers=shows(LAPTOP, Origin=f"{PAGE}:8443"))
    assert (good.status_code, good.headers["access-control-allow-origin"]) == (200, PAGE)
    assert "x-ratelimit-remaining-requests" in good.headers["access-control-expose-headers"]
    assert (bad.status_code, bad.headers["access-control-allow-origin"]) == (401, PAGE)
    assert "access-control-allow-origin" not in other.headers
    assert {answer.headers["vary"] for answer in (good, bad, other)} == {"Origin"}
    assert "*" not in str(good.headers) + str(bad.headers)


async def test_without_a_key_only_pages_of_configured_origins_get_in(tmp_path: Path) -> None:
    async with server(tmp_path, gateway={"cors": [PAGE]}) as running, running.http() as http:
        statuses = [
            (await http.get("/v1/models", headers=headers)).status_code
            for headers in (
                {"Origin": PAGE}, {"Origin": "https://evil.example"}, {"Origin": "null"}, {},
                {"Origin": PAGE, "Host": "evil.example"}, {"Origin": "http://localhost:5173"},
            )
        ]  # fmt: skip
    assert statuses == [200, 403, 403, 200, 403, 200]


async def test_a_key_is_taken_in_both_forms(tmp_path: Path) -> None:
    table: tuple[tuple[dict[str, str], int], ...] = (
        ({"x-api-key": LAPTOP}, 200),
        ({"Authorization": f"bearer  {LAPTOP}"}, 200),
        ({"Authorization": f"Bearer {LAPTOP}", "x-api-key": "wrong"}, 200),
        ({"Authorization": "Bearer wrong", "x-api-key": LAPTOP}, 401),
        ({"Authorization": f"Basic {LAPTOP}"}, 401),
        ({"Authorization": f"Basic {LAPTOP}", "x-api-key": LAPTOP}, 200),
        ({"x-api-key": LAPTOP + " x"}, 401),
        ({"Authorization": "Bearer"}, 401),
        ({}, 401),
    )
    keys = {"laptop": {"api_key": {"env": "LAPTOP"}}}
    async with (
        server(tmp_path, environ={"LAPTOP": LAPTOP}, gateway={"keys": keys}) as running,
        running.http() as http,
    ):
        for headers, status in table:
            assert (await http.get("/v1/models", headers=headers)).status_code == status, headers


def test_a_change_of_the_keys_file_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    made = KeptKey(sha256=hashed(b"secret"), created_at=datetime(2026, 11, 21, tzinfo=UTC))
    with changing(path) as kept:
        kept["laptop"] = made
    with pytest.raises(RuntimeError), changing(path) as kept:
        kept.clear()
        raise RuntimeError
    assert read_kept(path) == {"laptop": made}
    assert path.stat().st_mode & 0o077 == 0
