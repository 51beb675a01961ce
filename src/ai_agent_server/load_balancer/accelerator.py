"""An accelerator at work: asks its scheduler, and does what that decides through the engines."""

import asyncio
import itertools
import math
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping

import msgspec
import structlog

from ai_agent_server.config.settings import Accelerator, BalancerSettings, LLMSettings
from ai_agent_server.core.chat import Urgency
from ai_agent_server.errors import EngineError
from ai_agent_server.llm_engines.base import LLMEngine, ModelCard
from ai_agent_server.load_balancer.base import AcceleratorView, MemoryView, QueueDecision, QueuedView
from ai_agent_server.load_balancer.memory_ledger import Footprint, MemoryLedger, estimate_mb
from ai_agent_server.load_balancer.outside import Outside, looked
from ai_agent_server.load_balancer.scheduler import (
    Arrived,
    Configured,
    Dismissed,
    Effect,
    Event,
    ExternalMemory,
    Finished,
    Left,
    Load,
    Loaded,
    LoadFailed,
    Measured,
    Model,
    Recalled,
    Refuse,
    Retired,
    Rules,
    Scheduler,
    Seat,
    Sized,
    Spilled,
    Start,
    Tick,
    Unload,
    Unloaded,
)
from ai_agent_server.memory_gauges.base import Gauged, MemoryGauge

LOAD_TIMEOUT_S = 600.0
UNLOAD_TIMEOUT_S = 60.0
LOOK_TIMEOUT_S = 5.0
SPILL_AGAIN_S = 2.0
"""Between two questions whether an API may serve by now what has waited for as long as it should."""
GIVEN_BACK_S = 5.0
"""So long a driver may take until memory that a model gave back is free."""
GIVEN_BACK_LOOK_S = 0.2
RECENT = 64
MB = 2**20

log = structlog.get_logger(__name__)


class Engined(msgspec.Struct, frozen=True, kw_only=True):
    """An LLM of this accelerator: its settings, its engine, and how the engine is kept open meanwhile."""

    settings: LLMSettings
    engine: LLMEngine
    enter: Callable[[], None]
    leave: Callable[[], None]


