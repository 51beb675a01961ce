"""What `init` chooses from what a machine has, and how it looks at the machine."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ai_agent_server import probes
from ai_agent_server.cli.init import Proposal, propose
from ai_agent_server.config import settings
from ai_agent_server.probes import GPU, Found, LocalModel, LocalServer, Urls
from tests.servers.http_double import HTTPDouble, Out, Request

GB = 1024**3
ENGINES = frozenset({"local.llama_cpp", "local.ollama", "local.llama_server", "local.vllm", "api.openai"})
EMBEDDED = {"SmolLM2-135M-Instruct": "small"}
RTX = GPU(name="NVIDIA GeForce RTX 5060 Ti", memory_mb=16384, free_mb=15000)


def ollama(**sizes_gb: float) -> LocalServer:
    return LocalServer(
        kind="ollama",
        url="http://127.0.0.1:11434",
        models=tuple(
            LocalModel(
                name=name.replace("_", ":"),
                size_bytes=int(size * GB),
                capabilities=("chat", "json_schema", "vision") if "vl" in name else ("chat", "json_schema"),
            )
            for name, size in sizes_gb.items()
        ),
    )


def proposed(found: Found, *, apis: bool = False) -> Proposal:
    base: Any = json.loads(settings.packaged_configuration())
    proposal = propose(found, base, settings.packaged_debug_loop(), apis=apis)
    settings.parse(json.dumps(proposal.document).encode(), source="proposal")
    return proposal


def switched_on(proposal: Proposal) -> dict[str, str]:
    return {llm["model"]: llm["tier"] for llm in proposal.document["llms"].values() if llm["toggle"]}


@pytest.mark.parametrize(
    ("found", "on"),
    [
        pytest.param(Found(memory_mb=8000, engines=ENGINES), EMBEDDED, id="nothing"),
        pytest.param(
            Found(servers=(ollama(qwen3_8b=5.2),), gpus=(RTX,), engines=ENGINES),
            {"qwen3:8b": "main"},
            id="one-model",
        ),
        pytest.param(
            Found(servers=(ollama(m_14b=9.3, m_4b=2.5, m_32b=20.0),), gpus=(RTX,), engines=ENGINES),
            {"m:14b": "main", "m:4b": "small"},
            id="the-largest-that-fits-and-the-smallest",
        ),
        pytest.param(
            Found(servers=(ollama(qwen3_14b=9.3, qwen3_4b=2.5),), memory_mb=8000, engines=ENGINES),
            {"qwen3:4b": "main"},
            id="no-gpu-so-ram-decides",
        ),
        pytest.param(
            Found(
                servers=(ollama(qwen3_14b=9.3, qwen3_4b=2.5, qwen3vl_8b=6.1),), gpus=(RTX,), engines=ENGINES
            ),
            {"qwen3:14b": "main", "qwen3:4b": "small", "qwen3vl:8b": "small"},
            id="a-model-that-sees",
        ),
        pytest.param(
            Found(
                servers=(
                    LocalServer(
                        kind="llama-server",
                        url="http://127.0.0.1:8080",
                        models=(LocalModel(name="/models/Qwen3-14B-Q4_K_M.gguf", size_bytes=9 * GB),),
                        slots=2,
                    ),
                    ollama(qwen3_8b=5.2, tiny_1b=0.8),
                ),
                gpus=(RTX,),
                engines=ENGINES,
            ),
            {"/models/Qwen3-14B-Q4_K_M.gguf": "main", "tiny:1b": "small"},
            id="what-runs-already-is-main",
        ),
        pytest.param(
            Found(servers=(ollama(huge_70b=40.0),), gpus=(RTX,), engines=ENGINES),
            EMBEDDED,
            id="nothing-fits",
        ),
        pytest.param(
            Found(servers=(ollama(qwen3_4b=2.5, qwen3_latest=2.5),), gpus=(RTX,), engines=ENGINES),
            {"qwen3:latest": "main", "qwen3:4b": "small"},
            id="same-size",
        ),
    ],
)
def test_chooses_models_by_what_fits(found: Found, on: dict[str, str]) -> None:
    assert switched_on(proposed(found)) == on


def test_a_vllm_that_is_found_is_spoken_to_as_one() -> None:
    server = LocalServer(kind="vllm", url="http://127.0.0.1:8000", models=(LocalModel(name="Qwen/Qwen3-8B"),))
    llm = proposed(Found(servers=(server,), engines=ENGINES)).document["llms"]["qwen3-8b"]
    assert (llm["engine"], llm["source"], llm["options"]) == (
        "local.vllm",
        "local",
        {"base_url": "http://127.0.0.1:8000"},
    )


@pytest.mark.parametrize("apis", [False, True])
def test_an_api_is_used_only_when_that_was_said(apis: bool) -> None:
    found = Found(api_keys=frozenset({"OPENAI_API_KEY"}), memory_mb=8000, engines=ENGINES)
    llm = proposed(found, apis=apis).document["llms"]["openai"]
    assert llm["toggle"] is apis
    assert llm["api_key"] == {"env": "OPENAI_API_KEY"}


def test_a_key_without_an_engine_is_named_and_left_out() -> None:
    proposal = proposed(Found(api_keys=frozenset({"ANTHROPIC_API_KEY"}), engines=ENGINES))
    assert list(proposal.document["llms"]) == ["embedded"]
    assert any("ANTHROPIC_API_KEY" in reason and "no engine" in reason for reason in proposal.reasons)


def test_every_model_in_the_file_has_a_reason() -> None:
    found = Found(servers=(ollama(a=1.0, b=2.0, c=9.0, d=30.0),), gpus=(RTX,), engines=ENGINES)
    proposal = proposed(found)
    for llm in proposal.document["llms"].values():
        assert any(llm["model"] in reason for reason in proposal.reasons)


def test_names_that_collide_are_numbered() -> None:
    found = Found(
        servers=(ollama(**{"a/x_1": 1.0, "b/x_1": 2.0, "embedded": 3.0}),), gpus=(RTX,), engines=ENGINES
    )
    assert {"x-1", "x-1-2", "embedded-2", "embedded"} == set(proposed(found).document["llms"])


class Answers(HTTPDouble):
    """Answers each path with its JSON, any other with 404."""

    def __init__(self, routes: Mapping[str, Any]) -> None:
        super().__init__()
        self.routes = routes

    async def answer(self, request: Request, out: Out) -> None:
        status = 200 if request.path in self.routes else 404
        await out.whole(status, self.routes.get(request.path))


NOBODY = "http://127.0.0.1:9"


async def test_asks_ollama_for_models_sizes_and_what_they_can() -> None:
    routes = {
        "/api/tags": {
            "models": [{"name": "qwen3:8b", "size": 5_200_000_000, "details": {"family": "qwen3"}}]
        },
        "/api/show": {
            "capabilities": ["completion", "tools"],
            "model_info": {"qwen3.context_length": 40960},
        },
    }
    async with Answers(routes) as double:
        (server,) = await probes.servers(Urls(ollama=double.url, llama_server=NOBODY, vllm=NOBODY))
    assert server == LocalServer(
        kind="ollama",
        url=double.url,
        models=(
            LocalModel(
                name="qwen3:8b",
                size_bytes=5_200_000_000,
                context_tokens=40960,
                capabilities=("chat", "json_schema", "tools"),
            ),
        ),
    )


async def test_asks_llama_server_for_its_slots_and_context() -> None:
    routes = {
        "/v1/models": {
            "object": "list",
            "data": [{"id": "qwen.gguf", "owned_by": "llamacpp", "meta": {"size": 4_000_000_000}}],
        },
        "/props": {
            "total_slots": 4,
            "default_generation_settings": {"n_ctx": 16384},
            "modalities": {"vision": True},
        },
    }
    async with Answers(routes) as double:
        (server,) = await probes.servers(Urls(ollama=NOBODY, llama_server=double.url, vllm=double.url))
    assert (server.kind, server.slots) == ("llama-server", 4)
    assert server.models[0].context_tokens == 16384
    assert "vision" in server.models[0].capabilities


async def test_a_stranger_on_a_well_known_port_is_left_alone() -> None:
    async with Answers({"/v1/models": {"data": [{"id": "x", "owned_by": "somebody"}]}}) as double:
        assert await probes.servers(Urls(ollama=double.url, llama_server=double.url, vllm=double.url)) == ()


@pytest.mark.parametrize(
    ("said", "url"),
    [
        ("", "http://127.0.0.1:11434"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("127.0.0.1:9999", "http://127.0.0.1:9999"),
        ("http://localhost:8888/", "http://localhost:8888"),
        ("[::1]:7777", "http://[::1]:7777"),
        ("host:port", "http://127.0.0.1:11434"),
    ],
)
def test_ollama_is_looked_for_where_its_own_variable_says(said: str, url: str) -> None:
    assert probes.urls({"OLLAMA_HOST": said}).ollama == url


def test_the_holder_of_a_lock_is_read_from_the_kernels_table(tmp_path: Path) -> None:
    lock, table = tmp_path / "lock", tmp_path / "locks"
    lock.touch()
    table.write_text(
        "1: POSIX  ADVISORY  WRITE 77 00:1f:1 0 EOF\n"
        f"2: FLOCK  ADVISORY  WRITE 4242 00:1f:{lock.stat().st_ino} 0 EOF\n"
    )
    assert probes.lock_holder(lock, table) == 4242
    assert probes.lock_holder(tmp_path / "none", table) is None


def test_code_is_debugged_where_a_model_serves_that_can_and_drawn_anew_where_none_does() -> None:
    def after_a_failure(found: Found) -> str:
        developer = proposed(found).document["profiles"]["developer"]
        target: str = developer["workflow"]["routes"]["qa.fail"][0]["to"]
        return target

    assert after_a_failure(Found(memory_mb=8000, engines=ENGINES)) == "fast-coder"
    real = Found(servers=(ollama(qwen=5),), gpus=(RTX,), memory_mb=32000, engines=ENGINES)
    assert after_a_failure(real) == "debug"
