"""What the tasks of a profile, and those of a context, may use together: asked before each call, kept."""

import json
from pathlib import Path
from typing import Any

import pytest

from ai_agent_server.config.settings import parse
from ai_agent_server.errors import ConfigurationError
from tests.servers.process import ServerProcess, packaged, scripted, write_config

ONE = "0197a000-0000-7000-8000-000000000001"
TWO = "0197a000-0000-7000-8000-000000000002"


async def sent(http: Any, context_id: str, *, role: str = "rewrite", **more: Any) -> dict[str, Any]:
    payload = {"text": "Hello", "instructions": "shorter"} if role == "rewrite" else {"text": "Hello"}
    body = {"payload": payload, "context_id": context_id, **more}
    answer = await http.post(f"/api/v1/productivity/{role}", params={"wait": 60}, json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def test_a_context_and_a_profile_have_budgets_that_hold_over_a_restart(tmp_path: Path) -> None:
    limits = {
        "context": [{"per_s": 3600, "requests": 2}],
        "profiles": {"productivity": [{"requests": 3}]},
    }
    config = write_config(
        tmp_path, llms=scripted("short"), messaging={"enabled": False}, gateway={"limits": limits}
    )
    server = ServerProcess(tmp_path / "state", config)
    async with server, server.http() as http:
        first = await sent(http, ONE)
        assert first["status"] == "completed"
        assert (await sent(http, ONE, role="summarize"))["status"] == "completed"
    async with server, server.http() as http:
        spent = await sent(http, ONE)
        assert (spent["status"], spent["reason"], spent["usage"]["calls"]) == ("failed", "budget_sender", 0)
        assert f"the context '{ONE}' may use 2 requests in 3600 s" in spent["error"]["message"]
        fork = await http.post(f"/api/v1/tasks/{first['task_id']}/fork", json={"step": 1})
        assert fork.status_code == 202, "what it copies asks for nothing"
        assert (await sent(http, TWO))["status"] == "completed"
        spent = await sent(http, TWO)
        assert spent["reason"] == "budget_sender"
        assert "the profile 'productivity' may use 3 requests in total" in spent["error"]["message"]


@pytest.mark.parametrize(
    ("limits", "pointer"),
    [
        ({"profiles": {"developr": [{"tokens": 1}]}}, "/gateway/limits/profiles/developr"),
        ({"context": [{"tokens": 1}]}, "/gateway/limits/context/0/per_s"),
    ],
)
def test_a_budget_that_cannot_be_meant_is_refused(limits: dict[str, Any], pointer: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        parse(json.dumps(packaged(gateway={"limits": limits})).encode(), source="test")
    assert refused.value.pointer == pointer
