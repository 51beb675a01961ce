"""The Grafana dashboard against a real server: each query parses, and asks for what /metrics has."""

import json
import re
from collections.abc import AsyncIterator, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families
from promql_parser import AggregateExpr, Call, MatrixSelector, VectorSelector

from tests.servers.process import SCRIPT, ServerProcess, write_config

pytestmark = pytest.mark.asyncio(loop_scope="module")

DASHBOARD: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "doc" / "grafana" / "ai-agent-server.json").read_text()
)
PROMETHEUS_OWN = {"job", "instance"}
"""Labels that Prometheus gives to all that it scrapes."""
OF_COUNTERS = {"rate", "irate", "increase"}


class Told:
    """What /metrics has: the kind of each sample, and the values that each of its labels takes."""

    def __init__(self, text: str) -> None:
        self.kinds: dict[str, str] = {}
        self.labels: dict[str, dict[str, set[str]]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                self.kinds[sample.name] = family.type
                labels = self.labels.setdefault(sample.name, {})
                for label, value in sample.labels.items():
                    labels.setdefault(label, set()).add(value)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def told(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Told]:
    """A server that has had some of everything."""
    folder = tmp_path_factory.mktemp("watched")
    here = {**SCRIPT, "accelerator": "gpu", "memory_mb": 100, "options": {"replies": ["one two three"]}}
    down = {**SCRIPT, "locked": True, "tier": "main", "options": {"fail": "request"}}
    say = {"agent": "prompt", "llm": "here", "prompt": "say.md"}
    (folder / "say.md").write_text("Say it.")
    config = write_config(
        folder,
        llms={"here": here, "down": down},
        accelerators={"gpu": {"memory_mb": 1000, "headroom_mb": 100}},
        profiles={"team": {"roles": {"echo": say, "lost": {**say, "llm": "down"}}}},
        balancer={"retry": {"attempts": 1}},
        messaging={"enabled": False},
    )
    async with ServerProcess(folder / "state", config) as process, process.http() as http:
        for model in ("here", "here", "down"):
            body = {"model": model, "messages": [{"role": "user", "content": "Hello"}]}
            await http.post("/v1/chat/completions", json=body, headers={"X-Cache": "use"})
        for role in ("echo", "lost"):
            await http.post(f"/api/v1/team/{role}", json={"payload": {}}, params={"wait": 60})
        yield Told((await http.get("/metrics")).text)


def panels() -> Iterator[dict[str, Any]]:
    for panel in DASHBOARD["panels"]:
        yield panel
        yield from panel.get("panels", [])


def queries() -> list[tuple[str, str, str]]:
    """Panel, query, legend; Grafana's variables have a value."""
    return [
        (panel["title"], filled(target["expr"]), target["legendFormat"])
        for panel in panels()
        for target in panel.get("targets", [])
    ]


def filled(expr: str) -> str:
    return re.sub(r"\$__(rate_interval|range)\b", "5m", expr).replace("$job", ".*")


def nodes(expr: promql_parser.Expr) -> list[promql_parser.Expr]:
    found: list[promql_parser.Expr] = []
    promql_parser.walk(expr, found.append)
    return found


def selectors(expr: promql_parser.Expr) -> list[VectorSelector]:
    return [
        node.vector_selector if isinstance(node, MatrixSelector) else node
        for node in nodes(expr)
        if isinstance(node, VectorSelector | MatrixSelector)
    ]


def known_labels(expr: promql_parser.Expr, told: Told) -> set[str]:
    return PROMETHEUS_OWN.union(*(told.labels[each.name or ""] for each in selectors(expr)))


@pytest.mark.parametrize(("panel", "query", "legend"), queries())
async def test_a_query_asks_for_what_there_is(told: Told, panel: str, query: str, legend: str) -> None:
    expr = promql_parser.parse(query)
    for selector in selectors(expr):
        assert selector.name in told.kinds, query
        for matcher in selector.matchers.matchers:
            if matcher.name in PROMETHEUS_OWN:
                continue
            values = told.labels[selector.name][matcher.name]
            if matcher.op == promql_parser.MatchOp.Equal:
                assert matcher.value in values, query
            elif matcher.op == promql_parser.MatchOp.Re:
                assert any(re.fullmatch(matcher.value, value) for value in values), query
    ranged = {node.vector_selector.name for node in nodes(expr) if isinstance(node, MatrixSelector)}
    counters = {each.name for each in selectors(expr) if told.kinds[each.name or ""] == "counter"}
    assert counters <= ranged, "a counter without its rate says little"
    for node in nodes(expr):
        if isinstance(node, AggregateExpr) and node.modifier is not None:
            assert set(node.modifier.labels) <= known_labels(node.expr, told), query
        if isinstance(node, Call) and node.func.name in OF_COUNTERS:
            kinds = {told.kinds[each.name or ""] for each in selectors(node.args[0])}
            assert kinds <= {"counter", "histogram"}, query
    assert set(re.findall(r"{{(\w+)}}", legend)) <= known_labels(expr, told), panel


async def test_every_query_keeps_to_the_jobs_that_were_chosen() -> None:
    for _, query, _ in queries():
        for selector in selectors(promql_parser.parse(query)):
            assert [m.name for m in selector.matchers.matchers].count("job") == 1, query


async def test_it_asks_for_its_data_source_and_its_jobs_when_it_is_imported() -> None:
    datasource, job = DASHBOARD["templating"]["list"]
    assert (datasource["name"], datasource["type"], datasource["query"]) == (
        "datasource",
        "datasource",
        "prometheus",
    )
    assert job["query"]["query"] == "label_values(ai_agent_server_build_info, job)"
    for panel in panels():
        for target in panel.get("targets", []):
            assert target["datasource"] == panel["datasource"]
            assert panel["datasource"]["uid"] == "${datasource}"


async def test_its_panels_have_a_place_and_a_number_of_their_own() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
        assert panel["type"] == "row" or panel["description"]
    numbers = sorted(panel["id"] for panel in panels())
    assert all(one < next_one for one, next_one in pairwise(numbers))
