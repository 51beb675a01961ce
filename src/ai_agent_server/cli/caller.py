"""How the person called the command line, for commands that he can copy."""

import shlex

import msgspec

__all__ = ("Caller",)


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """The program as it was called, and the server that was named with --server."""

    program: tuple[str, ...] = ("ai-agent-server",)
    server: str | None = None

    def command(self, *words: str, asks_server: bool = True) -> str:
        """The command line of `words`, quoted for a shell."""
        named = ("--server", self.server) if self.server and asks_server else ()
        return shlex.join((*self.program, *words, *named))
