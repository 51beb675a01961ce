"""The whole error tree: raised by meaning here, turned into HTTP or NATS replies at the edge only.

AgentServerError
├── ConfigurationError          a configuration file or variable is wrong (pointer, problem, choices)
├── IntakeError                 a packet was not accepted; nothing of it was kept
│   ├── UnknownRoleError        no such profile or role (carries the names there are)
│   ├── UnknownLLMError         no such LLM is configured (carries the names there are)
│   ├── UnknownToolError        no such tool (carries the names there are)
│   ├── InvalidPacketError      the packet does not have the shape it should (pointer, expected, choices)
│   │   └── MalformedPacketError  what came is no JSON at all, or nested too deep to be read
│   ├── IdempotencyConflictError  the same key or id came with another body
│   ├── IntakeFullError         too many live tasks (retry_after_s)
│   └── ShuttingDownError       the server is stopping (retry_after_s)
├── AccessError                 the caller may not, or not now (headers: what an HTTP answer tells beside it)
│   ├── KeyNeededError          no key, or one that nobody knows
│   ├── ScopeError              the key is not for this
│   ├── ForeignPageError        a web page from elsewhere, where no key is asked for
│   └── LimitExceededError      the caller's share is used up (retry_after_s, unit, is_quota)
├── TaskStateError              what a task's file says forbids this
│   ├── TaskNotFoundError
│   │   └── TaskArchivedError    it ended long ago and is in the archive (place)
│   ├── TaskConflictError       the revision is not the expected one
│   ├── InvalidTransitionError  this event cannot follow this status
│   └── TaskLiveError           it must have ended first
├── StoreError                  the state folder failed
│   ├── StoreFullError          no space left; nothing half-written
│   ├── StoreUnusableError      read-only, not a folder, or in use by another server
│   └── CorruptTaskError        a file that does not decode (moved aside, never overwritten)
├── EngineError                 an LLM engine failed; `retry_safe` says whether a repeat can help
│   ├── EngineUnreachableError  refused, reset, DNS, TLS
│   ├── EngineTimeoutError      connect, first_token or idle (phase)
│   ├── EngineBusyError         429 or 503 (retry_after_s)
│   ├── EngineAuthError         401 or 403
│   ├── EngineRequestError      the engine refused the request itself (400, 404, 413, 422)
│   │   ├── ModelNotFoundError
│   │   └── ContextOverflowError
│   ├── EngineFailedError       5xx, or an error inside the stream
│   └── EngineProtocolError     cut, malformed or contradictory answer
├── NoLLMError                  the balancer refused every LLM (carries the decision)
├── ChannelError                the message transport failed
│   ├── ChannelClosedError
│   └── MessageTooLargeError    the transport takes no message of this size (limit_bytes)
├── SandboxError                no tier of the sandbox works, or the helper broke
├── AgentError                  an agent could not do its step
│   └── InvalidOutputError      what the LLM wrote does not have the shape asked for
└── ClientError                 what the command line met when it asked a server
    ├── ServerUnreachableError  nobody answers at the URL
    └── ServerRefusedError      the server said no, and why (its problem details)
"""

from typing import ClassVar, Literal

TimeoutPhase = Literal["connect", "first_token", "idle"]


class AgentServerError(Exception):
    """The root: every error that this package raises on purpose."""


class ConfigurationError(AgentServerError):
    """A configuration is wrong. `pointer` is a JSON pointer into the file, "" for the whole."""

    def __init__(
        self, problem: str, *, pointer: str = "", choices: tuple[str, ...] = (), source: str = ""
    ) -> None:
        self.problem, self.pointer, self.choices, self.source = problem, pointer, choices, source
        where = f"{source or 'configuration'}{' at ' + pointer if pointer else ''}"
        super().__init__(f"{where}: {problem}" + (f" (choices: {', '.join(choices)})" if choices else ""))


class IntakeError(AgentServerError):
    """A packet was not accepted; nothing of it was kept."""


class UnknownRoleError(IntakeError):
    """There is no such profile, or no such role in it."""

    def __init__(self, what: Literal["profile", "role"], name: str, choices: tuple[str, ...]) -> None:
        self.what, self.name, self.choices = what, name, choices
        super().__init__(f"unknown {what} {name!r}; there are: {', '.join(choices) or 'none'}")


