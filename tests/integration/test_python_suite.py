"""The test runner on the real sandbox: honest verdicts for honest code, and none that can be forged."""

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from ai_agent_server.core.task_packet import TestReport
from ai_agent_server.sandbox.base import Sandbox, SandboxLimits
from ai_agent_server.sandbox.bubblewrap import Bubblewrap
from ai_agent_server.sandbox.landlock import Landlock
from ai_agent_server.sandbox.python_suite import run_probes, run_suite

LIMITS = SandboxLimits(cpu_s=8, wall_s=15.0, memory_mb=256, processes=16, file_mb=4)
ADD = "def f(x):\n    return x + 1\n"


@pytest.fixture(params=(Bubblewrap, Landlock), ids=("bubblewrap", "landlock"))
async def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    """Each tier that has to contain."""
    made: Sandbox = request.param()
    probe = await made.probe()
    if not probe.works:
        pytest.skip(f"this machine has no {probe.tier}: {probe.detail}")
    return made


async def judged(sandbox: Sandbox, code: str, *tests: str, wall_s: float = LIMITS.wall_s) -> TestReport:
    """One suite without anchors."""
    limits = msgspec.structs.replace(LIMITS, wall_s=wall_s)
    return await run_suite(sandbox, code=code, anchors=(), tests=tests, limits=limits)


async def test_code_that_is_right_passes(sandbox: Sandbox) -> None:
    report = await run_suite(
        sandbox,
        code=ADD,
        anchors=("assert f(1) == 2",),
        tests=("assert f(-1) == 0", "assert f(0.5) == 1.5, 'message'"),
        limits=LIMITS,
    )
    assert (report.verdict, report.failing, report.detail) == ("pass", (), "")
    assert (report.anchors_passed, report.anchors_total) == (1, 1)
    assert (report.tests_passed, report.tests_total) == (2, 2)
    assert report.tier == (await sandbox.probe()).tier
    assert report.wall_ms > 0
    assert len(report.suite_sha256) == 64


async def test_each_assertion_is_reported_by_itself(sandbox: Sandbox) -> None:
    tests = ("assert f(1) == 3", "assert f(2) == 3", "assert f('x') == 1", "assert f(4) == 5")
    report = await judged(sandbox, ADD, *tests)
    assert report.verdict == "fail"
    assert report.tests_passed == 2
    assert report.failing == (tests[0], tests[2])
    assert report.detail == "assert f(1) == 3\nactual: 2\nexpected: 3"


@pytest.mark.parametrize(
    "test",
    [
        "assert not f(-1)",
        "assert f(1) is not None and f(0)",
        "assert 1 < f(1) <= 2",
        "assert sorted([f(3), f(1)]) == [2, 4]",
        "assert abs(f(0.1) - 1.1) < 1e-9",
        "assert math.isclose(f(0.1), 1.1)",
        "assert isinstance(f(1), int)",
        "assert all(f(n) == n + 1 for n in range(5))",
        "assert f(f(1)) == 3",
        "assert [f(n) for n in (1, 2)] == [2, 3]",
        "assert f(1) in {2, 3}",
        "assert (f(1), f(2)) == (2, 3)",
        "assert {'a': f(1)} == {'a': 2}",
        "assert str(f(1)) == '2'",
        "assert list(evens(5)) == [0, 2, 4]",
        "assert sum(evens(5)) == 6",
        "assert Counter(words('a a b')) == {'a': 2, 'b': 1}",
        "assert Point(1, 2) == Point(1, 2)",
        "assert Point(1, 2).x == 1",
        "assert stack.pop() == 2",
        "assert f(float('inf')) == float('inf')",
        "assert -f(1) == -2",
        "assert f(1) == f(0) + 1",
        "assert f(1) if f(0) else False",
        "assert max(evens(9), key=lambda n: -n) == 0",
        "assert f(10 ** 5000) > 0",
        "assert empty() == set()",
        "assert words('b a') == ['b', 'a'] and words('')[:1] == []",
    ],
)
async def test_ordinary_assertions_mean_what_they_mean_in_python(sandbox: Sandbox, test: str) -> None:
    code = ADD + (
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class Point:\n    x: int\n    y: int\n"
        "def evens(n):\n    yield from range(0, n, 2)\n"
        "stack = [1, 2]\n"
        "def empty(): return set()\n"
        "def words(text): return text.split()\n"
    )
    report = await judged(sandbox, code, test)
    assert report.verdict == "pass", report.detail
    statement = test.removeprefix("assert ")
    opposite = await judged(sandbox, code, f"assert not ({statement})")
    assert opposite.verdict == "fail", opposite


