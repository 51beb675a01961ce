"""The choice of an LLM: rules by table, promises by property, the rules' document against the code."""

import random
import re
from importlib import resources

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ai_agent_server import discovery
from ai_agent_server.core.chat import Capability, ChatRequest, ImagePart, Message, RouteHints, Tool, message
from ai_agent_server.load_balancer import estimate, strategies
from ai_agent_server.load_balancer.base import BalancingStrategy, LLMView, Requirements, Scored
from ai_agent_server.load_balancer.load_balancer import RULES, decide, may_wait_for
from ai_agent_server.load_balancer.strategies.resident_first import ResidentFirst

LOCAL = LLMView(name="local-small", source="local", tier="small")
API = LLMView(name="api-main", source="api", tier="main", context_tokens=100_000)


def changed(view: LLMView, **fields: object) -> LLMView:
    return msgspec.structs.replace(view, **fields)


def refused_by(view: LLMView, wanted: Requirements, *others: LLMView) -> str | None:
    decision = decide(wanted, (view, *others), ResidentFirst(), strategy_name="resident_first")
    (refusal,) = [each.refused_by for each in decision.candidates if each.llm == view.name]
    return refusal


NAMED = Requirements(llm="local-small")


@pytest.mark.parametrize(
    ("view", "wanted", "others", "rule"),
    [
        (LOCAL, Requirements(), (), None),
        (changed(LOCAL, toggle=False), Requirements(), (), "LB-1 toggle"),
        (API, NAMED, (changed(LOCAL, locked=True, toggle=False),), "LB-2 lock"),
        (API, NAMED, (changed(LOCAL, locked=True, circuit="open"),), "LB-2 lock"),
        (changed(LOCAL, locked=True), NAMED, (API,), None),
        (changed(LOCAL, locked=True), Requirements(), (API,), None),
        (API, Requirements(privacy="local"), (), "LB-3 privacy"),
        (API, Requirements(allowed=("local-small",)), (LOCAL,), "LB-10 allowed"),
        (LOCAL, Requirements(privacy="local"), (), None),
        (API, NAMED, (LOCAL,), "LB-4 assignment"),
        (changed(API, tier="small"), NAMED, (LOCAL,), "LB-4 assignment"),
        (API, NAMED, (changed(LOCAL, toggle=False),), "LB-4 assignment"),
        (changed(API, tier="small"), NAMED, (changed(LOCAL, toggle=False),), None),
        (changed(API, tier="small"), NAMED, (changed(LOCAL, circuit="open"),), None),
        (API, Requirements(llm="gone"), (LOCAL,), "LB-4 assignment"),
        (LOCAL, Requirements(needs=frozenset({"chat", "vision"})), (), "LB-5 capability"),
        (LOCAL, Requirements(input_tokens=4000), (), "LB-6 context"),
        (LOCAL, Requirements(input_tokens=4000, output_tokens=96), (), None),
        (LOCAL, Requirements(input_tokens=100, output_tokens=32_000), (), None),
        (
            changed(API, cost_per_million_output_usd=10.0),
            Requirements(output_tokens=1000, max_cost_usd=0.009),
            (),
            "LB-7 budget",
        ),
        (
            changed(API, cost_per_million_output_usd=10.0),
            Requirements(output_tokens=1000, max_cost_usd=0.01),
            (),
            None,
        ),
        (LOCAL, Requirements(max_cost_usd=0.0), (), None),
        (LOCAL, Requirements(exclude=frozenset({"local-small"})), (), "LB-8 tried"),
        (changed(LOCAL, circuit="open", cooldown_s=3.0), Requirements(), (), "LB-9 circuit"),
        (changed(LOCAL, circuit="half_open", probing=True), Requirements(), (), "LB-9 circuit"),
        (changed(LOCAL, circuit="half_open"), Requirements(), (), None),
    ],
)
def test_each_rule_refuses_what_it_says(
    view: LLMView, wanted: Requirements, others: tuple[LLMView, ...], rule: str | None
) -> None:
    assert refused_by(view, wanted, *others) == rule