class UnknownLLMError(IntakeError):
    """No LLM of this name is configured."""

    def __init__(self, name: str, choices: tuple[str, ...]) -> None:
        self.name, self.choices = name, choices
        super().__init__(f"unknown LLM {name!r}; there are: {', '.join(choices) or 'none'}")


class UnknownToolError(IntakeError):
    """There is no tool of this name."""

    def __init__(self, name: str, choices: tuple[str, ...]) -> None:
        self.name, self.choices = name, choices
        super().__init__(f"unknown tool {name[:80]!r}; there are: {', '.join(choices) or 'none'}")


class InvalidPacketError(IntakeError):
    """The packet is not of the shape asked for. `pointer` is a JSON pointer into what was sent.

    `choices` are the keys or values that would have been taken, where they are a closed set.
    """

    def __init__(
        self, problem: str, *, pointer: str = "", expected: str = "", choices: tuple[str, ...] = ()
    ) -> None:
        self.problem, self.pointer, self.expected, self.choices = problem, pointer, expected, choices
        super().__init__(
            f"{problem}{f' at {pointer}' if pointer else ''}{f'; expected {expected}' if expected else ''}"
        )


class MalformedPacketError(InvalidPacketError):
    """What came cannot be read as JSON: cut, not UTF-8, nested too deep, a number out of range."""


class IdempotencyConflictError(IntakeError):
    """The same idempotency key or task_id came before with another body."""

    def __init__(self, key: str, task_id: str) -> None:
        self.key, self.task_id = key, task_id
        super().__init__(f"{key} was used before with another body, by task {task_id}")


class IntakeFullError(IntakeError):
    """As many tasks are live as the configuration allows."""

    def __init__(self, live: int, retry_after_s: float) -> None:
        self.live, self.retry_after_s = live, retry_after_s
        super().__init__(f"{live} tasks are live, which is the bound; try again in {retry_after_s:.0f} s")


class ShuttingDownError(IntakeError):
    """The server is stopping and takes nothing new."""

    def __init__(self, retry_after_s: float = 5.0) -> None:
        self.retry_after_s = retry_after_s
        super().__init__("the server is shutting down")


LimitUnit = Literal["requests", "tokens", "gpu_s", "usd"]


class AccessError(AgentServerError):
    """The caller may not, or not now. `headers` go with every HTTP answer that tells of it."""

    def __init__(self, problem: str, *, headers: dict[str, str] | None = None) -> None:
        self.problem, self.headers = problem, headers or {}
        super().__init__(problem)


class KeyNeededError(AccessError):
    """No key was shown, or one that nobody knows."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem, headers={"WWW-Authenticate": "Bearer", "x-should-retry": "false"})


class ScopeError(AccessError):
    """The key is good, but not for this."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem, headers={"x-should-retry": "false"})


class ForeignPageError(AccessError):
    """A web page from elsewhere asks a server that lets in whoever is on its machine."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem, headers={"x-should-retry": "false"})


class LimitExceededError(AccessError):
    """The caller's share is used up.

    `retry_after_s` is when it will be enough again, None when it never will. `is_quota`: a budget is
    spent, rather than a rate passed.
    """

    def __init__(
        self,
        problem: str,
        *,
        unit: LimitUnit,
        retry_after_s: float | None,
        is_quota: bool,
        headers: dict[str, str],
    ) -> None:
        self.unit, self.retry_after_s, self.is_quota = unit, retry_after_s, is_quota
        super().__init__(problem, headers=headers)


class TaskStateError(AgentServerError):
    """What the task's file says forbids this."""

    def __init__(self, task_id: str, problem: str) -> None:
        self.task_id, self.problem = task_id, problem
        super().__init__(f"task {task_id}: {problem}")


class TaskNotFoundError(TaskStateError):
    """No file has this id."""

    def __init__(self, task_id: str) -> None:
        super().__init__(task_id, "no such task")


class TaskArchivedError(TaskNotFoundError):
    """The task ended long ago and is in the archive, in the file `place`."""

    def __init__(self, task_id: str, place: str) -> None:
        self.place = place
        TaskStateError.__init__(
            self, task_id, f"it was archived in {place}; `ai-agent-server tasks archive {task_id}` shows it"
        )


class TaskConflictError(TaskStateError):
    """Somebody else wrote first."""

    def __init__(self, task_id: str, *, expected: int, actual: int) -> None:
        self.expected, self.actual = expected, actual
        super().__init__(task_id, f"revision is {actual}, not {expected}")