@pytest.mark.parametrize(
    ("code", "verdict", "says"),
    [
        ("def f(:\n", "error", "line 1"),
        ("import no_such_module\n", "error", "ModuleNotFoundError"),
        ("1 / 0\n", "error", "ZeroDivisionError"),
        ("raise SystemExit(0)\n", "error", "SystemExit"),
        ("import os\nos._exit(0)\n", "error", "exit code 0"),
        ("while True: pass\n", "timeout", "loading"),
        ("def f(x): return [][x]\n", "fail", "line 1, in f"),
        ("def f(x):\n    while True: pass\n", "timeout", "no answer"),
        ("def f(x): return f(x)\n", "fail", "RecursionError"),
        ("def f(x): return bytearray(10**9)\n", "memory", "MemoryError"),
        ("import os, signal\ndef f(x): os.kill(os.getpid(), signal.SIGSEGV)\n", "signal", "SIGSEGV"),
        ("x = 1\n", "fail", "NameError"),
        ("def f(x): raise ValueError('y' * 10**6)\n", "fail", "ValueError"),
    ],
)
async def test_code_that_breaks_is_told_apart(sandbox: Sandbox, code: str, verdict: str, says: str) -> None:
    wall_s = 6.0 if verdict == "timeout" else LIMITS.wall_s
    report = await judged(sandbox, code, "assert f(1) == 2", wall_s=wall_s)
    assert report.verdict == verdict, report
    assert says in report.detail
    assert len(report.detail.encode()) <= 2048
    assert report.tests_passed == 0


async def test_a_test_that_hangs_fails_alone(sandbox: Sandbox) -> None:
    code = "def f(x):\n    while x == 1: pass\n    return x + 1\n"
    report = await judged(sandbox, code, "assert f(0) == 1", "assert f(1) == 2", "assert f(2) == 3")
    assert (report.verdict, report.tests_passed) == ("timeout", 2)
    assert report.failing == ("assert f(1) == 2",)


async def test_a_test_that_is_no_assertion_fails(sandbox: Sandbox) -> None:
    report = await judged(sandbox, ADD, "f(1) == 2", "assert f(1) == 2", "assert f(")
    assert (report.verdict, report.tests_passed, len(report.failing)) == ("fail", 1, 2)


async def test_an_import_that_only_the_tests_need_does_not_help_the_code(sandbox: Sandbox) -> None:
    code = "def f(x): return math.floor(x)\n"
    report = await judged(sandbox, code, "assert f(1.5) == math.floor(1.5)")
    assert report.verdict == "fail"
    assert "NameError" in report.detail


OWN_SUM = """
def sum(a, b):
    total = 0
    for n in range(1, min(a, b) + 1):
        if a % n == b % n == 0:
            total += n
    return total
"""


async def test_a_function_that_is_called_as_a_builtin_is_judged_by_what_it_does(sandbox: Sandbox) -> None:
    tests = ("assert sum(10, 15) == 6", "assert sum(100, 150) == 93", "assert abs(sum(4, 6) - 3) < 1")
    assert (await judged(sandbox, OWN_SUM, *tests)).verdict == "pass"
    wrong = await judged(
        sandbox, OWN_SUM.replace("min(a, b) + 1", "min(a, b)"), *tests, "assert sum(3, 3) == 4"
    )
    assert wrong.failing == ("assert sum(3, 3) == 4",)
    assert wrong.detail == "assert sum(3, 3) == 4\nactual: 1\nexpected: 4"


@pytest.mark.parametrize("test", ["assert max([1, 2]) == 2", "assert gcd(4, 6) == 2", "assert filter(1, 2)"])
async def test_what_python_has_under_the_name_is_not_the_codes(sandbox: Sandbox, test: str) -> None:
    report = await judged(sandbox, "x = 1\n", test)
    assert report.verdict == "fail"
    assert "NameError" in report.detail


