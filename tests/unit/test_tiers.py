"""The tier of a request, by table."""

from typing import Any

import pytest

from ai_agent_server.config.settings import MainTierLimits, TierLimits, TiersSettings
from ai_agent_server.core.chat import ChatRequest, Tier, Tool, message
from ai_agent_server.gateway.tiers import TierChoice, choose

SETTINGS = TiersSettings(
    small=TierLimits(max_input_tokens=100, max_output_tokens=50),
    main=MainTierLimits(max_input_tokens=1000, max_output_tokens=200),
)


def chosen(
    *, input_tokens: int = 10, asked: Tier | None = None, llm_tier: Tier | None = None, **request: Any
) -> TierChoice:
    return choose(
        ChatRequest(messages=(message("user", "hello"),), **request),
        input_tokens=input_tokens,
        asked=asked,
        llm_tier=llm_tier,
        settings=SETTINGS,
    )


@pytest.mark.parametrize(
    ("given", "tier", "max_tokens"),
    [
        ({}, "small", 50),
        ({"input_tokens": 100}, "small", 50),
        ({"input_tokens": 101}, "main", 200),
        ({"max_tokens": 50}, "small", 50),
        ({"max_tokens": 7}, "small", 7),
        ({"max_tokens": 51}, "main", 51),
        ({"max_tokens": 32_000}, "main", 200),
        ({"tools": (Tool(name="look"),)}, "main", 200),
        ({"tools": (Tool(name="look"),), "tool_choice": "none"}, "small", 50),
        ({"asked": "small", "input_tokens": 5000}, "small", 50),
        ({"asked": "small", "max_tokens": 999}, "small", 50),
        ({"asked": "main"}, "main", 200),
        ({"llm_tier": "main"}, "main", None),
        ({"llm_tier": "small", "max_tokens": 32_000, "input_tokens": 5000}, "small", 32_000),
        ({"llm_tier": "main", "asked": "small"}, "small", 50),
    ],
)
def test_the_tier_follows_from_what_is_asked_and_bounds_the_answer(
    given: dict[str, Any], tier: Tier, max_tokens: int | None
) -> None:
    choice = chosen(**given)
    assert (choice.tier, choice.max_tokens) == (tier, max_tokens)
    assert choice.reason


def test_the_reason_has_the_numbers() -> None:
    assert chosen(input_tokens=101).reason == "about 101 tokens are more than 100"
    assert chosen(max_tokens=60).reason == "an answer of 60 tokens is more than 50"