@pytest.mark.parametrize(
    ("wanted", "first", "second"),
    [
        (Requirements(), LOCAL, changed(API, tier="small")),
        (Requirements(tier="main"), API, LOCAL),
        (Requirements(tier="small"), changed(LOCAL, tier="main"), changed(API, tier="small")),
        (Requirements(), changed(LOCAL, resident=True), changed(LOCAL, name="b", resident=False)),
        (
            Requirements(prefer=("b",)),
            changed(LOCAL, name="b", resident=False),
            changed(LOCAL, resident=True),
        ),
        (Requirements(), LOCAL, changed(LOCAL, name="b", in_flight=1)),
        (
            Requirements(),
            changed(LOCAL, slots=4, in_flight=1),
            changed(LOCAL, name="b", slots=4, in_flight=2),
        ),
        (Requirements(), changed(LOCAL, tokens_per_s=100.0), changed(LOCAL, name="b", tokens_per_s=10.0)),
        (
            Requirements(tier="main"),
            changed(API, cost_per_million_output_usd=1.0),
            changed(API, name="b", cost_per_million_output_usd=60.0),
        ),
        (
            Requirements(output_tokens=4000, input_tokens=500),
            changed(LOCAL, name="b", context_tokens=8000),
            LOCAL,
        ),
        # An hour's queue here is worse than an API.
        (Requirements(output_tokens=1000), API, changed(LOCAL, in_flight=1, waiting=90)),
    ],
)
def test_resident_first_prefers(wanted: Requirements, first: LLMView, second: LLMView) -> None:
    for views in ((first, second), (second, first)):
        decision = decide(wanted, views, ResidentFirst(), strategy_name="resident_first")
        assert decision.chosen == first.name, decision


def test_the_reason_names_what_decided() -> None:
    resident = changed(LOCAL, name="warm", resident=True)
    cold = changed(LOCAL, name="cold", resident=False)
    decision = decide(Requirements(), (cold, resident), ResidentFirst(), strategy_name="resident_first")
    assert decision.reason == "warm: best of 2; ahead of cold by residency (local, in memory)"


def test_the_reason_of_a_refusal_names_every_rule() -> None:
    views = (changed(LOCAL, toggle=False), API)
    decision = decide(Requirements(privacy="local"), views, ResidentFirst(), strategy_name="resident_first")
    assert decision.chosen is None
    assert decision.reason == "no LLM may serve (local-small: LB-1 toggle; api-main: LB-3 privacy)"


def test_one_can_wait_for_a_circuit_but_not_for_a_switch() -> None:
    views = (changed(LOCAL, toggle=False), changed(API, circuit="open"))
    decision = decide(Requirements(), views, ResidentFirst(), strategy_name="resident_first")
    assert may_wait_for(decision) == {"api-main"}


class Rebel:
    """A strategy that wants what it was not offered, and forgets what it was."""

    def rank(self, wanted: Requirements, views: tuple[LLMView, ...]) -> tuple[Scored, ...]:
        return (Scored(llm="api-main", score=-1.0, parts={}),)


def test_a_strategy_cannot_bring_back_what_a_rule_refused() -> None:
    decision = decide(Requirements(privacy="local"), (API, LOCAL), Rebel(), strategy_name="rebel")
    assert decision.chosen == "local-small"
    assert {candidate.llm for candidate in decision.candidates} == {"api-main", "local-small"}


BUSY = changed(LOCAL, wait_s=90.0)
SAME_TIER = changed(API, tier="small")


@pytest.mark.parametrize(
    ("views", "wanted", "chosen"),
    [
        ((BUSY, API), Requirements(), "api-main"),
        ((changed(LOCAL, wait_s=30.0), API), Requirements(), "local-small"),
        ((changed(LOCAL, wait_s=30.0), API), Requirements(overdue=True), "api-main"),
        ((BUSY, changed(LOCAL, name="idle"), API), Requirements(), "idle"),
        ((BUSY,), Requirements(), "local-small"),
        ((BUSY, API), Requirements(privacy="local"), "local-small"),
        ((BUSY, API), Requirements(privacy="local", overdue=True), "local-small"),
        ((changed(BUSY, locked=True), SAME_TIER), NAMED, "local-small"),
        ((BUSY, SAME_TIER), NAMED, "api-main"),
        ((BUSY, API), NAMED, "local-small"),
        ((BUSY, API), Requirements(allowed=("local-small",)), "local-small"),
        ((BUSY, changed(API, cost_per_million_output_usd=10)), Requirements(max_cost_usd=0.0), "local-small"),
        ((BUSY, changed(API, circuit="open")), Requirements(), "local-small"),
        ((BUSY, API), Requirements(exclude=frozenset({"api-main"})), "local-small"),
        ((BUSY, API), Requirements(urgency="background"), "local-small"),
        (
            tuple(changed(view, capabilities=frozenset({"embeddings"})) for view in (BUSY, API)),
            Requirements(needs=frozenset({"embeddings"})),
            "local-small",
        ),
    ],
)
def test_what_waits_too_long_here_an_api_serves_where_one_may(
    views: tuple[LLMView, ...], wanted: Requirements, chosen: str
) -> None:
    decision = decide(wanted, views, ResidentFirst(), strategy_name="resident_first", spill_after_s=60)
    assert decision.chosen == chosen
    if chosen == "api-main":
        assert {each.refused_by for each in decision.candidates} <= {None, "LB-11 spill"}