async def test_the_entry_point_says_which_of_two_builtins_is_meant(sandbox: Sandbox) -> None:
    code = OWN_SUM + "def round(x): return 6\n"

    async def verdict(test: str, entry_point: str) -> str:
        report = await run_suite(
            sandbox, code=code, anchors=(test,), tests=(), limits=LIMITS, entry_point=entry_point
        )
        return report.verdict

    assert await verdict("assert round(sum(10, 15) + 0.2) == 6", "sum") == "pass"
    assert await verdict("assert round(sum(4, 6) + 0.2) == 6", "sum") == "fail"
    assert await verdict("assert round(sum(4, 6) + 0.2) == 6", "") == "fail"


FORGERIES = {
    "leaves_at_once": "import os\ndef f(x): os._exit(0)\n",
    "exits": "def f(x): raise SystemExit(0)\n",
    "equals_everything": "class All:\n    def __eq__(self, other): return True\ndef f(x): return All()\n",
    "equals_everything_as_int": (
        "class All(int):\n    def __eq__(self, other): return True\n    __hash__ = None\n"
        "def f(x): return All()\n"
    ),
    "patches_builtins": (
        "import builtins\nclass All:\n    def __eq__(self, other): return True\n"
        "def f(x):\n"
        "    for name in ('bool', 'repr', 'type', 'len', 'isinstance', 'print'):\n"
        "        setattr(builtins, name, lambda *a, **k: True)\n"
        "    return All()\n"
    ),
    "exits_while_loading": "import sys\nsys.exit(0)\n",
    "leaves_while_loading": "import os\nos._exit(0)\n",
    "exits_by_handler": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): raise SystemExit(1)\n",
    "exits_by_thread": (
        "import os, threading, time\n"
        "def leave():\n    time.sleep(0.05)\n    os._exit(0)\n"
        "threading.Thread(target=leave).start()\n"
        "def f(x): time.sleep(1)\n"
    ),
    "exits_by_alarm": (
        "import os, signal, time\n"
        "signal.signal(signal.SIGALRM, lambda *a: os._exit(0))\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.05)\n"
        "def f(x): time.sleep(1)\n"
    ),
    "replaces_itself": "import os\ndef f(x): os.execv('/proc/self/exe', ['python', '-c', 'pass'])\n",
    "takes_the_builtins_names": (
        "class Lie:\n    def __init__(self): self.asked = 0\n"
        "    def __eq__(self, other): return True\n"
        "def bool(value): return True\n"
        "def all(values): return True\n"
        "def len(values): return 2\n"
        "isinstance = any = all\n"
        "def f(x): return Lie()\n"
    ),
    "patches_exception": (
        "import sys\nsys.excepthook = lambda *a: __import__('os')._exit(0)\ndef f(x): return None\n"
    ),
}
"""Code that makes a runner believe which looks at the exit code of the code's own process."""

