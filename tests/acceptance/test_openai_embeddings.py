"""`/v1/embeddings` of a real server, asked by OpenAI's own SDK."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio
from openai.types import CreateEmbeddingResponse

from tests.servers.ollama_double import OllamaDouble
from tests.servers.openai_double import OpenAIDouble
from tests.servers.ports import held_port
from tests.servers.process import SCRIPT, ServerProcess, packaged, write_config

pytestmark = pytest.mark.asyncio(loop_scope="module")

VECTORS: dict[str, Any] = {**SCRIPT, "capabilities": ["embeddings"]}


class Gateway:
    """A server, OpenAI's SDK as its client, and the ports of the model servers `remote` and `ollama`."""

    def __init__(
        self, server: ServerProcess, client: openai.AsyncOpenAI, remote_port: int, ollama_port: int
    ) -> None:
        self.server, self.client = server, client
        self.remote_port, self.ollama_port = remote_port, ollama_port


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def gateway(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    """One server for all the tests."""
    with held_port() as remote_port, held_port() as ollama_port:
        async with gateway_at(tmp_path_factory.mktemp("gateway"), remote_port, ollama_port) as made:
            yield made


@asynccontextmanager
async def gateway_at(folder: Path, remote_port: int, ollama_port: int) -> AsyncIterator[Gateway]:
    """One whose model servers are to be at these ports."""
    llms: dict[str, Any] = {
        "vectors": VECTORS,
        "chat": SCRIPT,
        "down": {**VECTORS, "options": {"fail": "auth"}},
        "remote": {
            "engine": "api.openai",
            "model": "double-1",
            "source": "api",
            "capabilities": ["embeddings"],
            "options": {"base_url": f"http://127.0.0.1:{remote_port}/v1"},
        },
        "ollama": {
            "engine": "local.ollama",
            "model": "double-1",
            "source": "local",
            "capabilities": ["embeddings"],
            "options": {"base_url": f"http://127.0.0.1:{ollama_port}"},
        },
        "embedded": {
            **packaged()["llms"]["embedded"],
            "capabilities": ["embeddings"],
            "options": {"embeddings": "mean"},
        },
    }
    balancer = {"circuit": {"failures": 1_000_000}, "retry": {"attempts": 1}}
    config = write_config(folder, llms=llms, balancer=balancer, messaging={"enabled": False})
    async with (
        ServerProcess(folder / "state", config) as server,
        openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield Gateway(server, client, remote_port, ollama_port)


@pytest.fixture
def client(gateway: Gateway) -> openai.AsyncOpenAI:
    """OpenAI's SDK."""
    return gateway.client


async def test_the_sdk_gets_a_vector_for_each_text_as_base64_and_as_numbers(
    client: openai.AsyncOpenAI,
) -> None:
    raw = await client.embeddings.with_raw_response.create(model="vectors", input=["one", "two", "one"])
    assert isinstance(raw.http_response.json()["data"][0]["embedding"], str)
    first, second, third = (row.embedding for row in raw.parse().data)
    assert first == third != second
    assert raw.headers["x-llm"] == "vectors"
    assert raw.headers["x-request-id"]
    assert raw.headers["x-routing-reason"]

    plain = await client.embeddings.with_raw_response.create(
        model="vectors", input="one", encoding_format="float"
    )
    numbers = CreateEmbeddingResponse.model_validate(plain.http_response.json(), strict=True)
    assert numbers.data[0].embedding == pytest.approx(first)
    assert numbers.model == "vectors"
    assert numbers.usage.prompt_tokens == numbers.usage.total_tokens == 1


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["one", ""]}, "input[1]"),
        ({"input": [1, 2, 3]}, "input[0]"),
        ({"input": [[1, 2], [3]]}, "input[0]"),
        ({"input": ["x"] * 2049}, "input"),
        ({"dimensions": 0}, "dimensions"),
        ({"encoding_format": "hex"}, "encoding_format"),
        ({"model": "chat"}, "model"),
        ({"model": "developer/planner"}, "model"),
    ],
)
async def test_what_cannot_be_embedded_is_refused_with_its_place(
    client: openai.AsyncOpenAI, body: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.embeddings.create(**{"model": "vectors", "input": "one", **body})
    assert caught.value.param == param


async def test_errors_are_in_openais_form(gateway: Gateway) -> None:
    client = gateway.client
    with pytest.raises(openai.NotFoundError) as unknown:
        await client.embeddings.create(model="nope", input="one")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.APIStatusError) as failed:
        await client.embeddings.create(model="down", input="one")
    assert failed.value.status_code >= 500
    with pytest.raises(openai.BadRequestError) as long:
        await client.embeddings.create(model="vectors", input="word " * 100_000)
    assert long.value.code == "context_length_exceeded"
    async with gateway.server.http() as http:
        for raw in (b"", b"[1]", b"\xff", b"{", b'{"model":"vectors"}', b"[" * 100_000):
            answer = await http.post(
                "/v1/embeddings", content=raw, headers={"Content-Type": "application/json"}
            )
            assert answer.status_code == 400
            assert {*answer.json()["error"]} == {"message", "type", "param", "code"}
        large = await http.post("/v1/embeddings", json={"model": "vectors", "input": "x" * 9 * 2**20})
        assert large.status_code == 413
        assert large.json()["error"]["code"] == "request_too_large"


