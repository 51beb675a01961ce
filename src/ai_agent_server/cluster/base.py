"""The lease port: which server may run a task, where several share the tasks."""

from collections.abc import Mapping
from typing import Protocol

import msgspec


class Peers(msgspec.Struct, frozen=True, kw_only=True):
    """The servers that share the tasks, as this one sees them."""

    holder: str
    others: Mapping[str, float] = {}
    """Holder -> for how many seconds nothing was heard from it."""
    connected: bool = True


class Leases(Protocol):
    """Says whether a task is free to be taken.

    The lease itself is in the task: the generation and the holder of its last `Started` or `Recovered`,
    written by compare-and-set like every event. It is renewed by its holder's being alive, and lost by
    a higher generation; whoever writes after that is refused by the store, since a generation never
    changes without the revision. Promises, tested on every implementation by
    tests/conformance/test_leases.py: what nobody holds is free; what a live holder has is not; what a
    holder had that has gone, or fell silent, becomes free, and not before.
    """

    @property
    def holder(self) -> str:
        """The name under which this process takes tasks, never used by another; "" where it is alone."""
        ...

    def may_take(self, holder: str) -> bool:
        """Whether a task that `holder` has may be run here: it is nobody's, ours, or its holder is gone."""
        ...

    def peers(self) -> Peers:
        """Who else is there."""
        ...

    async def aclose(self) -> None:
        """Say goodbye: what this process holds is free at once."""
        ...
