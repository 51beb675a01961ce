"""The judge inside the sandbox: starts the worker, takes each test apart, and decides.

It runs as `python judge.py` and reads the code and the tests from stdin, so that neither is a file
the worker could read. Of each test it evaluates as much as it can itself: calls of the code under
test are values that the worker claims, everything around them (comparisons, arithmetic, builtins)
happens here, where that code has never been.

A builtin's name means Python's builtin, whatever the code binds to it, here and in what the worker is
asked. The one exception is what the suite itself is about (`own`: a function called `sum`, say), and
the code has no say in that.
"""
# ruff: noqa: S307 - the tests are evaluated here, over plain values

import ast
import builtins
import copy
import hashlib
import json
import math
import os
import select
import signal
import sys
import time
from collections.abc import Collection, Mapping

MAX_ANSWER = 400_000
MAX_DETAIL = 2_000
SAFE = {
    name: getattr(builtins, name)
    for name in (
        "abs", "all", "any", "bool", "bytes", "chr", "complex", "dict", "divmod", "enumerate", "float",
        "frozenset", "int", "isinstance", "len", "list", "max", "min", "ord", "pow", "range", "repr",
        "reversed", "round", "set", "sorted", "str", "sum", "tuple", "type", "zip",
    )
}  # fmt: skip
NO_VALUES = (ast.Lambda, ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom, ast.comprehension)
TRUTH = "not not (X)"
"""What `bool(X)` is, without a name that the code could bind to something else."""
CHAMELEON = "not not (L == ...) and not not (L == 'f7c1') and not not (L == 90417)"


class Failed(Exception):
    """The test did not hold; `outcome` says how."""

    def __init__(self, outcome: str, detail: str) -> None:
        super().__init__(detail)
        self.outcome, self.detail = outcome, detail


class Held:
    """A value that lives in the worker, because it has no literal form."""

    def __init__(self, name: str, kind: str, shown: str) -> None:
        self.name, self.kind, self.shown = name, kind, shown


class Worker:
    """The child that runs the code under test; started again when it died or hung."""

    def __init__(self, code: str, imports: list[str], timeout_s: float, own: frozenset[str]) -> None:
        self.code, self.imports, self.timeout_s, self.own = code, imports, timeout_s, own
        # Under these names the worker has Python's own: drawn anew, so that no code can bind them before.
        prefix = f"_{os.urandom(6).hex()}_"
        self.pythons = {name: prefix + name for name in SAFE.keys() - own}
        self.pid = 0
        self.to = self.answers = -1
        self.buffer = b""

    def start(self) -> None:
        """A new process with the code loaded. Raises `Failed`."""
        request_r, self.to = os.pipe()
        self.answers, answer_w = os.pipe()
        actions = [
            (os.POSIX_SPAWN_DUP2, request_r, 0),
            (os.POSIX_SPAWN_DUP2, answer_w, 1),
        ]
        flags = ["-I", "-S", "-B", "-X", "utf8"]
        argv = [sys.executable, *flags, "worker.py"]
        self.pid = os.posix_spawn(sys.executable, argv, os.environ, file_actions=actions)
        os.close(request_r)
        os.close(answer_w)
        self.buffer = b""
        answer = self.ask(
            {"code": self.code, "imports": self.imports, "own": list(self.own), "pythons": self.pythons}
        )
        if "error" in answer:
            kind = "syntax" if answer.get("syntax") else "import"
            raise Failed(kind, raised(answer))

    def ask(self, request: dict) -> dict:  # type: ignore[type-arg] # JSON, as the worker says it
        """One exchange. Raises `Failed` when the worker hangs, dies, or answers with no token."""
        token = os.urandom(8).hex()
        line = json.dumps({**request, "token": token}).encode() + b"\n"
        deadline = time.monotonic() + self.timeout_s
        try:
            while line:
                line = line[os.write(self.to, line) :]
        except BrokenPipeError:
            self.died()
        while b"\n" not in self.buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.answers], [], [], left)[0]:
                self.stop()
                raise Failed("timeout", f"no answer within {self.timeout_s:g} s")
            chunk = os.read(self.answers, 65536)
            if not chunk or len(self.buffer) > MAX_ANSWER:
                self.died()
            self.buffer += chunk
        text, _, self.buffer = self.buffer.partition(b"\n")
        try:
            answer: dict = json.loads(text)  # type: ignore[type-arg] # JSON
            genuine = answer.pop("token") == token
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            genuine = False
        if not genuine:
            self.stop()
            raise Failed("forged", "the code wrote into the channel of the test runner")
        return answer

    def died(self) -> None:
        """Raise what became of it."""
        status = self.stop()
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) != signal.SIGKILL:
            raise Failed("signal", f"the process ended by {signal.Signals(os.WTERMSIG(status)).name}")
        if os.WIFEXITED(status):
            raise Failed("exited", f"the code ended the process (exit code {os.WEXITSTATUS(status)})")
        raise Failed("signal", "the process was killed")

    def stop(self) -> int:
        """Kill and reap; answers its status."""
        if not self.pid:
            return 0
        # it may be gone by itself: then the status says how
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        ends = time.monotonic() + 0.2
        while not pid and time.monotonic() < ends and self.closed():
            time.sleep(0.002)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
        if not pid:
            os.kill(self.pid, signal.SIGKILL)
            _, status = os.waitpid(self.pid, 0)
        os.close(self.to)
        os.close(self.answers)
        self.pid = 0
        return status

    def closed(self) -> bool:
        """Whether it closed its end, as a process does that is about to be gone."""
        ready, _, _ = select.select([self.answers], [], [], 0)
        return bool(ready) and not os.read(self.answers, 1)


