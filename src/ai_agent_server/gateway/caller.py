"""Who calls: values that the door sets on every request, and what surfaces ask of the door."""

from typing import Any, Literal, Protocol

import msgspec

from ai_agent_server.config.settings import KeyScope
from ai_agent_server.core.chat import ChatRequest, ChatUsage, Privacy, Tier
from ai_agent_server.core.task_packet import Sender

__all__ = ("ALL_SCOPES", "Accounts", "CacheUse", "Caller", "Hold", "Priority", "caller_of")

Priority = Literal["interactive", "batch", "background"]
CacheUse = Literal["off", "use", "refresh"]
"""`refresh`: ask an LLM whatever is kept, and keep the new answer in its place."""
ALL_SCOPES: frozenset[KeyScope] = frozenset({"chat", "tools", "tasks", "admin", "metrics"})


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """One request's caller: what it may use, and under which names its use is counted."""

    key: str = ""
    """The key's name, never the secret; empty on a server that asks for none."""
    address: str = ""
    """The client's IP address; empty for a task's sender."""
    project: str = ""
    """A configured project; empty where none was named or found."""
    privacy: Privacy = "any"
    """The strictest of the key's, the project's and the header's."""
    allowed_llms: tuple[str, ...] = ()
    """Empty: all."""
    scopes: frozenset[KeyScope] = ALL_SCOPES
    priority: Priority = "interactive"
    prefer: tuple[str, ...] = ()
    """The project's LLMs in order of preference."""
    traceparent: str = ""
    """The trace that the request goes on in; empty where the client has none."""
    cache: CacheUse = "off"
    """What the request's header says; else the key, else the configuration."""

    @property
    def sender(self) -> Sender | None:
        """Under which names his tasks are counted, None where there is none."""
        return Sender(key=self.key, project=self.project) if self.key or self.project else None


class Hold(Protocol):
    """What was set aside for one request. `Accounts.charge` settles it, once."""


class Accounts(Protocol):
    """What a surface asks of the door. A chat request is placed, reserved for, and charged, in this order."""

    def placed(self, caller: Caller, request: ChatRequest) -> Caller:
        """`caller` in the project that the system prompt's paths name, where `X-Project` named none of ours.

        Where it named another one, the privacy of the stricter of the two holds.

        Raises `LimitExceededError` when the project has no request left.
        """
        ...

    def reserve(self, caller: Caller, *, tokens: int, tier: Tier | None, cost_usd: float = 0.0) -> Hold:
        """Set aside what a request will use at most: input as estimated and the most it may write.

        Raises `LimitExceededError`. Whoever gets a hold gives it to `charge` whatever happens.
        """
        ...

    def charge(
        self,
        caller: Caller,
        usage: ChatUsage,
        *,
        llm: str,
        gpu_s: float = 0.0,
        cost_usd: float = 0.0,
        hold: Hold | None = None,
    ) -> None:
        """Count what was used (an empty usage where nothing was), and give back the rest of the hold.

        `gpu_s` are the seconds for which a slot of a local LLM was taken.
        """
        ...

    def headers(self, caller: Caller) -> dict[str, str]:
        """`x-ratelimit-{limit,remaining,reset}-{requests,tokens}` as they stand now; none without a limit."""
        ...


def caller_of(scope: Any) -> Caller:
    """The caller of an ASGI connection that came through the door."""
    caller: Caller = scope["state"]["caller"]
    return caller
