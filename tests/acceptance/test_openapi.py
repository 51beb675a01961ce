"""The OpenAPI document holds for the running server, and for everything that it answers."""

import asyncio
import contextlib
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

from jsonschema import Draft202012Validator
from litestar.handlers import HTTPRouteHandler
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from ai_agent_server.core.api_document import document
from ai_agent_server.core.api_operations import operations, problem_examples
from ai_agent_server.core.api_schemas import INTERNAL, PROBLEMS, REFUSALS
from ai_agent_server.core.chat import JSONObject
from ai_agent_server.core.task_packet import Completed
from tests.servers.api import Parts, serving
from tests.servers.process import outputs

LIMIT_S = 280


async def test_whatever_schemathesis_sends_the_answer_is_documented_and_never_a_5xx(tmp_path: Path) -> None:
    parts = Parts(keep_alive_s=0.5)
    async with serving(parts.app) as address, ending_soon(parts):
        schemathesis = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "schemathesis.cli", "--no-color", "run", f"{address}/api/v1/openapi.json",
            # What a schema cannot say (the path and the body name the same role) is refused, and should be.
            "--checks", "all", "--exclude-checks", "positive_data_acceptance",
            "--max-examples", "5", "--seed", "1", "--generation-database", "none",
            "--request-timeout", "30", "--warnings", "off",
            cwd=tmp_path, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        output, _ = await outputs(schemathesis, LIMIT_S)

    assert schemathesis.returncode == 0, output.decode()
    tested = re.search(r"Tested: (\d+)", output.decode())
    # It does not test the one that it reads the document from.
    assert tested and int(tested[1]) >= len(operations()) - 1


def test_every_route_is_in_the_document_and_every_operation_is_a_route() -> None:
    routes = {
        (method.lower(), path.replace(":str}", "}"))
        for route in Parts().app.routes
        for handler in getattr(route, "route_handlers", ())
        if isinstance(handler, HTTPRouteHandler)
        for path in handler.paths
        for method in handler.http_methods
        # HEAD answers as GET; "/" leads a browser to the docs.
        if method not in {"OPTIONS", "HEAD"} and path != "/"
    }

    assert routes == {(operation.method, operation.path) for operation in operations()}
    assert len({operation.id for operation in operations()}) == len(operations())


def test_every_example_is_what_its_schema_says() -> None:
    described = document("0")
    checked = 0
    for path, methods in described["paths"].items():
        for operation in methods.values():
            bodies = [operation.get("requestBody", {}), *operation["responses"].values()]
            for content in (found for body in bodies for found in body.get("content", {}).values()):
                examples = [
                    *(
                        described["components"]["examples"][name]["value"]
                        for name in content.get("examples", ())
                    ),
                    *([content["example"]] if "example" in content else []),
                ]
                for example in examples:
                    mistakes = list(validator(described, content.get("schema", {})).iter_errors(example))
                    assert not mistakes, (path, mistakes)
                    checked += 1
    assert checked > 100


def test_every_operation_tells_its_success_its_failures_and_an_example() -> None:
    for path, methods in document("0")["paths"].items():
        for method, operation in methods.items():
            statuses = operation["responses"].keys()
            assert statuses & {"200", "202", "204"}, path
            assert {"400", "500"} <= statuses, path
            if "requestBody" in operation:
                assert {"413", "415", "422"} <= statuses, path
                assert operation["requestBody"]["content"]["application/json"]["example"], (method, path)


def test_every_kind_of_problem_has_its_own_name_and_an_example() -> None:
    kinds = [*PROBLEMS.values(), *REFUSALS.values(), INTERNAL]

    assert {kind.slug for kind in kinds} == problem_examples().keys()
    assert len({kind.slug for kind in kinds}) == len(kinds)


def validator(described: JSONObject, schema: JSONObject) -> Draft202012Validator:
    """A validator of `schema`, which points into `described`."""
    whole = Resource.from_contents(described, default_specification=DRAFT202012)
    registry = Registry().with_resource("urn:document", whole)
    pointed = {"$ref": f"urn:document{schema['$ref']}"} if "$ref" in schema else schema
    return Draft202012Validator(pointed, registry=registry)


@asynccontextmanager
async def ending_soon(parts: Parts) -> AsyncIterator[None]:
    """Let every task end a moment after it was submitted, so that nobody waits for one for ever."""

    async def ending() -> None:
        while True:
            await asyncio.sleep(0.05)
            now = datetime.now(UTC)
            for packet in list(parts.engine.tasks.values()):
                if not packet.status.is_final and (now - packet.created_at).total_seconds() > 0.1:
                    parts.engine.happen(packet.task_id, Completed(at=now, result={}))

    task = asyncio.create_task(ending())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