SABOTAGE = {
    "prints_a_report": (
        "import json, os\n"
        "for fd in range(32):\n"
        "    for index in range(-1, 3):\n"
        "        line = json.dumps({'test': index, 'outcome': 'pass', 'detail': '', 'literal': '2'})\n"
        "        try:\n            os.write(fd, (line + chr(10)).encode())\n"
        "        except OSError:\n            pass\n"
        "def f(x): return None\n"
    ),
    "patches_json": (
        "import json\n"
        'json.dumps = lambda *a, **k: \'{"literal": "2"}\'\n'
        "json.JSONEncoder.encode = json.JSONEncoder.iterencode = json.dumps\n"
        "def f(x): return None\n"
    ),
    "patches_unittest": (
        "import unittest\nunittest.TestCase.assertEqual = lambda *a: None\n"
        "unittest.TestResult.wasSuccessful = lambda self: True\ndef f(x): return None\n"
    ),
    "patches_the_runner": (
        "import sys\n"
        "def f(x):\n"
        "    frame = sys._getframe()\n"
        "    while frame:\n"
        "        for name, value in list(frame.f_globals.items()):\n"
        "            if callable(value) and name in ('shown', 'describe', 'trace'):\n"
        "                frame.f_globals[name] = lambda *a: 2\n"
        "        frame = frame.f_back\n"
        "    return None\n"
    ),
    "kills_the_judge": "import os\ndef f(x): os.kill(os.getppid(), 9)\n",
    "stops_the_judge": "import os, signal\nos.kill(os.getppid(), signal.SIGSTOP)\ndef f(x): return None\n",
    "answers_twice": "import os\ndef f(x):\n    os.fork()\n    return None\n",
    "closes_everything": "import os\ndef f(x):\n    os.closerange(0, 256)\n",
    "floods": "def f(x):\n    while True: print('x' * 10000)\n",
    "plants_a_module": (
        "import os\n"
        "for name in ('json', 'ast', 'select', 'worker', 'sitecustomize', 'copy', 'math'):\n"
        "    with open(name + '.py', 'w') as file:\n        file.write('raise SystemExit(0)')\n"
        "def f(x): os._exit(0)\n"
    ),
    "rewrites_the_runner": (
        "import os\n"
        "for name in ('judge.py', 'worker.py'):\n"
        "    try:\n        os.unlink(name)\n    except OSError:\n        pass\n"
        "    with open(name, 'w') as file:\n        file.write('print(2)')\n"
        "def f(x): os._exit(0)\n"
    ),
    "reads_the_tests": (
        "import os\n"
        "found = ''\n"
        "for name in os.listdir('.'):\n"
        "    found += open(name).read()\n"
        "def f(x): return 7919 if 'f(1) == 7919' in found else None\n"
    ),
    "recurses_in_repr": (
        "class Deep:\n    def __repr__(self): return repr(self)\n"
        "    def __eq__(self, other): return self == other\ndef f(x): return Deep()\n"
    ),
    "nests_without_end": "def f(x):\n    a = []\n    for _ in range(100000): a = [a]\n    return a\n",
    "contains_itself": "def f(x):\n    a = []\n    a.append(a)\n    return a\n",
}
"""Code that attacks this runner: it must not pass, and the runner must come back."""


@pytest.mark.parametrize("name", FORGERIES)
async def test_a_forged_success_is_none(sandbox: Sandbox, name: str) -> None:
    report = await judged(sandbox, FORGERIES[name], "assert f(1) == 2", "assert f(2) == 3")
    assert report.verdict in {"fail", "error", "signal", "timeout"}, report
    assert report.tests_passed == 0
    assert report.detail


@pytest.mark.parametrize("name", FORGERIES)
def test_the_same_forgery_deceives_a_runner_that_looks_at_the_exit_code(name: str, tmp_path: Path) -> None:
    program = tmp_path / "naive.py"
    program.write_text(FORGERIES[name] + "\nassert f(1) == 2\n")
    ended = subprocess.run([sys.executable, "-I", "-S", program], cwd=tmp_path, check=False, timeout=30)
    assert ended.returncode == 0


IMPORTED_BY_A_TEST = {"patches_unittest": SABOTAGE["patches_unittest"], "plants_a_module": (
    "for name in ('unittest', 'json'):\n"
    "    with open(name + '.py', 'w') as file:\n        file.write('raise SystemExit(0)')\n"
    "def f(x): return None\n"
)}  # fmt: skip
"""Code that makes a test file believe which imports it, and is run where it is."""
TEST_FILE = """
import sys
sys.path.insert(0, '.')
import unittest
from solution import f

class Test(unittest.TestCase):
    def test(self):
        self.assertEqual(f(1), 2)

unittest.main()
"""


@pytest.mark.parametrize("name", IMPORTED_BY_A_TEST)
async def test_a_patched_or_planted_module_passes_nothing(sandbox: Sandbox, name: str) -> None:
    report = await judged(sandbox, IMPORTED_BY_A_TEST[name], "assert f(1) == 2", "assert f(2) == 3")
    assert (report.verdict, report.tests_passed) == ("fail", 0), report


@pytest.mark.parametrize("name", IMPORTED_BY_A_TEST)
def test_the_same_module_deceives_a_test_file_that_imports_the_code(name: str, tmp_path: Path) -> None:
    (tmp_path / "solution.py").write_text(IMPORTED_BY_A_TEST[name])
    (tmp_path / "test_it.py").write_text(TEST_FILE)
    for _ in range(2):  # what is planted in the first run is imported in the second
        ended = subprocess.run([sys.executable, "test_it.py"], cwd=tmp_path, check=False, timeout=30)
    assert ended.returncode == 0


