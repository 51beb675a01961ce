"""The score: code against a problem's visible example, then against what was hidden."""

from ai_agent_server.errors import SandboxError
from ai_agent_server.sandbox.base import Sandbox, SandboxLimits
from ai_agent_server.sandbox.python_suite import run_suite
from bench.loop_quality.problems import Problem


class Score:
    """Runs code in the sandbox that the loop uses, by the same runner."""

    def __init__(self, sandbox: Sandbox, limits: SandboxLimits) -> None:
        self._sandbox, self._limits = sandbox, limits

    async def __call__(self, problem: Problem, code: str) -> tuple[bool, bool]:
        """Whether the visible example holds, and whether every assertion does."""
        if not code.strip():
            return False, False
        visible = await self._holds(code, (problem.visible,))
        return visible, visible and await self._holds(code, problem.hidden)

    async def _holds(self, code: str, tests: tuple[str, ...]) -> bool:
        report = await run_suite(self._sandbox, code=code, anchors=(), tests=tests, limits=self._limits)
        if report.verdict == "sandbox_error":
            raise SandboxError(report.detail or "the sandbox broke")
        return report.verdict == "pass"