class AcceleratorQueue:
    """Everybody who wants the memory or the slots of one accelerator goes through here.

    Belongs to one event loop. Decisions are the scheduler's; what takes time runs in tasks that
    `aclose` ends. `clock` is monotonic, in seconds.
    """

    def __init__(
        self,
        name: str,
        accelerator: Accelerator,
        balancer: BalancerSettings,
        *,
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]],
        gauge: MemoryGauge | None = None,
    ) -> None:
        self.name = name
        self._gauge = gauge
        self._reading: asyncio.Future[Gauged | None] | None = None
        self._device: Gauged | None = None
        self._outside = Outside()
        self._accelerator = accelerator
        self._clock, self._sleep = clock, sleep
        self._scheduler = Scheduler(
            {},
            MemoryLedger(memory_mb=accelerator.memory_mb, headroom_mb=accelerator.headroom_mb),
            self._rules(balancer),
        )
        self._llms: dict[str, Engined] = {}
        self._numbers = itertools.count(1)
        self._waiting: dict[str, asyncio.Future[Start | Refuse]] = {}
        self._changed_s: dict[str, float] = {}
        """LLM -> when an order to its engine was given or carried out: looks begun before are stale."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._orders = 0
        self._alarm: asyncio.Task[None] | None = None
        self._dismissed: dict[str, asyncio.Future[bool]] = {}
        """LLM that is to go -> whether it went."""
        self._recent: deque[tuple[float, Effect]] = deque(maxlen=RECENT)
        self._closed = False

    # What is asked of it

    async def turn(
        self,
        llm: str,
        *,
        key: str,
        urgency: Urgency,
        spill_after_s: float = math.inf,
        spills: Callable[[], bool] = lambda: False,
    ) -> Start | Refuse:
        """Wait until a request for `llm` may be sent, or is refused. A `Start` is given back by `leave`.

        Where it still waits after `spill_after_s`, it is refused as soon as `spills` says so, to be placed
        again.
        """
        request = f"{self.name}.{next(self._numbers)}"
        answer: asyncio.Future[Start | Refuse] = asyncio.get_running_loop().create_future()
        if self._closed:
            return Refuse(request=request, retry_after_s=None, why="the balancer is closed")
        self._waiting[request] = answer
        timer: asyncio.Task[None] | None = None
        if spill_after_s < math.inf:
            timer = self._own(self._spill_later(request, spill_after_s, spills), f"spill of {request}")
        try:
            self._tell(Arrived(request=request, llm=llm, key=key, urgency=urgency))
            return await answer
        except asyncio.CancelledError:
            self._tell(Left(request=request))
            raise
        finally:
            self._waiting.pop(request, None)
            if timer is not None:
                timer.cancel()

    def leave(self, request: str, *, answered: bool) -> None:
        """A request that was let in has ended."""
        self._tell(Finished(request=request) if answered else Left(request=request))

    def recall(self, llm: str) -> None:
        """Send those who wait for `llm` back, to be placed again."""
        self._tell(Recalled(llm=llm))

    def dismiss(self, llm: str) -> asyncio.Future[bool]:
        """Have `llm` leave the memory once its answers have ended; whether it did."""
        gone = self._dismissed.setdefault(llm, asyncio.get_running_loop().create_future())
        self._tell(Dismissed(llm=llm))
        seat = self._scheduler.seat(llm)
        if self._closed or seat is None or seat.state == "cold":
            self._went(llm, gone=True)
        return gone

    def seat(self, llm: str) -> Seat | None:
        """How `llm` stands; None where it is not of this accelerator."""
        return self._scheduler.seat(llm)

    def wait_s(self, llm: str) -> float:
        """What a request for `llm` would wait, estimated."""
        return self._scheduler.wait_s(llm)

    @property
    def queued(self) -> int:
        """Requests that wait."""
        return self._scheduler.queued

    def view(self) -> AcceleratorView:
        """The books, the queue and the last decisions."""
        ledger, seats = self._scheduler.ledger, self._scheduler.seats()
        return AcceleratorView(
            name=self.name,
            memory_mb=ledger.memory_mb,
            headroom_mb=ledger.headroom_mb,
            external_mb=ledger.external_mb,
            budget_mb=ledger.budget_mb,
            used_mb=ledger.used_mb,
            llms=tuple(
                MemoryView(
                    llm=seat.llm,
                    engine=ledger.footprints[seat.llm].engine,
                    state=seat.state,
                    draining=seat.draining,
                    memory_mb=ledger.footprints[seat.llm].mb,
                    basis=ledger.footprints[seat.llm].basis,
                    held_mb=ledger.held[seat.llm].mb if seat.llm in ledger.held else 0.0,
                    slots=seat.slots,
                    running=seat.running,
                    queued=seat.queued,
                    load_s=seat.load_s,
                )
                for seat in seats
            ),
            queue=tuple(
                QueuedView(
                    request=each.request,
                    llm=each.llm,
                    urgency=each.urgency,
                    place=each.place,
                    waited_s=each.waited_s,
                    wait_s=each.wait_s,
                )
                for each in self._scheduler.forecast()
            ),
            recent=tuple(_explained(effect, self._clock() - at_s) for at_s, effect in self._recent),
            device=self._device,
        )

    # What it is told

    def configure(
        self,
        llms: Mapping[str, Engined],
        balancer: BalancerSettings,
        *,
        replaced: frozenset[str] = frozenset(),
    ) -> None:
        """These are its LLMs from now on. Of those `replaced`, and left out, the engine is being closed."""
        self._llms = dict(llms)
        for name in replaced:
            self._changed_s[name] = self._clock()
        self._tell(
            Configured(
                models={name: Model(name=name, slots=each.settings.slots) for name, each in llms.items()},
                footprints={
                    name: Footprint(
                        llm=name, engine=each.settings.engine, declared_mb=each.settings.memory_mb
                    )
                    for name, each in llms.items()
                },
                rules=self._rules(balancer),
                replaced=replaced,
            )
        )

    def retired(self, llm: str) -> None:
        """The engine that `configure` sent away is closed."""
        self._tell(Retired(llm=llm))
        self._went(llm, gone=True)

    def seen(self, llm: str, card: ModelCard, began_s: float) -> None:
        """The engine was looked at, from `began_s` on: what it says of `llm`.

        It is believed where it says that a model is there or is not, and how much that takes. A look from
        before an order was carried out, or a request was sent, says nothing; nor does one say that a model
        went while it answers.
        """
        seat = self._scheduler.seat(llm)
        if seat is None or began_s <= self._changed_s.get(llm, -math.inf):
            return
        settings = self._llms[llm].settings
        if settings.memory_mb is None:
            self._size(llm, card, settings)
        if card.residency == "loaded" and seat.state == "cold":
            self._tell(Loaded(llm=llm))
        elif card.residency == "unloaded" and seat.state == "warm" and not seat.running:
            self._tell(Unloaded(llm=llm))
            self._went(llm, gone=True)
        if card.residency == "loaded" and card.memory_bytes:
            self._tell(Measured(llm=llm, memory_mb=card.memory_bytes / MB))

    def _size(self, llm: str, card: ModelCard, settings: LLMSettings) -> None:
        """What it would take: foretold by its engine, else guessed from its file's size."""
        if card.needed_bytes:
            self._tell(Sized(llm=llm, memory_mb=card.needed_bytes / MB))
        elif card.size_bytes:
            guess_mb = estimate_mb(card.size_bytes, context_tokens=settings.context, slots=settings.slots)
            self._tell(Sized(llm=llm, memory_mb=guess_mb))

    async def look_outside(self) -> None:
        """Read the gauge, and have what other programs take left out of the budget.

        Nothing while a model comes or goes: what it takes would be counted twice, or as theirs.
        """
        orders = self._orders
        gauged = await self._read_gauge()
        if gauged is not None and not self._moving() and orders == self._orders:
            self._note_outside(gauged, self._scheduler.ledger.used_mb)

    async def aclose(self) -> None:
        """Refuse who waits, and end what is under way."""
        self._closed = True
        for request, answer in self._waiting.items():
            if not answer.done():
                answer.set_result(Refuse(request=request, retry_after_s=None, why="the balancer is closed"))
        for llm in tuple(self._dismissed):
            self._went(llm, gone=False)
        tasks = (*self._tasks, *((self._alarm,) if self._alarm is not None else ()))
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        if self._reading is not None:
            await asyncio.wait((self._reading,), timeout=LOOK_TIMEOUT_S)
        if self._gauge is not None and (self._reading is None or self._reading.done()):
            await asyncio.to_thread(self._gauge.close)

    # Decisions, done

    def _tell(self, event: Event) -> None:
        if self._closed:
            return  # answers that were still running end now; nothing is loaded for those who waited
        for effect in self._scheduler.handle(event, self._clock()):
            self._do(effect)
        self._set_alarm()

    def _do(self, effect: Effect) -> None:
        self._recent.appendleft((self._clock(), effect))
        if isinstance(effect, Start):
            # An engine may bring in by itself what it had dropped: what was seen before is stale.
            self._changed_s[effect.llm] = self._clock()
        match effect:
            case Start() | Refuse():
                answer = self._waiting.get(effect.request)
                # Whoever left in this very moment says so itself.
                if answer is not None and not answer.done():
                    answer.set_result(effect)
            case Load(llm=llm):
                log.info("accelerator.load", accelerator=self.name, llm=llm, why=effect.why)
                self._run(llm, self._load(llm, self._llms[llm]))
            case Unload(llm=llm):
                log.info("accelerator.unload", accelerator=self.name, llm=llm, why=effect.why)
                self._run(llm, self._unload(llm, self._llms[llm]))

    def _run(self, llm: str, work: Coroutine[None, None, None]) -> None:
        self._changed_s[llm] = self._clock()
        self._orders += 1
        # Kept open from here: a reload closes the engine once what was ordered is done.
        self._llms[llm].enter()
        self._own(work, f"residency of {llm}")

    def _own(self, work: Coroutine[None, None, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _spill_later(self, request: str, after_s: float, spills: Callable[[], bool]) -> None:
        await self._sleep(after_s)
        while request in self._waiting and not self._waiting[request].done():
            if spills():
                self._tell(Spilled(request=request))
                return
            # The API that may not serve it now may later: its circuit closes, it is switched on.
            await self._sleep(SPILL_AGAIN_S)

    async def _load(self, llm: str, engined: Engined) -> None:
        try:
            done = await self._ordered(llm, engined.engine.load(), LOAD_TIMEOUT_S)
            self._tell(Loaded(llm=llm) if done else LoadFailed(llm=llm))
            if not done:
                self._went(llm, gone=True)
            card = await self._look(engined) if done else None
            if card is not None and card.residency == "loaded" and card.memory_bytes:
                self._tell(Measured(llm=llm, memory_mb=card.memory_bytes / MB))
        finally:
            engined.leave()

    async def _unload(self, llm: str, engined: Engined) -> None:
        try:
            await self._ordered(llm, engined.engine.unload(), UNLOAD_TIMEOUT_S)
            # Not its word but what it has. One that cannot be told keeps its model, and may not say so.
            card = await self._look(engined)
            gone = card is not None and card.residency == "unloaded"
            if gone:
                await self._given_back(llm)
            self._tell(Unloaded(llm=llm) if gone else Loaded(llm=llm))
            self._went(llm, gone=gone)
        finally:
            engined.leave()

    async def _given_back(self, llm: str) -> None:
        """Wait until the device has what `llm` took: a load into memory that is not free yet fails.

        What did not come back in time is somebody else's.
        """
        until_s = self._clock() + GIVEN_BACK_S
        while self._moving() == {llm} and (gauged := await self._read_gauge()) is not None:
            ledger = self._scheduler.ledger
            held_mb = ledger.used_mb - ledger.need_mb(llm)
            found = looked(self._outside, memory_mb=ledger.memory_mb, held_mb=held_mb, free_mb=gauged.free_mb)
            if found.mb <= self._outside.mb or self._clock() >= until_s:
                self._note_outside(gauged, held_mb)
                return
            await self._sleep(GIVEN_BACK_LOOK_S)

    def _moving(self) -> set[str]:
        """The models that come or go."""
        return {seat.llm for seat in self._scheduler.seats() if seat.state in {"loading", "unloading"}}

    def _note_outside(self, gauged: Gauged, held_mb: float) -> None:
        self._outside = looked(
            self._outside,
            memory_mb=self._scheduler.ledger.memory_mb,
            held_mb=held_mb,
            free_mb=gauged.free_mb,
        )
        if self._outside.mb != self._scheduler.ledger.external_mb:
            log.info("accelerator.outside", accelerator=self.name, memory_mb=round(self._outside.mb))
            self._tell(ExternalMemory(memory_mb=self._outside.mb))

    async def _read_gauge(self) -> Gauged | None:
        if self._gauge is None or self._closed:
            return None
        if self._reading is None:
            self._reading = asyncio.ensure_future(asyncio.to_thread(self._gauge.read))
        reading = self._reading
        # A driver that hangs keeps its own thread, and nobody else: it is asked again once it answered.
        await asyncio.wait((reading,), timeout=LOOK_TIMEOUT_S)
        if not reading.done():
            if self._device is not None:
                log.warning("accelerator.gauge_hangs", accelerator=self.name)
            self._device = None
            return None
        if self._reading is reading:
            self._reading = None
            self._device = reading.result()
        return self._device

    def _went(self, llm: str, *, gone: bool) -> None:
        told = self._dismissed.pop(llm, None)
        if told is not None and not told.done():
            told.set_result(gone)

    async def _ordered(self, llm: str, order: Coroutine[None, None, None], timeout_s: float) -> bool:
        """Whether the engine carried it out."""
        try:
            async with asyncio.timeout(timeout_s):
                await order
        except (EngineError, TimeoutError) as exc:
            log.warning("accelerator.order_failed", llm=llm, problem=type(exc).__name__)
            return False
        except Exception:
            # A fault in one engine must not leave the memory of all in doubt.
            log.exception("accelerator.order_failed", llm=llm)
            return False
        finally:
            self._changed_s[llm] = self._clock()
        return True

    async def _look(self, engined: Engined) -> ModelCard | None:
        try:
            async with asyncio.timeout(LOOK_TIMEOUT_S):
                return own_card(engined.settings.model, await engined.engine.models())
        except (EngineError, TimeoutError):
            return None
        except Exception:
            log.exception("accelerator.look_failed", model=engined.settings.model)
            return None

    def _set_alarm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        wake_s = self._scheduler.wake_s
        if wake_s != math.inf and self._waiting and not self._closed:
            self._alarm = asyncio.create_task(self._wake_at(wake_s), name=f"queue of {self.name}")

    async def _wake_at(self, wake_s: float) -> None:
        await self._sleep(max(0.0, wake_s - self._clock()))
        self._alarm = None
        self._tell(Tick())

    def _rules(self, balancer: BalancerSettings) -> Rules:
        return Rules(
            # Whoever is refused after that long must have had its model's time come before.
            max_wait_s=min(self._accelerator.max_wait_s, balancer.max_wait_s / 2),
            hold_s=self._accelerator.hold_s,
            patience_s=balancer.max_wait_s,
            max_queued=self._accelerator.max_queued,
        )


def _explained(effect: Effect, ago_s: float) -> QueueDecision:
    match effect:
        case Load(llm=llm):
            return QueueDecision(what="load", why=effect.why, ago_s=ago_s, llm=llm)
        case Unload(llm=llm):
            return QueueDecision(what="unload", why=effect.why, ago_s=ago_s, llm=llm)
        case Start(request=request, llm=llm):
            return QueueDecision(what="start", why=effect.why, ago_s=ago_s, llm=llm, request=request)
        case Refuse(request=request):
            return QueueDecision(what="refuse", why=effect.why, ago_s=ago_s, request=request)


def own_card(model: str, cards: tuple[ModelCard, ...]) -> ModelCard | None:
    """Which of an engine's cards is `model`'s."""
    wanted = model.removesuffix(":latest")
    for card in cards:
        if card.name.removesuffix(":latest") == wanted:
            return card
    # A llama-server holds one model and calls it by its path.
    return cards[0] if len(cards) == 1 else None