GIANT = "def boom(): raise ValueError('y' * 5_000_000)\ndef f(x): return boom() if x > 50 else f(x + 1)\n"


async def test_a_giant_traceback_is_cut_to_what_somebody_can_read(sandbox: Sandbox) -> None:
    report = await judged(sandbox, GIANT, "assert f(1) == 2")
    assert report.verdict == "fail"
    assert "ValueError" in report.detail
    assert len(report.detail.encode()) <= 2048


def test_the_same_traceback_is_giant_where_nothing_cuts_it() -> None:
    program = [sys.executable, "-I", "-S", "-c", GIANT + "f(1)"]
    bare = subprocess.run(program, capture_output=True, check=False, timeout=30)
    assert len(bare.stderr) > 5_000_000


@pytest.mark.parametrize("name", SABOTAGE)
async def test_sabotage_of_the_runner_passes_nothing(sandbox: Sandbox, name: str) -> None:
    wall_s = 4.0 if name == "stops_the_judge" else LIMITS.wall_s
    report = await judged(sandbox, SABOTAGE[name], "assert f(1) == 7919", "assert f(2) == 3", wall_s=wall_s)
    assert report.verdict != "pass", report
    assert report.tests_passed == 0, report
    assert report.detail


@pytest.mark.parametrize(
    "test",
    [
        "assert all(f(n) == n + 1 for n in range(3))",
        "assert len(f(1)) == 2",
        "assert sorted(f(1)) == [1, 2]",
        "assert isinstance(f(1), int)",
        "assert max((f(n) for n in (1, 2)), key=lambda n: n) == 3",
        "assert [len for len in f(1)] == [1, 2]",
    ],
)
async def test_code_cannot_put_its_own_in_a_builtins_place(sandbox: Sandbox, test: str) -> None:
    code = (
        "def all(values): return True\n"
        "isinstance = callable = lambda *a: True\n"
        "def len(values): return 2\n"
        "def sorted(values, key=None): return [1, 2]\n"
        "def max(values, key=None): return 3\n"
        "def f(x): return None\n"
    )
    report = await judged(sandbox, code, test)
    assert (report.verdict, report.tests_passed) == ("fail", 0), report


async def test_code_may_use_its_own_under_a_builtins_name(sandbox: Sandbox) -> None:
    code = "def max(values): return 7\ndef f(x): return max(x)\n"
    report = await judged(sandbox, code, "assert f([1]) == 7", "assert max([f([1]), 8]) == 8")
    assert report.verdict == "pass", report


async def test_a_giant_suite_of_long_tests_is_reported_whole(sandbox: Sandbox) -> None:
    tests = tuple(f"assert f({n}) == {n + 1} and '{'x' * 900}'" for n in range(40))
    # A test's time is its share of the whole.
    report = await judged(sandbox, ADD, *tests, wall_s=300.0)
    assert (report.verdict, report.tests_passed) == ("pass", 40), report


async def test_a_probe_is_the_same_for_equal_values_and_nothing_where_there_is_none(sandbox: Sandbox) -> None:
    code = "import time\ndef f(x):\n    return time.sleep(60) if x == 'slow' else eval(x)\n"
    said = ["2", "2.0", "True + 1", "{1, 2}", "{2, 1}", "(1,)", "[1]", "1 / 0", "slow", "object()", "3"]
    found = await run_probes(sandbox, code=code, expressions=tuple(f"f({x!r})" for x in said), limits=LIMITS)
    by = dict(zip(said, found, strict=True))
    assert by["2"] == by["2.0"] == by["True + 1"] != by["3"]
    assert by["{1, 2}"] == by["{2, 1}"] != ""
    assert by["(1,)"] != by["[1]"]
    assert [by[none] for none in ("1 / 0", "slow", "object()")] == ["", "", ""]


async def test_code_that_does_not_load_has_no_values(sandbox: Sandbox) -> None:
    assert await run_probes(sandbox, code="def f(:", expressions=("f(1)",), limits=LIMITS) == ("",)
