"""An NVIDIA card, through NVML: the driver's own library, by the binding that NVIDIA publishes."""

import importlib
from contextlib import suppress
from typing import Any, Protocol, cast

from ai_agent_server.memory_gauges.base import Gauged

__all__ = ("NvidiaGauge",)

MB = 2**20


class _Memory(Protocol):
    total: int
    free: int


class NVML(Protocol):
    """What is used of the module `pynvml` of nvidia-ml-py. Handles are the library's own."""

    NVMLError: type[Exception]

    def nvmlInit(self) -> None: ...  # noqa: N802 - theirs
    def nvmlShutdown(self) -> None: ...  # noqa: N802
    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any: ...  # noqa: N802
    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Any: ...  # noqa: N802
    def nvmlDeviceGetName(self, handle: Any) -> str | bytes: ...  # noqa: N802
    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> _Memory: ...  # noqa: N802


class NvidiaGauge:
    """The card of an index, as nvidia-smi counts them, or of a UUID (`GPU-...`)."""

    def __init__(self, where: str = "0", *, library: NVML | None = None) -> None:
        """`library` is by default looked for at the first reading: it is an optional dependency.

        Raises `ValueError` where `where` is neither an index nor a UUID.
        """
        if where and not where.isdecimal() and not where.startswith("GPU-"):
            raise ValueError("a card is named by its index or its UUID: `nvidia:0`, `nvidia:GPU-...`")
        self._where, self._library = where or "0", library
        self._handle: Any = None
        self._name = ""

    def read(self) -> Gauged | None:
        """The card now; None without the binding, the driver or the card."""
        library = self._library = self._library or binding()
        if library is None:
            return None
        try:
            if self._handle is None:
                self._open(library)
            memory = library.nvmlDeviceGetMemoryInfo(self._handle)
        except library.NVMLError:
            # A driver that was renewed, or a card that woke, is another one: opened anew at the next reading.
            self.close()
            return None
        return Gauged(device=self._name, total_mb=memory.total / MB, free_mb=memory.free / MB)

    def close(self) -> None:
        """Let go of the driver's library."""
        library, self._handle = self._library, None
        if library is not None:
            with suppress(library.NVMLError):
                library.nvmlShutdown()

    def _open(self, library: NVML) -> None:
        library.nvmlInit()
        by_index = self._where.isdecimal()
        handle = (
            library.nvmlDeviceGetHandleByIndex(int(self._where))
            if by_index
            else library.nvmlDeviceGetHandleByUUID(self._where)
        )
        name = library.nvmlDeviceGetName(handle)
        self._name = name.decode("utf-8", "replace") if isinstance(name, bytes) else name
        self._handle = handle


def binding() -> NVML | None:
    """nvidia-ml-py, None where it is not installed."""
    try:
        return cast("NVML", importlib.import_module("pynvml"))
    except ImportError:
        return None
