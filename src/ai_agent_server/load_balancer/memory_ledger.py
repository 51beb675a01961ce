"""The memory of one accelerator: what each model takes, what is taken, what is left. Pure.

A footprint is believed in this order: as measured, as declared, as estimated from the file. A model of
which nothing is known takes the whole budget until it was measured: it runs alone the first time.
"""

from collections.abc import Iterable
from typing import Literal

import msgspec

Basis = Literal["measured", "declared", "estimated", "unknown"]

RUNTIME_MB = 300.0
"""Of an estimate: what an engine's process takes beside weights and context (CUDA's own is about this)."""
KV_SHARE = 0.15
"""Of an estimate: context and compute buffers, as a share of the weights, for each 4096 tokens."""


class Footprint(msgspec.Struct, frozen=True, kw_only=True):
    """What a model takes of the accelerator, in megabytes (2**20 bytes)."""

    llm: str
    engine: str = ""
    declared_mb: float | None = None
    estimated_mb: float | None = None
    measured_mb: float | None = None
    """The most that was seen while it was last in memory."""

    @property
    def basis(self) -> Basis:
        """What `mb` rests on."""
        if self.measured_mb is not None:
            return "measured"
        if self.declared_mb is not None:
            return "declared"
        return "unknown" if self.estimated_mb is None else "estimated"

    @property
    def mb(self) -> float | None:
        """The best that is known; None where nothing is."""
        if self.measured_mb is not None:
            return self.measured_mb
        return self.estimated_mb if self.declared_mb is None else self.declared_mb


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """Memory that is taken, from the order to load until the unload is confirmed."""

    mb: float
    predicted_mb: float
    """What it was taken for."""
    measured: bool = False


class MemoryLedger(msgspec.Struct, frozen=True, kw_only=True):
    """The books of one accelerator. Each change gives another ledger."""

    memory_mb: float
    headroom_mb: float = 0.0
    external_mb: float = 0.0
    """What other programs take of it."""
    footprints: dict[str, Footprint] = {}
    held: dict[str, Held] = {}

    @property
    def budget_mb(self) -> float:
        """What our models may take together."""
        return max(0.0, self.memory_mb - self.headroom_mb - self.external_mb)

    @property
    def used_mb(self) -> float:
        """What our models take."""
        return sum(held.mb for held in self.held.values())

    @property
    def free_mb(self) -> float:
        """What is left; below 0 while a measurement, or another program, has outrun the books."""
        return self.budget_mb - self.used_mb

    def need_mb(self, llm: str) -> float:
        """What `llm` takes, or would."""
        if llm in self.held:
            return self.held[llm].mb
        footprint, whole_mb = self.footprints[llm], max(self.budget_mb, 1.0)
        if footprint.mb is None:
            return whole_mb
        match footprint.basis:
            case "estimated":
                return min(footprint.mb, whole_mb)
            case "measured":
                return self._booked_mb(footprint.mb)
            case _:
                return footprint.mb

    def fits(self, llm: str, *, freed: Iterable[str] = ()) -> bool:
        """Whether `llm` can be loaded now, or once `freed` are gone."""
        given_back_mb = sum(self.held[name].mb for name in freed if name in self.held)
        return self.need_mb(llm) <= self.free_mb + given_back_mb

    def can_fit(self, llm: str) -> bool:
        """Whether `llm` fits an accelerator that nobody else uses. An estimate rules nothing out."""
        footprint = self.footprints[llm]
        if footprint.mb is None or footprint.basis == "estimated":
            return True
        mb = self._booked_mb(footprint.mb) if footprint.basis == "measured" else footprint.mb
        return mb <= self.memory_mb - self.headroom_mb

    def hold(self, llm: str) -> "MemoryLedger":
        """`llm` is being loaded, or was found loaded."""
        if llm in self.held:
            return self
        need_mb = self.need_mb(llm)
        return self._with_held({**self.held, llm: Held(mb=need_mb, predicted_mb=need_mb)})

    def release(self, llm: str) -> "MemoryLedger":
        """`llm` is out of memory, for certain."""
        return self._with_held({name: held for name, held in self.held.items() if name != llm})

    def measured(self, llm: str, memory_mb: float) -> "MemoryLedger":
        """`llm` was seen to take `memory_mb`.

        The first look replaces what was thought; later ones only raise it, since a context's memory
        is touched as it fills and what was once touched may be touched again.
        """
        held = self.held.get(llm)
        if held is None:
            return self
        footprint = self.footprints[llm]
        most_mb = max(memory_mb, footprint.measured_mb or held.mb) if held.measured else memory_mb
        footprint = msgspec.structs.replace(footprint, measured_mb=most_mb)
        return msgspec.structs.replace(
            self,
            footprints={**self.footprints, llm: footprint},
            held={
                **self.held,
                llm: msgspec.structs.replace(held, mb=self._booked_mb(most_mb), measured=True),
            },
        )

    def estimated(self, llm: str, memory_mb: float) -> "MemoryLedger":
        """Of its file, `llm` looks as if it took `memory_mb`."""
        footprint = msgspec.structs.replace(self.footprints[llm], estimated_mb=memory_mb)
        return msgspec.structs.replace(self, footprints={**self.footprints, llm: footprint})

    def configured(
        self, footprints: dict[str, Footprint], *, anew: Iterable[str] = (), going: Iterable[str] = ()
    ) -> "MemoryLedger":
        """These are the models now, beside those that are still `going`.

        What was found out stays, but not of those that changed: `anew`.
        """
        kept = {
            llm: msgspec.structs.replace(
                footprint,
                estimated_mb=self.footprints[llm].estimated_mb,
                measured_mb=self.footprints[llm].measured_mb,
            )
            if llm in self.footprints and llm not in set(anew)
            else footprint
            for llm, footprint in footprints.items()
        }
        return msgspec.structs.replace(
            self, footprints={**{llm: self.footprints[llm] for llm in going}, **kept}
        )

    def external(self, memory_mb: float) -> "MemoryLedger":
        """Other programs take `memory_mb`."""
        return msgspec.structs.replace(self, external_mb=max(0.0, memory_mb))

    def _booked_mb(self, measured_mb: float) -> float:
        """What a measurement is booked as. One that reaches into the headroom is all that is ours: the model
        was there and ran, and to refuse it from then on would be to refuse it for ever."""
        if measured_mb > self.memory_mb:
            return measured_mb
        return min(measured_mb, self.memory_mb - self.headroom_mb)

    def _with_held(self, held: dict[str, Held]) -> "MemoryLedger":
        return msgspec.structs.replace(self, held=held)


def estimate_mb(file_bytes: int, *, context_tokens: int, slots: int) -> float:
    """What a model of a GGUF file of this size takes: weights, context, buffers. Rough until measured."""
    weights_mb = file_bytes / 2**20
    return weights_mb * (1 + KV_SHARE * context_tokens * slots / 4096) + RUNTIME_MB
