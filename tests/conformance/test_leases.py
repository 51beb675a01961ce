"""What every kind of leases promises, on every file below cluster."""

from ai_agent_server.cluster.alone import Alone
from ai_agent_server.cluster.base import Leases


def test_a_server_that_is_alone_may_take_everything() -> None:
    leases: Leases = Alone()
    assert leases.holder == ""
    assert all(leases.may_take(holder) for holder in ("", "left-over-from-a-cluster"))