class Judge:
    """Decides one test at a time."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.safe = {name: value for name, value in SAFE.items() if name not in worker.own}

    def decide(self, source: str) -> None:
        """Return when the test holds; `Failed` when it does not."""
        (statement,) = ast.parse(source).body
        assert isinstance(statement, ast.Assert)
        test = statement.test
        value = self.compare(test, explain=True) if isinstance(test, ast.Compare) else self.value(test)
        if isinstance(value, Held):
            value = self.in_worker(TRUTH, {"X": value})
        if isinstance(value, Held) or not value:
            raise Failed("fail", f"actual: {show(value)}\nexpected: a true value")

    def value(self, node: ast.expr) -> object:
        """The value of an expression: here if its parts are plain, else in the worker."""
        if is_plain(node, self.safe):
            return self.here(node, {})
        if isinstance(node, ast.Compare):
            return self.compare(node, explain=False)
        if isinstance(node, ast.BoolOp):
            value: object = None
            for part in node.values:
                value = self.value(part)
                truth = self.in_worker(TRUTH, {"X": value}) if isinstance(value, Held) else bool(value)
                if truth is not isinstance(node.op, ast.And):
                    return value
            return value
        if isinstance(node, ast.Call) and is_safe_call(node, self.safe):
            return self.combine(node, [*node.args, *(keyword.value for keyword in node.keywords)])
        if isinstance(node, ast.UnaryOp):
            return self.combine(node, [node.operand])
        if isinstance(node, ast.BinOp):
            return self.combine(node, [node.left, node.right])
        if isinstance(node, ast.Subscript):
            return self.combine(node, [node.value, node.slice])
        if isinstance(node, (ast.List, ast.Tuple, ast.Set)) and not any(
            isinstance(item, ast.Starred) for item in node.elts
        ):
            return self.combine(node, node.elts)
        return self.ask(ast.unparse(node))

    def combine(self, node: ast.expr, parts: list[ast.expr]) -> object:
        """Evaluate `parts`, then `node` over their values."""
        names = {}
        for index, part in enumerate(parts):
            if is_plain(part, self.safe):
                continue
            names[id(part)] = (f"_part_{index}", self.value(part))
        replaced = Replace({key: name for key, (name, _) in names.items()}).visit_copy(node)
        values = dict(names.values())
        if any(isinstance(value, Held) for value in values.values()):
            return self.in_worker(ast.unparse(replaced), values)
        return self.here(replaced, values)

    def compare(self, node: ast.Compare, *, explain: bool) -> object:
        """A chain of comparisons."""
        left = self.value(node.left)
        for operator, right_node in zip(node.ops, node.comparators, strict=True):
            right = self.value(right_node)
            symbol = OPERATORS[type(operator)]
            held = isinstance(left, Held) or isinstance(right, Held)
            if held:
                self.refuse_chameleon(left, right, symbol)
                truth = self.in_worker(f"not not (L {symbol} R)", {"L": left, "R": right})
            else:
                truth = self.here(
                    ast.parse(f"not not (L {symbol} R)", mode="eval").body, {"L": left, "R": right}
                )
            if truth is not True:
                if explain:
                    raise Failed("fail", difference(left, symbol, right))
                return False
            left = right
        return True

    def refuse_chameleon(self, left: object, right: object, symbol: str) -> None:
        """An object that equals everything passes no test."""
        if symbol not in {"==", "!="}:
            return
        for side in (left, right):
            if isinstance(side, Held) and self.in_worker(CHAMELEON, {"L": side}) is True:
                raise Failed("fail", f"actual: {side.shown}, a {side.kind} that claims to equal everything")

    def here(self, node: ast.expr, values: dict[str, object]) -> object:
        """Evaluate in this process, over plain values and safe builtins only."""
        compiled = compile(ast.fix_missing_locations(ast.Expression(node)), "test", "eval")
        try:
            return eval(compiled, {"__builtins__": {}, "math": math, **self.safe, **values})
        except RecursionError as problem:
            raise Failed("fail", "the values are nested too deep") from problem
        except Exception as problem:
            raise Failed("fail", f"raised {type(problem).__name__}: {problem}"[:MAX_DETAIL]) from problem

    def in_worker(self, source: str, values: dict[str, object]) -> object:
        """Evaluate in the worker; plain values go there as literals."""
        tree = ast.parse(source, mode="eval").body
        texts = {name: v.name if isinstance(v, Held) else as_source(v) for name, v in values.items()}
        return self.ask(ast.unparse(Names(texts).visit(tree)))

    def ask(self, expression: str) -> object:
        """What the worker says the expression is."""
        if not self.worker.pid:
            self.worker.start()
        tree = ast.parse(expression, mode="eval").body
        answer = self.worker.ask({"expression": ast.unparse(renamed(tree, self.worker.pythons))})
        if "error" in answer:
            raise Failed("memory" if answer["error"] == "MemoryError" else "raised", raised(answer))
        if "held" in answer:
            return Held(str(answer["held"]), str(answer["type"]), str(answer["shown"]))
        try:
            return plain_value(str(answer["literal"]))
        except (ValueError, SyntaxError, MemoryError, RecursionError) as problem:
            raise Failed("forged", "the value is not a literal") from problem


OPERATORS = {
    ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Is: "is",
    ast.IsNot: "is not", ast.In: "in", ast.NotIn: "not in",
}  # fmt: skip


class Replace(ast.NodeTransformer):
    """Puts names where sub-expressions were."""

    def __init__(self, names: dict[int, str]) -> None:
        self.names = names

    def visit_copy(self, node: ast.expr) -> ast.expr:
        """A copy of `node` with its direct parts replaced; `node` stays as it is."""
        copied = copy.copy(node)
        for field, value in ast.iter_fields(node):
            setattr(copied, field, self.replaced(value))
        return copied

    def replaced(self, value: object) -> object:
        """A field's value with the names put in."""
        if isinstance(value, list):
            return [self.replaced(item) for item in value]
        if isinstance(value, ast.keyword):
            copied = copy.copy(value)
            copied.value = self.named(value.value)
            return copied
        return self.named(value) if isinstance(value, ast.expr) else value

    def named(self, part: ast.expr) -> ast.expr:
        """The name that stands for `part`, or `part` itself."""
        return ast.Name(self.names[id(part)], ast.Load()) if id(part) in self.names else part


