"""Two conversations in turn on two slots of the embedded model: each reads only what is new to it."""

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import anthropic
import msgspec
import openai
import pytest

from tests.servers.process import ServerProcess, packaged, write_config

NEW_TOKENS = 80
"""More than a second turn adds: the answer to the first, the next question, the template around them."""
MOST_TOKENS = 16
TOPICS = ("the tide at the old harbour", "a clock tower in the snow")


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """What a client was told of one turn."""

    said: str
    prompt_tokens: int
    cached_tokens: int


Say = Callable[[str, list[Any]], Awaitable[Turn]]
"""Takes the system's words and the messages so far."""


@pytest.fixture
async def url(tmp_path: Path) -> AsyncIterator[str]:
    (name, llm), *_ = packaged()["llms"].items()
    # Nothing is kept beside the slots: what is not read again was in its slot.
    options = {**llm.get("options", {}), "prompt_cache_mb": 0}
    two_slots = {**llm, "slots": 2, "context": 1024, "options": options}
    config = write_config(tmp_path, messaging={"enabled": False}, llms={name: two_slots})
    async with ServerProcess(tmp_path / "state", config) as server:
        yield server.url


async def test_conversations_return_to_the_slots_that_have_read_them(url: str) -> None:
    async with (
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as by_openai,
        anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as by_anthropic,
    ):

        async def chat(system: str, messages: list[Any]) -> Turn:
            answer = await by_openai.chat.completions.create(
                model="auto",
                messages=[{"role": "system", "content": system}, *messages],
                max_tokens=MOST_TOKENS,
                temperature=0,
            )
            assert answer.usage is not None
            assert answer.usage.prompt_tokens_details is not None
            return Turn(
                said=answer.choices[0].message.content or "",
                prompt_tokens=answer.usage.prompt_tokens,
                cached_tokens=answer.usage.prompt_tokens_details.cached_tokens or 0,
            )

        async def message(system: str, messages: list[Any]) -> Turn:
            answer = await by_anthropic.messages.create(
                model="auto",
                system=system,
                messages=messages,
                max_tokens=MOST_TOKENS,
                extra_body={"temperature": 0},
            )
            (block,) = answer.content
            assert block.type == "text"
            cached_tokens = answer.usage.cache_read_input_tokens or 0
            return Turn(
                said=block.text,
                prompt_tokens=answer.usage.input_tokens + cached_tokens,
                cached_tokens=cached_tokens,
            )

        spoken: list[tuple[Say, str, list[Any]]] = []
        surfaces: tuple[Say, ...] = (chat, message)
        for say, topic in zip(surfaces, TOPICS, strict=True):
            system = f"{topic}: " + " ".join(f"Line {number} is of {topic}." for number in range(15))
            messages: list[Any] = [{"role": "user", "content": "Say one word."}]
            first = await say(system, messages)
            assert first.prompt_tokens > 2 * NEW_TOKENS
            assert first.cached_tokens < NEW_TOKENS
            messages += [
                {"role": "assistant", "content": first.said},
                {"role": "user", "content": "And another word."},
            ]
            spoken.append((say, system, messages))
        for again, its_system, its_messages in spoken:
            second = await again(its_system, its_messages)
            assert second.prompt_tokens > 2 * NEW_TOKENS
            assert second.prompt_tokens - second.cached_tokens < NEW_TOKENS
