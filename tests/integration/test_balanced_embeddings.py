"""Vectors by way of the balancer: the same filter, circuits and privacy, and no mixing of models."""

import asyncio
import random
from typing import Any

import msgspec
import pytest

from ai_agent_server.assembly import engine_for
from ai_agent_server.config.settings import BalancerSettings, CircuitSettings, LLMSettings, RetrySettings
from ai_agent_server.core.chat import Privacy, RouteHints
from ai_agent_server.core.embedding import EmbeddingRequest
from ai_agent_server.errors import ConfigurationError, NoLLMError
from ai_agent_server.load_balancer.balanced_engine import BalancedEngine, Member
from ai_agent_server.load_balancer.strategies.resident_first import ResidentFirst
from tests.servers.openai_double import OpenAIDouble


def llm(source: str = "local", **changes: Any) -> dict[str, Any]:
    return {
        "engine": "local.scripted",
        "model": "scripted",
        "source": source,
        "capabilities": ["embeddings"],
        **changes,
    }


def balanced(**llms: dict[str, Any]) -> BalancedEngine:
    settings = {name: msgspec.convert(each, LLMSettings) for name, each in llms.items()}
    return BalancedEngine(
        {name: Member(settings=each, engine=engine_for(name, each, {})) for name, each in settings.items()},
        strategy=ResidentFirst(),
        settings=BalancerSettings(
            circuit=CircuitSettings(failures=2, cooldown_s=30.0),
            retry=RetrySettings(attempts=2, backoff_s=0.0),
            max_wait_s=5.0,
        ),
        clock=asyncio.get_running_loop().time,
        rng=random.Random(7),
    )


def asking(llm: str | None = None, privacy: Privacy = "any") -> EmbeddingRequest:
    return EmbeddingRequest(inputs=("one", "two"), route=RouteHints(llm=llm, privacy=privacy))


FAILS: dict[str, Any] = {"options": {"fail": "failed"}}


async def test_the_reply_says_which_llm_made_the_vectors_and_why() -> None:
    engine = balanced(chat=llm(capabilities=["chat"]), vectors=llm())
    reply = await engine.embed(asking())
    assert (reply.llm, reply.source, len(reply.vectors)) == ("vectors", "local", 2)
    assert reply.decision is not None
    assert reply.decision.candidates[1].refused_by == "LB-5 capability"
    await engine.aclose()


async def test_an_llm_that_fails_is_tried_again_and_then_left_for_another() -> None:
    engine = balanced(broken=llm(**FAILS), whole=llm(source="api"))
    assert (await engine.embed(asking())).llm == "whole"
    assert {view.name: view.circuit for view in engine.views()} == {"broken": "open", "whole": "closed"}
    await engine.aclose()


async def test_vectors_of_a_named_llm_are_made_by_no_other() -> None:
    engine = balanced(broken=llm(**FAILS), whole=llm())
    with pytest.raises(NoLLMError) as caught:
        await engine.embed(asking("broken"))
    assert caught.value.refusals["whole"].startswith("LB-4")
    await engine.aclose()


async def test_what_may_not_leave_the_machine_is_never_sent_to_an_api() -> None:
    async with OpenAIDouble() as double:
        engine = balanced(
            broken=llm(**FAILS),
            remote=llm(source="api", engine="api.openai", options={"base_url": f"{double.url}/v1"}),
        )
        with pytest.raises(NoLLMError) as caught:
            await engine.embed(asking(privacy="local"))
        assert caught.value.refusals["remote"].startswith("LB-3")
        assert double.requests == []
        assert (await engine.embed(asking())).llm == "remote"
        await engine.aclose()


async def test_an_input_that_fits_no_context_is_refused_before_it_is_sent() -> None:
    engine = balanced(short=llm(context=100), long=llm(context=10_000))
    fits = EmbeddingRequest(inputs=("short", "word " * 1000))
    assert (await engine.embed(fits)).llm == "long"
    with pytest.raises(NoLLMError):
        await engine.embed(msgspec.structs.replace(fits, inputs=("word " * 20_000,)))
    await engine.aclose()


async def test_many_that_ask_at_once_all_get_their_vectors_by_one_slot() -> None:
    engine = balanced(vectors=llm(slots=1, options={"delay_s": 0.01}))
    replies = await asyncio.gather(*(engine.embed(asking()) for _ in range(10)))
    assert {reply.vectors for reply in replies} == {replies[0].vectors}
    assert engine.views()[0].in_flight == 0
    await engine.aclose()


def test_an_engine_that_gives_no_vectors_cannot_be_configured_to() -> None:
    claude = msgspec.convert(llm(source="api", engine="api.anthropic", model="claude"), LLMSettings)
    with pytest.raises(ConfigurationError) as caught:
        engine_for("claude", claude, {})
    assert caught.value.pointer == "/llms/claude/capabilities"
