"""Several servers on one NATS: any takes any task, a dead one is replaced, one that wakes is fenced off."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from ai_agent_server.cluster.nats_leases import server_id
from tests.integration.test_webhooks import SECRET, Receiver, receiving
from tests.servers.cluster import Cluster, a_cluster, in_order

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def receiver() -> AsyncIterator[Receiver]:
    """Whom webhooks are sent to."""
    async with receiving() as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory, receiver: Receiver) -> AsyncIterator[Cluster]:
    """Servers `a` and `b`; each test leaves both running and the LLM answering."""
    target = {"url": f"{receiver.url}/hooks", "secret": {"env": "HOOK_SECRET"}}
    callbacks = {"targets": {"ci": target}, "backoff_s": 0.05, "backoff_max_s": 0.2, "attempts": 1000}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOOK_SECRET", SECRET)
        async with a_cluster(tmp_path_factory.mktemp("cluster"), "a", "b", callbacks=callbacks) as made:
            yield made


@pytest.fixture(autouse=True)
def answering(cluster: Cluster) -> None:
    cluster.llm.gate.set()
    cluster.llm.delay_s = 0.05


async def asked(cluster: Cluster, task: str) -> None:
    """Until the LLM was asked for `task`."""
    async with asyncio.timeout(60):
        while not cluster.llm.asked.get(task):
            await asyncio.sleep(0.02)


def holder_of(cluster: Cluster, packet: dict[str, str]) -> str:
    """The name of the server that has `packet`."""
    is_a = packet["holder"].split(".")[0] == server_id(cluster.folder / "a", None)
    return "a" if is_a else "b"


async def test_a_task_given_to_one_server_is_read_and_followed_on_another(cluster: Cluster) -> None:
    task_id = await cluster.submit("a", "one")
    async with (
        cluster.client("b") as http,
        http.stream("GET", f"/api/v1/tasks/{task_id}/events") as answer,
    ):
        ids = [int(line[4:]) async for line in answer.aiter_lines() if line.startswith("id: ")]
    packet = await cluster.ended("b", task_id)
    assert packet["status"] == "completed"
    assert packet == await cluster.ended("a", task_id)
    in_order(packet)
    assert [seq for seq in ids if seq] == list(range(1, packet["revision"] + 1))
    assert await cluster.submit("b", "one") == task_id
    kept = cluster.folder / holder_of(cluster, packet) / "tasks_state"
    (file,) = kept.rglob(f"{task_id}.json")
    # The other server hears of the end from NATS, perhaps before the file has it.
    async with asyncio.timeout(60):
        while json.loads(file.read_bytes())["revision"] < packet["revision"]:
            await asyncio.sleep(0.02)


async def test_a_task_is_canceled_on_a_server_that_does_not_run_it(cluster: Cluster) -> None:
    cluster.llm.gate.clear()
    left = cluster.llm.left
    task_id = await cluster.submit("a", "stuck")
    await asked(cluster, "stuck")
    other = {"a": "b", "b": "a"}[holder_of(cluster, await cluster.read("a", task_id))]
    async with cluster.client(other) as http:
        canceled = (await http.post(f"/api/v1/tasks/{task_id}/cancel")).json()
    assert canceled["status"] == "canceled"
    async with asyncio.timeout(60):
        while cluster.llm.left == left:
            await asyncio.sleep(0.02)
    for name in "ab":
        assert await cluster.until(name, task_id, status="canceled") == canceled


async def test_a_server_that_was_stopped_and_wakes_up_is_fenced_off(cluster: Cluster) -> None:
    cluster.llm.gate.clear()
    task_id = await cluster.submit("a", "frozen")
    await asked(cluster, "frozen")
    held = await cluster.read("a", task_id)
    frozen = holder_of(cluster, held)
    other = {"a": "b", "b": "a"}[frozen]
    os.kill(cluster.servers[frozen].pid, signal.SIGSTOP)
    try:
        taken = await cluster.until(other, task_id, generation=held["generation"] + 1)
        assert taken["holder"] != held["holder"]
        cluster.llm.gate.set()
        done = await cluster.ended(other, task_id)
    finally:
        os.kill(cluster.servers[frozen].pid, signal.SIGCONT)
    assert done == await cluster.until(frozen, task_id, status="completed")
    in_order(done)
    repeated = cluster.llm.asked["frozen"] - done["usage"]["calls"]
    assert 1 <= repeated < done["generation"], "a server that takes it over repeats one call"
    after = await cluster.submit(frozen, "after")
    assert (await cluster.ended(frozen, after))["status"] == "completed"


async def test_kill_9_of_a_server_costs_a_task_one_call_at_most_and_nothing_else(cluster: Cluster) -> None:
    cluster.llm.delay_s = 0.15
    tasks = {f"t{n}": await cluster.submit("ab"[n % 2], f"t{n}") for n in range(30)}
    await cluster.servers["a"].kill()
    packets = {name: await cluster.ended("b", task_id) for name, task_id in tasks.items()}
    for name, packet in packets.items():
        assert packet["status"] == "completed", packet["error"]
        in_order(packet)
        # On a machine that stands still for longer than a lease one more server may take it over.
        assert cluster.llm.asked[name] < packet["usage"]["calls"] + packet["generation"]
    await cluster.start("a")


async def test_servers_restarted_one_after_the_other_lose_and_double_nothing(cluster: Cluster) -> None:
    cluster.llm.delay_s = 0.15
    tasks = {f"r{n}": await cluster.submit("ab"[n % 2], f"r{n}") for n in range(16)}
    for name in ("a", "b"):
        assert await cluster.servers[name].stop() == 0
        await cluster.start(name)
    for name, task_id in tasks.items():
        packet = await cluster.ended("a", task_id)
        assert packet["status"] == "completed"
        in_order(packet)
        assert cluster.llm.asked[name] == packet["usage"]["calls"]


async def test_webhooks_that_a_dead_server_owed_are_sent_by_the_other(
    cluster: Cluster, receiver: Receiver
) -> None:
    receiver.answers = [500] * 100_000
    callback = {"url": f"{receiver.url}/hooks", "events": ["task.submitted", "task.completed"]}
    body = {"payload": {"task": "Do it. #owed#"}, "callback": callback}
    async with cluster.client("a") as http:
        task_id = (await http.post("/api/v1/chain/first", json=body)).json()["task_id"]
    packet = await cluster.ended("a", task_id)
    await receiver.until(lambda: bool(receiver.came))
    dead = holder_of(cluster, packet)
    await cluster.servers[dead].kill()
    receiver.answers = []
    last = f"{task_id}:{packet['revision']}"
    await receiver.until(lambda: last in receiver.ids())
    await cluster.start(dead)
    after = await cluster.submit(dead, "after-the-dead")
    assert (await cluster.ended(dead, after))["status"] == "completed"


async def test_a_server_that_joins_sends_no_webhooks_of_others_again(
    cluster: Cluster, receiver: Receiver
) -> None:
    assert receiver.came, "there is nothing to send again"
    await cluster.start("c")
    task_id = await cluster.submit("c", "joined")
    assert (await cluster.ended("c", task_id))["status"] == "completed"
    async with cluster.client("c") as http:
        counted = (await http.get("/api/v1/metrics")).json()["state"]["webhooks"]
    assert counted["pending"] == counted["delivered"] == counted["failed"] == 0
