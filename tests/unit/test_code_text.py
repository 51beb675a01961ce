"""Code out of an LLM's text, repaired without a call."""

import ast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ai_agent_server.core.code_text import (
    MAX_TESTS,
    mechanical_repairs,
    missing_imports,
    undefined_names,
    usable_tests,
)

ADD = "def add(a, b):\n    return a + b\n"
FUTURE = '"""Doc."""\nfrom __future__ import annotations\n'
PIECES = ("```", "```python\n", "def f(x):\n", "    return x\n", "text\n", "\t", "assert f(1) == 2\n")


@pytest.mark.parametrize(
    ("text", "code", "repairs"),
    [
        (ADD, ADD, ()),
        ("", "", ()),
        (f"Sure!\n```python\n{ADD}```\nThis adds.", ADD, ("fences",)),
        (f"~~~py\n{ADD}~~~", ADD, ("fences",)),
        (f"```\n{ADD}```", ADD, ("fences",)),
        (f"```python\n{ADD}", ADD, ("unclosed_fence",)),
        (f"{ADD}```\nHope this helps", ADD, ("unclosed_fence",)),
        (f"```bash\npip install something-long-enough-to-win\n```\n```python\n{ADD}```", ADD, ("fences",)),
        (f"```python\nx = 1\n```\nbetter:\n```python\n{ADD}```", ADD, ("fences",)),
        (f"Here is the function:\n{ADD}\nIt adds two numbers.", ADD, ("prose",)),
        ("    def add(a, b):\n        return a + b\n", ADD, ("dedent",)),
        (">>> def add(a, b):\n...     return a + b\n>>> add(1, 2)\n3", ADD + "add(1, 2)\n", ("prompts",)),
        (ADD.replace("\n", "\r\n"), ADD, ()),
        (
            "def f(x):\n\tif x:\n        return 1\n\treturn 2\n",
            "def f(x):\n    if x:\n        return 1\n    return 2\n",
            ("tabs",),
        ),
        (
            "def f(x):\n    return math.sqrt(x)\n",
            "import math\ndef f(x):\n    return math.sqrt(x)\n",
            ("missing_import",),
        ),
        (
            f"{FUTURE}def f(x):\n    return sqrt(x)\n",
            f"{FUTURE}from math import sqrt\ndef f(x):\n    return sqrt(x)\n",
            ("missing_import",),
        ),
        ("def f(:\n", "def f(:\n", ()),
    ],
)
def test_text_becomes_code_by_named_repairs(text: str, code: str, repairs: tuple[str, ...]) -> None:
    assert mechanical_repairs(text) == (code, repairs)


def test_an_answer_that_was_cut_keeps_its_whole_functions() -> None:
    code, repairs = mechanical_repairs(ADD + "\ndef broken(a):\n    return a +")
    assert code.strip() == ADD.strip()
    assert len(repairs) == 1


def test_a_name_that_the_code_defines_itself_is_not_imported() -> None:
    assert missing_imports("class Counter: ...\ndef f(gcd): return gcd, Counter()\nfor re in []: pass") == ()
    assert missing_imports("def f():\n    global deque\n    deque = 1\ndef g(): return deque") == ()


def test_names_used_in_annotations_comprehensions_and_inner_functions_are_found() -> None:
    code = (
        "def f(x: Optional[int]):\n"
        "    def g():\n"
        "        return [heapq.heappop(x) for _ in range(2)]\n"
        "    return g() + list(itertools.chain(x))\n"
    )
    assert missing_imports(code) == ("from typing import Optional", "import heapq", "import itertools")
    assert undefined_names("x + y; y = 1") == {"x"}


@given(st.text(max_size=300))
def test_any_text_at_all_comes_back_as_text(text: str) -> None:
    code, _ = mechanical_repairs(text)
    assert isinstance(code, str)
    assert len(usable_tests(text, None)) <= MAX_TESTS


@given(st.lists(st.sampled_from(PIECES)))
def test_mixed_up_answers_are_repaired_once_and_for_all(parts: list[str]) -> None:
    code, _ = mechanical_repairs("".join(parts))
    again, _ = mechanical_repairs(code)
    if "```" not in code:
        assert again == code


def test_usable_tests_are_taken_out_of_prose_and_fences() -> None:
    text = (
        "1. `assert add(1, 2) == 3`\n"
        "- assert add(0, 0)==0  # zero\n"
        "Then assert that it works.\n"
        "assert add([1,\n    2], []) == [1, 2]\n"
    )
    assert usable_tests(text, "add") == (
        "assert add(1, 2) == 3",
        "assert add(0, 0) == 0",
        "assert add([1, 2], []) == [1, 2]",
    )


def test_usable_tests_are_found_in_test_functions_without_local_names() -> None:
    text = (
        "```python\n"
        "def test_one():\n    'Doc.'\n    assert add(1, 1) == 2\n\n"
        "def test_two():\n    x = 3\n    assert add(x, 1) == 4\n"
        "```"
    )
    assert usable_tests(text, "add") == ("assert add(1, 1) == 2",)


@pytest.mark.parametrize(
    "useless",
    [
        "assert True",
        "assert 1 + 1 == 2",
        "assert other(1) == 2",
        "assert (add(1, 2) == 3, 'message')",
        "assert add(1, 2) == add(1, 2)",
        "assert add(1, 2 ==",
        "add(1, 2) == 3",
        "assert add",
    ],
)
def test_a_statement_that_tests_nothing_is_dropped(useless: str) -> None:
    assert usable_tests(useless, "add") == ()


def test_tests_stand_once_and_are_bounded() -> None:
    text = "".join(f"assert add({n // 2}, 0) == {n // 2}\n" for n in range(100))
    kept = usable_tests(text, "add")
    assert len(kept) == len(set(kept)) == MAX_TESTS
    assert all(isinstance(ast.parse(test).body[0], ast.Assert) for test in kept)


def test_without_an_entry_point_anything_called_will_do() -> None:
    assert usable_tests("assert Stack().pop() is None\nassert len([]) == 0", None) == (
        "assert Stack().pop() is None",
    )
