"""Where user namespaces are refused, for real, the second tier takes over and says so."""

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest

from ai_agent_server.sandbox.landlock import Landlock

PROGRAM = Path(__file__).parent / "namespaces_refused.py"
NOBODY = 65534


@pytest.mark.parametrize("user", (None, NOBODY) if os.geteuid() == 0 else (None,))
async def test_the_second_tier_takes_over_where_namespaces_are_refused(user: int | None) -> None:
    if not (await Landlock().probe()).works:
        pytest.skip("this kernel has no Landlock")
    groups: list[int] | None = None if user is None else []
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-B", str(PROGRAM), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        cwd="/", env={"PATH": os.environ["PATH"]}, user=user, group=user, extra_groups=groups,
    )  # fmt: skip
    out, err = await process.communicate()
    if user is not None and process.returncode != 0 and b"Permission denied" in err:
        pytest.skip("another user cannot read this checkout")
    assert process.returncode == 0, err.decode()
    said = json.loads(out)
    works, detail, advice = said["bubblewrap"]
    assert works is False
    assert detail
    assert "namespaces" in advice
    assert said["auto"] == ["landlock", True]
    assert said["runs"] == ["fail", "fail"]
    assert said["suite"] == ["landlock", "fail", 1]
