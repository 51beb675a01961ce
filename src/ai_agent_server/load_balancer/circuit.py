"""The circuit of one LLM: closed, open, or half open with exactly one probe. Pure; the clock is passed in."""

from typing import Literal

import msgspec

from ai_agent_server.config.settings import CircuitSettings
from ai_agent_server.errors import (
    EngineBusyError,
    EngineError,
    EngineRequestError,
    EngineTimeoutError,
    ModelNotFoundError,
)
from ai_agent_server.load_balancer.base import CircuitState

Blame = Literal["llm", "nobody"]


class Circuit(msgspec.Struct, frozen=True, kw_only=True):
    """What is remembered of an LLM's failures. `open_until_s` is on the caller's monotonic clock."""

    failures: int = 0
    """In a row."""
    open_until_s: float | None = None
    probing: bool = False


def state(circuit: Circuit, now_s: float) -> CircuitState:
    """How the circuit stands at `now_s`."""
    if circuit.open_until_s is None:
        return "closed"
    return "open" if now_s < circuit.open_until_s else "half_open"


def cooldown_s(circuit: Circuit, now_s: float) -> float:
    """Seconds until an open circuit is half open; 0 for any other."""
    return max(0.0, circuit.open_until_s - now_s) if circuit.open_until_s is not None else 0.0


def admits(circuit: Circuit, now_s: float) -> bool:
    """Whether a request may be sent now."""
    standing = state(circuit, now_s)
    return standing == "closed" or (standing == "half_open" and not circuit.probing)


def begun(circuit: Circuit, now_s: float) -> tuple[Circuit, bool]:
    """A request that `admits` let through is sent; True when it is the probe."""
    if state(circuit, now_s) != "half_open":
        return circuit, False
    return msgspec.structs.replace(circuit, probing=True), True


def answered(circuit: Circuit, *, probe: bool, settings: CircuitSettings) -> Circuit:
    """The first token came. A probe's closes the circuit on trial: one failure opens it again.

    Only the whole answer clears the count, or an engine that cuts every stream would look healthy.
    """
    if not probe:
        return circuit
    return Circuit(failures=_threshold(settings) - 1)


def succeeded(circuit: Circuit) -> Circuit:
    """The whole answer came. While the circuit is open it is one to an older request: no proof of now."""
    return Circuit() if circuit.open_until_s is None else circuit


def failed(
    circuit: Circuit,
    now_s: float,
    *,
    probe: bool,
    settings: CircuitSettings,
    blame: Blame = "llm",
    retry_after_s: float | None = None,
) -> Circuit:
    """The request failed. A Retry-After opens the circuit for as long as it says, whoever is to blame."""
    if retry_after_s is not None:
        until_s = max(now_s + max(0.0, retry_after_s), circuit.open_until_s or 0.0)
        return Circuit(failures=circuit.failures, open_until_s=until_s, probing=circuit.probing and not probe)
    if blame == "nobody":
        return abandoned(circuit, probe=probe)
    failures = circuit.failures + 1
    if probe:
        return Circuit(failures=failures, open_until_s=now_s + settings.cooldown_s)
    if circuit.open_until_s is not None:
        # Sent before the circuit opened: it must not push the probe further away.
        return circuit
    if failures >= _threshold(settings):
        return Circuit(failures=failures, open_until_s=now_s + settings.cooldown_s)
    return Circuit(failures=failures)


def abandoned(circuit: Circuit, *, probe: bool) -> Circuit:
    """The request ended without showing anything: its client left, say. Another may probe."""
    return msgspec.structs.replace(circuit, probing=False) if probe else circuit


def blame_for(error: EngineError, *, cold: bool) -> Blame:
    """Whether a failure speaks against the LLM.

    A request that was wrong does not, nor an engine that is full, nor one that was still loading:
    `cold` says that the model was not in memory when the request was sent.
    """
    match error:
        case ModelNotFoundError():
            return "llm"
        case EngineRequestError() | EngineBusyError():
            return "nobody"
        case EngineTimeoutError(phase="first_token") if cold:
            return "nobody"
        case _:
            return "llm"


def _threshold(settings: CircuitSettings) -> int:
    return max(1, settings.failures)
