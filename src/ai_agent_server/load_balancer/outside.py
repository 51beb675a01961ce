"""What other programs take of a device's memory, from what is free of it. Pure.

Seen is only the whole: what is neither free nor booked is others'. It is followed up at once, since a load
into memory that somebody has fails, and down only after it stayed down: a game between two levels must not
have a model loaded that is thrown out again.
"""

import msgspec

NOISE = 0.01
"""Of the memory: what differs by less is the same."""
LEAST_NOISE_MB = 64.0
CALM = 3
"""Looks in a row that have to say that less is taken."""


class Outside(msgspec.Struct, frozen=True, kw_only=True):
    """What others take as the ledger is told it, and what it rests on."""

    mb: float = 0.0
    held_mb: float | None = None
    """What was booked at the last look: once that changes, what was seen before says nothing."""
    seen_mb: tuple[float, ...] = ()
    """The last looks, oldest first."""


def looked(before: Outside, *, memory_mb: float, held_mb: float, free_mb: float) -> Outside:
    """After a look at the device: `free_mb` is free of it while `held_mb` of the accelerator's `memory_mb`
    are booked.

    Of a device with more memory than the accelerator may use (RAM, say) others take nothing until less is
    free than ours may still want.
    """
    taken_mb = max(0.0, memory_mb - held_mb - free_mb)
    noise_mb = max(LEAST_NOISE_MB, NOISE * memory_mb)
    same = before.held_mb is not None and abs(held_mb - before.held_mb) <= noise_mb
    seen_mb = (*before.seen_mb, taken_mb)[-CALM:] if same else (taken_mb,)
    told_mb = before.mb
    if taken_mb > told_mb + noise_mb:
        told_mb = taken_mb
    elif max(seen_mb) < told_mb - noise_mb and (len(seen_mb) == CALM or not same):
        told_mb = max(seen_mb)
    return Outside(mb=told_mb, held_mb=held_mb, seen_mb=seen_mb)
