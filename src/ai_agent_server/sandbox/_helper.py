"""The server's side of the helper: start it, hand it a request, wait for its report, end it surely."""

import asyncio
import contextlib
import marshal
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Literal

import msgspec

from ai_agent_server.errors import SandboxError
from ai_agent_server.sandbox._inside import LENGTH_BYTES, READY
from ai_agent_server.sandbox._interpreter import PYTHON_FLAGS, Interpreter
from ai_agent_server.sandbox.base import SandboxLimits, SandboxReport, Tier

Need = Literal["required", "optional"]

MAX_FILES_BYTES = 4 * 1024 * 1024
_GRACE_S = 20.0
"""On top of the run's own wall time: start, and killing what is left."""
_END_S = 12.0
_ERRORS_BYTES = 8192
_NOBODY = 65534
_BOOT = f"""
import marshal, os, sys
def take(count):
    text = b''
    while len(text) < count:
        part = os.read(0, count - len(text))
        if not part:
            sys.exit('the server went away')
        text += part
    return text
for name, code in marshal.loads(take(int.from_bytes(take({LENGTH_BYTES}), 'big'))):
    module = sys.modules[name] = type(sys)(name)
    module.__path__ = []
    exec(code, vars(module))
    parent, _, leaf = name.rpartition('.')
    if parent:
        setattr(sys.modules[parent], leaf, module)
module.main()
"""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What the helper is asked to do. `layers` names what must, or may, confine the program."""

    argv: tuple[str, ...]
    files: Mapping[str, str]
    stdin: str
    limits: SandboxLimits
    work: str
    own_folder: bool
    """`work` does not exist: the helper makes it, and removes it."""
    drop_user: bool
    layers: Mapping[str, Need]
    readable: tuple[str, ...]
    environment: Mapping[str, str]


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    verdict: Literal["ok", "fail", "timeout", "memory", "signal", "output_limit", "sandbox_error"]
    detail: str = ""
    exit_code: int | None = None
    signal: int | None = None
    stdout: str = ""
    stderr: str = ""
    cpu_ms: float = 0.0
    wall_ms: float = 0.0
    memory_peak_kb: int = 0


def helper_argv(interpreter: Interpreter) -> tuple[str, ...]:
    """How the helper is started; its modules come over its stdin."""
    return (interpreter.executable, *PYTHON_FLAGS, "-c", _BOOT)


def inner_argv(interpreter: Interpreter, argv: tuple[str, ...]) -> tuple[str, ...]:
    """`argv` with `python` replaced by the interpreter inside."""
    if not argv or argv[0] != "python":
        raise SandboxError(f"only python runs inside, not {argv[:1]}")
    return (interpreter.executable, *PYTHON_FLAGS, *argv[1:])


def inner_environment(interpreter: Interpreter) -> dict[str, str]:
    """What the program finds in its environment besides PATH, HOME, TMPDIR and LANG."""
    return {"LD_LIBRARY_PATH": interpreter.library_path} if interpreter.library_path else {}


def check_files(files: Mapping[str, str]) -> None:
    """Refuse names that would leave the work folder, and more text than `MAX_FILES_BYTES`."""
    for name in files:
        path = PurePosixPath(name)
        if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name:
            raise SandboxError(f"{name!r} is not a file name below the work folder")
    if sum(len(text) for text in files.values()) > MAX_FILES_BYTES:
        raise SandboxError(f"more than {MAX_FILES_BYTES // 1024 // 1024} MiB of files")


async def run_helper(
    argv: tuple[str, ...], interpreter: Interpreter, request: Request, *, tier: Tier
) -> SandboxReport:
    """Run the helper by `argv`, ask it `request`, and be gone only when it and all below it are.

    Raises `SandboxError` when it does not start.
    """
    check_files(request.files)
    asked = marshal.dumps(msgspec.to_builtins(request))
    text = b"".join(len(part).to_bytes(LENGTH_BYTES, "big") + part for part in (interpreter.helper, asked))
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            env={}, cwd="/", start_new_session=True,
        )  # fmt: skip
    except OSError as exc:
        raise SandboxError(f"{argv[0]} cannot be started: {exc.strerror}") from exc
    try:
        async with asyncio.timeout(request.limits.wall_s + _GRACE_S):
            return await _converse(process, text, request, tier)
    except TimeoutError:
        return SandboxReport(verdict="sandbox_error", tier=tier, detail="the helper did not answer in time")
    finally:
        await _end_surely(process)


async def _converse(
    process: asyncio.subprocess.Process, text: bytes, request: Request, tier: Tier
) -> SandboxReport:
    to, answer, errors = _streams(process)
    # two streams, each cut; a byte that is no UTF-8 becomes three
    most = request.limits.output_kb * 1024 * 2 * 3 + 65536
    async with asyncio.TaskGroup() as group:
        stdout = group.create_task(_read_at_most(answer, most))
        stderr = group.create_task(_read_at_most(errors, _ERRORS_BYTES))
        # A helper that ended at once may have closed its pipe by now; then its errors say why.
        if not to.is_closing():
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                to.write(text)
                await to.drain()
    said = stdout.result()
    if not said.startswith(READY):
        last = stderr.result().decode("utf-8", "replace").strip()
        raise SandboxError(f"the helper did not start: {last[-500:] or 'it said nothing'}")
    try:
        answered = msgspec.msgpack.decode(said[len(READY) :], type=_Answer)
    except msgspec.DecodeError:
        last = stderr.result().decode("utf-8", "replace").strip()
        return SandboxReport(
            verdict="sandbox_error", tier=tier, detail=f"the helper gave no report: {last[-500:]}"
        )
    return SandboxReport(tier=tier, **msgspec.structs.asdict(answered))


def _streams(
    process: asyncio.subprocess.Process,
) -> tuple[asyncio.StreamWriter, asyncio.StreamReader, asyncio.StreamReader]:
    if process.stdin is None or process.stdout is None or process.stderr is None:
        raise SandboxError("the helper has no pipes")
    return process.stdin, process.stdout, process.stderr


async def _read_at_most(stream: asyncio.StreamReader, most: int) -> bytes:
    """Up to `most` bytes; what comes after is read and dropped, so that the writer never blocks."""
    kept = bytearray()
    while chunk := await stream.read(65536):
        kept += chunk[: most - len(kept)]
    return bytes(kept)


async def _end_surely(process: asyncio.subprocess.Process) -> None:
    """End the helper however this was left; a second cancel does not cut it short."""
    ending = asyncio.ensure_future(_end(process))
    canceled: asyncio.CancelledError | None = None
    while not ending.done():
        try:
            await asyncio.shield(ending)
        except asyncio.CancelledError as exc:
            canceled = exc
    if canceled is not None:
        raise canceled


async def _end(process: asyncio.subprocess.Process) -> None:
    to, answer, errors = _streams(process)
    to.close()  # the lifeline: the helper kills all below it and leaves
    try:
        async with asyncio.timeout(_END_S):
            await asyncio.gather(_read_at_most(answer, 0), _read_at_most(errors, 0), process.wait())
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def can_change_user() -> bool:
    """Whether root here may become nobody: in a namespace of one user it cannot."""
    lines = Path("/proc/self/uid_map").read_text(encoding="ascii").splitlines()
    spans = (tuple(map(int, line.split())) for line in lines)
    return any(first <= _NOBODY < first + count for first, _, count in spans)