class InvalidTransitionError(TaskStateError):
    """This event cannot follow this status."""


class TaskLiveError(TaskStateError):
    """The task has not ended yet."""


class StoreError(AgentServerError):
    """The state folder failed."""


class StoreFullError(StoreError):
    """There is no space left on the device; what was there before is whole."""


class StoreUnusableError(StoreError):
    """The state folder cannot be used at all: read-only, not a folder, or another server has it."""


class CorruptTaskError(StoreError):
    """A task file does not decode."""


class EngineError(AgentServerError):
    """An LLM engine failed. `retry_safe`: the same request may succeed if sent again."""

    retry_safe: ClassVar[bool] = False

    def __init__(self, problem: str, *, engine: str = "", status: int | None = None) -> None:
        self.problem, self.engine, self.status = problem, engine, status
        super().__init__(f"{engine}: {problem}" if engine else problem)


class EngineUnreachableError(EngineError):
    """The socket was refused or reset before an answer began."""

    retry_safe = True


class EngineTimeoutError(EngineError):
    """The engine was silent for longer than the phase allows."""

    retry_safe = True

    def __init__(self, phase: TimeoutPhase, timeout_s: float, *, engine: str = "") -> None:
        self.phase, self.timeout_s = phase, timeout_s
        super().__init__(f"no answer within {timeout_s:g} s (phase: {phase})", engine=engine)


class EngineBusyError(EngineError):
    """The engine has no place now; `retry_after_s` is what it asked for, if it did."""

    retry_safe = True

    def __init__(
        self, problem: str, *, engine: str = "", status: int | None = None, retry_after_s: float | None = None
    ) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(problem, engine=engine, status=status)


class EngineAuthError(EngineError):
    """The engine did not accept the key."""


class EngineRequestError(EngineError):
    """The engine refused the request itself; a repeat cannot help."""


class ModelNotFoundError(EngineRequestError):
    """The engine does not have the model."""


class ContextOverflowError(EngineRequestError):
    """The prompt does not fit the model's context."""


class EngineFailedError(EngineError):
    """The engine answered with an error of its own."""

    retry_safe = True


class EngineProtocolError(EngineError):
    """The answer was cut, malformed, or ended without saying why."""

    retry_safe = True


class NoLLMError(AgentServerError):
    """No configured LLM may serve the request. `refusals` maps each LLM to the rule that refused it."""

    def __init__(self, problem: str, *, refusals: dict[str, str]) -> None:
        self.problem, self.refusals = problem, refusals
        detail = "; ".join(f"{name}: {why}" for name, why in refusals.items())
        super().__init__(f"{problem}{f' ({detail})' if detail else ''}")


class ChannelError(AgentServerError):
    """The message transport failed."""


class ChannelClosedError(ChannelError):
    """The channel was closed."""


class MessageTooLargeError(ChannelError):
    """The transport takes no message of this size; a repeat cannot help."""

    def __init__(self, subject: str, *, size_bytes: int, limit_bytes: int) -> None:
        self.subject, self.size_bytes, self.limit_bytes = subject, size_bytes, limit_bytes
        super().__init__(f"{subject}: a message of {size_bytes} bytes; the transport takes {limit_bytes}")


class SandboxError(AgentServerError):
    """No tier of the sandbox works, or its helper broke."""


class AgentError(AgentServerError):
    """An agent could not do its step."""


class InvalidOutputError(AgentError):
    """What the LLM wrote does not have the shape asked for."""


class ClientError(AgentServerError):
    """What the command line met when it asked a server."""


class ServerUnreachableError(ClientError):
    """Nobody answers at the URL, or not as our server does."""

    def __init__(self, url: str, problem: str) -> None:
        self.url, self.problem = url, problem
        super().__init__(f"no server answers at {url}: {problem}")


class ServerRefusedError(ClientError):
    """The server said no. `status` is the HTTP status, the rest is from its RFC 9457 problem details."""

    def __init__(
        self, status: int, title: str, *, detail: str = "", pointer: str = "", choices: tuple[str, ...] = ()
    ) -> None:
        self.status, self.title, self.detail = status, title, detail
        self.pointer, self.choices = pointer, choices
        text = detail or title
        # The server's sentence may say the place and the choices by itself.
        where = f" at {pointer}" if pointer and pointer not in text else ""
        rest = f" (choices: {', '.join(choices)})" if choices and choices[0] not in text else ""
        super().__init__(f"{text}{where}{rest} [{status}]")
