"""Discovery: a file's place is its name. `llm_engines/local/ollama_engine.py` is `local.ollama`.

The single name in a module's `__all__` is its class. Nothing is registered anywhere: a new file is
found because it is there, and the conformance suites are parametrised by what is found.
"""

import importlib
import pkgutil
from types import ModuleType
from typing import Any

from ai_agent_server.errors import ConfigurationError

__all__ = ("implementation", "kinds")

SUFFIXES = ("_engine", "_agent", "_strategy")


def kinds(package: ModuleType) -> dict[str, str]:
    """Every kind below `package` -> the module that holds it. Nothing is imported."""
    found: dict[str, str] = {}
    prefix = package.__name__ + "."
    for info in pkgutil.walk_packages(package.__path__, prefix):
        leaf = info.name.rsplit(".", 1)[-1]
        if info.ispkg or leaf == "base" or leaf.startswith("_"):
            continue
        kind = info.name.removeprefix(prefix)
        for suffix in SUFFIXES:
            kind = kind.removesuffix(suffix)
        found[kind] = info.name
    return found


def implementation(package: ModuleType, kind: str, *, pointer: str = "") -> type[Any]:
    """The class of `kind` below `package`. Raises `ConfigurationError` with the kinds there are."""
    there = kinds(package)
    if kind not in there:
        raise ConfigurationError(f"unknown kind {kind!r}", pointer=pointer, choices=tuple(sorted(there)))
    module = importlib.import_module(there[kind])
    (name,) = module.__all__
    found: type[Any] = getattr(module, name)
    return found
