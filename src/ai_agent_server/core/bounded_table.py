"""Tables by names that others choose: past a bound all new names are one."""

from collections.abc import Callable
from typing import Final, TypeVar

__all__ = ("OTHER", "entry")

OTHER: Final = "other"

K = TypeVar("K")
V = TypeVar("V")


def entry(table: dict[K, V], key: K, new: Callable[[], V], *, most: int, other: K) -> V:
    """The entry of `key`, made where there is none; that of `other` once the table has `most`."""
    found = table.get(key)
    if found is None:
        found = table.setdefault(key if len(table) < most else other, new())
    return found
