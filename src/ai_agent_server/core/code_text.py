"""Code in an LLM's text: taken out, repaired mechanically, its usable tests kept. Pure."""

import ast
import builtins
import re
import symtable
import textwrap
import warnings
from collections.abc import Iterator

__all__ = ("MAX_TESTS", "assertions", "code_repairs", "mechanical_repairs", "usable_tests")

MAX_TESTS = 8
_MAX_TEXT = 200_000
_MAX_TEST = 2_000
_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([\w+.#-]*)[^\n`]*$", re.MULTILINE)
_PYTHON = {"python", "py", "python3", "py3", "pycon", "python2"}
_CODE_START = re.compile(
    r"^[ \t]*(def |class |import |from \w[\w.]* import |async def |@\w|[A-Za-z_]\w*\s*=[^=])"
)
_TYPING = (
    "Any", "Callable", "ClassVar", "DefaultDict", "Deque", "Dict", "FrozenSet", "Generator", "Generic",
    "Iterable", "Iterator", "List", "Literal", "Mapping", "NamedTuple", "Optional", "Protocol", "Sequence",
    "Set", "Tuple", "Type", "TypeVar", "Union",
)  # fmt: skip
_MODULES = (
    "abc", "bisect", "calendar", "cmath", "collections", "copy", "dataclasses", "datetime", "decimal",
    "enum", "fractions", "functools", "hashlib", "heapq", "io", "itertools", "json", "math", "operator",
    "os", "random", "re", "statistics", "string", "struct", "sys", "textwrap", "time", "typing",
    "unicodedata", "uuid",
)  # fmt: skip
_NAMES = {
    "collections": ("Counter", "OrderedDict", "defaultdict", "deque", "namedtuple"),
    "functools": ("cache", "cmp_to_key", "lru_cache", "partial", "reduce", "wraps"),
    "itertools": (
        "accumulate", "chain", "combinations", "combinations_with_replacement", "count", "cycle", "groupby",
        "islice", "pairwise", "permutations", "product", "repeat", "starmap", "takewhile", "zip_longest",
    ),
    "heapq": ("heapify", "heappop", "heappush", "heappushpop", "heapreplace", "nlargest", "nsmallest"),
    "bisect": ("bisect_left", "bisect_right", "insort"),
    "math": (
        "ceil", "comb", "factorial", "floor", "gcd", "inf", "isclose", "isqrt", "lcm", "log2", "pi",
        "sqrt",
    ),
    "copy": ("deepcopy",),
    "dataclasses": ("dataclass", "field"),
    "datetime": ("date", "timedelta", "timezone"),
    "decimal": ("Decimal",),
    "enum": ("Enum", "IntEnum", "auto"),
    "fractions": ("Fraction",),
    "operator": ("itemgetter", "attrgetter"),
    "string": ("ascii_letters", "ascii_lowercase", "ascii_uppercase", "punctuation"),
    "abc": ("ABC", "abstractmethod"),
    "typing": _TYPING,
}  # fmt: skip
_MEMBER_IMPORTS = {name: f"from {module} import {name}" for module, names in _NAMES.items() for name in names}
_MODULE_IMPORTS = {name: f"import {name}" for name in _MODULES}
IMPORTS = _MODULE_IMPORTS | _MEMBER_IMPORTS
"""An undefined name -> the import that the writer meant."""
PYTHONS_NAMES = frozenset(dir(builtins)) | _MEMBER_IMPORTS.keys()
"""What a name means that nobody defines."""


def mechanical_repairs(text: str) -> tuple[str, tuple[str, ...]]:
    """The Python code in an LLM's text, and the names of the repairs that it took.

    Names: `fences`, `unclosed_fence`, `prose`, `prompts`, `tabs`, `dedent`, `truncated_end`,
    `missing_import`. What cannot be repaired comes back as it is.
    """
    repairs: list[str] = []
    source = text[:_MAX_TEXT].replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")
    blocks, closed = _fenced(source)
    if blocks:
        source = _best_block(blocks)
        repairs.append("fences" if closed else "unclosed_fence")
    code, more = code_repairs(source)
    return code, (*repairs, *more)


def code_repairs(source: str) -> tuple[str, tuple[str, ...]]:
    """Repairs of code that stands without fences; each is kept only where it helps the code to parse."""
    repairs: list[str] = []
    code = source.strip("\n").rstrip()
    for name, repair in (
        ("prompts", _without_prompts),
        ("dedent", _dedented),
        ("tabs", _without_tabs),
        ("prose", _without_prose),
        ("truncated_end", _without_broken_end),
    ):
        if parses(code):
            break
        changed = repair(code)
        if changed != code and (name in {"dedent", "tabs", "prompts"} or parses(changed)):
            code = changed
            repairs.append(name)
    missing = missing_imports(code)
    if missing:
        code = _with_imports(code, missing)
        repairs.append("missing_import")
    return code + "\n" if code else code, tuple(repairs)


def usable_tests(text: str, entry_point: str | None) -> tuple[str, ...]:
    """The single-line `assert` statements in an LLM's text that can be run, at most `MAX_TESTS`.

    Each one parses, calls something (the entry point, if there is one), says more than a constant,
    and stands once. Order is kept. Statements are written out again in one form, so that equal tests
    are equal text.
    """
    source = text[:_MAX_TEXT].replace("\r\n", "\n").replace("\0", "")
    kept: dict[str, None] = {}
    for statement in _assertions(source):
        plain = ast.unparse(statement)
        if len(plain) <= _MAX_TEST and _says_something(statement, entry_point):
            kept.setdefault(plain)
        if len(kept) == MAX_TESTS:
            break
    return tuple(kept)


def assertions(example: str) -> tuple[str, ...]:
    """The assert statements that `example` is; `f(1) == 2` is read as one. () where it is more or less.

    Imports beside them are left out: the runner brings what tests need of the standard library.
    """
    text = example.strip()
    tree = _parsed(text)
    match tree.body if tree else []:
        case [ast.Assert()]:
            return (text,)
        case [ast.Expr(value=ast.Compare())]:
            return (f"assert {text}",)
        case body if all(
            isinstance(statement, ast.Assert | ast.Import | ast.ImportFrom) for statement in body
        ):
            return tuple(ast.unparse(statement) for statement in body if isinstance(statement, ast.Assert))
        case _:
            return ()


def parses(code: str) -> bool:
    """Whether `code` is Python."""
    return _parsed(code) is not None


def missing_imports(code: str) -> tuple[str, ...]:
    """The imports of well-known standard names that `code` uses and defines nowhere."""
    if _parsed(code) is None:
        return ()
    wanted = {IMPORTS[name] for name in undefined_names(code) if name in IMPORTS}
    return tuple(sorted(wanted))


def builtin_under_test(tests: tuple[str, ...], entry_point: str = "") -> str | None:
    """The name of Python's that `tests` are about: `sum` in `assert sum(4, 6) == 3`.

    It is the `entry_point`, or else the one name that every test calls where no test reads any that is
    not Python's. The tests alone decide: code could otherwise take the place of what it is judged by.
    """
    root = entry_point.partition(".")[0]
    if root in PYTHONS_NAMES:
        return root
    if any(undefined_names(test) - IMPORTS.keys() for test in tests):
        return None
    called = [_called(test) & PYTHONS_NAMES for test in tests]
    shared = frozenset.intersection(*called) if called else frozenset()
    return next(iter(shared)) if len(shared) == 1 else None


def _called(code: str) -> frozenset[str]:
    tree = _parsed(code)
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call)) if tree else ()
    return frozenset(function.id for function in calls if isinstance(function, ast.Name))


