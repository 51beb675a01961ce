"""The text tools run at once: every exchange that a tool asks for, over the gateway's own way to the LLMs."""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import aclosing

import msgspec

from ai_agent_server.config.settings import TiersSettings
from ai_agent_server.core.chat import ChatDelta, ChatReply, ChatRequest, ChatUsage, JSONObject, Tier
from ai_agent_server.core.intake import PayloadCheck
from ai_agent_server.core.prompt import ask as asked
from ai_agent_server.core.prompt import render
from ai_agent_server.errors import (
    AgentServerError,
    EngineProtocolError,
    InvalidOutputError,
    UnknownToolError,
)
from ai_agent_server.gateway.caller import Caller
from ai_agent_server.gateway.serving import Serving, Surface
from ai_agent_server.llm_engines.base import JoinedStream
from ai_agent_server.load_balancer.base import LLMView
from ai_agent_server.tools.base import Ask, Room, TextTool, read

__all__ = ("ReadyTool", "ToolAnswer", "ToolRunner", "ToolWork")

ATTEMPTS = 3
"""How often an exchange is had until its answer is of the form asked for."""
AT_ONCE = 2
"""Exchanges of one call at a time: others want the slots too."""
PROMPT_TOKENS = 400
"""What stands in a prompt beside the text, at most: labels and instructions come on top."""
SMALLEST_PIECE_TOKENS = 64


class ReadyTool:
    """A tool with its prompt file and the check of its arguments."""

    def __init__(self, tool: TextTool, prompt: str) -> None:
        self.tool, self.prompt = tool, prompt
        self.parameters = with_tier(tool.card.parameters)
        self.check = PayloadCheck(self.parameters, at="")


class ToolAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a call, and what it took."""

    tool: str
    output: JSONObject
    """Obeys the tool's result schema."""
    llm: str
    """The LLM that answered last."""
    calls: int
    usage: ChatUsage


class ToolWork:
    """How far a call is; whoever waits for it may look."""

    def __init__(self) -> None:
        self.calls = 0
        self.deltas = 0
        self.left = 0
        self.llm = ""
        self.input_tokens = 0
        self.output_tokens = 0
        self.headers: dict[str, str] = {}
        """Those of the last exchange."""

    def told(self) -> str:
        """In words."""
        return f"{self.deltas} tokens written; {self.calls} exchanges done, {self.left} under way"


class ToolRunner:
    """Runs one call after the other for whoever asks. Errors are those of errors.py."""

    def __init__(
        self,
        serving: Serving,
        *,
        tools: Callable[[], Mapping[str, ReadyTool]],
        tiers: Callable[[], TiersSettings],
        views: Callable[[], tuple[LLMView, ...]],
    ) -> None:
        """`tools`, `tiers` and `views` answer what is configured now."""
        self._serving = serving
        self._tools, self._tiers, self._views = tools, tiers, views

    def tools(self) -> Mapping[str, ReadyTool]:
        """By name."""
        return self._tools()

    async def run(
        self,
        name: str,
        arguments: JSONObject,
        caller: Caller,
        *,
        tier: Tier | None = None,
        surface: Surface = "tools",
        work: ToolWork | None = None,
    ) -> ToolAnswer:
        """Call the tool; the argument `tier` goes before `tier`, and small is taken where neither says.

        Cancelling it ends every exchange at once. Raises `UnknownToolError`, `InvalidPacketError` for
        arguments of another shape, `InvalidOutputError` where no LLM could be brought to an answer of the
        form asked for, and what `Serving.open` raises.
        """
        tools = self._tools()
        if name not in tools:
            raise UnknownToolError(name, tuple(tools))
        ready = tools[name]
        ready.check(arguments)
        given = {key: value for key, value in arguments.items() if key != "tier"}
        call = _Call(
            self._serving,
            ready,
            caller,
            tier=arguments.get("tier") or tier or "small",
            surface=surface,
            work=work,
        )
        room = self._room(ready.tool, call.tier)
        answers: list[JSONObject] = []
        try:
            while asks := ready.tool.asks(given, answers, room):
                answers += await call.all(asks, room.answer_tokens)
        except InvalidOutputError as exc:
            raise InvalidOutputError(
                f"{name}: no usable answer in {ATTEMPTS} tries; the last: {exc}"
            ) from exc
        return ToolAnswer(
            tool=name,
            output=ready.tool.result(answers),
            llm=call.work.llm,
            calls=call.work.calls,
            usage=ChatUsage(input_tokens=call.work.input_tokens, output_tokens=call.work.output_tokens),
        )

    def _room(self, tool: TextTool, tier: Tier) -> Room:
        """What fits the tier's limits and the largest context among its LLMs."""
        limits = self._tiers().small if tier == "small" else self._tiers().main
        usable = [view for view in self._views() if view.toggle]
        contexts = [view.context_tokens for view in usable if view.tier == tier] or [
            view.context_tokens for view in usable
        ]
        answer_tokens = min(tool.card.answer_tokens, limits.max_output_tokens)
        context = max(contexts, default=4096)
        piece_tokens = min(
            Room().piece_tokens,
            limits.max_input_tokens - PROMPT_TOKENS,
            context - answer_tokens - PROMPT_TOKENS,
        )
        return Room(piece_tokens=max(SMALLEST_PIECE_TOKENS, piece_tokens), answer_tokens=answer_tokens)


