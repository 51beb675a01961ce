"""The memory gauge port: how much of a device's memory is free, whoever took the rest."""

from typing import Protocol

import msgspec


class Gauged(msgspec.Struct, frozen=True, kw_only=True):
    """A device as it was looked at, in megabytes (2**20 bytes)."""

    device: str
    """What it is called: `NVIDIA GeForce RTX 5060 Ti`, `RAM`."""
    total_mb: float
    free_mb: float


class MemoryGauge(Protocol):
    """One device. A gauge class is `Gauge(where)`: what stands behind the colon of `device`, or nothing;
    `ValueError` where that names none.

    Not for several threads at the same time.
    """

    def read(self) -> Gauged | None:
        """The device now; None where it cannot be told. Takes milliseconds: call it in a thread."""
        ...

    def close(self) -> None:
        """Let go of the device; reading opens it again."""
        ...
