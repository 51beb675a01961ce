"""What the REST API does with bodies and requests that are wrong, over a real socket."""

import asyncio
import gzip
from collections.abc import AsyncIterator

import httpx
import pytest

from ai_agent_server.errors import (
    ChannelError,
    CorruptTaskError,
    IntakeFullError,
    ShuttingDownError,
    StoreFullError,
    StoreUnusableError,
)
from tests.servers.api import Parts, serving

PLANNER = "/api/v1/developer/planner"
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def parts() -> Parts:
    return Parts()


@pytest.fixture
async def http(parts: Parts) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(parts.app) as address, httpx.AsyncClient(base_url=address, timeout=30) as client:
        yield client


def is_problem(answer: httpx.Response) -> bool:
    said = answer.json()
    return (
        answer.headers["content-type"] == "application/problem+json"
        and said["status"] == answer.status_code
        and {"type", "title", "detail", "instance"} <= said.keys()
    )


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"payload: yes", 400),
        (b'{"payload": {}} x', 400),
        (b'{"payload": {"task": "\xff\xfe"}}', 400),
        (b'{"payload": {"task": "\xed\xa0\x80"}}', 400),
        (b'{"payload": {"task": "\\ud800"}}', 400),
        (b'{"payload": {"task": "a\x00b"}}', 400),
        (b'{"payload": {"task": "a\x1bb"}}', 400),
        (b'{"payload": {"task": NaN}}', 400),
        (b'{"payload": {"task": 1e999}}', 400),
        (b'{"payload": {"task": %s}}' % (b"9" * 10_000), 400),
        (b'{"payload": ' + b'{"a":' * 10_000 + b"1" + b"}" * 10_001, 400),
        (b"[" * 100_000, 400),
        (b'{"payload": {"task": ' + b"[" * 70 + b"]" * 70 + b"}}", 400),
        (b"\xef\xbb\xbf{}", 400),
        ("{}".encode("utf-16"), 400),
        (b'{"payload": {"a": [{"b/c": 1, "b/c": 2}]}}', 422),
        (b'{"payload": {"task": "x"}, "privacy": "local", "privacy": "any"}', 422),
        (b"null", 422),
        (b"[]", 422),
        (b'"payload"', 422),
    ],
)
async def test_a_body_that_is_no_packet_is_refused_and_nothing_of_it_is_kept(
    parts: Parts, http: httpx.AsyncClient, body: bytes, status: int
) -> None:
    answer = await http.post(PLANNER, content=body, headers=JSON)

    assert answer.status_code == status, answer.text
    assert is_problem(answer)
    assert not parts.engine.tasks


@pytest.mark.parametrize(
    ("body", "pointer", "says"),
    [
        ({}, "/payload", "object"),
        ({"payload": "a task"}, "/payload", "object"),
        ({"payload": {}, "prioritty": 3}, "/prioritty", "privacy"),
        ({"payload": {}, "limits": {"calls": "many"}}, "/limits/calls", "int"),
        ({"payload": {}, "limits": {"calls": -1}}, "/limits/calls", ">= 0"),
        ({"payload": {}, "limits": {"cals": 1}}, "/limits/cals", "calls"),
        ({"payload": {}, "scope": "all"}, "/scope", "workflow"),
        ({"payload": {}, "status": "completed"}, "/status", "submitted"),
        ({"payload": {}, "history": [{}]}, "/history", "length 0"),
        ({"payload": {}, "task_id": "../../etc/passwd"}, "/task_id", "UUID"),
        ({"payload": {"files": [{"te/xt": "a\0b"}]}}, "/payload/files/0/te~1xt", "NUL"),
    ],
)
async def test_a_wrong_packet_is_told_where_and_what_would_be_right(
    parts: Parts, http: httpx.AsyncClient, body: object, pointer: str, says: str
) -> None:
    answer = await http.post(PLANNER, json=body)

    assert (answer.status_code, answer.json()["pointer"]) == (422, pointer)
    assert says in answer.text
    assert not parts.engine.tasks


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "", None])
async def test_a_body_that_is_not_declared_as_json_is_refused(
    http: httpx.AsyncClient, content_type: str | None
) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    answer = await http.post(PLANNER, content=b'{"payload": {}}', headers=headers)

    assert (answer.status_code, is_problem(answer)) == (415, True)


async def test_a_body_over_the_limit_is_refused_whether_its_length_is_declared_or_not(
    parts: Parts, http: httpx.AsyncClient
) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b'{"payload": {"task": "'
        for _ in range(64):
            yield b"x" * 1024
        yield b'"}}'

    parts.body_limit_bytes(1024)
    declared = await http.post(PLANNER, json={"payload": {"task": "x" * 2000}})
    chunked = await http.post(PLANNER, content=chunks(), headers=JSON)
    small = await http.post(PLANNER, json={"payload": {"task": "x"}})

    assert (declared.status_code, chunked.status_code, small.status_code) == (413, 413, 202)
    assert "max_body_mb" in declared.json()["detail"]


async def test_a_body_over_the_limit_is_not_read_to_its_end(parts: Parts) -> None:
    parts.body_limit_bytes(1024)
    async with serving(parts.app) as address, asyncio.timeout(60):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(address.rpartition(":")[2]))
        # A hundred gigabytes are promised; one line of them is sent.
        writer.write(
            b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n" % PLANNER.encode()
        )
        writer.write(b"Content-Length: 100000000000\r\n\r\n{")
        status = await reader.readline()
        writer.close()

    assert b" 413 " in status


async def test_a_compressed_body_is_no_way_around_the_limit(http: httpx.AsyncClient) -> None:
    bomb = gzip.compress(b'{"payload": {"task": "' + b"x" * 10_000_000 + b'"}}')
    answer = await http.post(PLANNER, content=bomb, headers={**JSON, "Content-Encoding": "gzip"})

    assert answer.status_code == 400


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/api/v1/nothing/here/at/all", 404),
        ("GET", "/api/v2/tasks", 404),
        ("PUT", "/api/v1/tasks", 405),
        ("POST", "/api/v1/tasks", 405),
        ("GET", PLANNER, 405),
    ],
)
async def test_what_is_not_there_is_a_problem_too(
    http: httpx.AsyncClient, method: str, path: str, status: int
) -> None:
    answer = await http.request(method, path)

    assert (answer.status_code, is_problem(answer)) == (status, True)
    assert status != 405 or answer.headers["allow"]


@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (IntakeFullError(1000, 6.2), 429, "7"),
        (ShuttingDownError(5.0), 503, "5"),
        (StoreFullError("no space is left"), 507, None),
        (StoreUnusableError("read-only"), 503, None),
        (CorruptTaskError("does not decode"), 503, None),
    ],
)
async def test_what_the_engine_raises_becomes_its_status(
    parts: Parts, http: httpx.AsyncClient, error: Exception, status: int, retry_after: str | None
) -> None:
    parts.engine.failing = error
    answer = await http.post(PLANNER, json={"payload": {}})

    assert (answer.status_code, is_problem(answer)) == (status, True)
    assert answer.headers.get("retry-after") == retry_after


@pytest.mark.parametrize(
    "error",
    [KeyError("secret-of-ours"), ChannelError("secret-of-ours"), OSError("secret-of-ours")],
)
async def test_what_nobody_foresaw_is_500_and_tells_nothing_of_the_inside(
    parts: Parts, http: httpx.AsyncClient, error: Exception
) -> None:
    parts.engine.failing = error
    answer = await http.post(PLANNER, json={"payload": {}})

    assert (answer.status_code, is_problem(answer)) == (500, True)
    assert "secret-of-ours" not in answer.text