ABILITIES: tuple[Capability, ...] = ("chat", "tools", "json_schema", "vision")
NAMES = ("a", "b", "c", "d")


def some_view(name: str) -> st.SearchStrategy[LLMView]:
    return st.builds(
        LLMView,
        name=st.just(name),
        source=st.sampled_from(["local", "api"]),
        tier=st.sampled_from(["small", "main"]),
        toggle=st.booleans(),
        locked=st.booleans(),
        capabilities=st.frozensets(st.sampled_from(ABILITIES)).map(lambda more: more | {"chat"}),
        context_tokens=st.integers(256, 100_000),
        slots=st.integers(1, 4),
        cost_per_million_output_usd=st.floats(0, 100),
        circuit=st.sampled_from(["closed", "open", "half_open"]),
        probing=st.booleans(),
        in_flight=st.integers(0, 8),
        resident=st.sampled_from([True, False, None]),
        tokens_per_s=st.none() | st.floats(0.1, 1000),
    )


some_views = st.permutations(NAMES).flatmap(
    lambda names: st.tuples(*(some_view(name) for name in names[: 1 + len(names) // 2]))
)
some_wanted = st.builds(
    Requirements,
    llm=st.none() | st.sampled_from([*NAMES, "gone"]),
    tier=st.sampled_from([None, "small", "main"]),
    prefer=st.lists(st.sampled_from(NAMES), max_size=3).map(tuple),
    privacy=st.sampled_from(["any", "local"]),
    needs=st.frozensets(st.sampled_from(ABILITIES), max_size=1).map(lambda more: more | {"chat"}),
    input_tokens=st.integers(0, 8000),
    max_cost_usd=st.none() | st.floats(0, 1),
    exclude=st.frozensets(st.sampled_from(NAMES), max_size=2),
)
every_strategy = st.sampled_from(sorted(discovery.kinds(strategies)))


@given(some_wanted, some_views, every_strategy)
def test_every_decision_keeps_its_promises(
    wanted: Requirements, views: tuple[LLMView, ...], kind: str
) -> None:
    strategy = discovery.implementation(strategies, kind)()
    decision = decide(wanted, views, strategy, strategy_name=kind)
    by_name = {view.name: view for view in views}

    assert sorted(each.llm for each in decision.candidates) == sorted(by_name), "everyone, once"
    assert all((each.refused_by is None) == (each.score is not None) for each in decision.candidates)
    assert decision.reason
    if decision.chosen is None:
        assert all(each.refused_by for each in decision.candidates)
        return
    chosen = by_name[decision.chosen]
    assert decision.candidates[0].llm == chosen.name
    assert chosen.toggle
    assert chosen.circuit != "open"
    assert chosen.name not in wanted.exclude
    if wanted.privacy == "local":
        assert chosen.source == "local"
    if wanted.llm is not None:
        assert wanted.llm in by_name, "an unknown assignment serves nobody"
        assigned = by_name[wanted.llm]
        assert chosen.name == assigned.name or (not assigned.locked and chosen.tier == assigned.tier)


def random_case(rng: random.Random) -> tuple[Requirements, tuple[LLMView, ...]]:
    """By hand: to draw so large values from Hypothesis takes fifty times as long."""
    views = tuple(
        LLMView(
            name=name,
            source=rng.choice(("local", "api")),
            tier=rng.choice(("small", "main")),
            toggle=rng.random() < 0.9,
            locked=rng.random() < 0.3,
            context_tokens=rng.choice((1000, 100_000)),
            slots=rng.randint(1, 4),
            cost_per_million_output_usd=rng.choice((0.0, 50.0)),
            circuit=rng.choice(("closed", "closed", "open")),
            in_flight=rng.randint(0, 8),
            resident=rng.choice((True, False, None)),
            wait_s=rng.choice((None, rng.uniform(0, 60))),
        )
        for name in rng.sample(NAMES, rng.randint(1, 4))
    )
    wanted = Requirements(
        llm=rng.choice((None, None, *NAMES)),
        tier=rng.choice((None, "small", "main")),
        privacy=rng.choice(("any", "any", "local")),
        allowed=rng.choice(((), ("a", "b"))),
        input_tokens=rng.choice((10, 8000)),
        max_cost_usd=rng.choice((None, 0.001)),
        exclude=frozenset(rng.sample(NAMES, rng.choice((0, 0, 1)))),
        urgency=rng.choice(("interactive", "batch", "background")),
    )
    return wanted, views


@pytest.mark.parametrize("kind", sorted(discovery.kinds(strategies)))
def test_spilling_never_leaves_what_a_rule_keeps_and_always_keeps_its_time(kind: str) -> None:
    strategy, rng = discovery.implementation(strategies, kind)(), random.Random(kind)
    for _ in range(1500):
        holds_when_spilling(strategy, *random_case(rng), rng.choice((0.0, 20.0)), rng.random() < 0.2)


def holds_when_spilling(
    strategy: BalancingStrategy,
    wanted: Requirements,
    views: tuple[LLMView, ...],
    spill_after_s: float,
    overdue: bool,
) -> None:
    before = decide(wanted, views, strategy, strategy_name="any")
    wanted = msgspec.structs.replace(wanted, overdue=overdue)
    after = decide(wanted, views, strategy, strategy_name="any", spill_after_s=spill_after_s)
    by_name = {view.name: view for view in views}
    spilled = [each for each in after.candidates if each.refused_by == "LB-11 spill"]
    if not spilled:
        assert {each.llm for each in after.candidates if each.refused_by is None} == {
            each.llm for each in before.candidates if each.refused_by is None
        }
    assert (after.chosen is None) == (before.chosen is None)
    if after.chosen is None:
        return
    chosen = by_name[after.chosen]
    apis = [
        each.llm for each in after.candidates if each.refused_by is None and by_name[each.llm].source == "api"
    ]
    if spilled:
        assert apis, "refused though no API may serve"
        assert wanted.privacy != "local"
        assert wanted.urgency != "background"
        assert not any(view.locked for view in views if view.name == wanted.llm)
    for name in apis:
        cost = estimate.cost_usd(by_name[name], wanted.input_tokens, wanted.output_tokens)
        assert wanted.max_cost_usd is None or cost <= wanted.max_cost_usd
    if chosen.source == "local" and apis and wanted.urgency != "background":
        assert not overdue
        assert estimate.queue_s(chosen, wanted.output_tokens) + estimate.load_s(chosen) <= spill_after_s


@given(some_wanted, some_views, every_strategy)
def test_the_same_question_has_the_same_answer(
    wanted: Requirements, views: tuple[LLMView, ...], kind: str
) -> None:
    strategy = discovery.implementation(strategies, kind)()
    assert decide(wanted, views, strategy, strategy_name=kind) == decide(
        wanted, views, strategy, strategy_name=kind
    )


def test_requirements_are_read_off_the_request() -> None:
    request = ChatRequest(
        messages=(
            message("system", "x" * 350),
            Message(role="user", parts=(ImagePart(media_type="image/png", content="QUJD" * 1000),)),
        ),
        max_tokens=77,
        tools=(Tool(name="f"),),
        response_schema={"type": "object"},
        route=RouteHints(llm="a", tier="main", prefer=("b",), privacy="local", max_cost_usd=0.5),
    )
    wanted = estimate.requirements(request)
    assert wanted.needs == {"chat", "tools", "json_schema", "vision"}
    assert (wanted.llm, wanted.tier, wanted.prefer, wanted.privacy) == ("a", "main", ("b",), "local")
    assert (wanted.output_tokens, wanted.max_cost_usd) == (77, 0.5)
    assert 1100 <= wanted.input_tokens <= 1150


def test_tools_that_may_not_be_called_need_no_capability() -> None:
    request = ChatRequest(messages=(message("user", "hi"),), tools=(Tool(name="f"),), tool_choice="none")
    assert estimate.requirements(request).needs == {"chat"}


def rules_document() -> str:
    return resources.files("ai_agent_server.config").joinpath("load_balancer_rules.md").read_text("utf-8")


def test_the_document_has_the_rules_of_the_code_in_their_order() -> None:
    rows = re.findall(r"^\| LB-(\d+) \| (\w+) \| .+ \| .+ \|$", rules_document(), re.MULTILINE)
    assert rows == [(str(rule.number), rule.name) for rule in RULES]


def test_the_document_has_each_strategy_s_parts() -> None:
    sections = re.findall(r"^### (\w+)\n(.*?)(?=^##)", rules_document(), re.MULTILINE | re.DOTALL)
    written = {
        kind: set(re.findall(r"^\| (\w+) \| .+ \| .+ \|$", text, re.MULTILINE)) - {"part"}
        for kind, text in sections
    }
    real = {}
    for kind in discovery.kinds(strategies):
        ranked = discovery.implementation(strategies, kind)().rank(Requirements(), (LOCAL, API))
        real[kind] = {name for scored in ranked for name in scored.parts}
    assert written == real