def undefined_names(code: str, *, own: str = "") -> frozenset[str]:
    """Global names that `code` reads and neither binds nor finds among the builtins other than `own`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            top = symtable.symtable(code, "<code>", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return frozenset()
    bound = {
        symbol.get_name() for symbol in top.get_symbols() if symbol.is_assigned() or symbol.is_imported()
    }
    bound |= {child.get_name() for child in top.get_children()}
    read: set[str] = set()
    waiting = [top]
    while waiting:
        table = waiting.pop()
        waiting += table.get_children()
        for symbol in table.get_symbols():
            name = symbol.get_name()
            if symbol.is_declared_global() and symbol.is_assigned():
                bound.add(name)
            if symbol.is_referenced() and (table is top or symbol.is_global()):
                read.add(name)
    known = {*dir(builtins), "__file__", "__name__"} - {own}
    return frozenset(read - bound - known)


def _parsed(code: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an LLM's invalid escapes are not our warnings
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _fenced(text: str) -> tuple[list[tuple[str, str]], bool]:
    """(language, content) of each fenced block, and whether the last one was closed."""
    blocks: list[tuple[str, str]] = []
    opened: tuple[str, str, int] | None = None
    for fence in _FENCE.finditer(text):
        mark, language = fence.group(1), fence.group(2).lower()
        if opened is None:
            opened = (mark, language, fence.end() + 1)
        elif mark[0] == opened[0][0] and len(mark) >= len(opened[0]) and not language:
            blocks.append((opened[1], text[opened[2] : fence.start()]))
            opened = None
        elif language in _PYTHON:
            # a new block begins though the last was never closed
            blocks.append((opened[1], text[opened[2] : fence.start()]))
            opened = (mark, language, fence.end() + 1)
    if opened is None:
        return blocks, True
    # the last fence opened a block that was never closed, or it closes one that the prompt opened
    candidates = [(opened[1], text[opened[2] :])]
    if not blocks and not opened[1]:
        candidates.append(("", text[: opened[2]].rstrip().removesuffix(opened[0])))
    return [*blocks, *(block for block in candidates if block[1].strip())], False


def _best_block(blocks: list[tuple[str, str]]) -> str:
    """The longest Python block; one that parses before one that does not."""

    def rank(block: tuple[str, str]) -> tuple[bool, bool, int]:
        language, content = block
        named = language in _PYTHON
        return (named or not language, parses(textwrap.dedent(content)), len(content))

    return max(blocks, key=rank)[1]


def _without_prompts(code: str) -> str:
    """The input lines of an interactive session."""
    lines = code.splitlines()
    if not any(line.lstrip().startswith(">>> ") for line in lines):
        return code
    return "\n".join(line.lstrip()[4:] for line in lines if line.lstrip().startswith((">>> ", "... ")))


def _dedented(code: str) -> str:
    return textwrap.dedent(code)


def _without_tabs(code: str) -> str:
    return textwrap.dedent(code.expandtabs(4)) if "\t" in code else code


def _without_prose(code: str) -> str:
    """The longest run of lines that begins like code and parses."""
    lines = code.splitlines()
    starts = [i for i, line in enumerate(lines) if _CODE_START.match(line)][:40]
    best = ""
    for start in starts:
        for end in _ends(lines, start):
            candidate = textwrap.dedent("\n".join(lines[start:end])).rstrip()
            if len(candidate) <= len(best):
                break
            if parses(candidate):
                best = candidate
                break
    return best or code


def _ends(lines: list[str], start: int) -> Iterator[int]:
    """Where the run from `start` may end: whole, then before each line at the margin, last first."""
    yield len(lines)
    margins = [i for i in range(len(lines) - 1, start, -1) if lines[i] and not lines[i][0].isspace()]
    yield from margins[:60]


def _without_broken_end(code: str) -> str:
    """The code without its last statements, where an LLM was cut in the middle of one."""
    lines = code.splitlines()
    for end in _ends(lines, 0):
        candidate = "\n".join(lines[:end]).rstrip()
        if candidate and parses(candidate) and re.search(r"^(async )?(def|class) ", candidate, re.MULTILINE):
            return candidate
    return code


def _with_imports(code: str, imports: tuple[str, ...]) -> str:
    """Imports go below the docstring and the `__future__` imports."""
    tree = _parsed(code)
    line = 0
    for statement in tree.body if tree else ():
        is_docstring = (
            isinstance(statement, ast.Expr)
            and isinstance(statement.value, ast.Constant)
            and isinstance(statement.value.value, str)
            and line == 0
        )
        is_future = isinstance(statement, ast.ImportFrom) and statement.module == "__future__"
        if not (is_docstring or is_future):
            break
        line = statement.end_lineno or 0
    lines = code.splitlines()
    return "\n".join([*lines[:line], *imports, *lines[line:]])


def _assertions(source: str) -> Iterator[ast.Assert]:
    """Every `assert` in the text: from code that parses, else line by line out of prose."""
    blocks, _ = _fenced(source)
    for part in [content for _, content in blocks] or [source]:
        tree = _parsed(textwrap.dedent(part))
        if tree is not None:
            yield from (node for node in _in_order(tree) if isinstance(node, ast.Assert))
        else:
            yield from _line_by_line(part)


def _in_order(tree: ast.Module) -> Iterator[ast.stmt]:
    """The module's own statements and those of its test functions that have no local names."""
    for statement in tree.body:
        yield statement
        if isinstance(statement, ast.FunctionDef) and all(
            isinstance(inner, ast.Assert) or _is_text(inner) for inner in statement.body
        ):
            yield from statement.body


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _line_by_line(text: str) -> Iterator[ast.Assert]:
    lines = text.splitlines()
    for index, line in enumerate(lines):
        begin = line.find("assert ")
        if begin < 0 or line[:begin].strip(" \t>*-0123456789.`"):
            continue
        # a statement may go on over some lines, until its brackets close
        for count in range(1, 7):
            joined = "\n".join([line[begin:], *lines[index + 1 : index + count]])
            tree = _parsed(joined.strip().rstrip("`"))
            if tree is not None and len(tree.body) == 1 and isinstance(tree.body[0], ast.Assert):
                yield tree.body[0]
                break


def _says_something(statement: ast.Assert, entry_point: str | None) -> bool:
    called = set()
    for node in ast.walk(statement.test):
        if isinstance(node, ast.Call):
            function = node.func
            called.add(function.id if isinstance(function, ast.Name) else "")
            called.add(function.attr if isinstance(function, ast.Attribute) else "")
    called.discard("")
    if isinstance(statement.test, ast.Tuple):  # assert (x, "message") is always true
        return False
    if isinstance(statement.test, ast.Compare):
        sides = [statement.test.left, *statement.test.comparators]
        if len({ast.dump(side) for side in sides}) == 1:
            return False
    return entry_point in called if entry_point else bool(called - {"isinstance", "len", "callable", "type"})
