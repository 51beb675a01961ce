"""The interpreter that runs inside: its executable, and the only paths that it needs to read."""

import asyncio
import marshal
import sys
from importlib.abc import InspectLoader
from pathlib import Path
from types import CodeType, ModuleType

import msgspec

import ai_agent_server
from ai_agent_server import sandbox
from ai_agent_server.errors import SandboxError
from ai_agent_server.sandbox import _inside, _landlock_abi, _seccomp

PYTHON_FLAGS = ("-I", "-S", "-B", "-X", "utf8")

_HELPER = (ai_agent_server, sandbox, _landlock_abi, _seccomp, _inside)
"""In the order in which they are loaded."""
_FIND_S = 30.0
_LIST_LIBRARIES = """
import importlib, os, sys, sysconfig
folder = sysconfig.get_path('platstdlib') + '/lib-dynload'
for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
    if 'test' not in name and not name.startswith('_tkinter'):
        try:
            importlib.import_module(name.partition('.')[0])
        except ImportError:
            pass
with open('/proc/self/maps') as maps:
    print(sysconfig.get_path('stdlib'), sysconfig.get_path('platstdlib'), sep=chr(10))
    print(chr(10).join({line.split(None, 5)[5].strip() for line in maps if '.so' in line}))
"""


class Interpreter(msgspec.Struct, frozen=True, kw_only=True):
    """An executable and the paths it reads. Nothing of a virtual environment is among them."""

    executable: str
    readable: tuple[str, ...]
    """The executable, the standard library and the folders of shared libraries; none is below another."""
    links: tuple[tuple[str, str], ...]
    """Links on the way to the loader: (path, target), as /lib64 -> usr/lib64."""
    library_path: str
    """For LD_LIBRARY_PATH: ld.so.cache is not readable inside."""
    helper: bytes
    """The helper's modules, compiled: they travel, so that no file of ours need be readable inside."""


async def find_interpreter() -> Interpreter:
    """The base interpreter of this process; asks it once which shared libraries its modules load."""
    executable = await asyncio.to_thread(_base_executable)
    process = await asyncio.create_subprocess_exec(
        executable, *PYTHON_FLAGS, "-c", _LIST_LIBRARIES,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
        env={}, cwd="/",
    )  # fmt: skip
    try:
        async with asyncio.timeout(_FIND_S):
            output, _ = await process.communicate()
    except TimeoutError as exc:
        raise SandboxError(f"{executable} did not say which libraries it loads") from exc
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        raise SandboxError(f"{executable} cannot list its own modules")
    return await asyncio.to_thread(described, executable, output.decode())


def described(executable: str, listing: str) -> Interpreter:
    """The interpreter whose program answered `listing`: two folders of modules, then the libraries."""
    lines = [Path(line).resolve() for line in listing.splitlines() if line]
    standard = {str(path) for path in lines[:2] if path.is_dir()}
    folders = {str(path.parent) for path in lines[2:]}
    links, loaders = _loader_paths()
    readable = _without_nested({executable, *standard, *folders, *loaders})
    outside = sorted(folder for folder in folders if not any(_is_below(folder, path) for path in standard))
    return Interpreter(
        executable=executable,
        readable=readable,
        links=links,
        library_path=":".join(outside),
        helper=marshal.dumps([(module.__name__, _code(module)) for module in _HELPER]),
    )


def _code(module: ModuleType) -> CodeType | None:
    loader = module.__spec__.loader if module.__spec__ else None
    if not isinstance(loader, InspectLoader):
        raise SandboxError(f"{module.__name__} cannot be handed to the helper")
    return loader.get_code(module.__name__)


def _base_executable() -> str:
    return str(Path(getattr(sys, "_base_executable", None) or sys.executable).resolve())


def _loader_paths() -> tuple[tuple[tuple[str, str], ...], set[str]]:
    """How a program's PT_INTERP, /lib64/ld-linux-x86-64.so.2 say, is reached."""
    links: list[tuple[str, str]] = []
    folders: set[str] = set()
    for name in ("/lib", "/lib64", "/usr/lib64"):
        path = Path(name)
        if path.is_symlink():
            links.append((name, str(path.readlink())))
        elif name != "/lib" and path.is_dir():
            folders.add(name)
    return tuple(links), folders


def _is_below(path: str, parent: str) -> bool:
    return path == parent or path.startswith(parent.rstrip("/") + "/")


def _without_nested(paths: set[str]) -> tuple[str, ...]:
    return tuple(sorted(p for p in paths if not any(other != p and _is_below(p, other) for other in paths)))
