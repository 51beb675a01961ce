"""RAM, as Linux tells it in /proc/meminfo."""

import re
from pathlib import Path

from ai_agent_server.memory_gauges.base import Gauged

__all__ = ("RAMGauge",)

_KILOBYTES = re.compile(r"^(MemTotal|MemAvailable): +(\d+) kB$", re.MULTILINE)


class RAMGauge:
    """What programs may still take without swapping: the page cache counts as free."""

    def __init__(self, where: str = "", *, meminfo: Path = Path("/proc/meminfo")) -> None:
        """Raises `ValueError` where `where` says anything: there is one RAM."""
        if where:
            raise ValueError("there is one RAM: it is `ram` alone")
        self._meminfo = meminfo

    def read(self) -> Gauged | None:
        """RAM now; None on a system that has no /proc/meminfo."""
        try:
            kilobytes = dict(_KILOBYTES.findall(self._meminfo.read_text("ascii")))
            return Gauged(
                device="RAM",
                total_mb=int(kilobytes["MemTotal"]) / 1024,
                free_mb=int(kilobytes["MemAvailable"]) / 1024,
            )
        except (OSError, ValueError, KeyError):
            return None

    def close(self) -> None:
        """Nothing is held."""
