"""`llms`: the configured LLMs of a running server, their switches, and why one would be chosen."""

import asyncio
from collections.abc import Sequence
from typing import Annotated

from cyclopts import App, Parameter
from msgspec import UNSET
from rich.table import Table
from rich.text import Text

from ai_agent_server.cli import Exit, view
from ai_agent_server.cli.options import AsJSON, ServerURL, connect, console, print_json
from ai_agent_server.core.api_schemas import ExplainDraft, LLMCard
from ai_agent_server.core.chat import Capability, Decision, Privacy, Tier
from ai_agent_server.errors import InvalidPacketError
from ai_agent_server.load_balancer.base import AcceleratorView

__all__ = ("llms",)

llms = App(name="llms", help="List LLMs; switch one on or off; explain a choice.")


@llms.default
def list_llms(
    *,
    why: Annotated[bool, Parameter(negative=())] = False,
    server: ServerURL = None,
    as_json: AsJSON = False,
) -> int:
    """List the configured LLMs as they stand now.

    Parameters
    ----------
    why
        Also which of them a request without wishes would get and by which rules, and what each
        accelerator's queue decided last.
    """

    async def talk() -> tuple[tuple[LLMCard, ...], Decision | None, tuple[AcceleratorView, ...]]:
        async with connect(server) as client:
            if not why:
                return await client.llms(), None, ()
            return await client.llms(), await client.explain(ExplainDraft()), await client.accelerators()

    cards, decision, accelerators = asyncio.run(talk())
    if as_json:
        more = {} if decision is None else {"decision": decision, "accelerators": accelerators}
        print_json({"items": cards, **more})
        return Exit.OK
    console().print(_table(cards), soft_wrap=True)
    if decision is not None:
        shown = (view.decision(decision), *map(view.accelerator, accelerators))
        for each in shown:
            console().print("", each, sep="\n", soft_wrap=True)
    return Exit.OK


@llms.command(name="on")
def switch_on(name: str, /, *, server: ServerURL = None, as_json: AsJSON = False) -> int:
    """Switch an LLM on; kept over a restart."""
    return _switch(name, True, server, as_json)


@llms.command(name="off")
def switch_off(name: str, /, *, server: ServerURL = None, as_json: AsJSON = False) -> int:
    """Switch an LLM off; what it does now it finishes. Kept over a restart."""
    return _switch(name, False, server, as_json)


@llms.command
def explain(
    to: Annotated[str | None, Parameter(name="PROFILE/ROLE", help="As this role would ask.")] = None,
    /,
    *,
    llm: Annotated[str | None, Parameter(help="Exactly this LLM.")] = None,
    tier: Tier | None = None,
    prefer: Annotated[
        tuple[str, ...], Parameter(negative=(), show_default=False, help="LLMs to prefer, best first.")
    ] = (),
    privacy: Annotated[Privacy, Parameter(help="local: nothing may leave this machine.")] = "any",
    needs: Annotated[
        tuple[Capability, ...], Parameter(negative=(), show_default=False, help="What it must be able to do.")
    ] = (),
    input_tokens: int = 0,
    output_tokens: int | None = None,
    max_cost_usd: float | None = None,
    server: ServerURL = None,
    as_json: AsJSON = False,
) -> int:
    """Say which LLM would serve such a request, and why. No LLM is called."""
    profile, slash, role = (to or "").partition("/")
    if to is not None and not (profile and slash and role):
        raise InvalidPacketError(f"{to!r} is not PROFILE/ROLE")
    wanted = ExplainDraft(
        profile=profile or None,
        role=role or None,
        llm=llm or UNSET,
        tier=tier or UNSET,
        prefer=prefer or UNSET,
        privacy=privacy,
        needs=needs or UNSET,
        input_tokens=input_tokens,
        output_tokens=UNSET if output_tokens is None else output_tokens,
        max_cost_usd=max_cost_usd,
    )

    async def talk() -> Decision:
        async with connect(server) as client:
            return await client.explain(wanted)

    found = asyncio.run(talk())
    if as_json:
        print_json(found)
    else:
        console().print(view.decision(found), soft_wrap=True)
    return Exit.OK if found.chosen is not None else Exit.FAILED


def _switch(name: str, on: bool, server: str | None, as_json: bool) -> int:
    async def talk() -> LLMCard:
        async with connect(server) as client:
            return await client.set_toggle(name, on)

    card = asyncio.run(talk())
    if as_json:
        print_json(card)
    else:
        console().print(f"{card.name} is {'on' if card.toggle else 'off'}", soft_wrap=True)
        if card.toggle and card.has_key is False:
            console().print(
                "warning: the API key that its configuration names is not set where the server runs",
                style="yellow",
                soft_wrap=True,
            )
    return Exit.OK


def _table(cards: Sequence[LLMCard]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("llm", "on", "model", "tier", "busy", "circuit", "in memory", "tokens/s"):
        table.add_column(column, overflow="fold", no_wrap=column not in {"model", "llm"})
    for card in cards:
        resident = {True: "yes", False: "no", None: "?"}[card.resident]
        speed = "" if card.tokens_per_s is None else f"{card.tokens_per_s:.0f}"
        table.add_row(
            Text(card.name),
            Text("on", style="green") if card.toggle else Text("off", style="dim"),
            Text(f"{card.model or '?'} on {card.engine or card.source}, {card.context_tokens} tokens"),
            card.tier + (" locked" if card.locked else ""),
            f"{card.in_flight}/{card.slots}",
            Text(card.circuit, style="" if card.circuit == "closed" else "red"),
            resident,
            speed,
        )
    return table