async def test_without_an_llm_that_gives_vectors_the_answer_says_what_to_do(tmp_path: Path) -> None:
    config = write_config(tmp_path, llms={"chat": SCRIPT}, messaging={"enabled": False})
    async with (
        ServerProcess(tmp_path / "state", config) as server,
        openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client,
    ):
        with pytest.raises(openai.BadRequestError, match="capability `embeddings`"):
            await client.embeddings.create(model="auto", input="one")


async def test_what_may_not_leave_the_machine_never_reaches_an_api(gateway: Gateway) -> None:
    async with OpenAIDouble(port=gateway.remote_port) as double:
        for model in ("remote", "auto"):
            try:
                answer = await gateway.client.embeddings.create(
                    model=model, input="secret", extra_headers={"X-Privacy": "local"}
                )
            except openai.APIStatusError as exc:
                assert model == "remote"
                assert exc.response.headers["x-should-retry"] == "false"
            else:
                assert answer.model != "remote"
        assert double.paths() == []
        await gateway.client.embeddings.create(model="remote", input="open")
        assert double.paths() == ["/v1/embeddings"]


async def test_shorter_vectors_come_from_an_engine_that_can_cut_them(gateway: Gateway) -> None:
    async with OllamaDouble(port=gateway.ollama_port) as double:
        cut = await gateway.client.embeddings.create(model="ollama", input=["one", "two"], dimensions=2)
        assert [len(row.embedding) for row in cut.data] == [2, 2]
        (asked,) = [request.json for request in double.requests if request.path == "/api/embed"]
        assert asked["truncate"] is False
    with pytest.raises(openai.BadRequestError, match="shorten"):
        await gateway.client.embeddings.create(model="embedded", input="one", dimensions=2)


async def test_vectors_are_counted_in_the_metrics(gateway: Gateway) -> None:
    async def counted() -> int:
        async with gateway.server.http() as http:
            rows = (await http.get("/api/v1/metrics")).json()["gateway"]["requests"]
        ours = [row for row in rows if (row["surface"], row["llm"]) == ("embeddings", "vectors")]
        return sum(row["input_tokens"] for row in ours if row["status"] == "ok")

    before = await counted()
    await gateway.client.embeddings.create(model="vectors", input="one two three")
    async with asyncio.timeout(60):
        while (after := await counted()) == before:
            await asyncio.sleep(0.02)
    assert after == before + 3


async def test_the_embedded_model_gives_vectors_that_know_what_is_alike(client: openai.AsyncOpenAI) -> None:
    answer = await client.embeddings.create(
        model="embedded",
        input=["The cat sleeps on the sofa.", "A kitten naps on the couch.", "import numpy as np"],
    )
    cat, kitten, code = (row.embedding for row in answer.data)
    assert _product(cat, kitten) > _product(cat, code)


def _product(left: list[float], right: list[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))


async def test_the_same_texts_get_the_same_vectors_without_asking_again(gateway: Gateway) -> None:
    async with OpenAIDouble(port=gateway.remote_port) as double, gateway.server.http() as http:

        async def asked(texts: list[str], cache: str) -> tuple[str, Any]:
            body = {"model": "remote", "input": texts}
            answer = await http.post("/v1/embeddings", json=body, headers={"X-Cache": cache})
            assert answer.status_code == 200, answer.text
            return answer.headers.get("x-cache", ""), answer.json()

        before = (await http.get("/api/v1/metrics")).json()["gateway"]["cache"]
        first = await asked(["fox", "hound"], "use")
        again = await asked(["fox", "hound"], "use")
        assert (first[0], again[0]) == ("miss", "hit")
        assert again[1] == first[1]
        assert (await asked(["hound", "fox"], "use"))[0] == "miss"
        assert (await asked(["fox", "hound"], "refresh"))[0] == "miss"
        assert (await asked(["fox", "hound"], "off"))[0] == ""
        assert len(double.asked) == 4
        after = (await http.get("/api/v1/metrics")).json()["gateway"]["cache"]
    assert after["hits"] - before["hits"] == 1
    assert after["tokens_saved"] - before["tokens_saved"] == first[1]["usage"]["total_tokens"]
