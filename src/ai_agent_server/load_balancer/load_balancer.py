"""The choice of an LLM: numbered rules refuse, a strategy ranks the rest, every candidate is explained. Pure.

The rules are told in plain language in config/load_balancer_rules.md; a test holds the two together.
"""

from collections.abc import Callable, Mapping, Sequence

import msgspec

from ai_agent_server.core.chat import Candidate, Decision
from ai_agent_server.load_balancer.base import BalancingStrategy, LLMView, Requirements
from ai_agent_server.load_balancer.estimate import answer_room, cost_usd, load_s, queue_s


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """A request as the rules see it: what it requires, and the LLM it is assigned to."""

    wanted: Requirements
    assigned: LLMView | None = None
    """The LLM that `wanted.llm` names, None where there is none of that name."""
    assigned_serves: bool = False
    """Whether no rule refuses the assigned LLM."""
    spill_after_s: float | None = None
    """What waits longer than this here an API serves; None where none may."""


class Rule(msgspec.Struct, frozen=True):
    """A filter. `refuse` says why an LLM may not serve, or None."""

    number: int
    name: str
    refuse: Callable[[LLMView, Asked], str | None]
    temporary: bool = False
    """What this rule refuses may be allowed a little later: a request can wait for it."""

    @property
    def label(self) -> str:
        """`LB-3 privacy`."""
        return f"LB-{self.number} {self.name}"


def decide(
    wanted: Requirements,
    views: tuple[LLMView, ...],
    strategy: BalancingStrategy,
    *,
    strategy_name: str,
    spill_after_s: float | None = None,
) -> Decision:
    """Which LLM serves, and why; candidates best first, then the refused in the order given.

    What would wait longer than `spill_after_s` on this machine goes to an API that may serve it. A strategy
    only orders: an LLM that a rule refused cannot be chosen, whatever a strategy answers.
    """
    asked = _asked(wanted, views, spill_after_s)
    allowed: dict[str, LLMView] = {}
    refused: list[Candidate] = []
    for view in views:
        verdict = _judge(view, asked)
        if verdict is None:
            allowed[view.name] = view
        else:
            refused.append(verdict)
    ranked = _ranked(strategy, wanted, allowed)
    return Decision(
        chosen=ranked[0].llm if ranked else None,
        reason=_reason(asked, ranked, refused, allowed),
        strategy=strategy_name,
        candidates=(*ranked, *refused),
    )


def may_wait_for(decision: Decision) -> frozenset[str]:
    """The LLMs that only a temporary rule refused."""
    return frozenset(candidate.llm for candidate in decision.candidates if candidate.refused_by in TEMPORARY)


def refusals(decision: Decision) -> dict[str, str]:
    """Each refused LLM -> the rule and why."""
    return {
        candidate.llm: f"{candidate.refused_by}: {candidate.why}"
        for candidate in decision.candidates
        if candidate.refused_by is not None
    }


def _asked(wanted: Requirements, views: tuple[LLMView, ...], spill_after_s: float | None) -> Asked:
    assigned = next((view for view in views if view.name == wanted.llm), None)
    asked = Asked(wanted=wanted, assigned=assigned)
    if spill_after_s is not None and _may_spill(asked, views):
        asked = msgspec.structs.replace(asked, spill_after_s=spill_after_s)
    if assigned is None:
        return asked
    return msgspec.structs.replace(asked, assigned_serves=_judge(assigned, asked) is None)


def _may_spill(asked: Asked, views: tuple[LLMView, ...]) -> bool:
    """Whether an API would serve if nobody on this machine did. Background has time, and an index holds the
    vectors of one model."""
    wanted = asked.wanted
    if wanted.urgency == "background" or "embeddings" in wanted.needs:
        return False
    return any(view.source == "api" and _judge(view, asked) is None for view in views)


def _judge(view: LLMView, asked: Asked) -> Candidate | None:
    """The first rule that refuses, None when all let the LLM through."""
    for rule in RULES:
        why = rule.refuse(view, asked)
        if why is not None:
            return Candidate(llm=view.name, refused_by=rule.label, why=why)
    return None


def _ranked(
    strategy: BalancingStrategy, wanted: Requirements, allowed: Mapping[str, LLMView]
) -> list[Candidate]:
    """Every allowed one, once, whatever the strategy answers."""
    ranked: dict[str, Candidate] = {}
    if allowed:
        for scored in strategy.rank(wanted, tuple(allowed.values())):
            if scored.llm in allowed and scored.llm not in ranked:
                ranked[scored.llm] = Candidate(llm=scored.llm, score=scored.score, parts=scored.parts)
    for name in allowed:
        if name not in ranked:
            ranked[name] = Candidate(llm=name, why="the strategy did not rank it")
    return list(ranked.values())


def _reason(
    asked: Asked,
    ranked: Sequence[Candidate],
    refused: Sequence[Candidate],
    allowed: Mapping[str, LLMView],
) -> str:
    if not ranked:
        each = "; ".join(f"{candidate.llm}: {candidate.refused_by}" for candidate in refused)
        return f"no LLM may serve ({each or 'none is configured'})"
    best = ranked[0]
    why = _why_chosen(asked, best, ranked)
    facts = _facts(allowed[best.llm], asked.wanted)
    after = ", ".join(sorted(asked.wanted.exclude))
    return f"{best.llm}: {why}{facts}" + (f"; after {after}" if after else "")


