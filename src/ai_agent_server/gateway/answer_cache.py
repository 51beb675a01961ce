"""The exact cache: the same question gets the answer that was given before, and one asks for many."""

import asyncio
import hashlib
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterable
from contextlib import aclosing
from typing import Literal, TypeAlias

import msgspec

from ai_agent_server.config.settings import Settings
from ai_agent_server.core.chat import (
    ChatDelta,
    ChatRequest,
    Decision,
    RouteHints,
    Urgency,
)
from ai_agent_server.core.embedding import EmbeddingReply, EmbeddingRequest
from ai_agent_server.core.metrics_snapshot import CacheState
from ai_agent_server.gateway.caller import Caller
from ai_agent_server.llm_engines.base import JoinedStream
from ai_agent_server.load_balancer.base import Sent, Source

__all__ = ("AnswerCache", "KeptVectors", "Reading")

ENTRY_BYTES = 512
"""What an answer takes beside its own text: the tables' places and the objects around it."""
OUT_FOR_NOW = frozenset({"LB-8 tried", "LB-9 circuit"})

Ask: TypeAlias = Callable[[Sent], AsyncGenerator[ChatDelta, None]]
_Question: TypeAlias = tuple[bytes, Urgency]


class _Kept(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """An answer, encoded: its size is known, and it holds no objects."""

    answer: bytes
    """The deltas of a chat as JSON, or vectors as MessagePack."""
    llm: str
    stored_s: float

    @property
    def size_bytes(self) -> int:
        return len(self.answer) + ENTRY_BYTES


class AnswerCache:
    """The answers, in memory, the least lately used given up first; and the questions under way.

    Equal are two requests of the same key and project (`gateway.cache.shared`: of anyone) that bring the
    same question to the balancer: messages, tools, schema, sampling, bounds, and which LLMs may serve; or
    the same texts for their vectors.
    """

    def __init__(self, *, settings: Callable[[], Settings], clock: Callable[[], float]) -> None:
        """`clock` is monotonic, in seconds."""
        self._settings, self._clock = settings, clock
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()
        self._kept_bytes = 0
        self._flights: dict[_Question, _Flight] = {}
        self._forgotten = 0
        """How often something was forgotten."""

    def reading(self, request: ChatRequest, caller: Caller) -> "Reading | None":
        """A reader of the answer to `request`; None where `caller` wants no cache, or there is none."""
        settings = self._settings().gateway.cache
        if caller.cache == "off" or not settings.max_mb:
            return None
        digest = _digest(request, () if settings.shared else (caller.key, caller.project))
        kept = self._find(digest) if caller.cache == "use" else None
        return Reading(
            self,
            question=(digest, request.route.urgency),
            hints=request.route,
            kept=kept,
            age_s=self._clock() - kept.stored_s if kept is not None else 0.0,
            may_join=caller.cache == "use",
        )

    def vectors(self, request: EmbeddingRequest, caller: Caller) -> "KeptVectors | None":
        """The way to the vectors of `request`; None where `caller` wants no cache, or there is none."""
        settings = self._settings().gateway.cache
        if caller.cache == "off" or not settings.max_mb:
            return None
        digest = _digest(request, () if settings.shared else (caller.key, caller.project))
        kept = self._find(digest) if caller.cache == "use" else None
        forgotten = self._forgotten

        def keep(reply: EmbeddingReply) -> None:
            if self._forgotten == forgotten and not self._is_stand_in(
                reply.llm, reply.decision, request.route
            ):
                again = msgspec.structs.replace(reply, decision=_from_cache(reply.llm))
                self._keep(digest, msgspec.msgpack.encode(again), reply.llm)

        return KeptVectors(
            None if kept is None else kept.answer,
            age_s=self._clock() - kept.stored_s if kept is not None else 0.0,
            keep=keep,
        )

    def state(self) -> CacheState:
        """What is kept now."""
        return CacheState(answers=len(self._kept), size_bytes=self._kept_bytes)

    def forget(self, llms: Collection[str]) -> None:
        """Give up what these LLMs answered, whatever is under way, and what is beyond the bounds."""
        for digest in [digest for digest, kept in self._kept.items() if kept.llm in llms]:
            self._drop(digest)
        if llms:
            self._flights.clear()
            self._forgotten += 1
        self._make_room()

    def flight(self, reading: "Reading", ask: Ask) -> "_Flight":
        """The question under way that `reading` may join, or a new one."""
        found = self._flights.get(reading.question) if reading.may_join else None
        if found is None:
            found = self._flights[reading.question] = _Flight(
                ask, landed=lambda flight, answer: self._landed(reading, flight, answer)
            )
            reading.outcome = "miss"
        return found

    def _landed(self, asked: "Reading", flight: "_Flight", answer: JoinedStream | None) -> None:
        if self._flights.get(asked.question) is not flight:
            # A reload or a refresh came between: this answer is not the newest there is.
            return
        del self._flights[asked.question]
        if answer is None or answer.finish_reason == "content_filter":
            return
        if self._is_stand_in(answer.llm, answer.decision, asked.hints):
            return
        first, *others = answer.again()
        if others or first.tool_calls:  # else it says nothing
            deltas = (msgspec.structs.replace(first, decision=_from_cache(answer.llm)), *others)
            self._keep(asked.question[0], msgspec.json.encode(deltas), answer.llm)

    def _is_stand_in(self, llm: str, decision: Decision | None, hints: RouteHints) -> bool:
        """Whether another LLM than usual answered: it would go on standing in after the usual one is back."""
        if hints.llm is not None:
            return llm != hints.llm
        llms = self._settings().llms

        def is_wanted(name: str) -> bool:
            return name in llms and llms[name].tier == hints.tier

        candidates = decision.candidates if decision is not None else ()
        return not is_wanted(llm) and any(
            is_wanted(candidate.llm) and candidate.refused_by in OUT_FOR_NOW for candidate in candidates
        )

    def _find(self, digest: bytes) -> _Kept | None:
        kept = self._kept.get(digest)
        if kept is None:
            return None
        if self._clock() - kept.stored_s >= self._settings().gateway.cache.ttl_s:
            self._drop(digest)
            return None
        self._kept.move_to_end(digest)
        return kept

    def _keep(self, digest: bytes, answer: bytes, llm: str) -> None:
        self._drop(digest)
        kept = _Kept(answer=answer, llm=llm, stored_s=self._clock())
        if kept.size_bytes > self._settings().gateway.cache.max_mb * 2**20:
            return  # the vectors of many texts: it would take all others with it
        self._kept[digest] = kept
        self._kept_bytes += kept.size_bytes
        self._make_room()

    def _drop(self, digest: bytes) -> None:
        kept = self._kept.pop(digest, None)
        if kept is not None:
            self._kept_bytes -= kept.size_bytes

    def _make_room(self) -> None:
        bounds = self._settings().gateway.cache
        while self._kept_bytes > bounds.max_mb * 2**20 or len(self._kept) > bounds.max_answers:
            _, oldest = self._kept.popitem(last=False)
            self._kept_bytes -= oldest.size_bytes


class Reading:
    """One request's way to its answer: from what is kept, with others who asked the same, or by asking."""

    def __init__(
        self,
        cache: AnswerCache,
        *,
        question: _Question,
        hints: RouteHints,
        kept: _Kept | None,
        age_s: float,
        may_join: bool,
    ) -> None:
        self.question, self.hints, self.may_join = question, hints, may_join
        self.age_s = age_s
        """For how long the answer had been kept."""
        self.outcome: Literal["hit", "miss"] = "hit"
        """`miss`: it is this request that asked an LLM. Known once the stream has begun."""
        self.pays = False
        """Whether the LLM's work is this request's. Known at the end: one who leaves lets another pay."""
        self._cache, self._kept = cache, kept

    @property
    def is_kept(self) -> bool:
        """Whether no LLM will be asked."""
        return self._kept is not None

    async def stream(self, ask: Ask, sent: Sent) -> AsyncGenerator[ChatDelta, None]:
        """The answer. `ask` is called where nobody has asked yet, and closed when its last reader leaves.

        `sent` is told which LLM's engine has the question, as soon as one has it.
        """
        if self._kept is not None:
            for delta in msgspec.json.decode(self._kept.answer, type=tuple[ChatDelta, ...]):
                yield delta
            return
        flight = self._cache.flight(self, ask)
        async with aclosing(flight.read(self, sent)) as deltas:
            async for delta in deltas:
                yield delta


class KeptVectors:
    """One request's way to its vectors: from what is kept, or by asking."""

    def __init__(self, kept: bytes | None, *, age_s: float, keep: Callable[[EmbeddingReply], None]) -> None:
        self._kept, self._keep = kept, keep
        self.outcome: Literal["hit", "miss"] = "miss" if kept is None else "hit"
        self.age_s = age_s
        """For how long they had been kept."""

    async def reply(self, ask: Callable[[], Awaitable[EmbeddingReply]]) -> EmbeddingReply:
        """The vectors. `ask` is called where none are kept."""
        if self._kept is not None:
            return msgspec.msgpack.decode(self._kept, type=EmbeddingReply)
        reply = await ask()
        self._keep(reply)
        return reply


class _Seat:
    """A reader's place in a flight: what came and was not read yet."""

    __slots__ = ("news", "ready", "sent")

    def __init__(self, so_far: Iterable[ChatDelta], sent: Sent) -> None:
        self.ready, self.sent, self.news = deque(so_far), sent, asyncio.Event()


class _Flight:
    """A question that an LLM is answering, and its readers. It ends with its answer or its last reader."""

    def __init__(self, ask: Ask, *, landed: Callable[["_Flight", JoinedStream | None], None]) -> None:
        self._landed = landed
        self._joined = JoinedStream()
        self._seats: dict[Reading, _Seat] = {}
        self._sent_to: tuple[str, Source] | None = None
        self._payer: Reading | None = None
        self._task = asyncio.create_task(self._run(ask(self._sent)), name="answer-for-all")
        self._task.add_done_callback(lambda _: self._tell())

    async def read(self, reading: Reading, sent: Sent) -> AsyncGenerator[ChatDelta, None]:
        """Everything from the beginning. Raises what the LLM's engine raises."""
        seat = self._seats[reading] = _Seat(self._joined.again(), sent)
        if self._sent_to is not None:
            sent(*self._sent_to)
        try:
            while True:
                while seat.ready:
                    yield seat.ready.popleft()
                if self._task.done():
                    self._task.result()
                    return
                seat.news.clear()
                await seat.news.wait()
        finally:
            await self._leave(reading)

    async def _leave(self, reading: Reading) -> None:
        del self._seats[reading]
        is_last = not self._seats
        reading.pays = self._payer is reading or (self._payer is None and is_last)
        if is_last:
            self._landed(self, None)  # before anything is awaited: nobody may join what is being ended
            self._task.cancel()
            await asyncio.wait((self._task,))
            if not self._task.cancelled():
                self._task.exception()  # told to those who read; who left need not know of it

    async def _run(self, source: AsyncGenerator[ChatDelta, None]) -> None:
        answer = None
        try:
            async with aclosing(source) as deltas:
                async for delta in deltas:
                    self._joined.add(delta)
                    for seat in self._seats.values():
                        seat.ready.append(delta)
                    self._tell()
            if self._joined.finish_reason is not None:
                answer = self._joined
        finally:
            self._payer = next(iter(self._seats), None)
            self._landed(self, answer)

    def _sent(self, llm: str, source: Source) -> None:
        self._sent_to = llm, source
        for seat in self._seats.values():
            seat.sent(llm, source)

    def _tell(self) -> None:
        for seat in self._seats.values():
            seat.news.set()


def _from_cache(llm: str) -> Decision:
    return Decision(chosen=llm, reason=f"from the cache: {llm} said it", strategy="cache")


def _digest(request: ChatRequest | EmbeddingRequest, whose: tuple[str, ...]) -> bytes:
    """What two questions have in common whose answers may stand for each other.

    The order of a schema's keys counts: it is the order in which an answer that obeys it has them. Not
    what only says when the answer comes, or who hears of it: urgency, whose turn it is, the trace.
    """
    hints = msgspec.structs.replace(request.route, urgency="interactive", key="")
    question = msgspec.structs.replace(request, route=hints)
    if isinstance(question, ChatRequest):
        question = msgspec.structs.replace(question, traceparent="")
    return hashlib.sha256(msgspec.json.encode((whose, question))).digest()
