"""Ports of loopback that stay a test's own, also while nobody listens on them."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager


def holder() -> socket.socket:
    """A socket that has a free port: until it is closed nobody is given that port unasked.

    Who names it may listen there again and again: beside a bound socket that does not listen another may
    be bound if both reuse addresses, as the listeners of asyncio, of the server and of nats-server do.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    return held


@contextmanager
def held_port() -> Iterator[int]:
    """A port that nobody else is given as long as the body runs."""
    with holder() as held:
        port: int = held.getsockname()[1]
        yield port