def _why_chosen(asked: Asked, best: Candidate, ranked: Sequence[Candidate]) -> str:
    if best.llm == asked.wanted.llm:
        return "asked for by name"
    if asked.wanted.llm is not None:
        return f"stands in for {asked.wanted.llm}"
    if len(ranked) == 1:
        return "the only one that may serve"
    following = ranked[1]
    if best.score is None or following.score is None:
        return f"first of {len(ranked)}"
    worse = {name: value - best.parts.get(name, 0.0) for name, value in following.parts.items()}
    gap = max(worse, key=lambda name: worse[name], default="")
    if not gap or worse[gap] <= 0:
        return f"first of {len(ranked)} that are alike"
    return f"best of {len(ranked)}; ahead of {following.llm} by {gap}"


def _facts(view: LLMView, wanted: Requirements) -> str:
    facts: list[str] = [view.source]
    if wanted.tier is not None:
        facts.append(f"tier {view.tier}")
    if view.resident is not None:
        facts.append("in memory" if view.resident else "to be loaded")
    if view.source == "local" and view.in_flight:
        facts.append(f"{view.in_flight} of {view.slots} slots busy")
    if view.circuit == "half_open":
        facts.append("as a probe")
    return f" ({', '.join(facts)})"


def _toggle(view: LLMView, _: Asked) -> str | None:
    return None if view.toggle else "it is switched off"


def _lock(view: LLMView, asked: Asked) -> str | None:
    assigned = asked.assigned
    if assigned is None or not assigned.locked or view.name == assigned.name:
        return None
    return f"the request is assigned to {assigned.name}, which is locked: it is never moved"


def _privacy(view: LLMView, asked: Asked) -> str | None:
    if asked.wanted.privacy == "local" and view.source != "local":
        return "the request may not leave this machine"
    return None


def _allowed(view: LLMView, asked: Asked) -> str | None:
    if asked.wanted.allowed and view.name not in asked.wanted.allowed:
        return "whoever asks may not use it"
    return None


def _assignment(view: LLMView, asked: Asked) -> str | None:
    name, assigned = asked.wanted.llm, asked.assigned
    if name is None or view.name == name:
        return None
    if assigned is None:
        # The name may have been a locked one's before a reload: to guess another could give data away.
        return f"the request is assigned to {name!r}, which is not configured"
    if asked.assigned_serves:
        return f"the request is assigned to {name}, which can serve"
    if "embeddings" in asked.wanted.needs:
        # An index that holds vectors of two models finds nothing, and nobody is told.
        return f"its vectors cannot be compared with those of {name}"
    if view.tier != assigned.tier:
        return f"only another of tier {assigned.tier} may stand in for {name}"
    return None


def _capability(view: LLMView, asked: Asked) -> str | None:
    missing = sorted(asked.wanted.needs - view.capabilities)
    return f"it cannot do {', '.join(missing)}" if missing else None


def _context(view: LLMView, asked: Asked) -> str | None:
    # A long max_tokens alone refuses nobody: clients ask for 32000 by habit, and an answer that meets
    # the end of the context says so by its finish_reason.
    wanted = asked.wanted
    counted = wanted.counted.get(view.name)
    prompt = wanted.input_tokens if counted is None else counted
    needed = prompt + answer_room(wanted)
    if needed > view.context_tokens:
        about = "about " if counted is None else ""
        return f"{about}{needed} tokens do not fit its context of {view.context_tokens}"
    return None


def _budget(view: LLMView, asked: Asked) -> str | None:
    wanted = asked.wanted
    if wanted.max_cost_usd is None:
        return None
    cost = cost_usd(view, wanted.input_tokens, wanted.output_tokens)
    if cost > wanted.max_cost_usd:
        return f"up to ${cost:.4f} is more than the ${wanted.max_cost_usd:.4f} that is left"
    return None


def _spill(view: LLMView, asked: Asked) -> str | None:
    bound_s = asked.spill_after_s
    if bound_s is None or view.source == "api":
        return None
    if asked.wanted.overdue:
        return f"the request has waited its {bound_s:g} s on this machine; an API serves it"
    wait_s = queue_s(view, asked.wanted.output_tokens) + load_s(view)
    if wait_s > bound_s:
        return f"a wait of about {wait_s:.0f} s; after {bound_s:g} s an API serves"
    return None


def _tried(view: LLMView, asked: Asked) -> str | None:
    if view.name in asked.wanted.exclude:
        return "it failed this request, or had no free slot for all of the wait"
    return None


def _circuit(view: LLMView, _: Asked) -> str | None:
    if view.circuit == "open":
        return f"it failed too often; left alone for another {view.cooldown_s:.1f} s"
    if view.circuit == "half_open" and view.probing:
        return "it failed too often; one request is trying it now"
    return None


RULES: tuple[Rule, ...] = (
    Rule(1, "toggle", _toggle),
    Rule(2, "lock", _lock),
    Rule(3, "privacy", _privacy),
    Rule(10, "allowed", _allowed),
    Rule(4, "assignment", _assignment),
    Rule(5, "capability", _capability),
    Rule(6, "context", _context),
    Rule(7, "budget", _budget),
    Rule(8, "tried", _tried),
    Rule(11, "spill", _spill),
    # Last, so that what a temporary rule refused was let through by every other.
    Rule(9, "circuit", _circuit, temporary=True),
)
"""In the order in which they are asked; the first that refuses is the one a decision names."""

TEMPORARY = frozenset(rule.label for rule in RULES if rule.temporary)
