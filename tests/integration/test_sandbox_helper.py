"""The helper below both tiers, where it ends before it is spoken to."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine

import pytest
import uvloop

from ai_agent_server.errors import SandboxError
from ai_agent_server.sandbox._helper import Request, run_helper
from ai_agent_server.sandbox._interpreter import find_interpreter
from ai_agent_server.sandbox.base import SandboxLimits


async def busy() -> None:
    """Leave the loop so little time that a program's end is seen together with its start."""
    while True:
        time.sleep(0.02)  # noqa: ASYNC251  (to stand in the loop's way is the point)
        await asyncio.sleep(0)


async def run_what_ends_at_once() -> None:
    interpreter = await find_interpreter()
    request = Request(
        argv=("python",), files={}, stdin="", limits=SandboxLimits(), work="/work", own_folder=False,
        drop_user=False, layers={}, readable=(), environment={},
    )  # fmt: skip
    standing = asyncio.create_task(busy())
    try:
        await run_helper(("/bin/true",), interpreter, request, tier="bubblewrap")
    finally:
        standing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await standing


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_a_helper_that_ends_at_once_is_one_that_did_not_start(
    run: Callable[[Coroutine[None, None, None]], None],
) -> None:
    with pytest.raises(SandboxError, match="did not start"):
        run(run_what_ends_at_once())
