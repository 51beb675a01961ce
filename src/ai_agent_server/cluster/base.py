"""The lease port: which server may run a task, where several share the tasks."""

from collections.abc import Mapping, Sequence
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


def server_of(holder: str) -> str:
    """The server's id in `holder`, which is `<server>.<process>`; "" where nobody holds."""
    return holder.rpartition(".")[0]


class Left(msgspec.Struct, frozen=True, kw_only=True):
    """What a server that is gone had on its shelf. `place` is what `Shelf.replace` knows it by."""

    holder: str
    content: bytes
    place: int


class Shelf(Protocol):
    """A document of each server's own, which the others find when it is gone.

    What is put is safe when it returns. Every method may raise a `StoreError` child. Tested on every
    implementation by tests/conformance/test_shelf.py.
    """

    async def read(self) -> bytes | None:
        """What this server put last, or whoever took its place; None at first."""
        ...

    async def put(self, content: bytes) -> None:
        """Keep `content` in the place of what was there."""
        ...

    def is_own(self, holder: str) -> bool:
        """Whether what `holder` had was had by this server."""
        ...

    async def left(self) -> Sequence[Left]:
        """What servers that are gone left, and nobody replaced."""
        ...

    async def replace(self, left: Left, content: bytes) -> bool:
        """Put `content` in its place, for the server to read if it comes back; False: somebody was first."""
        ...
