"""Leases of a server that shares its tasks with nobody: the state folder's lock has settled it."""

from ai_agent_server.cluster.base import Peers

__all__ = ("Alone",)


class Alone:
    """Everything is this server's own."""

    holder = ""

    def may_take(self, holder: str) -> bool:  # noqa: ARG002  (the port's name)
        """Always: also what a server of a cluster held, whose state folder this is now."""
        return True

    def peers(self) -> Peers:
        """Nobody."""
        return Peers(holder="")

    async def aclose(self) -> None:
        """Nobody waits for it."""
