"""One LLM as it stands: its configuration, its engine, its circuit, its load, and what was measured of it."""

import asyncio
from dataclasses import dataclass

import msgspec

from ai_agent_server.config.settings import CircuitSettings, LLMSettings
from ai_agent_server.core.chat import ChatUsage
from ai_agent_server.llm_engines.base import LLMEngine, ModelCard, Residency
from ai_agent_server.load_balancer import circuit
from ai_agent_server.load_balancer.accelerator import AcceleratorQueue, Engined, own_card
from ai_agent_server.load_balancer.base import LLMView
from ai_agent_server.load_balancer.circuit import Circuit

WEIGHT_OF_NEW = 0.2
"""Of an exponentially weighted mean: the last ten answers make up nine tenths of it."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """An LLM to balance: its settings, and the engine that was built from them."""

    settings: LLMSettings
    engine: LLMEngine
    switched: bool | None = None
    """On or off as it was switched at run time; None is as its settings say."""


class HeldEngine:
    """An engine and how many streams use it: one that was replaced is closed after its last."""

    def __init__(self, name: str, engine: LLMEngine) -> None:
        self.name, self.engine = name, engine
        self.idle = asyncio.Event()
        self.idle.set()
        self._streams = 0

    def enter(self) -> None:
        """A stream begins."""
        self._streams += 1
        self.idle.clear()

    def leave(self) -> None:
        """A stream ended."""
        self._streams -= 1
        if not self._streams:
            self.idle.set()


class Standing:
    """The state of one LLM. Belongs to one event loop; times are the balancer's clock's."""

    def __init__(self, name: str, member: Member, accelerator: AcceleratorQueue | None = None) -> None:
        """`accelerator` is whose memory and time the LLM shares with others."""
        self.name, self.accelerator = name, accelerator
        self.settings = member.settings
        self.toggle = member.settings.toggle if member.switched is None else member.switched
        self.held = HeldEngine(name, member.engine)
        self.circuit = Circuit()
        self.in_flight = 0
        self.residency: Residency = "unknown"
        self.memory_bytes: int | None = None
        self._first_token_s: float | None = None
        self._tokens_per_s: float | None = None
        self._load_s: float | None = None

    def reconfigure(self, settings: LLMSettings) -> None:
        """Take settings that need no other engine. A switch holds until its toggle in the file changes."""
        if settings.toggle != self.settings.toggle:
            self.toggle = settings.toggle
        self.settings = settings

    @property
    def has_slot(self) -> bool:
        """Whether one more may be sent at once. An API bounds that by 429, an accelerator by turns."""
        return (
            self.accelerator is not None
            or self.settings.source == "api"
            or self.in_flight < self.settings.slots
        )

    @property
    def engined(self) -> Engined:
        """What its accelerator knows of it."""
        return Engined(
            settings=self.settings, engine=self.held.engine, enter=self.held.enter, leave=self.held.leave
        )

    @property
    def resident(self) -> bool | None:
        """Whether the model is in memory, None where nobody knows."""
        return None if self.residency == "unknown" else self.residency == "loaded"

    def view(self, now_s: float, *, waiting: int = 0) -> LLMView:
        """What strategies and people see."""
        settings = self.settings
        view = LLMView(
            name=self.name,
            source=settings.source,
            tier=settings.tier,
            toggle=self.toggle,
            locked=settings.locked,
            capabilities=frozenset(settings.capabilities),
            context_tokens=settings.context,
            slots=settings.slots,
            cost_per_million_input_usd=settings.cost_per_million_input_usd,
            cost_per_million_output_usd=settings.cost_per_million_output_usd,
            circuit=circuit.state(self.circuit, now_s),
            probing=self.circuit.probing,
            cooldown_s=circuit.cooldown_s(self.circuit, now_s),
            in_flight=self.in_flight,
            waiting=waiting,
            resident=self.resident,
            time_to_first_token_ms=None if self._first_token_s is None else self._first_token_s * 1000,
            tokens_per_s=self._tokens_per_s,
            load_s=self._load_s,
            failures=self.circuit.failures,
        )
        seat = None if self.accelerator is None else self.accelerator.seat(self.name)
        if self.accelerator is None or seat is None:
            return view
        return msgspec.structs.replace(
            view,
            in_flight=seat.running,
            waiting=waiting + seat.queued,
            resident=seat.state == "warm",
            load_s=seat.load_s,
            wait_s=self.accelerator.wait_s(self.name),
        )

    def begin(self, now_s: float) -> bool:
        """A request is sent; True when it is the circuit's probe."""
        self.circuit, probe = circuit.begun(self.circuit, now_s)
        self.in_flight += 1
        self.held.enter()
        return probe

    def first_token(self, after_s: float, *, cold: bool, probe: bool, settings: CircuitSettings) -> None:
        """The first token came `after_s` after sending."""
        self.circuit = circuit.answered(self.circuit, probe=probe, settings=settings)
        if cold:
            self._load_s = _mean(self._load_s, after_s)
        else:
            self._first_token_s = _mean(self._first_token_s, after_s)
        if self.settings.source == "local":
            self.residency = "loaded"

    def finished(self, usage: ChatUsage, writing_s: float) -> None:
        """The whole answer came; `writing_s` from its first token to its last."""
        self.circuit = circuit.succeeded(self.circuit)
        if usage.output_tokens > 1 and writing_s > 0:
            self._tokens_per_s = _mean(self._tokens_per_s, (usage.output_tokens - 1) / writing_s)

    def seen(self, cards: tuple[ModelCard, ...], began_s: float) -> None:
        """What the engine says of its models, asked at `began_s`; of ours nothing leaves it unknown."""
        card = own_card(self.settings.model, cards)
        self.residency = "unknown" if card is None else card.residency
        self.memory_bytes = None if card is None else card.memory_bytes
        if card is not None and self.accelerator is not None:
            self.accelerator.seen(self.name, card, began_s)

    def card(self) -> ModelCard:
        """The LLM under the name that it has here."""
        return ModelCard(
            name=self.name,
            residency=self.residency,
            memory_bytes=self.memory_bytes,
            context_tokens=self.settings.context,
        )


def same_engine(old: LLMSettings, new: LLMSettings) -> bool:
    """Whether an engine built from `old` serves `new`: only what the balancer reads differs."""
    return old == msgspec.structs.replace(
        new,
        toggle=old.toggle,
        locked=old.locked,
        tier=old.tier,
        capabilities=old.capabilities,
        memory_mb=old.memory_mb,
        cost_per_million_input_usd=old.cost_per_million_input_usd,
        cost_per_million_output_usd=old.cost_per_million_output_usd,
    )


def _mean(old: float | None, new: float) -> float:
    return new if old is None else old + WEIGHT_OF_NEW * (new - old)