class _Call:
    """One call under way."""

    def __init__(
        self,
        serving: Serving,
        ready: ReadyTool,
        caller: Caller,
        *,
        tier: Tier,
        surface: Surface,
        work: ToolWork | None,
    ) -> None:
        self._serving, self._ready, self._caller, self._surface = serving, ready, caller, surface
        self._places = asyncio.Semaphore(AT_ONCE)
        self.tier = tier
        self.work = work or ToolWork()

    async def all(self, asks: tuple[Ask, ...], answer_tokens: int) -> list[JSONObject]:
        """Every exchange, a few at a time, their answers in order. The first that fails ends the others."""
        self.work.left += len(asks)
        try:
            async with asyncio.TaskGroup() as group:
                running = [group.create_task(self._one(ask, answer_tokens)) for ask in asks]
        except BaseExceptionGroup as failed:
            ours = failed.subgroup(AgentServerError)
            raise (_first(ours) if ours is not None else failed) from None
        return [task.result() for task in running]

    async def _one(self, ask: Ask, answer_tokens: int) -> JSONObject:
        async with self._places:
            complaint = ""
            for attempt in range(1, ATTEMPTS + 1):
                request = asked(
                    render(self._ready.prompt, ask.fields),
                    max_tokens=answer_tokens,
                    temperature=0.0,
                    seed=attempt,
                    attempt=attempt,
                    complaint=complaint,
                    schema=ask.schema,
                )
                try:
                    answer = read(await self._reply(request), ask)
                except InvalidOutputError as exc:
                    complaint = str(exc)[:300]
                except EngineProtocolError:
                    # Cut after its first token, which the balancer never repeats; here nothing was shown.
                    if attempt == ATTEMPTS:
                        raise
                else:
                    self.work.left -= 1
                    return answer
            raise InvalidOutputError(complaint)

    async def _reply(self, request: ChatRequest) -> ChatReply:
        opened = await self._serving.open(
            self.tier, request, self._caller, tier=self.tier, surface=self._surface
        )
        joined = JoinedStream()
        async with aclosing(opened):
            async for delta in opened.deltas:
                if isinstance(delta, ChatDelta):
                    joined.add(delta)
                    self.work.deltas += bool(delta.text or delta.reasoning)
        reply = joined.reply()
        work = self.work
        work.calls += 1
        work.llm = reply.llm
        work.input_tokens += reply.usage.input_tokens
        work.output_tokens += reply.usage.output_tokens
        work.headers = opened.headers
        return reply


def with_tier(parameters: JSONObject) -> JSONObject:
    """A tool's parameters, and beside them which tier should serve."""
    return parameters | {
        "properties": parameters["properties"]
        | {
            "tier": {
                "enum": ["small", "main"],
                "default": "small",
                "description": "main: a larger LLM, slower and better.",
            }
        }
    }


def _first(group: BaseExceptionGroup[AgentServerError]) -> AgentServerError:
    found = group.exceptions[0]
    return _first(found) if isinstance(found, BaseExceptionGroup) else found