class Names(ast.NodeTransformer):
    """Puts source text where names were."""

    def __init__(self, texts: dict[str, str]) -> None:
        self.texts = texts

    def visit_Name(self, node: ast.Name) -> ast.expr:
        """The text's expression, if the name has one."""
        if node.id in self.texts:
            return ast.parse(self.texts[node.id], mode="eval").body
        return node


def renamed(node: ast.expr, names: Mapping[str, str]) -> ast.expr:
    """`node` with other names for what it reads and does not bind itself."""
    bound = {part.arg for part in ast.walk(node) if isinstance(part, ast.arg)}
    bound |= {p.id for p in ast.walk(node) if isinstance(p, ast.Name) and not isinstance(p.ctx, ast.Load)}
    changed: ast.expr = Names({name: text for name, text in names.items() if name not in bound}).visit(node)
    return changed


def is_plain(node: ast.expr, safe: Collection[str] = SAFE) -> bool:
    """Whether nothing in it comes from the code under test: literals and `safe` builtins over them."""
    for part in ast.walk(node):
        if isinstance(part, ast.Name) and part.id not in safe and part.id != "math":
            return False
        if isinstance(part, ast.Attribute) and not (
            isinstance(part.value, ast.Name) and part.value.id == "math"
        ):
            return False
        if isinstance(part, NO_VALUES):
            return False
    return True


