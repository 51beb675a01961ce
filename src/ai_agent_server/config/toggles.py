"""Which LLMs were switched on or off at run time: a small file in the state folder, kept over a restart."""

import asyncio
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import structlog

from ai_agent_server.durable import translated, write_whole
from ai_agent_server.errors import StoreError

log = structlog.get_logger(__name__)


class Switch(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An LLM as it was switched, and what the configuration said when it was."""

    on: bool
    over: bool


Switches = dict[str, Switch]


class Toggles:
    """The switches. One holds until its LLM's toggle in the configuration is changed: then that wins.

    The file is read once, here; it blocks. One that cannot be read counts as none.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # Held by threads: a write goes on when who asked for it is cancelled.
        self._writing = threading.Lock()
        self._switches = self._read()

    def over(self, configured: Mapping[str, bool]) -> dict[str, bool]:
        """LLM name -> on or off, for those of `configured` (name -> toggle) that are switched."""
        return {
            name: switch.on
            for name, switch in self._switches.items()
            if name in configured and configured[name] == switch.over
        }

    async def keep(self, name: str, on: bool, over: bool) -> None:
        """Write down that `name`, configured as `over`, was switched.

        Raises `StoreFullError` or `StoreUnusableError`; the switches are as they were then.
        """
        switch = Switch(on=on, over=over)
        await asyncio.to_thread(self._change, lambda switches: {**switches, name: switch})

    async def forget(self, configured: Mapping[str, bool]) -> None:
        """Forget what the configuration has overruled, so that it stays so when it changes back."""
        try:
            await asyncio.to_thread(
                self._change,
                lambda switches: {
                    name: switch
                    for name, switch in switches.items()
                    if configured.get(name, switch.over) == switch.over
                },
            )
        except StoreError as exc:
            log.warning("toggles.not_forgotten", problem=str(exc))

    def _change(self, change: Callable[[Switches], Switches]) -> None:
        with self._writing:
            switches = change(self._switches)
            if switches == self._switches:
                return
            with translated(self._path):
                write_whole(self._path, msgspec.json.encode(switches))
            self._switches = switches

    def _read(self) -> Switches:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=Switches)
        except FileNotFoundError:
            pass
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as exc:
            log.warning("toggles.unreadable", path=str(self._path), problem=str(exc))
        return {}