def is_safe_call(node: ast.Call, safe: Collection[str]) -> bool:
    """A call of a `safe` builtin, or of something in `math`, with ordinary arguments."""
    ordinary = not any(isinstance(argument, ast.Starred) for argument in node.args) and all(
        keyword.arg and is_plain(keyword.value, safe) for keyword in node.keywords
    )
    # isinstance(x, C) and the like name classes, which have no literal form
    return (
        ordinary
        and is_plain(node.func, safe)
        and not (isinstance(node.func, ast.Name) and node.func.id in {"isinstance", "type", "repr", "str"})
    )


def as_source(value: object) -> str:
    """A plain value as source text."""
    return repr(value).replace("inf", "1e999") if isinstance(value, (float, complex)) else repr(value)


def plain_value(text: str) -> object:
    """What a literal says, and nothing but a literal."""
    return set() if text == "set()" else ast.literal_eval(text)


def show(value: object) -> str:
    """A value for a person, cut."""
    text = value.shown if isinstance(value, Held) else repr(value)
    return text if len(text) <= 600 else f"{text[:400]} ... {text[-150:]}"


def difference(left: object, symbol: str, right: object) -> str:
    """Actual against expected."""
    expected = show(right) if symbol == "==" else f"something that is {symbol} {show(right)}"
    note = ""
    if type(left) is not type(right) and not isinstance(left, Held) and not isinstance(right, Held):
        note = f"\ntypes: {type(left).__name__} and {type(right).__name__}"
    return f"actual: {show(left)}\nexpected: {expected}{note}"


def raised(answer: dict) -> str:  # type: ignore[type-arg] # JSON, as the worker says it
    """An exception in the code under test."""
    text = f"raised {answer['error']}: {answer['message']}"
    return f"{text}\n{answer['trace']}" if answer.get("trace") else text


def digest(value: object) -> str:
    """16 characters, the same for equal values."""
    return hashlib.sha256(canonical(value).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def canonical(value: object) -> str:
    """One spelling for values that are equal: 2 and 2.0, True and 1, a set in any order."""
    if isinstance(value, (bool, int)):
        return str(int(value))
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else format(value, ".9g")
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__}({','.join(map(canonical, value))})"
    if isinstance(value, (set, frozenset)):
        return f"set({','.join(sorted(map(canonical, value)))})"
    if isinstance(value, dict):
        return f"dict({','.join(sorted(f'{canonical(k)}:{canonical(v)}' for k, v in value.items()))})"
    return repr(value)


def main() -> None:
    """Read the suite, print one JSON line a test as it is decided, then one for each probe."""
    suite = json.loads(sys.stdin.read())
    worker = Worker(suite["code"], suite["imports"], suite["test_timeout_s"], frozenset(suite["own"]))
    judge = Judge(worker)

    def tell(index: int, outcome: str, detail: str) -> None:
        print(json.dumps({"test": index, "outcome": outcome, "detail": detail[:MAX_DETAIL]}), flush=True)  # noqa: T201 - the report

    # a write to a worker that is gone must be an answer, not the judge's end
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    try:
        worker.start()
    except Failed as failed:
        tell(-1, failed.outcome, failed.detail)
        return
    tell(-1, "loaded", "")
    told = False
    for index, source in enumerate(suite["tests"]):
        try:
            judge.decide(source)
        except Failed as failed:
            # only the first failure's detail is reported: the rest of the output stays small
            tell(index, failed.outcome, "" if told else failed.detail)
            told = True
        else:
            tell(index, "pass", "")
    for index, expression in enumerate(suite["probes"], len(suite["tests"])):
        try:
            value = judge.ask(expression)
        except Failed as failed:
            tell(index, failed.outcome, "")
        else:
            tell(index, "value", "" if isinstance(value, Held) else digest(value))
    worker.stop()


if __name__ == "__main__":
    main()
